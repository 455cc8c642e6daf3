"""`python -m vllm_ssd.profiler FD`: started by `vllm_ssd.profiler.measure`, not by hand."""

import sys
from multiprocessing.connection import Connection

from vllm_ssd.profiler.worker import serve

if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
