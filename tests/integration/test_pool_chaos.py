"""An engine with drafters that Ray places: its text is the target's while parts of Ray die."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import engines
import pytest
from engines import Engine, assert_conclusive, request, texts
from ray_cluster import AGENT, RECONNECT_S, RayCluster, running, wait_until

pytestmark = pytest.mark.timed

READY_S, ROUND_S = 60.0, 0.05
ACTOR = "ray::ForkedDrafterActor"


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with running(engines.server().address) as cluster:
        cluster.add_node(drafter=2)
        yield cluster


@pytest.fixture(scope="module")
def engine(cluster: RayCluster, start_engine: Callable[..., Engine]) -> Iterator[Engine]:
    engine = start_engine(
        speculative={
            "drafters": "ray",
            "num_drafters": 2,
            "min_drafters": 2,
            "drafter_resources": {"drafter": 1},
            "branch_budget": 12,
            "on_miss": "skip",
        },
        patches={"vllm_ssd.link.placed.AGENT_COMMAND": [*AGENT, "ForkedDrafterActor"]},
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def requests(prompts: Callable[..., list[list[int]]]) -> list[dict[str, Any]]:
    return [request(prompt, max_tokens=40) for prompt in prompts(6, 10, 60, seed=22)]


@pytest.fixture(scope="module")
def expected(target_alone: Engine, requests: list[dict[str, Any]]) -> list[list[list[int]]]:
    return texts(target_alone.generate(requests))


@pytest.fixture
def run(cluster: RayCluster, engine: Engine, requests: list[dict[str, Any]], expected: Any) -> Callable[..., None]:
    """A run whose text is the target's, while all processes of a name are killed."""

    def run(kill: str = "", **least: int) -> None:
        engine.send("generate", requests=requests, min_seconds=ROUND_S)
        if kill:
            time.sleep(10 * ROUND_S)
            cluster.kill(kill)
        done = engine.receive()
        assert texts(done) == expected
        if least:
            assert_conclusive(done, **least)

    return run


def await_drafters(engine: Engine) -> None:
    for index in (0, 1):
        assert engine.call("wait_for_drafter", generation=1, timeout_s=READY_S, index=index)


def generations(engine: Engine) -> list[int]:
    """Of both drafters, 0 for one that is not there."""
    drafters = [engine.call("drafter", index=index) for index in (0, 1)]
    return [drafter.generation * drafter.connected for drafter in drafters]


def test_an_actor_dies(engine: Engine, run: Callable[..., None]) -> None:
    run(hits=30, accepted=30)
    assert not engine.call("has_joined_ray")
    run(kill=ACTOR, hits=5, accepted=5)
    await_drafters(engine)


def test_all_raylets_die(cluster: RayCluster, engine: Engine, run: Callable[..., None]) -> None:
    """It decodes without drafters, and with those of a node that comes."""
    run(kill="raylet")
    deadline = time.monotonic() + READY_S
    while generations(engine) != [0, 0]:  # they end when they have heard of their actors' end
        assert time.monotonic() < deadline
        run()
    run()
    cluster.add_node(drafter=2)
    await_drafters(engine)
    run(hits=30, accepted=30)


def test_the_gcs_dies(cluster: RayCluster, engine: Engine, run: Callable[..., None]) -> None:
    """All of Ray ends with it, and the drafters serve on."""
    await_drafters(engine)
    before = generations(engine)
    cluster.kill("gcs_server")
    wait_until(lambda: not cluster.of("raylet") and not cluster.of(ACTOR), 10 * RECONNECT_S)
    run(hits=30, accepted=30)
    assert generations(engine) == before
