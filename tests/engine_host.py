"""The process of an `engines.Engine`: one vLLM engine, and what tests may see and change of it.

An engine in a process of its own shares no distributed state with any other, and its drafter, or the whole of it,
can be killed.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import fork_server
import numpy as np
from lockstep import await_drafter
from PIL import Image

from vllm_ssd.monitor.scrape import scrape, url_of
from vllm_ssd.planning.engine_host import serve
from vllm_ssd.target.metrics import COUNTERS

V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
if V2:  # also in the worker processes, which import this module anew
    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreted_v2  # noqa: F401
    from launches import Launches, watched_kernels


LOCKSTEP_S = 5.0
"""Longest wait for a drafter, which may have been stopped."""


class EngineHost:
    """The engine, and what tests may do to it."""

    def __init__(self) -> None:
        self._llm = self._engine = self._proposer = self._metrics_port = None
        self._seen = {"known_q": 0, "cut_q": 0, "ngram_drafts": 0, "extensions": 0}
        self._launched_at_start: list[str] = []
        self._noises: list[Any] = []
        self._adapters: dict[str, int] = {}  # number of each folder: vLLM tells adapters apart by it
        fork_server.fork_drafters()

    def start(self, *, patches: dict[str, Any] | None = None, imports: Sequence[str] = (), **engine_args: Any) -> None:
        """Start the engine with module attributes such as "vllm_ssd.link.process.HANG_S" replaced by `patches`, and
        with what it takes to import modules of the tests.

        With several workers the proposer is in another process, and only what its metrics page says is seen.
        """
        from vllm import LLM

        self.patch(**(patches or {}))
        for module in imports:
            importlib.import_module(module)
        with watched_kernels(self._launched_at_start) if V2 else contextlib.nullcontext():
            llm = LLM(**engine_args)
        self._llm, self._engine = llm, llm.llm_engine
        if (speculative := engine_args.get("speculative_config", {})).get("method") == "ssd":
            from vllm_ssd.compat.target import measure  # once the engine has set vLLM up

            self._proposer = measure.proposer(self._engine)
            self._metrics_port = speculative.get("metrics_port")
        if self._proposer is not None:
            if V2:
                self._see_lookups()
            else:
                self._see_proposals(distort=None)
                self._see_ngram_drafts()

    def patch(self, **values: Any) -> dict[str, Any]:
        """Set module attributes such as "vllm_ssd.link.process.HANG_S"; returns what they were."""
        before = {}
        for path, value in values.items():
            module, _, name = path.rpartition(".")
            module = importlib.import_module(module)
            before[path] = getattr(module, name)
            setattr(module, name, value)
        return before

    def patched(self) -> list[str]:
        """Symbols of vLLM that the plugin has replaced in this process."""
        ours = sys.modules.get("vllm_ssd.compat.patch")
        return [] if ours is None else list(ours.patched())

    def start_own_drafters(self) -> None:
        """Start drafters from now on as a server does, not as forks."""
        from vllm_ssd.link import process

        process.subprocess = subprocess

    def set_config(self, **values: Any) -> None:
        """On V1, change keys of the running speculative_config that only the target reads, such as `on_miss`."""
        for name, value in values.items():
            object.__setattr__(self._proposer._verifier._config, name, value)

    def generate(
        self,
        requests: list[dict[str, Any]],
        signals: dict[int, int] | None = None,
        min_seconds: float = 0.0,
        calls: dict[int, tuple[str, dict[str, Any]]] | None = None,
        signalled: int = 0,
        resume_s: float | None = None,
        lockstep: float = 0.0,
    ) -> SimpleNamespace:
        """Run `requests` (see `engines.request`) to their ends; `signals[step]` is sent to the drafter of index
        `signalled` before a step, and SIGCONT `resume_s` seconds later; of the engine, `calls[step]` is called: the
        name of a method, and its keyword arguments.

        -> outputs, one per request; counts, what the metrics of vLLM and of SSD grew by; seconds, one per step. Each
        step is stretched to `min_seconds`, and of all steps the share of `lockstep` until the drafters have done what
        they can. signals_at: when each signal was sent, of `time.perf_counter`, or SIGKILL had its effect, which a busy
        machine puts off.
        """
        signals_at: list[float] = []
        resumed: list[threading.Timer] = []
        before, started = self.counts(), time.perf_counter()
        waiting = sorted(enumerate(requests), key=lambda item: item[1]["join_step"])
        outputs: list[SimpleNamespace] = [SimpleNamespace() for _ in requests]
        step, seconds = 0, []
        while waiting or self._engine.has_unfinished_requests():
            while waiting and waiting[0][1]["join_step"] <= step:
                self._join(*waiting.pop(0))
            if signals and step in signals:
                signals_at.append(time.perf_counter())
                pid = self.drafter(signalled).pid
                if signals[step] == signal.SIGKILL:
                    threading.Thread(target=note_end, args=(os.pidfd_open(pid), signals_at)).start()
                os.kill(pid, signals[step])
                if resume_s is not None:
                    resumed.append(threading.Timer(resume_s, os.kill, (pid, signal.SIGCONT)))
                    resumed[-1].start()
            if calls and step in calls:
                method, arguments = calls[step]
                getattr(self._engine, method)(**arguments)
            began = time.perf_counter()
            for output in self._engine.step():
                index = int(output.request_id)
                outputs[index] = plain_output(output, rounds_before=getattr(outputs[index], "rounds", []))
                abort_after = requests[index]["abort_after"]
                if abort_after and len(outputs[index].samples[0].token_ids) >= abort_after:
                    self._engine.abort_request([output.request_id])
            seconds.append(time.perf_counter() - began)
            time.sleep(max(0.0, min_seconds - seconds[-1]))
            step += 1
            if int(step * lockstep) > int((step - 1) * lockstep):
                self._await_drafters()
        self._settle()
        counts = {name: value - before.get(name, 0) for name, value in self.counts().items()}
        total_s = time.perf_counter() - started
        for timer in resumed:
            timer.join()
        return SimpleNamespace(outputs=outputs, counts=counts, seconds=seconds, total_s=total_s, signals_at=signals_at)

    def call_engine(self, name: str, arguments: dict[str, Any]) -> None:
        """Call a method of vLLM's engine whose result does not matter."""
        getattr(self._engine, name)(**arguments)

    def beam_search(self, prompts: list[list[int]], width: int, max_tokens: int) -> list[list[list[int]]]:
        """Token ids [prompt][beam][token] of the best beams, without the prompts."""
        from vllm.sampling_params import BeamSearchParams

        params = BeamSearchParams(beam_width=width, max_tokens=max_tokens, ignore_eos=True)
        outputs = self._llm.beam_search([{"prompt_token_ids": prompt} for prompt in prompts], params)
        self._settle()
        return [[beam.tokens[-max_tokens:] for beam in output.sequences] for output in outputs]

    def counts(self) -> dict[str, int]:
        """Counters of vLLM and of SSD's metrics, drafts verified with a known q, those of them whose q has tokens of no
        probability, and drafts found by n-gram."""
        from vllm.v1.metrics.reader import Counter

        counts = {
            metric.name: int(metric.value) for metric in self._engine.get_metrics() if isinstance(metric, Counter)
        }
        if self._proposer is not None:
            counts |= self._proposer._metrics.counts | self._seen
        elif self._metrics_port is not None:
            (engine,) = scrape(url_of(str(self._metrics_port))).engines.values()
            counts |= {name: int(engine.values[f"{name}_total"]) for name in COUNTERS}
        return counts

    def set_drafts(self, counts: list[int]) -> None:
        """On the V2 runner with `adaptive`: let rounds carry `counts` drafts in turn, whatever pays."""
        adaptation = self._adaptation()
        wanted = itertools.cycle(counts)
        adaptation.choose = lambda batch_size: next(wanted)

    def drafts_learned(self) -> dict[int, float]:
        """On the V2 runner with `adaptive`: the rounds learned from, by number of drafts."""
        buckets = self._adaptation()._buckets.values()
        rounds: dict[int, float] = {}
        for bucket in buckets:
            for k, arm in enumerate(bucket.estimator._arms):
                rounds[k] = rounds.get(k, 0) + arm.rounds
        return {k: number for k, number in rounds.items() if number}

    def forget_rounds(self) -> None:
        """On V1: let the adaptation be that of a server that has just started."""
        from vllm_ssd.policy import Adaptation

        verifier = self._proposer._verifier
        verifier._adaptation = verifier._fallback._adaptation = Adaptation(verifier._config.num_speculative_tokens)

    def launched_at_start(self) -> list[str]:
        """Triton kernels that ran before the first request."""
        return self._launched_at_start

    def noises(self) -> list[Any]:
        """On the V2 runner: the `Noise` of each request that the drafter was told of since the last call."""
        noises, self._noises = self._noises, []
        return noises

    def is_async(self) -> bool:
        """Whether the scheduler is a step ahead of the results."""
        return bool(self._engine.vllm_config.scheduler_config.async_scheduling)

    def has_joined_ray(self) -> bool:
        """Whether this process is a driver of Ray, which vLLM imports where it is installed, or has what could be."""
        ray = sys.modules.get("ray")
        return (ray is not None and ray.is_initialized()) or any(n.startswith("vllm_ssd.pool") for n in sys.modules)

    def drafter(self, index: int = 0) -> SimpleNamespace:
        """Of one drafter: process id (0: others started it), number of starts, whether it is connected, KV pages in
        use by its last report."""
        link, stats = self._proposer._drafters.links[index], self._proposer._metrics.drafter_stats(index)
        return SimpleNamespace(
            pid=link._process.pid if link._process else 0,
            generation=link.generation,
            connected=link.connected,
            pages_in_use=stats.pages_total - stats.pages_free if stats else 0,
        )

    def wait_for_answer(self, index: int, timeout_s: float) -> bool:
        """Whether a drafter answers, what it owed included, within the time."""
        deadline, link = time.monotonic() + timeout_s, self._proposer._drafters.links[index]
        while (is_silent := link.suspect or not link.connected) and time.monotonic() < deadline:
            time.sleep(0.1)
        return not is_silent

    def wait_for_drafter(self, generation: int, timeout_s: float, index: int = 0) -> bool:
        """Whether a process of the drafter of `generation` or later shook hands within the time."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            link = self._proposer._drafters.links[index]
            if link.generation >= generation and link.connected:
                return True
            time.sleep(0.1)
        return False

    def watch_fleet(self) -> None:
        """Record from now on what the drafters of a fleet do."""
        from fleet_watch import FleetWatch

        self._fleet_watch = FleetWatch(self._proposer)

    def fleet_seen(self) -> SimpleNamespace:
        """What was recorded since the last call; see `fleet_watch.FleetWatch`."""
        return self._fleet_watch.take()

    def distort_q(self, exponent: float | None) -> None:
        """On V1, claim q ** exponent, renormalised, to be what drafts are drawn from from now on; None: the truth."""
        self._see_proposals(exponent)

    def _embedded(self, prompt: list[int]) -> dict[str, Any]:
        """The prompt as the embeddings of its tokens."""
        import torch
        from safetensors import safe_open

        with safe_open(f"{self._engine.vllm_config.model_config.model}/model.safetensors", "pt") as weights:
            return {"prompt_embeds": weights.get_tensor("model.embed_tokens.weight")[torch.tensor(prompt)].float()}

    def _adaptation(self) -> Any:
        from vllm_ssd.compat.target import measure

        return measure.scheduler(self._engine)._adaptation

    def _see_proposals(self, distort: float | None) -> None:
        verifier = self._proposer._verifier

        def proposals(request_ids, num_tokens, draft_token_ids):
            rows = type(verifier).proposals(verifier, request_ids, num_tokens, draft_token_ids)
            if rows is None:
                return None
            known = [proposal for row in rows for proposal in row if proposal is not None]
            self._seen["known_q"] += len(known)
            self._seen["cut_q"] += sum(not probs.all() for _, probs in known)
            return [[p if p is None or distort is None else distorted(p, distort) for p in row] for row in rows]

        verifier.proposals = proposals

    def _see_lookups(self) -> None:
        """On the V2 runner: drafts with a known q, tensors that the host read, steps and what they launched."""
        from host_reads import HostReads

        speculator, runner = self._proposer, type(self._proposer)
        self._seen |= dict.fromkeys(("host_reads", "proposals", "sampled_proposals", "verifications"), 0)

        def watched(method, *args, **kwargs):
            with Launches() as launches, HostReads() as reads:
                result = method(speculator, *args, **kwargs)
            self._seen["host_reads"] += len(reads.found)
            for name in launches.names:
                self._seen[f"launch {name}"] = self._seen.get(f"launch {name}", 0) + 1
            return result

        def propose(input_batch, *args, **kwargs):
            slots = input_batch.idx_mapping_np
            sampled = speculator._sampled[slots]
            drafts = watched(runner.propose, input_batch, *args, **kwargs)
            self._seen["proposals"] += 1
            self._seen["sampled_proposals"] += bool(sampled.any())
            num_drafts = speculator.num_drafts[slots].cpu().numpy()[sampled]
            self._seen["known_q"] += int(num_drafts.sum())
            has_zero = (speculator._verifying.q_probs[slots].cpu().numpy()[sampled] == 0).any(-1)
            self._seen["cut_q"] += int((has_zero & (np.arange(has_zero.shape[1]) < num_drafts[:, None])).sum())
            return drafts

        def invalid_drafts(batch):
            self._seen["verifications"] += 1
            return watched(runner.invalid_drafts, batch)

        speculator.propose, speculator.invalid_drafts = propose, invalid_drafts
        self._see_noises(speculator._courier._client)

    def _see_noises(self, client: Any) -> None:
        def add(*args, **kwargs):
            remote = type(client).add(client, *args, **kwargs)
            self._noises.append(remote.noise)
            return remote

        client.add = add

    def _see_ngram_drafts(self) -> None:
        from vllm_ssd.target.v1 import fallback, round

        original, add_ngram = fallback.ngram_drafts, round.Row.add_ngram

        def ngram_drafts(*args):
            drafts = original(*args)
            self._seen["ngram_drafts"] += len(drafts)
            return drafts

        def seen(row, token_ids):
            self._seen["extensions"] += len(token_ids) * bool(row.drafts.token_ids)
            add_ngram(row, token_ids)

        fallback.ngram_drafts, round.Row.add_ngram = ngram_drafts, seen

    def keep_drafts(self, most: int) -> None:
        """On V1, take at most `most` drafts of a branch, as from a drafter that had no time for more."""
        from vllm_ssd.target.v1.request import Request

        self._lookup = getattr(self, "_lookup", Request.lookup)
        Request.lookup = lambda *outcome: self._lookup(*outcome).since(0, most)

    def _await_drafters(self) -> None:
        """Wait until all drafters sleep, with a bound; on V2 also until their blocks are in the cache."""
        if self._proposer is None:
            return
        if V2:
            self._await_courier()
        for link in self._proposer._drafters.links:
            await_drafter(link, LOCKSTEP_S)
        if V2:
            self._await_courier()

    def _await_courier(self) -> None:
        """Wait until the courier has done what there is for it, and told the drafters of it."""
        for _ in range(2):  # what it tells is sent after the first
            turn = threading.Event()
            self._proposer._courier._enqueue(turn.set)
            turn.wait(LOCKSTEP_S)  # unless its thread has ended

    def _settle(self) -> None:
        """On V2 with SSD: tell the worker that the last requests have ended; the courier counts their rounds."""
        if not V2 or (self._proposer is None and self._metrics_port is None):
            return
        from vllm_ssd.compat.target import measure

        while measure.scheduler(self._engine).has_requests():
            self._engine.step()
        if self._proposer is None:  # in another process
            deadline, before = time.monotonic() + 5, {}
            while before != (before := self.counts()) and time.monotonic() < deadline:
                time.sleep(0.2)
            return
        self._await_courier()

    def _join(self, index: int, request: dict[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        params = dict(request["params"])
        if regex := params.pop("regex", None):
            params["structured_outputs"] = StructuredOutputsParams(regex=regex)
        if schema := params.pop("json_schema", None):
            params["structured_outputs"] = StructuredOutputsParams(json=schema)
        if isinstance(structured := params.get("structured_outputs"), dict):
            params["structured_outputs"] = StructuredOutputsParams(**structured)
        kind = RequestOutputKind.CUMULATIVE if request["abort_after"] else RequestOutputKind.FINAL_ONLY
        prompt = self._embedded(request["prompt"]) if request["embedded"] else {"prompt_token_ids": request["prompt"]}
        if request["image"]:
            prompt["multi_modal_data"] = {"image": Image.new("RGB", (32, 32), request["image"])}
        self._engine.add_request(
            str(index),
            prompt | ({"cache_salt": request["cache_salt"]} if request["cache_salt"] else {}),
            SamplingParams(**params, output_kind=kind),
            lora_request=self._lora(request["lora"]),
            priority=request["priority"],
        )

    def _lora(self, folder: str | None) -> Any:
        from vllm.lora.request import LoRARequest

        if folder is None:
            return None
        number = self._adapters.setdefault(folder, len(self._adapters) + 1)
        return LoRARequest(f"adapter-{number}", number, folder)


def note_end(process: int, signals_at: list[float]) -> None:
    """Put the time when the process of this descriptor ends in the place of the last."""
    select.select([process], [], [])
    signals_at[-1] = time.perf_counter()
    os.close(process)


def plain_output(output: Any, rounds_before: Sequence[int]) -> SimpleNamespace:
    """A request's output without vLLM's classes: samples of token_ids, text, finish_reason and logprobs.

    rounds: tokens of the first sample after each round that vLLM has told of: of a request with `abort_after`, all.
    """
    samples = [
        SimpleNamespace(
            token_ids=list(sample.token_ids),
            text=sample.text,
            finish_reason=sample.finish_reason,
            stop_reason=sample.stop_reason,
            logprobs=[{token: entry.logprob for token, entry in step.items()} for step in sample.logprobs or ()],
        )
        for sample in sorted(output.outputs, key=lambda sample: sample.index)
    ]
    prompt_logprobs = [{t: e.logprob for t, e in step.items()} for step in (output.prompt_logprobs or ()) if step]
    return SimpleNamespace(
        samples=samples,
        num_cached_tokens=output.num_cached_tokens,
        prompt_logprobs=prompt_logprobs,
        rounds=[*rounds_before, len(samples[0].token_ids)],
    )


def distorted(proposal: Any, exponent: float) -> Any:
    """`(token ids, probabilities)` with each probability raised to `exponent` and renormalised."""
    token_ids, probs = proposal
    powers = probs**exponent
    return token_ids, powers / powers.sum()


if __name__ == "__main__":
    serve(EngineHost)
