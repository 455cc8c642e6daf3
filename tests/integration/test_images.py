"""Requests with images beside requests of text alone: the drafter sees neither the former nor what they show."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import ON_V2, Engine, assert_conclusive, assert_counts_agree, request, texts
from marks import needs_v2
from tiny_models import SEEING_WORDS, VOCAB_SIZE, write_seeing, write_with_words

COLOURS = [(250, 20, 20), (10, 40, 240)]
LIMITS: dict[str, Any] = {"max_model_len": 128, "limit_mm_per_prompt": {"image": 1}}


@pytest.fixture(scope="module")
def seeing_pair(tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The target of the tiny pair with an encoder of images, and its drafter, with the words of both."""
    folder = tmp_path_factory.mktemp("seeing")
    target = write_seeing(tiny_pair[0], folder / "target")
    return target, write_with_words(tiny_pair[1], folder / "drafter", SEEING_WORDS, VOCAB_SIZE)


@pytest.fixture(scope="module")
def reference(start_engine: Callable[..., Engine], seeing_pair: tuple[Path, Path]) -> Iterator[Engine]:
    """The target alone."""
    engine = start_engine(model=str(seeing_pair[0]), **LIMITS)
    yield engine
    engine.close()


@pytest.fixture(
    params=[
        "V1",
        pytest.param("V2", marks=needs_v2),
    ],
)
def engine(
    request: pytest.FixtureRequest, start_engine: Callable[..., Engine], seeing_pair: tuple[Path, Path]
) -> Iterator[Engine]:
    engine = start_engine(
        model=str(seeing_pair[0]),
        speculative={"model": str(seeing_pair[1]), "on_miss": "skip"},
        environment=ON_V2 if request.param == "V2" else {},
        **LIMITS,
    )
    yield engine
    engine.close()


def test_images_beside_text(engine: Engine, reference: Engine) -> None:
    """Only the rows of text are drafted for, and the log says once that the others are not."""
    rng = random.Random(5)
    prompts = [[rng.randrange(1, VOCAB_SIZE - 1) for _ in range(rng.randint(6, 20))] for _ in range(4)]
    with_images = [
        request(prompt, max_tokens=24, join_step=i, image=colour)
        for i, (prompt, colour) in enumerate(zip(prompts, COLOURS))
    ]
    alone = engine.generate(with_images, lockstep=1.0)
    assert texts(alone) == texts(reference.generate(with_images))
    drafted = ("hits", "misses", "draft_tokens", "drafter_prompt_tokens")
    assert not any(alone.counts[name] for name in drafted), alone.counts
    assert_counts_agree(alone)

    mixed = [*with_images, *(request(prompt, max_tokens=40, join_step=i) for i, prompt in enumerate(prompts[2:]))]
    run = engine.generate(mixed, lockstep=1.0)
    assert texts(run) == texts(reference.generate(mixed))
    assert_conclusive(run, hits=10, accepted=10)
    told = sum(run.counts[name] for name in ("hits", "misses", "late", "accepted_tokens"))
    assert told <= sum(asked["params"]["max_tokens"] for asked in mixed[2:]), "more rounds than those of text"
    assert engine.log.read_text().count("runs without drafts") == 1

    exchanged = [asked | {"image": colour} for asked, colour in zip(with_images, reversed(COLOURS))]
    assert texts(reference.generate(exchanged)) != texts(alone), "inconclusive: the images change nothing"
