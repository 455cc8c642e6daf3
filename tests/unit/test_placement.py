"""Where drafters run: never where a target does, and each replica's on its own where there is room."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ssd.config import REPLICAS_ENV, SSDConfig
from vllm_ssd.link import placement
from vllm_ssd.link.options import DrafterOptions


def place(
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_cpu: bool,
    replica: int | None = None,
    replicas: int = 1,
    world_size: int = 1,
    cpus: str = "0-7",
    environment: dict[str, str] | None = None,
    **user: Any,
) -> tuple[list[int], str | None]:
    """The cores and the CUDA_VISIBLE_DEVICES of a replica's drafter, on a machine with `cpus`."""
    options, changed = place_all(
        monkeypatch,
        is_cpu=is_cpu,
        replica=replica,
        replicas=replicas,
        world_size=world_size,
        cpus=cpus,
        environment=environment,
        **user,
    )
    return options.cpus, changed.get("CUDA_VISIBLE_DEVICES")


def place_all(
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_cpu: bool = True,
    replica: int | None = None,
    replicas: int = 1,
    world_size: int = 1,
    cpus: str = "0-7",
    environment: dict[str, str] | None = None,
    target_max_model_len: int = 4096,
    **user: Any,
) -> tuple[DrafterOptions, dict[str, str | None]]:
    """As `place_drafter` gives them."""
    for name in ("OMP_PLACES", "VLLM_CPU_OMP_THREADS_BIND", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {REPLICAS_ENV: str(replicas), **(environment or {})}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(placement, "_allowed_cpus", lambda: set(placement.parse_cpus(cpus)))
    parallel = SimpleNamespace(data_parallel_rank_local=replica, world_size=world_size)
    vllm_config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        parallel_config=parallel,
        model_config=SimpleNamespace(max_model_len=target_max_model_len),
    )
    config = SSDConfig.from_user({"model": "x", **user})
    return placement.place_drafter(config, vllm_config, is_cpu=is_cpu)


def test_cores_that_no_worker_is_bound_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def cores(**environment: str) -> list[int]:
        return place(monkeypatch, is_cpu=True, environment=environment)[0]

    assert cores() == [7]
    assert cores(OMP_PLACES="{0,1,2,3,4}") == [5, 6, 7]
    assert cores(OMP_PLACES="{0,1}", VLLM_CPU_OMP_THREADS_BIND="0-1|2-3|4,5") == [6, 7]
    assert cores(OMP_PLACES="{0,1,2,3,4,5,6,7}", VLLM_CPU_OMP_THREADS_BIND="auto") == [7]


def test_replicas_share_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def cores(replica: int, **user: Any) -> list[int]:
        bound = {"VLLM_CPU_OMP_THREADS_BIND": "0,1|2,3"}
        return place(monkeypatch, is_cpu=True, replica=replica, replicas=2, environment=bound, **user)[0]

    assert (cores(0), cores(1)) == ([4, 6], [5, 7])
    assert (cores(0, drafter_cpus="6-7"), cores(1, drafter_cpus="6-7")) == ([6], [7])
    assert (cores(0, drafter_cpus="7"), cores(1, drafter_cpus="7")) == ([7], [7])


def test_drafters_come_after_all_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    def device(**arguments: Any) -> str | None:
        return place(monkeypatch, is_cpu=False, **arguments)[1]

    assert device() == "1" and device(world_size=4) == "4"
    assert [device(replica=i, replicas=2, world_size=2) for i in range(2)] == ["4", "5"]
    visible = {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b,GPU-c,GPU-d"}
    assert [device(replica=i, replicas=2, environment=visible) for i in range(2)] == ["GPU-c", "GPU-d"]
    assert device(replica=1, replicas=2, drafter_device="cuda:1", environment=visible) == "GPU-b"
    with pytest.raises(ValueError, match="wants device 5 of CUDA_VISIBLE_DEVICES=GPU-a,GPU-b,GPU-c,GPU-d, which has 4"):
        device(replica=1, replicas=2, world_size=2, environment=visible)


def test_a_drafter_takes_no_longer_requests_than_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    def lengths(**user: Any) -> tuple[int | None, int]:
        options, _ = place_all(monkeypatch, target_max_model_len=1000, **user)
        return options.engine_args.get("max_model_len"), options.engine_args["target_max_model_len"]

    assert lengths() == (None, 1000)
    assert lengths(max_model_len=500) == (500, 1000)
    assert lengths(max_model_len=2000) == (1000, 1000)
