"""Which GPU a drafter gets, over every way to give a target its own: never that of a target, never one not there."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import ParallelConfig

from vllm_ssd.config import REPLICAS_ENV, SSDConfig
from vllm_ssd.link.gpus import Gpus, visible_names
from vllm_ssd.link.placement import NO_UTILIZATION, Placement, place_drafter
from vllm_ssd.plugin import replicas_here

UUIDS = {f"GPU-{letter}": number for number, letter in enumerate("abcdefgh")}
REFUSED = "refused"


@dataclass
class Case:
    """A node with `count` GPUs, the server's environment and arguments, and what each replica's drafter should get.

    parallel: of `ParallelConfig`; later: what vLLM's executors set afterwards; targets: names of the GPUs that targets
    on this node use, whoever started them; drafters: the CUDA_VISIBLE_DEVICES of each replica's drafter, or REFUSED
    """

    id: str
    drafters: list[str] | str
    count: int = 8
    visible: str | None = None
    parallel: dict[str, Any] = field(default_factory=dict)
    later: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    targets: tuple[str, ...] = ("0",)
    user: dict[str, Any] = field(default_factory=dict)
    replicas: tuple[int | None, ...] = (None,)
    current: int = 0


TWO_EACH = {"tensor_parallel_size": 2}
TWO_REPLICAS = {"data_parallel_size": 2, "data_parallel_size_local": 2}
KV = {"kv_cache_memory": "1GiB"}
RAY = {"distributed_executor_backend": "ray"}

CASES = [
    Case("one", ["1"]),
    Case("cuda is any that is free", ["1"], user={"drafter_device": "cuda"}),
    Case("tensor parallel", ["4"], parallel={"tensor_parallel_size": 4}, targets=("0", "1", "2", "3")),
    Case("pipeline", ["4"], parallel=TWO_EACH | {"pipeline_parallel_size": 2}, targets=("0", "1", "2", "3")),
    Case("the rank of a later stage", ["2"], parallel=TWO_EACH, targets=("0", "1"), current=1),
    # --device-ids, as vLLM resolves them to physical ids
    Case("device ids", ["0"], parallel={"assigned_physical_gpu_ids": [1]}, targets=("1",), current=1),
    Case(
        "device ids, a pair",
        ["0"],
        parallel=TWO_EACH | {"assigned_physical_gpu_ids": [2, 3]},
        targets=("2", "3"),
        current=2,
    ),
    Case(
        "a device id to spare",
        ["5"],
        parallel=TWO_EACH | {"assigned_physical_gpu_ids": [3, 4, 5]},
        targets=("3", "4"),
        current=3,
    ),
    Case(
        "device ids in another order",
        ["2"],
        visible="6,4,2",
        count=3,
        parallel=TWO_EACH | {"assigned_physical_gpu_ids": [4, 6]},
        targets=("4", "6"),
        current=1,
    ),
    Case(
        "device ids of UUIDs",
        ["GPU-b"],
        visible="GPU-a,GPU-b,GPU-c",
        count=3,
        parallel=TWO_EACH | {"assigned_physical_gpu_ids": [0, 2]},
        targets=("GPU-a", "GPU-c"),
    ),
    Case(
        "device ids of two replicas",
        ["0", "3"],
        parallel=TWO_REPLICAS | {"assigned_physical_gpu_ids": [1, 2]},
        targets=("1", "2"),
        replicas=(0, 1),
        current=1,
    ),
    # Ray: the assignment is the node's, whatever CUDA_VISIBLE_DEVICES says
    Case("ray", ["0"], parallel={"assigned_physical_gpu_ids": [3]}, later=RAY, targets=("3",), current=3),
    Case(
        "ray over two nodes",
        ["2"],
        parallel={"tensor_parallel_size": 4, "assigned_physical_gpu_ids": [0, 1]},
        later=RAY,
        targets=("0", "1"),
    ),
    Case(
        "ray, all its GPUs",
        REFUSED,
        count=2,
        parallel=TWO_EACH | {"assigned_physical_gpu_ids": [0, 1]},
        later=RAY,
        targets=("0", "1"),
    ),
    Case(
        "ray replicas",
        REFUSED,
        parallel=TWO_REPLICAS | {"assigned_physical_gpu_ids": [0]},
        later=RAY | {"data_parallel_backend": "ray"},
        targets=("0", "1"),
        replicas=(0,),
    ),
    Case(
        "ray replicas, named",
        ["6"],
        parallel=TWO_REPLICAS | {"assigned_physical_gpu_ids": [1]},
        later=RAY | {"data_parallel_backend": "ray"},
        targets=("0", "1"),
        replicas=(1,),
        current=1,
        user={"drafter_device": "cuda:7,6"},
    ),
    # several nodes
    Case(
        "two nodes",
        ["4"],
        parallel={"tensor_parallel_size": 8, "nnodes": 2, "node_rank": 1},
        targets=("0", "1", "2", "3"),
    ),
    Case(
        "two nodes, all their GPUs",
        REFUSED,
        count=4,
        parallel={"tensor_parallel_size": 8, "nnodes": 2},
        targets=("0", "1", "2", "3"),
    ),
    Case(
        "torchrun",
        ["2"],
        parallel={"tensor_parallel_size": 4, "distributed_executor_backend": "external_launcher"},
        environment={"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "0"},
        targets=("0", "1"),
    ),
    # data parallelism
    Case("two replicas", ["2", "3"], parallel=TWO_REPLICAS, targets=("0", "1"), replicas=(0, 1)),
    Case(
        "replicas of two", ["4", "5"], parallel=TWO_REPLICAS | TWO_EACH, targets=("0", "1", "2", "3"), replicas=(0, 1)
    ),
    Case(
        "as many replicas as this node has",
        ["2", "3"],
        parallel=TWO_REPLICAS | {"data_parallel_size": 4},
        targets=("0", "1"),
        replicas=(0, 1),
    ),
    Case(
        "one GPU for two drafters", ["2", REFUSED], count=3, parallel=TWO_REPLICAS, targets=("0", "1"), replicas=(0, 1)
    ),
    Case(
        "one for both, sized",
        ["2", "2"],
        count=3,
        parallel=TWO_REPLICAS,
        targets=("0", "1"),
        replicas=(0, 1),
        user={"drafter_device": "cuda:2"} | KV,
    ),
    Case(
        "one for both, unsized",
        REFUSED,
        parallel=TWO_REPLICAS,
        targets=("0", "1"),
        replicas=(0, 1),
        user={"drafter_device": "cuda:2"},
    ),
    Case(
        "one for both, by share",
        REFUSED,
        parallel=TWO_REPLICAS,
        targets=("0", "1"),
        replicas=(0, 1),
        user={"drafter_device": "cuda:2", "gpu_memory_utilization": 0.4},
    ),
    Case(
        "one each, by name",
        ["7", "5"],
        parallel=TWO_REPLICAS,
        targets=("0", "1"),
        replicas=(0, 1),
        user={"drafter_device": "cuda:7,5"},
    ),
    Case(
        "a server a replica",
        REFUSED,
        parallel={"data_parallel_size": 2, "data_parallel_external_lb": True},
        targets=("0", "1"),
        replicas=(0,),
    ),
    Case(
        "with GPUs of its own",
        ["3"],
        visible="2,3",
        count=2,
        parallel={"data_parallel_size": 2, "data_parallel_external_lb": True},
        targets=("2",),
        replicas=(0,),
    ),
    Case(
        "by the supervisor",
        REFUSED,
        visible="0,1,2,3",
        count=4,
        parallel={"data_parallel_size": 2, "data_parallel_external_lb": True, "assigned_physical_gpu_ids": [1]},
        targets=("0", "1"),
        replicas=(0,),
        current=1,
    ),
    Case(
        "offline, a process a replica",
        REFUSED,
        environment={"VLLM_DP_SIZE": "2", "VLLM_DP_RANK": "0"},
        targets=("0", "1"),
    ),
    # one GPU
    Case("one GPU", REFUSED, count=1),
    Case("one GPU, any", REFUSED, count=1, user={"drafter_device": "cuda"} | KV),
    Case("one GPU, named", REFUSED, count=1, user={"drafter_device": "cuda:0"}),
    Case("one GPU, sized", ["0"], count=1, user={"drafter_device": "cuda:0"} | KV),
    Case("one GPU, by shares", ["0"], count=1, user={"drafter_device": "cuda:0", "gpu_memory_utilization": 0.08}),
    Case(
        "one GPU, too large a share", REFUSED, count=1, user={"drafter_device": "cuda:0", "gpu_memory_utilization": 0.3}
    ),
    Case(
        "the GPU of another rank",
        REFUSED,
        parallel=TWO_EACH,
        targets=("0", "1"),
        user={"drafter_device": "cuda:1", "gpu_memory_utilization": 0.05},
    ),
    Case(
        "the GPU of another rank, sized",
        ["1"],
        parallel=TWO_EACH,
        targets=("0", "1"),
        user={"drafter_device": "cuda:1"} | KV,
    ),
    # names
    Case("one visible", REFUSED, visible="5", count=1, targets=("5",)),
    Case("a selection", ["7"], visible="5,7", count=2, targets=("5",)),
    Case("more named than there are", REFUSED, visible="0,9", count=1),
    Case("UUIDs", ["GPU-c"], visible="GPU-a,GPU-b,GPU-c", count=3, parallel=TWO_EACH, targets=("GPU-a", "GPU-b")),
    Case("MIG", ["MIG-y"], visible="MIG-x,MIG-y", count=1, targets=("MIG-x",)),
    Case(
        "MIG of one GPU", ["MIG-GPU-a/7/0"], visible="MIG-GPU-a/3/0,MIG-GPU-a/7/0", count=1, targets=("MIG-GPU-a/3/0",)
    ),
    Case("MIG, one instance", REFUSED, visible="MIG-x", count=1, targets=("MIG-x",)),
    Case(
        "a name that nobody knows",
        REFUSED,
        visible="GPU-?,GPU-b",
        count=2,
        parallel={"assigned_physical_gpu_ids": [1]},
        targets=("GPU-b",),
        current=1,
    ),
    Case("empty", ["1"], visible="", count=2),
    Case("past the last", REFUSED, count=2, user={"drafter_device": "cuda:2"}),
]


def physical_id(name: str) -> int:
    """As vLLM maps a name of CUDA_VISIBLE_DEVICES, which knows numbers and UUIDs."""
    return int(name) if name.isdigit() else UUIDS[name]


def place(monkeypatch: pytest.MonkeyPatch, case: Case, replica: int | None, drafter: int = 0) -> Placement:
    """A drafter of one replica, told what a worker of it is told."""
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "RANK", "VLLM_DP_SIZE", "VLLM_DP_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    if case.visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", case.visible)
    parallel = ParallelConfig(**case.parallel)
    for name, value in case.later.items():
        setattr(parallel, name, value)
    monkeypatch.setenv(REPLICAS_ENV, str(replicas_here(parallel)))
    if replica is not None:  # vLLM's engine sets it after the server's configuration
        parallel.data_parallel_rank_local = replica
    names = visible_names(case.visible, case.count)
    current = case.current if replica is None else (case.current + replica) % len(names)
    vllm_config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        parallel_config=parallel,
        model_config=SimpleNamespace(max_model_len=4096),
        cache_config=SimpleNamespace(gpu_memory_utilization=0.92),
    )
    config = SSDConfig.from_user({"model": "x", **case.user})
    return place_drafter(config, vllm_config, Gpus(names, current, physical_id), drafter)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_never_a_targets_gpu_and_never_one_that_is_not_there(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    names = visible_names(case.visible, case.count)
    expected = [case.drafters] * len(case.replicas) if isinstance(case.drafters, str) else case.drafters
    for replica, drafter in zip(case.replicas, expected, strict=True):
        if drafter == REFUSED:
            with pytest.raises(
                ValueError, match=r"^ssd: .*\b(drafter_device|kv_cache_memory|gpu_memory_utilization)\b"
            ):
                place(monkeypatch, case, replica)
            continue
        placement = place(monkeypatch, case, replica)
        device = placement.environment["CUDA_VISIBLE_DEVICES"]
        assert device == drafter and device in names
        assert device not in case.targets or ":" in case.user.get("drafter_device", "")


def test_each_drafter_of_a_fleet_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def gpus(replicas: int, count: int, **user: Any) -> list[str | None]:
        parallel = {"data_parallel_size": replicas, "data_parallel_size_local": replicas}
        case = Case("", "", count=count, parallel=parallel, user={"num_drafters": 2, **user})
        everywhere = [(replica, drafter) for replica in range(replicas) for drafter in range(2)]
        return [place(monkeypatch, case, *one).environment["CUDA_VISIBLE_DEVICES"] for one in everywhere]

    assert gpus(1, 4) == ["1", "2"]
    assert gpus(2, 6) == ["2", "3", "4", "5"]
    assert gpus(1, 4, drafter_device="cuda:3,1") == ["3", "1"]
    assert gpus(1, 2, drafter_device="cuda:1", **KV) == ["1", "1"]
    with pytest.raises(ValueError, match=r"one GPU for 2 drafters.*drafter_device"):
        gpus(1, 2)
    with pytest.raises(ValueError, match="several drafters share cuda:1.*kv_cache_memory"):
        gpus(1, 2, drafter_device="cuda:1")


def test_pages_of_given_size_need_no_share_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM checks the share although it does not use it, and its default is never free beside a target."""
    sized = place(monkeypatch, Case("", "", count=1, user={"drafter_device": "cuda:0"} | KV), None)
    assert sized.beside_target
    assert sized.options.engine_args["kv_cache_memory_bytes"] == 1 << 30
    assert sized.options.engine_args["gpu_memory_utilization"] == NO_UTILIZATION
    alone = place(monkeypatch, Case("", ""), None)
    assert not alone.beside_target and "gpu_memory_utilization" not in alone.options.engine_args


def test_the_other_name_of_the_visible_devices_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place(monkeypatch, Case("", ""), None).environment["HIP_VISIBLE_DEVICES"] is None
