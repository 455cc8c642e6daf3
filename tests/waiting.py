"""Wait for what another thread or process does."""

import time
from collections.abc import Callable


def wait_until(holds: Callable[[], bool], timeout_s: float = 30.0, pause_s: float = 0.01) -> float:
    """The seconds until something holds; fails when it does not in time."""
    started = time.monotonic()
    while not holds():
        assert time.monotonic() - started < timeout_s, f"not within {timeout_s:g} s"
        time.sleep(pause_s)
    return time.monotonic() - started
