"""Speculation under pipeline parallelism, with which vLLM's V1 runner has three faults, whatever the method.

Seen in 0.32 and read in 0.30. vLLM imports a worker extension in every worker; this one mends what is wrong there:

- `GPUModelRunner` reads `self.drafter` on every rank once it lays out or uses KV, but only the last one has it. It must
  not be there before, for then `load_model` is called on it.
- Early ranks are told a round's bonus token but not its accepted drafts, so a request that was preempted, or left out
  for a step, would be computed from wrong tokens when it returns. The scheduler sends all tokens of such a request.

The third is the scheduler's: see `run_one_batch_at_a_time`.
"""

from __future__ import annotations

import functools

from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class WorkerExtension:
    """Mixed into vLLM's worker class; importing it is what counts."""


def _name_missing_proposer(initialize_kv_cache):
    @functools.wraps(initialize_kv_cache)
    def wrapped(self, *args, **kwargs):
        if not hasattr(self, "drafter"):
            self.drafter = None
        return initialize_kv_cache(self, *args, **kwargs)

    return wrapped


def _learn_accepted_drafts(update_states):
    @functools.wraps(update_states)
    def wrapped(self, scheduler_output):
        if self.drafter is None:
            for request_id, token_ids in scheduler_output.scheduled_cached_reqs.all_token_ids.items():
                state = self.requests[request_id]
                state.output_token_ids = token_ids[state.num_prompt_tokens :]
        return update_states(self, scheduler_output)

    return wrapped


GPUModelRunner.initialize_kv_cache = _name_missing_proposer(GPUModelRunner.initialize_kv_cache)
GPUModelRunner._update_states = _learn_accepted_drafts(GPUModelRunner._update_states)
