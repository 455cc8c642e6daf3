"""What the agent that finds drafters tells the target, and what it is told at start."""

from __future__ import annotations

from typing import Any

import msgspec


class Listed(msgspec.Struct, frozen=True):
    """A drafter that is ready. name: it keeps this for life; leaving: it ends soon, and takes no new requests."""

    name: str
    address: str
    leaving: bool = False


class Roster(msgspec.Struct, frozen=True):
    """A line of JSON from the agent.

    drafters: all of them; None where it does not know, so that those of the last roster stay
    problem: why there are fewer than are wanted, or ""
    fatal: whether waiting cannot help
    credential: PEM, which all drafters of a roster share
    """

    drafters: list[Listed] | None = None
    problem: str = ""
    fatal: bool = False
    credential: str = ""


class Wanted(msgspec.Struct, frozen=True):
    """What the agent is to find: JSON on its command line.

    pool: a name, or "" for drafters that it places itself and that end with it
    num_drafters, resources, keys, max_num_seqs: of those; keys are of `SSDConfig`
    server_pid: the agent ends with it, and with its parent
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
    """What a drafter needs where the user names nothing, by Ray's names."""
    return {"CPU": 1} if on_cpu else {"GPU": 1}


class Report(msgspec.Struct, frozen=True):
    """A line of JSON from a drafter that listens to who keeps it running.

    address: "" until it listens; problem: why it will not
    """

    pid: int
    address: str = ""
    targets: int = 0
    requests: int = 0
    problem: str = ""
