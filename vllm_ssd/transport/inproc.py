"""Both ends in one process: for tests, and for a drafter that runs in a thread of the target."""

from __future__ import annotations

import socket

from vllm_ssd.transport import DEFAULT_MAX_PENDING_BYTES
from vllm_ssd.transport.process import ProcessTransport


def pair(max_pending_bytes: int = DEFAULT_MAX_PENDING_BYTES) -> tuple[ProcessTransport, ProcessTransport]:
    """The target's end and the drafter's, over the same bytes and code as between processes."""
    target, drafter = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return (
        ProcessTransport(target, "target", max_pending_bytes),
        ProcessTransport(drafter, "drafter", max_pending_bytes),
    )
