"""A scheduler that adapts the number of drafts per round on the V2 model runner.

vLLM's scheduler looks that number up by batch size in a table, for whose entries it has captured CUDA graphs. With
asynchronous scheduling it is a step ahead of the results, so a choice takes effect two rounds later.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any, cast

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_ssd.compat.target.runner import DRAFTER_STATE, DrafterState
from vllm_ssd.policy import Adaptation


class Choices:
    """Stands in for vLLM's table: asks an `Adaptation`, and returns 0 while no drafter is available."""

    def __init__(self, adaptation: Adaptation) -> None:
        self._adaptation = adaptation
        self._away = False

    def __getitem__(self, batch_size: int) -> int:
        return 0 if self._away else self._adaptation.choose(batch_size)

    def note(self, state: DrafterState) -> None:
        """Note the state of the drafter in the latest round."""
        self._away = state == DrafterState.AWAY


class Adaptive(Scheduler):
    """A scheduler that chooses the number of drafts with the highest throughput."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.dynamic_sd_lookup is not None  # `adaptive` gives vLLM a schedule
        self._adaptation = Adaptation(self.num_spec_tokens, self.dynamic_sd_lookup[1:])
        self._choices = Choices(self._adaptation)
        self.dynamic_sd_lookup = cast(list[int], self._choices)  # vLLM only ever indexes it
        # Time of the latest result, and its requests, of each batch in flight.
        self._decided: deque[tuple[float, set[str]]] = deque(maxlen=self.parallel_config.pipeline_parallel_size)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Learn from the round, then call vLLM's method."""
        self._observe(time.perf_counter(), scheduler_output, model_runner_output)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _observe(self, now: float, scheduler_output: Any, model_runner_output: Any) -> None:
        """Learn from a pure decode round that directly follows one of the same requests."""
        scheduled, drafts = scheduler_output.num_scheduled_tokens, scheduler_output.scheduled_spec_decode_tokens
        request_ids = set(scheduled)
        state = getattr(model_runner_output, DRAFTER_STATE, DrafterState.IN_TIME)
        self._choices.note(state)
        decided_at = next((at for at, ids in self._decided if ids == request_ids), None)
        self._decided.append((now, request_ids))
        sampled, row = model_runner_output.sampled_token_ids, model_runner_output.req_id_to_index
        if decided_at is None or not scheduled or not sampled:
            return
        offered = [len(drafts.get(request_id, ())) for request_id in scheduled]
        accepted = [len(sampled[row[request_id]]) - 1 for request_id in scheduled]
        decoded = all(tokens == 1 + m for tokens, m in zip(scheduled.values(), offered))
        if decoded and min(accepted) >= 0 and state != DrafterState.AWAY:
            in_time, seconds = state == DrafterState.IN_TIME, now - decided_at
            self._adaptation.observe(len(scheduled), max(offered), offered, accepted, seconds, in_time)


class AsyncAdaptive(Adaptive, AsyncScheduler):
    """`Adaptive` with asynchronous scheduling."""


def scheduler(vllm_config: VllmConfig, **arguments: Any) -> Adaptive:
    """Build the scheduler, asynchronous if vLLM decided so; `scheduler_cls` names this function."""
    chosen = AsyncAdaptive if vllm_config.scheduler_config.async_scheduling else Adaptive
    return chosen(vllm_config=vllm_config, **arguments)
