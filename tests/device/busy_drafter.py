"""A drafter that shakes hands and, once spoken to, compiles or hangs: `python -m busy_drafter FD OPTIONS`.

VLLM_SSD_BUSY names the module and the function that are then on its stack, VLLM_SSD_BUSY_S for how long.
"""

from __future__ import annotations

import os
import sys
import time
import types

from vllm_ssd.drafter.heartbeat import Heartbeat
from vllm_ssd.link.protocol import PROTOCOL_VERSION, DrafterStats, Push, Step, Welcome
from vllm_ssd.link.transport import ProcessTransport, TransportClosed

INTERVAL_S = 0.1


def function_of(module: str, name: str) -> types.FunctionType:
    """A function of that name, in a module of that name, that sleeps for so long."""
    scope = {"__name__": module, "sleep": time.sleep}
    exec(f"def {name}(seconds): sleep(seconds)", scope)
    return scope[name]


def main(fd: int) -> None:
    transport = ProcessTransport.from_fd(fd, "drafter")
    transport.poll(None)
    transport.send(Welcome(PROTOCOL_VERSION, 100, "", 1000, 50, 4))
    work = function_of(*os.environ["VLLM_SSD_BUSY"].split(":"))
    heartbeat = Heartbeat(transport, INTERVAL_S)
    while True:
        if any(isinstance(message, Step) for message in heartbeat.poll(None)):
            work(float(os.environ["VLLM_SSD_BUSY_S"]))
            heartbeat.send(Push([], [], DrafterStats(1, 1, 0.0, 1, 0)))


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]))
    except TransportClosed:
        pass
