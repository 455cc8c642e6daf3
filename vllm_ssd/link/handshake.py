"""The first words between a target and its drafter, from the target's side."""

from __future__ import annotations

import time
from collections.abc import Callable

from vllm_ssd.link.protocol import Hello, Refused, Welcome
from vllm_ssd.link.transport import Transport, TransportClosed

LOOK_S = 0.5
"""How often it is asked whether the handshake is still wanted."""


class DrafterFailed(RuntimeError):
    """The drafter never came up; the message is the one sentence the user needs."""


class DrafterRefused(DrafterFailed):
    """The drafter will not serve this target."""


def shake_hands(
    transport: Transport,
    hello: Hello,
    timeout_s: float,
    goes_on: Callable[[], bool],
    how_it_ended: Callable[[TransportClosed], str],
) -> Welcome:
    """The drafter's answer to `hello`; raises `DrafterFailed`.

    goes_on: whether it is still wanted; how_it_ended: says of a drafter that closed the connection what became of it
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
        raise DrafterFailed("the SSD drafter answered the handshake with something else")
    return answers[0]
