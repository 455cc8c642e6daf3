"""`vllm serve` for a soak: the same command, with what tests change of it.

    python scripts/soak_server.py serve MODEL [flags]

SOAK_BACKOFF_S is the first and the longest pause before a drafter is started again. With SOAK_FORKED=1 drafters are
forked from a process that has imported vLLM. With TRITON_INTERPRET=1 the V2 model runner works on the CPU. vLLM's
child processes import this module anew, or are forked from it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreted_v2  # noqa: F401

import fork_server  # noqa: E402

from vllm_ssd.link import process  # noqa: E402
from vllm_ssd.link.lifetime import die_with  # noqa: E402

first, longest = map(float, os.environ["SOAK_BACKOFF_S"].split(","))
process.BACKOFF_S = (first, longest)
fork_server.fork_drafters()

if __name__ == "__main__":
    die_with(os.getppid())
    if os.environ.pop("SOAK_FORKED", None):
        os.environ[fork_server.ADDRESS] = fork_server.ForkServer(os.environ).address
        fork_server.fork_drafters()
    from vllm.entrypoints.cli.main import main

    sys.argv[0] = "vllm"
    sys.exit(main())
