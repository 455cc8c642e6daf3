"""Two drafters: both draft, and when one dies or hangs its requests go to the other."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from engines import ON_V2, Engine, assert_conclusive, request, texts
from fleet_watch import assert_bounded
from marks import needs_v2

pytestmark = pytest.mark.timed

ROUND_S = {"v1": 0.03, "v2": 0.15}
TOKENS = {"v1": 400, "v2": 120}
"""A round of V2 takes longer, its kernels being interpreted; a run takes over 3 s after STEP."""
CALM_TOKENS = {"v1": 120, "v2": 40}
"""Of a run in which nothing happens."""
RESUME_S = 6.0
"""A drafter that is stopped goes on before it is taken for hung."""
STEP = 10
"""When a drafter is hit, of its run's steps."""
WAIT_MS = 20
NOTICED_S, HITS_AGAIN_S, MOVED_S = 0.05, 2.0, 3.0
RESTART_S = 90.0


@pytest.fixture(
    scope="module",
    params=["v1", pytest.param("v2", marks=needs_v2)],
)
def engine(request: pytest.FixtureRequest, start_engine: Callable[..., Engine]) -> Engine:
    """An engine with two drafters, on either runner; on V1 a miss waits."""
    wait = {"on_miss": "wait", "wait_ms": WAIT_MS} if request.param == "v1" else {"on_miss": "skip"}
    engine = start_engine(
        speculative={"num_drafters": 2, "branch_budget": 12} | wait,
        environment=ON_V2 if request.param == "v2" else None,
    )
    engine.call("watch_fleet")
    return engine


@pytest.fixture(scope="module")
def runner(engine: Engine) -> str:
    """Which runner the engine has."""
    return "v2" if engine.call("is_async") else "v1"


@pytest.fixture(scope="module")
def requests(prompts: Callable[..., list[list[int]]], runner: str) -> list[dict[str, Any]]:
    return [request(prompt, max_tokens=TOKENS[runner]) for prompt in prompts(8, 10, 60, seed=20)]


@pytest.fixture(scope="module")
def expected(target_alone: Engine, requests: list[dict[str, Any]]) -> list[list[list[int]]]:
    return texts(target_alone.generate(requests))


Run = Callable[[dict[int, int]], SimpleNamespace]


@pytest.fixture
def run_with(engine: Engine, runner: str, requests: list[dict[str, Any]], expected: Any) -> Run:
    """A run with signals to drafter 1, whose text is the target's, and what the fleet did in it."""

    def run_with(signals: dict[int, int]) -> SimpleNamespace:
        engine.call("fleet_seen")
        tokens = (TOKENS if signals else CALM_TOKENS)[runner]
        asked = [one | {"params": one["params"] | {"max_tokens": tokens}} for one in requests]
        resume_s = RESUME_S if signal.SIGSTOP in signals.values() else None
        run = engine.generate(asked, signals=signals, signalled=1, min_seconds=ROUND_S[runner], resume_s=resume_s)
        assert texts(run) == [[text[:tokens]] for (text,) in expected]
        assert_conclusive(run, hits=30, accepted=30)
        seen = engine.call("fleet_seen")
        if runner == "v1":
            assert_bounded(seen, WAIT_MS)
        return SimpleNamespace(at=run.signals_at, seconds=run.seconds, **vars(seen))

    return run_with


def hit_rate(outcomes: list[tuple[float, str, int, bool]]) -> float:
    assert len(outcomes) >= 20, f"inconclusive: {len(outcomes)} outcomes"
    return sum(hit for *_, hit in outcomes) / len(outcomes)


def assert_moved(seen: SimpleNamespace, within_s: float, *, to_hit: bool) -> None:
    """Every request of drafter 1 goes on, or hits, on the other within the time, and those of the other as before."""
    (at, *_) = seen.at
    owners = {name: index for when, name, index, _ in seen.outcomes if when < at}
    moved = [name for name, index in owners.items() if index == 1]
    stayed = [name for name, index in owners.items() if index == 0]
    assert moved and stayed, f"inconclusive: {owners}"
    for name in moved:
        again = [(when - at, hit) for when, other, index, hit in seen.outcomes if other == name and index == 0]
        assert any(hit for _, hit in again), name
        after_s = next(after_s for after_s, hit in again if hit or not to_hit)
        assert after_s <= within_s, (name, after_s)
    before = [outcome for outcome in seen.outcomes if outcome[1] in stayed and outcome[0] < at]
    after = [outcome for outcome in seen.outcomes if outcome[1] in stayed and outcome[0] > at]
    assert all(index == 0 for _, _, index, _ in after)
    assert hit_rate(after) >= hit_rate(before) - 0.15


def test_both_draft(run_with: Run) -> None:
    seen = run_with({})
    for index in (0, 1):
        assert hit_rate([outcome for outcome in seen.outcomes if outcome[2] == index]) > 0.2
    assert not seen.lost


def test_stopped(engine: Engine, run_with: Run) -> None:
    """SIGSTOP: its requests move while the link stays, and it is used again when it goes on."""
    seen = run_with({STEP: signal.SIGSTOP})
    assert not seen.lost
    assert_moved(seen, MOVED_S, to_hit=False)
    assert engine.call("wait_for_answer", index=1, timeout_s=RESTART_S)
    again = run_with({})
    assert not again.lost
    assert hit_rate([outcome for outcome in again.outcomes if outcome[2] == 1]) > 0.2


def test_killed(engine: Engine, runner: str, run_with: Run) -> None:
    """kill -9: noticed at once, its requests go on elsewhere, and it comes back."""
    before = engine.call("drafter", index=1)
    seen = run_with({STEP: signal.SIGKILL})
    ((lost_at, index, _),) = seen.lost
    round_s = max(ROUND_S[runner], seen.seconds[STEP])  # V1 looks once a round; V2's interpreted kernels hold the GIL
    assert index == 1 and lost_at - seen.at[0] <= NOTICED_S + round_s
    assert_moved(seen, HITS_AGAIN_S, to_hit=True)
    assert engine.call("wait_for_drafter", generation=before.generation + 1, timeout_s=RESTART_S, index=1)
