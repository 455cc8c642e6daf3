"""`python -m vllm_ssd.drafter FD OPTIONS_JSON`: started by `vllm_ssd.launch`, not by hand."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

import msgspec

from vllm_ssd.drafter.options import DrafterOptions


def main(fd: int, options: DrafterOptions) -> int:
    """Tie this process to its parent, then boot and serve."""
    _die_with(options.parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the target closes us
    from vllm_ssd.drafter.server import run

    return run(fd, options)


def _die_with(parent_pid: int) -> None:
    """Have Linux kill this process when its parent dies, even while vLLM boots and no socket is read."""
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent_pid:
            os._exit(1)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=DrafterOptions)))
