"""The drafter's death is a non-event: the text stays, the drafter comes back, hits resume."""

from __future__ import annotations

import os
import signal
import statistics
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines import Engine, assert_conclusive, request, texts

ROUND_S = 0.05
HANG_S = 3.0
RESTART_S = 90.0
"""Longest time from a drafter's death to the next one's handshake."""


@pytest.fixture(scope="module")
def impatient_engine(ssd_engine: Engine) -> Iterator[Engine]:
    """The engine, which waits at misses, with short times until a drafter counts as hung and is started again."""
    times = {"vllm_ssd.link.process.HANG_S": HANG_S, "vllm_ssd.link.process.BACKOFF_S": (0.2, 1.0)}
    before = ssd_engine.call("patch", **times)
    ssd_engine.call("set_config", on_miss="wait")
    yield ssd_engine
    if ssd_engine.process.poll() is None:
        ssd_engine.call("patch", **before)


@pytest.fixture
def engine(impatient_engine: Engine, requests: list[dict[str, Any]]) -> Engine:
    """The engine, with a drafter that is alive and hits."""
    assert impatient_engine.call("wait_for_drafter", generation=1, timeout_s=RESTART_S)
    assert_conclusive(impatient_engine.generate(requests[:2], lockstep=1.0), hits=3)
    return impatient_engine


@pytest.fixture(scope="module")
def requests(prompts: Callable[..., list[list[int]]]) -> list[dict[str, Any]]:
    return [request(prompt, max_tokens=60, join_step=3 * i) for i, prompt in enumerate(prompts(16, 10, 100, seed=20))]


@pytest.fixture(scope="module")
def expected(target_alone: Engine, requests: list[dict[str, Any]]) -> list[list[list[int]]]:
    return texts(target_alone.generate(requests))


def assert_recovers(engine: Engine, before: SimpleNamespace, requests: list[dict[str, Any]], expected: Any) -> None:
    """A new drafter comes up, another process than `before`, and its drafts are used."""
    assert engine.call("wait_for_drafter", generation=before.generation + 1, timeout_s=RESTART_S)
    assert engine.call("drafter").pid != before.pid
    run = engine.generate(requests, lockstep=1.0)
    assert texts(run) == expected
    assert_conclusive(run, hits=30, accepted=30)
    assert engine.call("counts")["restarts"] >= before.generation


def slow_round_s(run: SimpleNamespace) -> float:
    """What one round in twenty exceeds: a busy machine may hold up any single one."""
    return statistics.quantiles(run.seconds, n=20)[-1]


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(0, id="before-the-prompt"),
        pytest.param(25, id="amid-generation", marks=pytest.mark.compat),
    ],
)
def test_killed(engine: Engine, requests: list[dict[str, Any]], expected: Any, step: int) -> None:
    before = engine.call("drafter")
    run = engine.generate(requests, signals={step: signal.SIGKILL}, min_seconds=ROUND_S)
    assert texts(run) == expected
    assert_recovers(engine, before, requests, expected)


@pytest.mark.timed
def test_hung(engine: Engine, requests: list[dict[str, Any]], expected: Any) -> None:
    before = engine.call("drafter")
    run = engine.generate(requests, signals={25: signal.SIGSTOP}, min_seconds=ROUND_S)
    assert texts(run) == expected
    assert sum(run.seconds[25:]) + ROUND_S * len(run.seconds[25:]) > HANG_S, "inconclusive: over before it could hang"
    assert slow_round_s(run) < 0.2, "rounds waited for a drafter that hangs"
    assert_recovers(engine, before, requests, expected)


@pytest.mark.timed
def test_slow(engine: Engine, requests: list[dict[str, Any]], expected: Any) -> None:
    """A drafter that runs a tenth of the time is neither waited for nor given up."""
    before = engine.call("drafter")
    engine.send("generate", requests=requests, min_seconds=ROUND_S)
    finished = threading.Event()
    throttle = threading.Thread(target=run_a_tenth_of_the_time, args=(before.pid, finished))
    throttle.start()
    try:
        run = engine.receive()
    finally:
        finished.set()
        throttle.join()
    assert texts(run) == expected
    assert slow_round_s(run) < 0.2, "rounds waited for a slow drafter"
    assert engine.call("drafter").generation == before.generation


def run_a_tenth_of_the_time(pid: int, finished: threading.Event) -> None:
    while not finished.wait(0.05):
        os.kill(pid, signal.SIGSTOP)
        finished.wait(0.45)
        os.kill(pid, signal.SIGCONT)


def test_killed_and_unable_to_start_again(
    engine: Engine, draft_model: Path, requests: list[dict[str, Any]], expected: Any
) -> None:
    before = engine.call("drafter")
    hidden = draft_model.rename(draft_model.with_name("hidden"))
    try:
        run = engine.generate(requests, signals={10: signal.SIGKILL}, min_seconds=ROUND_S)
        assert texts(run) == expected
        assert not engine.call(
            "wait_for_drafter", generation=before.generation + 1, timeout_s=5.0
        )  # several starts have failed
        assert texts(engine.generate(requests)) == expected
    finally:
        hidden.rename(draft_model)
    assert_recovers(engine, before, requests, expected)
