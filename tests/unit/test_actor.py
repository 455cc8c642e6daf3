"""The actor that keeps a drafter running, without Ray."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from fake_cluster import fake_cluster

from vllm_ssd.link.roster import Report
from vllm_ssd.pool.spec import DrafterSpec, Status

SOON_S = 10.0


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, whose drafters never start."""
    with fake_cluster(here=lambda: ("127.0.0.1", "127.0.0.1:1"), end_this_actor=lambda: None):
        module = importlib.import_module("vllm_ssd.pool.actor")
        over = threading.Event()
        monkeypatch.setattr(module.DrafterChild, "run", lambda self: over.wait() and "it ended")
        yield module
        over.set()


def test_a_drafter_that_leaves_while_it_reports_is_leaving(actor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = actor.DrafterActor("a", msgspec.json.encode(DrafterSpec({}, 8, {"CPU": 1}, "")))
    left, replace = threading.Event(), msgspec.structs.replace

    def leave() -> None:
        drafter.leave()
        left.set()

    def interrupted(status: Status, **changes: Any) -> Status:
        if "requests" in changes:
            threading.Thread(target=leave, daemon=True).start()
            left.wait(0.2)  # it has left, unless it waits for this report
        return replace(status, **changes)

    monkeypatch.setattr(msgspec.structs, "replace", interrupted)
    drafter._take_report(Report(7, "127.0.0.1:7", 1, 3))
    assert left.wait(SOON_S)
    status = msgspec.json.decode(drafter.status(), type=Status)
    assert status.leaving and status.requests == 3 and status.address == "127.0.0.1:7"
    drafter._take_report(Report(7))  # it has ended, and nobody waits for it any longer
