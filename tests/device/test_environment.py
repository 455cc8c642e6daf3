"""What says which part of the target a process is never reaches its drafter."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator

import pytest
from engines import ENVIRONMENT, PAIR
from vllm import envs

from vllm_ssd.link.environment import drafter_environment
from vllm_ssd.link.options import DrafterOptions
from vllm_ssd.link.process import DrafterProcess
from vllm_ssd.link.protocol import PROTOCOL_VERSION, Hello

POLLUTED = {
    # data parallelism of a rank, as vLLM's offline examples and its engine set it
    "VLLM_DP_SIZE": "2",
    "VLLM_DP_RANK": "1",
    "VLLM_DP_RANK_LOCAL": "1",
    "VLLM_DP_MASTER_IP": "192.0.2.1",
    "VLLM_DP_MASTER_PORT": "1",
    # torchrun
    "RANK": "3",
    "LOCAL_RANK": "3",
    "GROUP_RANK": "1",
    "ROLE_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "192.0.2.1",
    "MASTER_PORT": "1",
    "TORCHELASTIC_RUN_ID": "x",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    # MPI and Slurm
    "OMPI_COMM_WORLD_RANK": "3",
    "PMI_RANK": "3",
    "SLURM_PROCID": "3",
    # Ray, elastic expert parallelism, a split of layers over two stages
    "RAY_ADDRESS": "192.0.2.1:1",
    "VLLM_RAY_BUNDLE_INDICES": "3",
    "VLLM_ELASTIC_EP_SCALE_UP_LAUNCH": "1",
    "VLLM_PP_LAYER_PARTITION": "3,5",
    "VLLM_PORT": "1",
}
"""A process of a target that spans everything there is."""

OF_THE_TARGET = re.compile(
    r"(^|_)(DP_(SIZE|RANK|MASTER)|RANK|WORLD_SIZE|MASTER_|ELASTIC_EP|PP_LAYER|RAY_BUNDLE|RAY_DP)"
)


def test_no_name_of_a_rank_is_passed_on() -> None:
    """Over every variable that this vLLM reads: a new one of that kind is found here."""
    names = {name for name in envs.environment_variables if OF_THE_TARGET.search(name)} | POLLUTED.keys()
    assert len(names) > len(POLLUTED)
    assert drafter_environment(dict.fromkeys(names, "1"), {}) == {}


@pytest.fixture
def polluted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in (ENVIRONMENT | POLLUTED).items():
        monkeypatch.setenv(name, value)
    yield


def test_a_drafter_boots_whole_and_alone_in_a_polluted_environment(polluted: None) -> None:
    options = DrafterOptions(
        {
            "model": str(PAIR / "drafter"),
            "dtype": "float32",
            "enforce_eager": True,
            "max_num_seqs": 4096,  # more than the tokens of vLLM's default batch
            "target_max_model_len": 256,
            "kv_cache_memory_bytes": 64 << 20,
            "num_branches": 4096 * 24,
        },
        num_speculative_tokens=3,
        fan_out=2,
        branch_budget=None,
        max_num_seqs=2,
        max_branches=8,
        top_m=5,
        cpus=[],
        parent_pid=os.getpid(),
    )
    link = DrafterProcess(
        options,
        Hello(PROTOCOL_VERSION, 2048, 3, ""),
        environment={
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_V2_MODEL_RUNNER": "0",
            "GLOO_SOCKET_IFNAME": "lo",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": None,
        },
        startup_timeout_s=100.0,
        logger=logging.getLogger("test"),
    )
    try:
        link.wait_until_ready()
        link.poll()
        assert link.connected and link.max_model_len == 256
    finally:
        link.close()
