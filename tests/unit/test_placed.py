"""Drafters that an agent names: links follow its rosters, and the agent may die or talk nonsense."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from listening_drafter import HELLO, OPTIONS
from test_fleet import make, open_all
from test_tenants import Drafter, hits
from waiting import wait_until

from vllm_ssd.drafter import keeper
from vllm_ssd.drafter.keeper import Keeper
from vllm_ssd.link import placed, process, remote
from vllm_ssd.link.handshake import DrafterFailed
from vllm_ssd.link.placed import PlacedFleet
from vllm_ssd.link.roster import Listed, Report, Roster, Wanted
from vllm_ssd.link.seat import Seat

LOGGER = logging.getLogger("test_placed")
AGENT = """
import socket, sys, time
with open(sys.argv[1] + ".starts", "a") as starts:
    starts.write("x")
target = socket.socket(fileno=int(sys.argv[2]))
with open(sys.argv[1], "rb") as said:
    target.sendall(said.read())
time.sleep(60)
"""
EMPTY_POOL = """
import sys, types
import vllm_ssd.pool

class Watch:
    def look(self, handles, timeout_s):
        return {}, set()

cluster = types.ModuleType("vllm_ssd.pool.cluster")
cluster.Watch, cluster.of_pool = Watch, lambda pool: {}
cluster.NoCluster = cluster.BadResources = RuntimeError
cluster.join = lambda unauthenticated: None
cluster.is_on_a_node = lambda: True
vllm_ssd.pool.cluster = sys.modules["vllm_ssd.pool.cluster"] = cluster
from vllm_ssd.pool import agent
agent.POLL_S = 0.02
sys.exit(agent.main(int(sys.argv[1]), sys.argv[2]))
"""
OUTSIDE_RAY = """
import sys
from vllm_ssd.pool import agent, cluster
cluster.join = lambda unauthenticated: None
sys.exit(agent.main(int(sys.argv[1]), sys.argv[2]))
"""
SOON_S = 30.0


@pytest.fixture
def drafters(credential: Path) -> Iterator[list[Drafter]]:
    drafters = [Drafter(credential) for _ in range(3)]
    yield drafters
    for drafter in drafters:
        drafter.stop()


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What agents say at once when they start; how often they did is in the file beside it."""
    path = tmp_path / "said"
    path.write_bytes(b"")
    monkeypatch.setattr(placed, "AGENT_COMMAND", [sys.executable, "-S", "-c", AGENT, str(path)])
    monkeypatch.setattr(placed, "BACKOFF_S", (0.05, 60.0))
    monkeypatch.setattr(remote, "RETRY_S", (0.05, 0.2))
    for module in (process, sys.modules["vllm_ssd.link.seat"]):
        monkeypatch.setattr(module, "WATCH_S", 0.05)
    return path


@pytest.fixture
def start(said: Path) -> Iterator[Callable[..., PlacedFleet]]:
    fleets: list[PlacedFleet] = []

    def start(
        min_ready: int = 1, timeout_s: float = SOON_S, pool: str = "", resources: dict[str, float] | None = None
    ) -> PlacedFleet:
        def connect(_: int, address: str, context) -> Seat:
            return Seat(address, context, OPTIONS, HELLO, startup_timeout_s=timeout_s, logger=LOGGER)

        wanted = Wanted(pool, 2, resources or {"GPU": 1}, {}, 8, False, os.getpid(), 0)
        fleets.append(PlacedFleet(wanted, connect, min_ready=min_ready, startup_timeout_s=timeout_s, logger=LOGGER))
        return fleets[-1]

    yield start
    for fleet in fleets:
        fleet.close()


def roster(credential: Path, *listed: tuple[str, Drafter, bool]) -> Roster:
    named = [Listed(name, f"127.0.0.1:{drafter.address[1]}", leaving) for name, drafter, leaving in listed]
    return Roster(named, credential=credential.read_text())


def starts(said: Path) -> int:
    path = Path(f"{said}.starts")
    return len(path.read_text()) if path.exists() else 0


def test_a_drafter_that_joins_gets_a_link_and_one_that_leaves_gives_its_up(
    start: Callable[..., PlacedFleet], drafters: list[Drafter], credential: Path
) -> None:
    fleet = start()
    one, two, three = drafters
    fleet.follow(roster(credential, ("a", one, False), ("b", two, False)))
    fleet.wait_until_ready()
    wait_until(lambda: all(link.poll() is not None and link.connected for link in fleet.links), SOON_S)
    assert len(fleet) == 2 and all(hits(link) for link in fleet.links)
    fleet.follow(roster(credential, ("b", two, True)))
    assert not fleet.links[0].connected and fleet.links[1].leaving and hits(fleet.links[1])
    wait_until(lambda: len(one.tenants) == 0, SOON_S)
    time.sleep(0.3)
    assert not fleet.links[0].connected and len(one.tenants) == 0, "it connected to one that had left"
    fleet.follow(roster(credential, ("b", two, True), ("c", three, False)))
    wait_until(lambda: fleet.links[0].poll() is not None and fleet.links[0].connected, SOON_S)
    assert len(fleet) == 2 and hits(fleet.links[0]) and len(three.tenants) == 1


def test_a_drafter_that_is_leaving_gets_none_of_a_new_targets_requests(
    start: Callable[..., PlacedFleet], drafters: list[Drafter], credential: Path
) -> None:
    fleet = start()
    fleet.follow(roster(credential, ("a", drafters[0], True), ("b", drafters[1], False)))
    assert [link.leaving for link in fleet.links] == [True, False]


def test_drafters_stay_when_the_agent_knows_none(
    start: Callable[..., PlacedFleet], drafters: list[Drafter], credential: Path
) -> None:
    fleet = start()
    fleet.follow(roster(credential, ("a", drafters[0], False)))
    fleet.wait_until_ready()
    fleet.follow(Roster(problem="Ray is gone", fatal=True))
    fleet.wait_until_ready()
    assert hits(fleet.links[0])


def test_an_agent_is_heard_and_started_again(
    start: Callable[..., PlacedFleet], said: Path, drafters: list[Drafter], credential: Path
) -> None:
    said.write_bytes(msgspec.json.encode(roster(credential, ("a", drafters[0], False))) + b"\n")
    fleet = start()
    fleet.wait_until_ready()
    wait_until(lambda: starts(said) == 1, SOON_S)
    fleet._agent._process.kill()
    wait_until(lambda: starts(said) == 2, SOON_S)
    assert fleet.links[0].generation == 1 and hits(fleet.links[0])
    agent = fleet._agent._process
    fleet.close()
    assert agent.wait(SOON_S)


@pytest.mark.parametrize("nonsense", [b"{]\n", b'{"drafters": 3}\n', b'{"drafters": [["a", "b"]]}\n'])
def test_nonsense_ends_an_agent(start: Callable[..., PlacedFleet], said: Path, nonsense: bytes) -> None:
    said.write_bytes(nonsense)
    fleet = start(timeout_s=1.0)
    wait_until(lambda: starts(said) >= 2, SOON_S)
    assert len(fleet) == 0


def test_what_goes_wrong_with_a_roster_ends_the_agent_and_not_its_keeper(
    start: Callable[..., PlacedFleet], said: Path, drafters: list[Drafter], credential: Path
) -> None:
    """A wrong address, then a link that cannot be made; the drafter of the roster that follows is used."""
    named = roster(credential, ("b", drafters[0], False))
    wrong = msgspec.structs.replace(named, drafters=[Listed("a", "nowhere")])
    said.write_bytes(msgspec.json.encode(wrong) + b"\n")
    fleet = start()
    wait_until(lambda: starts(said) >= 2, SOON_S)
    connect, failures = fleet._connect, iter([RuntimeError("can't start new thread"), OSError("no space left")])

    def fail(*args):
        for failure in failures:
            raise failure
        return connect(*args)

    fleet._connect = fail
    said.write_bytes(msgspec.json.encode(named) + b"\n")
    fleet.wait_until_ready()
    assert len(fleet) == 1 and hits(fleet.links[0])


@pytest.mark.parametrize(
    ("roster", "says"),
    [
        (Roster(problem="no cluster", fatal=True), "^ssd: no cluster$"),
        (Roster([], problem="0 of 2 drafters"), rf"^ssd: 0 of 2 drafters \(startup_timeout_s={SOON_S:g}\)$"),
        (None, "Ray has not answered"),
    ],
)
def test_a_start_without_drafters_says_why(
    start: Callable[..., PlacedFleet], said: Path, roster: Roster | None, says: str
) -> None:
    said.write_bytes(msgspec.json.encode(roster) + b"\n" if roster else b"")
    fleet = start()
    wait_until(lambda: fleet._roster == (roster or Roster()), SOON_S)
    fleet._start_by = time.monotonic()
    with pytest.raises(DrafterFailed, match=says):
        fleet.wait_until_ready()
    start(min_ready=0).wait_until_ready()


def test_without_ray_the_agent_says_how_to_get_it(
    start: Callable[..., PlacedFleet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(placed, "AGENT_COMMAND", [sys.executable, "-m", "vllm_ssd.pool"])
    with pytest.raises(DrafterFailed, match=r"pip install 'vllm-ssd\[ray\]'"):
        start().wait_until_ready()


def test_resources_that_ray_does_not_take_are_said_at_once(
    start: Callable[..., PlacedFleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placed, "AGENT_COMMAND", [sys.executable, "-c", OUTSIDE_RAY])
    fleet = start(timeout_s=60.0, resources={"gold": 1e-5})
    with pytest.raises(DrafterFailed, match=r'^ssd: Ray cannot reserve \{"gold": 1e-05\}: .*precision'):
        fleet.wait_until_ready()


def test_what_is_missing_is_said_again(
    start: Callable[..., PlacedFleet], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Though nothing changes: it may have been said before anybody wanted to hear it."""
    monkeypatch.setattr(placed, "AGENT_COMMAND", [sys.executable, "-c", EMPTY_POOL])
    monkeypatch.setattr(placed, "QUIET_S", 0.1)
    monkeypatch.setattr(placed, "LOG_INTERVAL_S", 0.2)
    with caplog.at_level(logging.WARNING, LOGGER.name):
        start(min_ready=0, pool="chat")
        wait_until(lambda: caplog.text.count("SSD: 0 drafters: Ray has no pool chat") >= 2, SOON_S)


def test_a_drafter_that_leaves_gets_no_new_requests() -> None:
    links, client, _ = make(2)
    (live,) = open_all(client, [[1, 2]])
    leaving = links[live.member]
    leaving.leaving = True
    assert client.open(live, [1, 2, 3]) and links[live.member] is leaving, "a request that it has stays"
    for i in range(8):
        new = client.add(f"new {i}", 0.0)
        assert client.open(new, [i]) and links[new.member] is not leaving
    (only,), alone, _ = make(1)
    only.leaving = True
    assert not alone.open(alone.add("a", 0.0), [1])


def test_a_credential_does_not_outlive_a_keeper_that_ends_while_the_drafter_loads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key = tmp_path / "folder" / "ssd.pem"
    key.parent.mkdir()
    key.touch()
    ended = threading.Event()
    monkeypatch.setattr(keeper.os, "_exit", lambda status: ended.set())
    ours, theirs = socket.socketpair()
    Keeper(msgspec.structs.replace(OPTIONS, keeper=theirs.detach(), registry="127.0.0.1:1", key=str(key)))
    assert key.exists()
    ours.close()
    assert ended.wait(SOON_S) and not key.parent.exists() and tmp_path.exists()


@pytest.mark.parametrize(
    ("ray_lives", "has_targets", "ends"), [(True, True, True), (False, False, True), (False, True, False)]
)
def test_a_drafter_ends_with_its_keeper_unless_ray_is_gone(
    monkeypatch: pytest.MonkeyPatch, ray_lives: bool, has_targets: bool, ends: bool
) -> None:
    monkeypatch.setattr(keeper, "REPORT_S", 0.05)
    registry = socket.create_server(("127.0.0.1", 0))
    ours, theirs = socket.socketpair()
    host, port = registry.getsockname()
    if not ray_lives:
        registry.close()
    options = msgspec.structs.replace(OPTIONS, keeper=theirs.detach(), registry=f"{host}:{port}")
    ended = threading.Event()

    class Tenants:
        load = int(has_targets), 0

    kept = Keeper(options)
    kept.serve("127.0.0.1:7", Tenants(), ended.set)
    with ours.makefile("rb") as lines:
        reports = [msgspec.json.decode(lines.readline(), type=Report) for _ in range(4)]
    assert [report.address for report in reports] == ["", "127.0.0.1:7", "127.0.0.1:7", "127.0.0.1:7"]
    assert reports[-1].targets == has_targets and not ended.is_set()
    ours.close()
    assert ended.wait(SOON_S if ends else 0.5) == ends
    Tenants.load = 0, 0
    assert ended.wait(SOON_S)
    registry.close()
