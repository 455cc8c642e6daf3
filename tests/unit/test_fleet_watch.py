"""What `fleet_watch` says of a call that is too long, and of one that was only held up."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from fleet_watch import FleetWatch, assert_bounded

WAIT_MS = 20


def watched(propose: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What was seen of one call."""
    monkeypatch.setattr(subprocess, "_fork_exec", subprocess._fork_exec)  # as it was, afterwards
    verifier = SimpleNamespace(_client=SimpleNamespace(looked_up=None), propose=lambda batch: propose())
    watch = FleetWatch(SimpleNamespace(_verifier=verifier, _drafters=[]))
    verifier.propose(None)
    return watch.take()


def test_a_call_within_its_bound_passes_and_a_longer_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_bounded(watched(lambda: time.sleep(WAIT_MS / 1e3), monkeypatch), WAIT_MS)
    with pytest.raises(AssertionError, match="Call"):
        assert_bounded(watched(lambda: time.sleep(0.2), monkeypatch), WAIT_MS)
    with pytest.raises(AssertionError, match="inconclusive"):
        assert_bounded(SimpleNamespace(proposed=[]), WAIT_MS)


def test_the_start_of_another_process_is_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def propose() -> None:
        starter = threading.Thread(target=subprocess.run, args=([sys.executable, "-c", ""],))
        starter.start()
        starter.join()

    (call,) = watched(propose, monkeypatch).proposed
    assert 0 < call.held_up < call.seconds
