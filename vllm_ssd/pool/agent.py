"""The agent of one target, which asks Ray for drafters and tells the target where they are.

It is a separate process because a Ray driver ends when the GCS does; the target then starts another agent, and keeps
using the drafters that it has.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any

import msgspec

from vllm_ssd.link.credential import new_credential
from vllm_ssd.link.lifetime import Ancestor, die_with
from vllm_ssd.link.roster import Listed, Roster, Wanted

POLL_S = 1.0
AGAIN_S = 5.0
"""Time after which a permanently dead actor is replaced."""


def main(fd: int, wanted_json: str, actor: type | None = None) -> int:
    """Send rosters to the target at the other end of the socket `fd`, for as long as it exists."""
    wanted = msgspec.json.decode(wanted_json, type=Wanted)
    die_with(wanted.parent_pid)
    target = socket.socket(fileno=fd)
    threading.Thread(target=_end_with, args=(target,), daemon=True).start()
    try:
        from vllm_ssd.pool import cluster
    except ImportError:
        _tell(target, Roster(problem="drafters on Ray need Ray: pip install 'vllm-ssd[ray]'", fatal=True))
        return 1
    server, told = Ancestor(wanted.server_pid), None
    try:
        cluster.join(wanted.unauthenticated)
        agent = Agent(wanted, actor)
        while not server.has_ended():
            looked_at = time.monotonic()
            roster = agent.look()
            if roster != told or roster.problem:  # repeat problems, which the target logs now and then
                _tell(target, roster)
                told = roster
            if not cluster.is_on_a_node():
                return 1  # the next agent joins through another node
            time.sleep(max(looked_at + POLL_S - time.monotonic(), 0.0))
    except (cluster.NoCluster, cluster.BadResources) as error:
        _tell(target, Roster(problem=str(error), fatal=True))
        return 1
    return 0


def _tell(target: socket.socket, roster: Roster) -> None:
    target.sendall(msgspec.json.encode(roster) + b"\n")


def _end_with(target: socket.socket) -> None:
    try:
        target.recv(1)
    finally:
        os._exit(0)


class Agent:
    """Places or finds the drafters of one target.

    wanted: which drafters; actor: class of the actors that it places, `DrafterActor` by default
    """

    def __init__(self, wanted: Wanted, actor: type | None = None) -> None:
        from vllm_ssd.pool import cluster
        from vllm_ssd.pool.actor import DrafterActor
        from vllm_ssd.pool.spec import DrafterSpec

        self._cluster = cluster
        self._wanted = wanted
        self._actor = actor or DrafterActor
        self._watch = cluster.Watch()
        self._spec = DrafterSpec(wanted.keys, wanted.max_num_seqs, wanted.resources, "")
        self._own: dict[str, Any] = {}
        self._num_placed = 0
        self._place_at = 0.0

    def look(self) -> Roster:
        """The current roster."""
        return self._look_at_pool() if self._wanted.pool else self._look_at_own()

    def _look_at_own(self) -> Roster:
        if not self._spec.credential:
            self._spec = msgspec.structs.replace(self._spec, credential=new_credential().decode())
        while len(self._own) < self._wanted.num_drafters and time.monotonic() >= self._place_at:
            name = f"{os.getpid()}-{self._num_placed}"
            self._own[name] = self._cluster.place(self._actor, name, self._spec)
            self._num_placed += 1
        known, dead = self._watch.look(self._own, POLL_S)
        for name in dead:
            del self._own[name]
            self._place_at = time.monotonic() + AGAIN_S
        problem = self._cluster.shortage(known, self._wanted.num_drafters, self._spec.resources)
        return self._roster(known, problem)

    def _look_at_pool(self) -> Roster:
        pool = self._wanted.pool
        handles = self._cluster.of_pool(pool)
        known, _ = self._watch.look(handles, POLL_S)
        if not handles:
            return self._roster({}, f"0 drafters: Ray has no pool {pool}; `vllm-ssd pool up {pool}` makes one")
        if not self._spec.credential and known:
            spec = self._cluster.spec_of(handles[next(iter(known))], POLL_S)
            self._spec = spec or self._spec
        problem = self._cluster.shortage(known, len(handles), self._spec.resources)
        return self._roster(known, problem) if self._spec.credential else Roster(problem=problem)

    def _roster(self, known: dict[str, Any], problem: str) -> Roster:
        listed = [Listed(name, status.address, status.leaving) for name, status in known.items() if status.address]
        return Roster(listed, problem, credential=self._spec.credential)
