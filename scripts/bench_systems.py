"""What a benchmark compares: a pair of models, the ways to decode with it, and an engine a way."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_worker import Request, System, Turn
from rich.console import Console

from vllm_ssd.config import parse_cpus
from vllm_ssd.planning.engine_host import EngineFailed, EngineProcess, threads_on

PAIR = Path(__file__).resolve().parents[1] / "tests" / "assets" / "pair"
WORKER = Path(__file__).with_name("bench_worker.py")
PROMPT_TOKENS = 64
MAX_MODEL_LEN = 1024
MAX_PAIR_LEN = 512
"""Of `start_pair`."""
MAX_NUM_SEQS = 16
KV_CACHE_BYTES = 192 << 20
STARTS_AT_ONCE = 2
STARTUP_TIMEOUT_S = 300

console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)


def start_pair(speculative_config: dict[str, Any], target: Path = PAIR / "target", **engine_args: Any) -> Any:
    """vLLM's engine with the bundled target, or one made of it, for short prompts of at most eight requests at once."""
    from vllm import EngineArgs, LLMEngine

    return LLMEngine.from_engine_args(
        EngineArgs(
            model=str(target),
            dtype="float32",
            enforce_eager=True,
            max_model_len=MAX_PAIR_LEN,
            max_num_seqs=8,
            kv_cache_memory_bytes=128 << 20,
            enable_prefix_caching=False,
            speculative_config=speculative_config,
            **engine_args,
        )
    )


def on_cpu() -> bool:
    """Whether the installed vLLM runs models on the CPU."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def add_cores(parser: argparse.ArgumentParser) -> None:
    """`--cores`: two lists of CPU numbers, of the engines and of SSD's drafters."""
    parser.add_argument(
        "--cores",
        nargs=2,
        type=_cores,
        metavar=("TARGET", "DRAFTER"),
        help="cores of the engines, and of SSD's drafters, as 0-3 4,5; on a CPU 0 and 1 by default, on a GPU ignored",
    )


def _cores(text: str) -> tuple[int, ...]:
    try:
        return parse_cpus(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def choose_cores(cores: list[tuple[int, ...]] | None, is_cpu: bool) -> list[tuple[int, ...]]:
    """The cores of the engines and of SSD's drafters; none of their own on a GPU."""
    if is_cpu:
        return cores or [(0,), (1,)]
    if cores:
        console.print("--cores is ignored: this vLLM runs models on a GPU")
    return [(), ()]


@dataclass(frozen=True)
class Pair:
    """Two models and how vLLM loads them. engine_args: of every engine; ssd: keys of every SSD speculative_config.

    plugin: what vLLM needs to load the models, beside SSD's plugin; environment: where it finds that
    """

    name: str
    target: str
    drafter: str
    engine_args: dict[str, Any] = field(default_factory=dict)
    ssd: dict[str, Any] = field(default_factory=dict)
    plugin: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    def plain(self) -> System:
        """No speculation."""
        return self._system("plain", "plain", None)

    def stock(self, k: int, **options: Any) -> System:
        """vLLM's own speculation with the drafter."""
        drafting = {"method": "draft_model", "model": self.drafter, "num_speculative_tokens": k}
        return self._system(f"stock K={k}", "stock", drafting | options)

    def speculative(self, options: dict[str, Any], name: str | None = None) -> System:
        """SSD; `options` are further keys of its speculative_config, which name it unless `name` is given."""
        if name is None:
            more = [f"{key}={value}" for key, value in options.items() if key != "num_speculative_tokens"]
            name = " ".join([f"SSD K={options['num_speculative_tokens']}", *more])
        return self._system(name, "ssd", {"method": "ssd", "model": self.drafter, **self.ssd, **options})

    def ceiling(self, longest: int) -> System:
        """Recorded drafts of up to `longest` tokens, at no cost."""
        replay = {"method": "custom_class", "model": "bench_worker.Replay", "num_speculative_tokens": longest}
        return self._system("ceiling", "ceiling", replay)

    def _system(self, name: str, method: str, speculative_config: dict[str, Any] | None) -> System:
        engine_args = {"model": self.target, "enable_prefix_caching": False, "seed": 0, **self.engine_args}
        plugins = ["ssd"] * (method == "ssd") + [self.plugin] * bool(self.plugin)
        environment = self.environment | {"VLLM_PLUGINS": ",".join(plugins)}
        return System(name, method, engine_args, speculative_config, environment)


def bundled_pair(name: str, target: Path, drafter: Path, dtype: str, cores: Sequence[Sequence[int]]) -> Pair:
    """The bundled models after `resize_model`."""
    engine_args = {
        "dtype": dtype,
        "enforce_eager": True,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": MAX_NUM_SEQS,
        "max_num_batched_tokens": 2 * MAX_NUM_SEQS * PROMPT_TOKENS,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
    }
    ssd = {"dtype": dtype, "kv_cache_memory": "192MiB"} | drafter_cores(cores)
    return Pair(name, str(target), str(drafter), engine_args, ssd)


def drafter_cores(cores: Sequence[Sequence[int]]) -> dict[str, str]:
    """SSD's key for the drafter's cores, if it has any of its own."""
    return {"drafter_cpus": ",".join(map(str, cores[1]))} if cores[1] else {}


class Fleet:
    """An engine for each system, all on the same cores, suspended unless it has been asked."""

    def __init__(self, systems: Sequence[System], cores: Sequence[int], folder: Path) -> None:
        self.systems = list(systems)
        self._cores, self._folder = cores, folder
        self._engines: dict[str, EngineProcess] = {}

    def start(self) -> None:
        """Start all engines, a few at a time on all cores; each is pinned once it is up."""
        waiting: list[EngineProcess] = []
        for system in self.systems:
            if len(waiting) == STARTS_AT_ONCE:
                self._wait_until_up(waiting.pop(0))
            log = self._folder / f"{system.name.replace(' ', '-').replace('/', '-')}.log"
            environment = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", **system.environment}
            engine = EngineProcess(
                [str(WORKER)],
                log,
                environment=environment | threads_on(self._cores),
                name=system.name,
                idle_stop=True,
            )
            self._engines[system.name] = engine
            engine.send("start", system=system)
            waiting.append(engine)
        for engine in waiting:
            self._wait_until_up(engine)

    def ask(self, name: str, request: Request) -> Turn:
        """Let one system generate while all others are suspended."""
        return self._engines[name].call("generate", request=request)

    def close(self) -> None:
        """End all engines; SSD's take their drafters along."""
        with ThreadPoolExecutor() as pool:  # vLLM takes seconds to exit
            list(pool.map(EngineProcess.close, self._engines.values()))

    def _wait_until_up(self, engine: EngineProcess) -> None:
        engine.receive(STARTUP_TIMEOUT_S)
        engine.pin(self._cores)


@contextmanager
def running(systems: Sequence[System], cores: Sequence[int], folder: Path) -> Iterator[Fleet]:
    """A fleet that is ended whatever happens."""
    fleet = Fleet(systems, cores, folder)
    try:
        with console.status(f"starting {len(systems)} engines"):
            fleet.start()
        yield fleet
    finally:
        fleet.close()


def run_script(main: Callable[[], None]) -> None:
    """Run a benchmark; an engine that fails, or what the user must mend, is its last word, without a traceback."""
    try:
        main()
    except (EngineFailed, UserError) as failure:
        console.print(str(failure), markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


class UserError(ValueError):
    """Something that the user must mend."""
