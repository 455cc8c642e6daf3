"""The process of one engine of a benchmark, and what passes between the two."""

import gc
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vllm_ssd.planning.engine_host import serve
from vllm_ssd.planning.worker import decode

KEY_TOKENS = 64
COUNTERS = ("hits", "misses", "late", "waits", "draft_tokens", "accepted_tokens", "evictions", "restarts")

Drafts = dict[tuple[bytes, int], list[int]]
"""What was drafted after a text, named by its last KEY_TOKENS tokens (int32 bytes) and its length in tokens."""


@dataclass(frozen=True)
class System:
    """One way to decode.

    method: plain, stock, ssd or ceiling; engine_args, speculative_config: as vLLM takes them; environment: of its
    process
    """

    name: str
    method: str
    engine_args: dict[str, Any]
    speculative_config: dict[str, Any] | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def num_drafts(self) -> int:
        """Most drafts of a round."""
        return self.speculative_config["num_speculative_tokens"] if self.speculative_config else 0


@dataclass(frozen=True)
class Request:
    """Generate `max_tokens` for all `prompts`, `batch_size` of them at a time.

    replay: drafts for a ceiling; num_junk_drafts: drafts a row that a ceiling makes up where it has none;
    num_held_drafts: drafts a round of an adaptive engine while its adaptation rests.
    """

    prompts: list[list[int]]
    batch_size: int
    max_tokens: int
    temperature: float = 0.0
    replay: Drafts = field(default_factory=dict)
    num_junk_drafts: int = 0
    num_held_drafts: int | None = None


@dataclass
class Turn:
    """The result of one request; times and counts cover the steps in which the whole batch was decoding.

    seconds: of all decoding steps; row_rounds: steps times the rows in them; handovers_s: host time from the outcome
    to the drafts, in rounds where every row hit; delayed_s: a core was wanted but taken by another process;
    wanted: rounds by the number of drafts that the adaptation chose. Of an engine on the V2 runner, drafts, handovers_s
    and wanted stay empty.
    """

    token_ids: list[list[int]] = field(default_factory=list)
    num_tokens: int = 0
    row_rounds: int = 0
    seconds: float = 0.0
    steps_s: list[float] = field(default_factory=list)
    delayed_s: float = 0.0
    drafts: Drafts = field(default_factory=dict)
    handovers_s: list[float] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    build_ms: float = 0.0
    wanted: Counter[int] = field(default_factory=Counter)


def text_key(token_ids: np.ndarray, length: int) -> tuple[bytes, int]:
    """The key in `Drafts` of the first `length` of a row's `token_ids` [max_model_len] int32."""
    return token_ids[max(0, length - KEY_TOKENS) : length].tobytes(), length


class Replay:
    """A `custom_class` proposer that costs nothing: it replays drafts recorded from another engine."""

    def __init__(self, vllm_config: Any) -> None:
        self.drafts: Drafts = {}
        self.junk: list[int] = []

    def load_model(self, target: Any) -> None:
        """Nothing to load: vLLM's CPU runner wants the method."""

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens: np.ndarray,
        token_ids: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts of each row, by its text."""
        return [
            self.drafts.get(text_key(token_ids[i], int(num_tokens[i])), self.junk) if sampled else []
            for i, sampled in enumerate(sampled_token_ids)
        ]


class Recorder:
    """Records the drafts of an SSD proposer, and the time of each call in which every row hit."""

    def __init__(self, proposer: Any) -> None:
        self._propose = proposer.propose
        self._counts = proposer._metrics.counts
        self.clear()
        proposer.propose = self.propose

    def clear(self) -> None:
        """Forget everything recorded."""
        self.drafts: Drafts = {}
        self.handovers_s: list[float] = []

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens: np.ndarray,
        token_ids: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """The proposer's own drafts, recorded."""
        hits = self._counts["hits"]
        started = time.perf_counter()
        proposed = self._propose(sampled_token_ids, num_tokens, token_ids, slot_mappings=slot_mappings)
        seconds = time.perf_counter() - started
        if self._counts["hits"] - hits == len(proposed):
            self.handovers_s.append(seconds)
        for i, drafts in enumerate(proposed):
            if drafts:
                self.drafts[text_key(token_ids[i], int(num_tokens[i]))] = drafts
        return proposed


class Steered:
    """Wraps an SSD proposer's adaptation: counts rounds, and can fix the number of drafts."""

    def __init__(self, proposer: Any) -> None:
        self._adaptation = proposer._verifier._adaptation
        self.begin(None)
        proposer._verifier._adaptation = self

    def begin(self, num_held_drafts: int | None) -> None:
        """Reset the counter; while `num_held_drafts` is given, the adaptation is neither asked nor updated."""
        self._num_held_drafts = num_held_drafts
        self.wanted: Counter[int] = Counter()

    def choose(self, batch_size: int) -> int:
        """Drafts of the next round."""
        if self._num_held_drafts is not None:
            return self._num_held_drafts
        return self._adaptation.choose(batch_size)

    def observe(self, batch_size: int, wanted: int, *of_round: Any) -> None:
        """Count a round, and pass it on unless the number of drafts is fixed."""
        self.wanted[wanted] += 1
        if self._num_held_drafts is None:
            self._adaptation.observe(batch_size, wanted, *of_round)

    def draft_seconds(self, batch_size: int) -> float:
        """The adaptation's own estimate."""
        return self._adaptation.draft_seconds(batch_size)


class Worker:
    """The host of one engine, see `engine_host.serve`."""

    def start(self, system: System) -> None:
        """Start the engine of `system`."""
        from vllm import EngineArgs, LLMEngine

        from vllm_ssd.compat.target import measure, runner_v1

        runner_v1.repair_cpu_sampling()  # as SSD does for itself
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(disable_log_stats=True, speculative_config=system.speculative_config, **system.engine_args)
        )
        proposer = measure.proposer(self._engine)
        on_v1 = hasattr(proposer, "_verifier")
        self._replay = proposer if system.method == "ceiling" else None
        self._ssd = proposer if system.method == "ssd" else None
        self._recorder = Recorder(proposer) if self._ssd and on_v1 else None
        self._steered = Steered(proposer) if self._ssd and on_v1 else None
        self._num_requests = 0
        gc.collect()
        gc.freeze()

    def generate(self, request: Request) -> Turn:
        """Do as asked; see `Request` and `Turn`."""
        if self._replay:
            self._replay.drafts = request.replay
            self._replay.junk = [0] * request.num_junk_drafts
        counts = self._counts()
        if self._recorder and self._steered:
            self._recorder.clear()
            self._steered.begin(request.num_held_drafts)
        turn = Turn(delayed_s=-self._delayed_s())
        for i in range(0, len(request.prompts), request.batch_size):
            self._decode(request.prompts[i : i + request.batch_size], request, turn)
        turn.delayed_s += self._delayed_s()
        turn.counts = {name: value - counts[name] for name, value in self._counts().items()}
        if self._recorder and self._steered:
            turn.drafts, turn.handovers_s = self._recorder.drafts, self._recorder.handovers_s
            turn.wanted = self._steered.wanted
        if self._ssd:
            stats = self._ssd._metrics.drafter_stats()
            turn.build_ms = stats.build_ms if stats else 0.0
        return turn

    def _decode(self, prompts: Sequence[list[int]], request: Request, turn: Turn) -> None:
        """Generate for one batch, all of whose requests start together; adds to `turn`."""
        named = {}
        for prompt in prompts:
            self._num_requests += 1
            named[str(self._num_requests)] = {"prompt_token_ids": prompt}
        emitted = {name: [] for name in named}
        prefilled = False
        full = True  # until the first row is done: the rest would be timed as a smaller batch
        for seconds, outputs in decode(self._engine, named, request.max_tokens, request.temperature):
            if prefilled and full:
                turn.steps_s.append(seconds)
                turn.row_rounds += len(outputs)
                turn.num_tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
            prefilled = True
            full = full and not any(output.finished for output in outputs)
            for output in outputs:
                emitted[output.request_id] += output.outputs[0].token_ids
        turn.token_ids += emitted.values()
        turn.seconds = sum(turn.steps_s)

    def _counts(self) -> dict[str, int]:
        return {name: self._ssd._metrics.counts[name] for name in COUNTERS} if self._ssd else {}

    def _delayed_s(self) -> float:
        """Seconds that the main threads of target and drafter have waited for a core so far."""
        waited_ns = 0
        for pid in [os.getpid(), *([self._ssd._drafters.links[0]._process.pid] if self._ssd else [])]:
            with suppress(OSError):  # a drafter may have ended
                waited_ns += int(Path(f"/proc/{pid}/schedstat").read_text().split()[1])
        return waited_ns / 1e9


if __name__ == "__main__":
    from bench_worker import Worker  # by the name under which the benchmark knows what this process answers

    serve(Worker)
