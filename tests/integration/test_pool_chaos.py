"""Engines with drafters that Ray places: the text is the target's while parts of Ray die."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import engines
import pytest
from engines import ON_V2, PAIR, Engine, assert_conclusive, request, texts
from fleet_watch import assert_bounded
from marks import needs_v2
from ray_cluster import AGENT, GCS_GONE_S, RayCluster, running
from waiting import wait_until

pytestmark = pytest.mark.timed

READY_S, ROUND_S, V2_ROUND_S = 60.0, 0.05, 0.15
WAIT_MS = 20
GONE_S = 10.0
ACTOR, WORKER = "ray::ForkedDrafterActor", "ray::Worker"
FORKED_AGENT = {"vllm_ssd.link.placed.AGENT_COMMAND": [*AGENT, "ForkedDrafterActor"]}
SIZES = {"branch_budget": 12}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with running(engines.server().address) as cluster:
        cluster.add_node(GPU=1, drafter=2, pooled=1)
        cluster.add_node(GPU=1)
        yield cluster


@pytest.fixture(scope="module")
def engine(cluster: RayCluster, start_engine: Callable[..., Engine]) -> Iterator[Engine]:
    engine = start_engine(
        speculative={
            "drafters": "ray",
            "num_drafters": 2,
            "min_drafters": 2,
            "drafter_resources": {"drafter": 1},
            "on_miss": "wait",
            "wait_ms": WAIT_MS,
            **SIZES,
        },
        patches=FORKED_AGENT,
    )
    engine.call("watch_fleet")
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
    """A run whose text is the target's, while all processes of a name are killed; no round waits longer than it may."""

    def run(kill: str = "", **least: int) -> None:
        engine.send("generate", requests=requests, min_seconds=ROUND_S)
        if kill:
            time.sleep(10 * ROUND_S)
            cluster.kill(kill)
        done = engine.receive()
        assert texts(done) == expected
        assert_bounded(engine.call("fleet_seen"), WAIT_MS)
        assert not done.counts["too_long"]
        if least:
            assert_conclusive(done, **least)

    return run


def pool_command(*arguments: str) -> str:
    """Output of `vllm-ssd pool`, which succeeds."""
    done = subprocess.run([*AGENT, "ForkedDrafterActor", "pool", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_target_s_workers_are_ray_s_too(
    cluster: RayCluster, start_engine: Callable[..., Engine], requests: list[dict[str, Any]], expected: Any
) -> None:
    """vLLM's Ray executor: a rank on each node, and a drafter beside them that ends when the server is killed."""
    engine = start_engine(
        forked=False,  # what imports vLLM imports Ray, which reads its environment once
        imports=["ray_on_cpu"],
        distributed_executor_backend="ray",
        tensor_parallel_size=2,
        speculative={**SIZES, "drafters": "ray", "drafter_resources": {"drafter": 1}, "on_miss": "skip"},
    )
    done = engine.generate(requests, min_seconds=ROUND_S)
    assert texts(done) == expected
    assert_conclusive(done, hits=30, accepted=30)
    assert not done.counts["too_long"]
    assert len(cluster.of(WORKER)) == 2 and len(cluster.of(ACTOR)) == 1
    engine.process.kill()
    wait_until(lambda: not cluster.of(WORKER) and not cluster.of(ACTOR), GONE_S)


@needs_v2
def test_a_pool_drafts_for_the_v2_runner(
    cluster: RayCluster, start_engine: Callable[..., Engine], requests: list[dict[str, Any]], expected: Any
) -> None:
    """Its drafter dies, and the courier hears from the next one."""
    config = json.dumps({**SIZES, "num_speculative_tokens": 5, "dtype": "float32", "kv_cache_memory": "64MiB"})
    resources = json.dumps({"pooled": 1})
    pool_command("up", "v2", "--model", str(PAIR / "drafter"), "--resources", resources, "--config", config)
    engine = start_engine(
        speculative={**SIZES, "drafters": "ray:v2", "on_miss": "skip"}, environment=ON_V2, patches=FORKED_AGENT
    )
    assert engine.call("is_async")
    done = engine.generate(requests, min_seconds=V2_ROUND_S)
    assert texts(done) == expected
    assert_conclusive(done, hits=30, accepted=30)
    assert not done.counts["too_long"] and not engine.call("has_joined_ray")
    engine.send("generate", requests=requests, min_seconds=V2_ROUND_S)
    time.sleep(5 * V2_ROUND_S)
    cluster.kill(ACTOR)
    assert texts(engine.receive()) == expected
    assert engine.call("wait_for_drafter", generation=2, timeout_s=READY_S)
    done = engine.generate(requests, min_seconds=V2_ROUND_S)
    assert texts(done) == expected
    assert_conclusive(done, hits=30, accepted=30)
    engine.close()
    assert pool_command("down", "v2") == "ended 1 drafters of v2\n"


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
    """All of Ray ends with it, and the drafters serve on; VLLM_SSD_TESTS_GCS_GONE_S=120 has Ray's own times."""
    await_drafters(engine)
    before = generations(engine)
    cluster.kill("gcs_server")
    killed_at = time.monotonic()
    while time.monotonic() - killed_at < GCS_GONE_S or cluster.of("raylet") or cluster.of(ACTOR):
        assert time.monotonic() - killed_at < GCS_GONE_S + READY_S
        run(hits=30, accepted=30)
    run(hits=30, accepted=30)
    assert generations(engine) == before
