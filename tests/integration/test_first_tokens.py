"""A server that has just started is as fast as its drafts allow: rounds in which the drafter reads teach nothing."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from statistics import median

import pytest
from engines import Engine, assert_conclusive, request, texts

pytestmark = pytest.mark.timed

ROUND_S = 0.014
"""Rounds are stretched to this: rates are then tokens a round, whatever else the machine does, and K = 5 is best."""
NUM_PROMPTS, NUM_TOKENS = 8, 200
READING_ROUNDS = 16
"""The drafter is held for so long, as if it read a long prompt."""


@pytest.fixture
def skipping(ssd_engine: Engine) -> Iterator[Engine]:
    ssd_engine.call("set_config", on_miss="skip")
    yield ssd_engine
    ssd_engine.call("set_config", adaptive=False, on_miss="auto")


def test_the_first_tokens_come_as_fast_as_with_the_best_number_of_drafts(
    skipping: Engine, target_alone: Engine, prompts: Callable[..., list[list[int]]]
) -> None:
    """Each prompt on a server that has just started, and at the K that is best: 0.95 of its rate in the median.

    A single prompt may come slower where blocks are late. Were the rounds in which the drafter is held to count, the
    median would be 0.8.
    """
    requests = [request(prompt, max_tokens=NUM_TOKENS) for prompt in prompts(NUM_PROMPTS, 60, 250, seed=9)]
    expected = texts(target_alone.generate(requests))
    held = {1: signal.SIGSTOP, 1 + READING_ROUNDS: signal.SIGCONT}
    rounds: dict[bool, list[int]] = {True: [], False: []}
    for wanted, text in zip(requests, expected):
        for adaptive in (True, False):
            skipping.call("set_config", adaptive=adaptive)
            skipping.call("forget_rounds")
            run = skipping.generate([wanted], signals=held, min_seconds=ROUND_S)
            assert texts(run) == [text]
            assert_conclusive(run, hits=10, accepted=10)
            rounds[adaptive].append(len(run.seconds))
    ratios = [best / fresh for fresh, best in zip(rounds[True], rounds[False])]
    assert median(ratios) >= 0.9, rounds
