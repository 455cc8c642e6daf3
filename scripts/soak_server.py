"""`vllm serve` for a soak: the same command, with what tests change of it.

    python scripts/soak_server.py serve MODEL [flags]

SOAK_BACKOFF_S is the first and the longest pause before a drafter is started again. With TRITON_INTERPRET=1 the V2
model runner works on the CPU. vLLM's child processes import this module anew, or are forked from it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreted_v2  # noqa: F401

from vllm_ssd.drafter.lifetime import die_with  # noqa: E402
from vllm_ssd.link import process  # noqa: E402

first, longest = map(float, os.environ["SOAK_BACKOFF_S"].split(","))
process.BACKOFF_S = (first, longest)

if __name__ == "__main__":
    die_with(os.getppid())
    from vllm.entrypoints.cli.main import main

    sys.argv[0] = "vllm"
    sys.exit(main())
