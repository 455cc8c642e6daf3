"""Engines and prompts that several test modules share."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engines import PAIR, Engine

CORPUS = ("argparse", "ast", "collections", "configparser", "csv", "dataclasses", "decimal", "difflib")


@pytest.fixture(scope="session")
def start_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Engine]]:
    """Start engines that live until the session ends or their user closes them."""
    folder = tmp_path_factory.mktemp("engines")
    engines: list[Engine] = []

    def start(**arguments: Any) -> Engine:
        engines.append(Engine(folder / f"{len(engines)}.log", **arguments))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


@pytest.fixture(scope="session")
def target_alone(start_engine: Callable[..., Engine]) -> Engine:
    """The bundled target without speculation, which every greedy text is compared with."""
    return start_engine()


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
