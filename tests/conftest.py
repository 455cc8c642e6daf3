"""Engines and prompts that several test modules share."""

from __future__ import annotations

import gc
import inspect
import random
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from engines import ON_GPU, PAIR, Engine, share_servers

CORPUS = ("argparse", "ast", "collections", "configparser", "csv", "dataclasses", "decimal", "difflib")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "timed: needs the machine to itself: the suite runs it by itself")
    # What an example takes is the machine's affair.
    slow = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile("any machine", deadline=None, suppress_health_check=slow)
    hypothesis.settings.load_profile("any machine")
    if config.getoption("numprocesses", None) and not ON_GPU and "tests" in config.args:
        share_servers()  # for all test processes, which this one starts


def pytest_collection_finish() -> None:
    """Have the garbage collector, which vLLM calls at each start, leave alone what collection has imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def start_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Engine]]:
    """Start engines that live until the session ends or their user closes them."""
    folder = tmp_path_factory.mktemp("engines")
    engines: list[Engine] = []

    def start(**arguments: Any) -> Engine:
        engines.append(Engine(folder / f"{len(engines)}.log", **arguments))
        return engines[-1]

    yield start
    with ThreadPoolExecutor() as pool:  # vLLM takes seconds to exit
        list(pool.map(Engine.close, engines))


@pytest.fixture(scope="session")
def shared_engine(start_engine: Callable[..., Engine]) -> Callable[..., Engine]:
    """Engines that several modules use, one a configuration: started when first asked for, and again if they ended."""
    engines: dict[str, Engine] = {}

    def get(**arguments: Any) -> Engine:
        key = repr(sorted(arguments.items()))
        if key not in engines or engines[key].process.poll() is not None:
            engines[key] = start_engine(**arguments)
        return engines[key]

    return get


@pytest.fixture(scope="session")
def target_alone(shared_engine: Callable[..., Engine]) -> Engine:
    """The bundled target without speculation, which every greedy text is compared with."""
    return shared_engine()


@pytest.fixture(scope="session")
def draft_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundled drafter that a test may hide from the next start."""
    return shutil.copytree(PAIR / "drafter", tmp_path_factory.mktemp("models") / "drafter")


@pytest.fixture(scope="module")
def ssd_engine(shared_engine: Callable[..., Engine], draft_model: Path) -> Iterator[Engine]:
    """The bundled pair with SSD on the V1 runner, at `on_miss` "auto"; a module may change that with "set_config"."""
    engine = shared_engine(speculative={"model": str(draft_model), "branch_budget": 12})
    yield engine
    if engine.process.poll() is None:
        engine.call("set_config", on_miss="auto")


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a target of known next-token probabilities and of a drafter that is somewhat like it."""
    from tiny_models import write_pair

    return write_pair(tmp_path_factory.mktemp("tiny"), noise=0.2)


@pytest.fixture(scope="session")
def corpus() -> list[int]:
    """Token ids of a part of the standard library, as the bundled pair sees it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(PAIR / "target" / "tokenizer.json"))
    text = "".join(inspect.getsource(__import__(name)) for name in CORPUS)
    return tokenizer.encode(text).ids


@pytest.fixture(scope="session")
def prompts(corpus: list[int]) -> Callable[..., list[list[int]]]:
    """Pieces of the corpus: `prompts(number, shortest, longest, seed)`."""

    def cut(number: int, shortest: int, longest: int, seed: int = 0) -> list[list[int]]:
        rng = random.Random(seed)
        starts = [rng.randrange(len(corpus) - longest) for _ in range(number)]
        return [corpus[start : start + rng.randint(shortest, longest)] for start in starts]

    return cut
