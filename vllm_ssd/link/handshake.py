"""The handshake between a target and its drafter, from the target's side."""

from __future__ import annotations

import time
from collections.abc import Callable

from vllm_ssd.link.protocol import Hello, Refused, Welcome
from vllm_ssd.link.transport import Transport, TransportClosed

LOOK_S = 0.5
"""Interval at which `goes_on` is checked."""


class DrafterFailed(RuntimeError):
    """Raised if a drafter does not come up; the message is one sentence for the user."""


class DrafterRefused(DrafterFailed):
    """Raised if a drafter refuses to serve this target."""


def shake_hands(
    transport: Transport,
    hello: Hello,
    timeout_s: float,
    goes_on: Callable[[], bool],
    how_it_ended: Callable[[TransportClosed], str],
) -> Welcome:
    """Send `hello` and return the drafter's `Welcome`; raises `DrafterFailed`.

    goes_on: whether the handshake is still wanted; how_it_ended: describes the end of a drafter that closed the
    connection
    """
    deadline, answers = time.monotonic() + timeout_s, []
    try:
        transport.send(hello)
        while not answers and time.monotonic() < deadline and goes_on():
            answers = transport.poll(min(LOOK_S, max(deadline - time.monotonic(), 0.0)))
    except TransportClosed as error:
        raise DrafterFailed(f"the SSD drafter {how_it_ended(error)} before it was ready; see its output") from None
    if not answers:
        raise DrafterFailed(
            f"the SSD drafter was not ready within startup_timeout_s={timeout_s:g}; "
            "raise it if the draft model loads slowly"
        )
    if isinstance(answers[0], Refused):
        raise DrafterRefused(f"the SSD drafter cannot serve: {answers[0].reason}")
    if not isinstance(answers[0], Welcome) or len(answers) > 1:
        raise DrafterFailed("the SSD drafter sent an invalid answer to the handshake")
    return answers[0]
