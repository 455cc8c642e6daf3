"""Drafters that Ray places: the server's own and named pools, and what becomes of them when parts of Ray die."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import engines
import pytest
from listening_drafter import HELLO, OPTIONS, opening
from ray_cluster import AGENT, RayCluster, running
from waiting import wait_until

from vllm_ssd.link import placed
from vllm_ssd.link.handshake import DrafterFailed
from vllm_ssd.link.placed import PlacedFleet
from vllm_ssd.link.protocol import Close, Step
from vllm_ssd.link.roster import Wanted
from vllm_ssd.link.seat import Seat

pytestmark = pytest.mark.timed

LOGGER = logging.getLogger("test_pool")
KEYS = {"model": "fake", "num_speculative_tokens": 3, "fan_out": 3, "top_m": 5}
"""Of `OPTIONS`."""
READY_S, HITS_AGAIN_S, GONE_S, USED_S = 40.0, 2.0, 5.0, 5.0
ROUND_S = 0.05


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with running(engines.server().address) as cluster:
        cluster.add_node(drafter=2)
        yield cluster


@pytest.fixture
def place(cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., PlacedFleet]]:
    """Fleets of drafters with a fake model."""
    monkeypatch.setattr(placed, "AGENT_COMMAND", [*AGENT, "FakeDrafterActor"])
    fleets: list[PlacedFleet] = []

    def place(
        num_drafters: int = 2, *, resource: str = "drafter", pool: str = "", timeout_s: float = READY_S, **keys: Any
    ) -> PlacedFleet:
        wanted = Wanted(pool, num_drafters, {resource: 1}, KEYS | keys, 8, False, os.getpid(), 0)

        def connect(_: int, address: str, context: Any) -> Seat:
            return Seat(address, context, OPTIONS, HELLO, startup_timeout_s=timeout_s, logger=LOGGER)

        fleets.append(PlacedFleet(wanted, connect, min_ready=num_drafters, startup_timeout_s=timeout_s, logger=LOGGER))
        return fleets[-1]

    yield place
    for fleet in fleets:
        fleet.close()


def drafts(fleet: PlacedFleet, index: int) -> bool:
    """Whether a request that is opened now on a drafter gets a block."""
    fleet.poll()
    link = fleet.links[index]
    link.send(opening("a", epoch=time.monotonic_ns()))
    deadline = time.monotonic() + HITS_AGAIN_S
    while time.monotonic() < deadline:
        if any(at == index and push.blocks for at, push in fleet.poll(0.05)):
            return True
    return False


def connected(fleet: PlacedFleet) -> int:
    fleet.poll()
    return sum(link.connected for link in fleet.links)


def test_drafters_are_placed_replaced_and_end_with_the_target(
    cluster: RayCluster, place: Callable[..., PlacedFleet]
) -> None:
    fleet = place()
    fleet.wait_until_ready()
    assert drafts(fleet, 0) and drafts(fleet, 1)
    cluster.of("ray::FakeDrafterActor")[0].kill()
    wait_until(lambda: connected(fleet) == 1, HITS_AGAIN_S)
    assert drafts(fleet, 0 if fleet.links[0].connected else 1)
    wait_until(lambda: connected(fleet) == 2, READY_S)
    assert drafts(fleet, 0) and drafts(fleet, 1) and len(fleet) == 2
    fleet.close()
    wait_until(lambda: not cluster.of("ray::FakeDrafterActor"), GONE_S)


def test_too_few_resources_and_models_that_do_not_load_are_said(place: Callable[..., PlacedFleet]) -> None:
    poor, wrong = place(resource="gold"), place(1, model="a model that cannot be loaded")
    for fleet, says in (
        (poor, r'0 of 2 drafters: no node has \{"gold": 1\} free \(0 total, 0 free\)'),
        (wrong, "0 of 1 drafters: on .*: OSError: a model that cannot be loaded: no such"),
    ):
        wait_until(lambda fleet=fleet, says=says: re.search(says, fleet._roster.problem) is not None, READY_S)
        fleet._start_by = ended = time.monotonic()  # of `startup_timeout_s`, however long that is
        with pytest.raises(DrafterFailed, match=says):
            fleet.wait_until_ready()
        assert time.monotonic() - ended < 5


def command(*arguments: str) -> tuple[int, str]:
    """Exit status and output of `vllm-ssd pool`, whose drafters have a fake model."""
    done = subprocess.run([*AGENT, "FakeDrafterActor", "pool", *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_named_pool_grows_shrinks_and_ends(cluster: RayCluster, place: Callable[..., PlacedFleet]) -> None:
    """Its drafters join a target that runs, and leave it."""
    config = json.dumps({name: value for name, value in KEYS.items() if name != "model"})
    up = ("up", "chat", "--model", "fake", "--resources", '{"drafter": 1}', "--config", config, "--wait", "30")
    code, output = command(*up)
    assert code == 0 and "ready" in output and "chat" in output, output
    assert "the pool chat exists" in command(*up)[1]
    fleet = place(1, pool="chat")
    fleet.wait_until_ready()
    assert drafts(fleet, 0)
    assert command("add", "chat", "1", "--wait", "30")[0] == 0
    wait_until(lambda: connected(fleet) == 2, USED_S)
    assert drafts(fleet, 1)
    code, output = command("add", "chat", "1", "--wait", "0")
    assert code == 1 and '2 of 3 drafters: no node has {"drafter": 1} free (2 total, 0 free)' in output, output
    code, output = command("status", "chat", "--json")
    report = json.loads(output)
    assert code == 1 and report["model"] == "fake" and report["problem"]
    assert [one["targets"] for one in report["drafters"] if one["address"]] == [1, 1]
    (waiting,) = [one["name"] for one in report["drafters"] if not one["address"]]
    first = next(one["name"] for one in report["drafters"] if one["address"] == fleet.links[0]._name)
    assert command("remove", "chat", waiting, first) == (0, f"leaving: {waiting}, {first}\n")
    wait_until(lambda: fleet.links[0].leaving, USED_S)
    assert fleet.links[0].connected and drafts(fleet, 1), "it serves what it has"
    fleet.links[0].send(Step([Close("a")], 3))
    wait_until(lambda: len(cluster.of("ray::FakeDrafterActor")) == 1, READY_S)
    wait_until(lambda: connected(fleet) == 1, GONE_S)
    assert command("down", "chat") == (0, "ended 1 drafters of chat\n")
    wait_until(lambda: not connected(fleet), GONE_S)
    assert "there is no pool chat" in command("status", "chat")[1]


def test_a_cluster_that_asks_nobody_who_he_is_is_not_used(
    place: Callable[..., PlacedFleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(DrafterFailed, match="RAY_AUTH_MODE=token"):
        place().wait_until_ready()
    assert "RAY_AUTH_MODE=token" in command("status", "chat")[1]
