"""Messages between a target and the agent that finds its drafters, and reports of a listening drafter."""

from __future__ import annotations

from typing import Any

import msgspec


class Listed(msgspec.Struct, frozen=True):
    """A ready drafter. name: unique and permanent; leaving: it takes no new requests and will end soon."""

    name: str
    address: str
    leaving: bool = False


class Roster(msgspec.Struct, frozen=True):
    """Agent → target, one line of JSON.

    drafters: all ready drafters; None if unknown, in which case those of the last roster stay
    problem: why there are fewer than wanted, or ""
    fatal: whether waiting cannot help
    credential: PEM shared by all drafters of the roster
    """

    drafters: list[Listed] | None = None
    problem: str = ""
    fatal: bool = False
    credential: str = ""


class Wanted(msgspec.Struct, frozen=True):
    """The drafters that the agent should find, as JSON on its command line.

    pool: a pool's name, or "" for drafters that the agent places itself and that end with it
    num_drafters, resources, keys, max_num_seqs: settings of drafters that the agent places; keys are of `SSDConfig`
    unauthenticated: allow a Ray cluster without authentication
    parent_pid, server_pid: processes that the agent must not outlive
    """

    pool: str
    num_drafters: int
    resources: dict[str, float]
    keys: dict[str, Any]
    max_num_seqs: int
    unauthenticated: bool
    parent_pid: int
    server_pid: int


def default_resources(on_cpu: bool) -> dict[str, float]:
    """Ray resources of a drafter if the user names none."""
    return {"CPU": 1} if on_cpu else {"GPU": 1}


class Report(msgspec.Struct, frozen=True):
    """Drafter → the actor that keeps it running, one line of JSON.

    address: where it listens, "" until it does; problem: why it does not
    """

    pid: int
    address: str = ""
    targets: int = 0
    requests: int = 0
    problem: str = ""
