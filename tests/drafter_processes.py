"""Which processes are drafters."""

from __future__ import annotations

from contextlib import suppress

import psutil


def is_drafter(process: psutil.Process) -> bool:
    """Whether a process is a drafter that somebody has started; one that ends meanwhile is none."""
    with suppress(psutil.Error):
        return "vllm_ssd.drafter" in process.cmdline()
    return False
