"""`python -m vllm_ssd.planning FD`: started by `vllm_ssd.planning.measure`, not by hand."""

import sys
from multiprocessing.connection import Connection

from vllm_ssd.planning.worker import serve

if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
