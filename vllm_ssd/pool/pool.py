"""Named pools: drafters on Ray that outlive the process that started them, for any number of targets."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

import msgspec

from vllm_ssd.link.credential import new_credential
from vllm_ssd.pool import cluster
from vllm_ssd.pool.actor import DrafterActor
from vllm_ssd.pool.spec import DrafterSpec, Status

ANSWER_S = 3.0
"""Time within which a placed actor answers."""
WATCH_S = 0.5


class PoolError(RuntimeError):
    """Raised if a command cannot be carried out; the message is one sentence for the user."""


class PoolReport(msgspec.Struct, frozen=True):
    """The current state of a pool. model, resources: None while Ray has placed no drafter."""

    pool: str
    model: str | None
    resources: dict[str, float] | None
    problem: str
    drafters: list[Status]


class Pool:
    """A pool of a cluster that this process has joined (`cluster.join`)."""

    actor: type = DrafterActor

    def __init__(self, name: str) -> None:
        self._name = name
        self._watch = cluster.Watch()

    def up(self, num_drafters: int, spec: DrafterSpec) -> None:
        """Start the pool with a new credential; raises `PoolError` if it exists."""
        if cluster.of_pool(self._name):
            raise PoolError(f"the pool {self._name} exists; `vllm-ssd pool add {self._name}` adds drafters to it")
        self._place(num_drafters, msgspec.structs.replace(spec, credential=new_credential().decode()))

    def add(self, num_drafters: int) -> None:
        """Add drafters with the pool's settings; raises `PoolError` while Ray has placed none of it."""
        handles = self._handles()
        specs = (cluster.spec_of(handles[name], ANSWER_S) for name in self._placed(handles))
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None:
            raise PoolError(f"Ray has placed no drafter of the pool {self._name} yet, so its settings are unknown")
        self._place(num_drafters, spec)

    def remove(self, names: Sequence[str], num_drafters: int = 0) -> list[str]:
        """Remove the drafters in `names`, or else `num_drafters` of the least busy; returns their names.

        Raises `PoolError` for unknown names, and for more drafters than there are.
        """
        handles = self._handles()
        if unknown := [name for name in names if name not in handles]:
            raise PoolError(f"the pool {self._name} has no drafter {', '.join(unknown)}")
        known = self._placed(handles)
        staying = {name: known.get(name) for name in handles if name not in known or not known[name].leaving}
        if num_drafters > len(staying):
            raise PoolError(f"the pool {self._name} has {len(staying)} drafters")
        by_load = sorted(staying, key=lambda name: (s := staying[name]) and (bool(s.address), s.requests) or (False, 0))
        leaving = list(names) or by_load[:num_drafters]
        for name in leaving:
            if name in known:
                cluster.leave(handles[name])
            else:  # not placed yet, so there is nothing to finish
                cluster.end(handles[name])
        return leaving

    def down(self) -> int:
        """End all drafters at once; returns their number. Their targets continue without drafts."""
        handles = self._handles()
        for handle in handles.values():
            cluster.end(handle)
        return len(handles)

    def report(self) -> PoolReport:
        """The state of the pool and its drafters."""
        handles = self._handles()
        known = self._placed(handles)
        spec = next(filter(None, (cluster.spec_of(handles[name], ANSWER_S) for name in known)), None)
        statuses = [known.get(name, Status(name)) for name in sorted(handles)]
        problem = cluster.shortage(known, len(handles), spec.resources if spec else {})
        if spec is None:
            return PoolReport(self._name, None, None, problem, statuses)
        return PoolReport(self._name, spec.keys["model"], spec.resources, problem, statuses)

    def wait(self, timeout_s: float) -> PoolReport:
        """The report once all drafters are ready, one has failed, or the timeout has expired."""
        deadline = time.monotonic() + timeout_s
        while True:
            report = self.report()
            over = time.monotonic() >= deadline or any(status.state == "failed" for status in report.drafters)
            if over or not report.problem:
                return report
            time.sleep(WATCH_S)

    def _place(self, num_drafters: int, spec: DrafterSpec) -> None:
        for _ in range(num_drafters):
            cluster.place(self.actor, secrets.token_hex(3), spec, self._name)

    def _handles(self) -> dict[str, cluster.Handle]:
        handles = cluster.of_pool(self._name)
        if not handles:
            raise PoolError(f"there is no pool {self._name}; `vllm-ssd pool up {self._name}` makes one")
        return handles

    def _placed(self, handles: dict[str, cluster.Handle]) -> dict[str, Status]:
        return self._watch.look(handles, ANSWER_S)[0]
