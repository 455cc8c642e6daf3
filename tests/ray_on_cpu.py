"""Importing this lets vLLM's Ray executor run on the CPU, where vLLM knows no resource to place workers by.

Its workers take what Ray calls a GPU: on a machine without one, as many as a node was started with. Their classes come
from this module, so that each of them has imported it, too.
"""

from __future__ import annotations

from ray_cluster import AGENT
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.executor import ray_executor_v2

from vllm_ssd.link import placed

CpuPlatform.ray_device_key = "GPU"
placed.AGENT_COMMAND = [*AGENT, "ForkedDrafterActor"]


class Worker(ray_executor_v2.RayWorkerProc):
    """vLLM's."""


ray_executor_v2.RayWorkerProc = Worker
