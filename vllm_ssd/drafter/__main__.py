"""`python -m vllm_ssd.drafter FD OPTIONS_JSON`: started by `vllm_ssd.link.process`, not by hand."""

from __future__ import annotations

import signal
import sys

import msgspec

from vllm_ssd.drafter.lifetime import die_with
from vllm_ssd.link.options import DrafterOptions


def main(fd: int, options: DrafterOptions) -> int:
    """Tie this process to its parent, then boot and serve."""
    die_with(options.parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the target closes us
    from vllm_ssd.drafter.server import run

    return run(fd, options)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=DrafterOptions)))
