"""`python -m vllm_ssd.planning FD`: started by `vllm_ssd.planning.measure`, not by hand."""

from vllm_ssd.planning.engine_host import serve
from vllm_ssd.planning.worker import Worker

if __name__ == "__main__":
    serve(Worker)
