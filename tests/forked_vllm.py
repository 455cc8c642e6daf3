"""The command line `vllm` for `engines.start_program`; it forks its engine and workers, which vLLM on a CPU spawns."""

from __future__ import annotations

import multiprocessing
import sys
from functools import partial

from vllm.v1.engine import utils
from vllm.v1.executor import multiproc_executor

if __name__ == "__main__":
    utils.get_mp_context = multiproc_executor.get_mp_context = partial(multiprocessing.get_context, "fork")
    from vllm.entrypoints.cli.main import main

    sys.argv[0] = "vllm"
    sys.exit(main())
