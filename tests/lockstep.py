"""A target that waits for its drafter after each step: how fast the machine is makes no difference to what is found."""

from __future__ import annotations

import fcntl
import struct
import termios
import time
from pathlib import Path
from typing import Any

GAP_S = 3e-4
"""Between two looks at a drafter: it may sleep for a moment, but not twice."""


def await_drafter(link: Any, limit_s: float) -> bool:
    """Whether the process of a `DrafterProcess` has read all that it was sent and found nothing more to do, in time."""
    deadline = time.monotonic() + limit_s
    looks = 0
    while looks < 2:
        looks = looks + 1 if is_idle(link) else 0
        if looks < 2:
            if time.monotonic() > deadline:
                return False
            time.sleep(GAP_S)
    return True


def is_idle(link: Any) -> bool:
    """Whether a drafter sleeps, with nothing sent to it that it has not read; one that is not there does."""
    descriptor = link.descriptor()
    if descriptor is None:  # it has pushed so much that the target must take it first
        return True
    if descriptor < 0 or link._process is None:
        return True
    try:
        (unread,) = struct.unpack("i", fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)))
        state = Path(f"/proc/{link._process.pid}/stat").read_text().rpartition(") ")[2][0]
    except OSError:  # it has ended
        return True
    return unread == 0 and state == "S"
