"""One vLLM engine in a process of its own, which generates when `bench_decode.py` asks it to and sleeps otherwise."""

import gc
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from vllm_ssd.drafter.lifetime import die_with
from vllm_ssd.planning.worker import decode

PROMPT_TOKENS = 64
MAX_MODEL_LEN = 1024
MAX_NUM_SEQS = 16
KV_CACHE_BYTES = 192 << 20
COUNTERS = ("hits", "misses", "late", "waits", "draft_tokens", "accepted_tokens", "evictions", "restarts")

Drafts = dict[tuple[bytes, int], list[int]]
"""What was drafted for a request, named by its prompt (int32 bytes), at a committed length."""


@dataclass(frozen=True)
class System:
    """One way to decode. speculative_config: as vLLM takes it; method: plain, stock, ssd or ceiling."""

    name: str
    method: str
    target: str
    speculative_config: dict[str, Any] | None = None


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
    """What one request gave; times and counts are of the steps in which the whole batch was decoding.

    seconds: of all decoding steps; row_rounds: steps times the rows in them; handovers_s: host time from the outcome
    to the drafts, in rounds where every row hit; delayed_s: a core was wanted but taken by another process;
    wanted: rounds by the number of drafts that the adaptation chose; pids: of the engine and, with SSD, of its drafter.
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
    pids: list[int] = field(default_factory=list)


class Replay:
    """A `custom_class` proposer that costs nothing: it hands over drafts that were recorded elsewhere."""

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
        """Drafts of each row, by prompt and committed length."""
        return [
            self.drafts.get((token_ids[i, :PROMPT_TOKENS].tobytes(), int(num_tokens[i])), self.junk) if sampled else []
            for i, sampled in enumerate(sampled_token_ids)
        ]


class Recorder:
    """Remembers what an SSD proposer hands over, and how long it took where every row hit."""

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
                self.drafts[token_ids[i, :PROMPT_TOKENS].tobytes(), int(num_tokens[i])] = drafts
        return proposed


class Steered:
    """Stands in for an SSD proposer's adaptation: counts rounds, may hold it at a number of drafts while it rests."""

    def __init__(self, proposer: Any) -> None:
        self._adaptation = proposer._verifier._adaptation
        self.begin(None)
        proposer._verifier._adaptation = self

    def begin(self, num_held_drafts: int | None) -> None:
        """Forget the rounds counted; with `num_held_drafts` the adaptation is neither asked nor taught anything."""
        self._num_held_drafts = num_held_drafts
        self.wanted: Counter[int] = Counter()

    def choose(self, batch_size: int) -> int:
        """Drafts of the next round."""
        if self._num_held_drafts is not None:
            return self._num_held_drafts
        return self._adaptation.choose(batch_size)

    def observe(self, batch_size: int, wanted: int, *of_round: Any) -> None:
        """A round, of which a resting adaptation does not hear."""
        self.wanted[wanted] += 1
        if self._num_held_drafts is None:
            self._adaptation.observe(batch_size, wanted, *of_round)

    def draft_seconds(self, batch_size: int) -> float:
        """What the adaptation knows."""
        return self._adaptation.draft_seconds(batch_size)


class Worker:
    """An engine for one system, pinned to `core` once it is up."""

    def __init__(self, system: System, dtype: str, core: int) -> None:
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.sample import rejection_sampler

        from vllm_ssd.compat.target.runner_v1 import expand_batch_to_tokens

        # Stock vLLM verifies with uninitialised temperatures on the CPU; SSD repairs that for itself.
        rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=system.target,
                dtype=dtype,
                enforce_eager=True,
                enable_prefix_caching=False,
                max_model_len=MAX_MODEL_LEN,
                max_num_seqs=MAX_NUM_SEQS,
                max_num_batched_tokens=2 * MAX_NUM_SEQS * PROMPT_TOKENS,
                kv_cache_memory_bytes=KV_CACHE_BYTES,
                speculative_config=system.speculative_config,
                disable_log_stats=True,
                seed=0,
            )
        )
        runner = self._engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        proposer = getattr(runner, "drafter", None)
        self._replay = proposer if system.method == "ceiling" else None
        self._ssd = proposer if system.method == "ssd" else None
        self._recorder = Recorder(proposer) if self._ssd else None
        self._steered = Steered(proposer) if self._ssd else None
        self._num_requests = 0
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), {core})
        gc.collect()
        gc.freeze()

    @property
    def pids(self) -> list[int]:
        """This process and, with SSD, its drafter."""
        return [os.getpid(), *([self._ssd._drafter._process.pid] if self._ssd else [])]

    def generate(self, request: Request) -> Turn:
        """Do as asked; see `Request` and `Turn`."""
        if self._replay:
            self._replay.drafts = request.replay
            self._replay.junk = [0] * request.num_junk_drafts
        counts = self._counts()
        if self._recorder:
            self._recorder.clear()
            self._steered.begin(request.num_held_drafts)
        turn = Turn(delayed_s=-self._delayed_s(), pids=self.pids)
        for i in range(0, len(request.prompts), request.batch_size):
            self._decode(request.prompts[i : i + request.batch_size], request, turn)
        turn.delayed_s += self._delayed_s()
        turn.counts = {name: value - counts[name] for name, value in self._counts().items()}
        if self._recorder:
            turn.drafts, turn.handovers_s = self._recorder.drafts, self._recorder.handovers_s
            turn.wanted = self._steered.wanted
            stats = self._ssd._metrics.drafter_stats
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
        full = True  # until the first row is done: rows of unequal luck would otherwise be timed as smaller batches
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
        return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) for pid in self.pids) / 1e9


def serve(connection: Connection, system: System, dtype: str, core: int, log: Path) -> None:
    """Start `system`, then answer every `Request` with a `Turn` until the connection closes.

    The first message is the list of process ids, or the text of the exception that prevented the start. Workers are
    stopped while they are idle, so the kernel must end them should the benchmark be killed.
    """
    die_with(os.getppid())
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "ssd" if system.method == "ssd" else "",
    }
    try:
        worker = Worker(system, dtype, core)
        connection.send(worker.pids)
        while True:
            connection.send(worker.generate(connection.recv()))
    except EOFError:
        return
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        raise
