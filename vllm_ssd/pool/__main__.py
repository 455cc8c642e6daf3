"""`python -m vllm_ssd.pool FD WANTED_JSON`: the agent, started by `link.placed`."""

from __future__ import annotations

import sys

from vllm_ssd.pool.agent import main

if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2]))
