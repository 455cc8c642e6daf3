"""`python -m vllm_ssd.drafter FD|HOST:PORT OPTIONS_JSON`: started by `link.process` or `vllm-ssd drafter`."""

from __future__ import annotations

import os
import signal
import sys

import msgspec

from vllm_ssd.link.lifetime import die_with
from vllm_ssd.link.options import DrafterOptions


def main(place: int | str, options: DrafterOptions) -> int:
    """Boot and serve: on a descriptor the parent, with which this process dies; on an address all who connect."""
    if isinstance(place, str):
        if options.keeper >= 0:
            detach()
        from vllm_ssd.drafter.standalone import listen

        return listen(place, options)
    die_with(options.parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the target shuts us down
    from vllm_ssd.drafter.server import run

    return run(place, options)


def detach() -> None:
    """Continue in a child of init, because Ray's processes kill their children when they end."""
    if os.fork():
        os._exit(0)
    os.setsid()


if __name__ == "__main__":
    place = int(sys.argv[1]) if sys.argv[1].isdigit() else sys.argv[1]
    sys.exit(main(place, msgspec.json.decode(sys.argv[2], type=DrafterOptions)))
