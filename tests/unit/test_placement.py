"""Which cores drafters get, and how long their requests may be; `tests/device/test_placement.py` has the GPUs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ssd.config import REPLICAS_ENV, SSDConfig
from vllm_ssd.link import placement
from vllm_ssd.link.options import DrafterOptions
from vllm_ssd.target import start


def place(
    monkeypatch: pytest.MonkeyPatch,
    *,
    replica: int | None = None,
    replicas: int = 1,
    drafter: int = 0,
    cpus: str = "0-7",
    environment: dict[str, str] | None = None,
    target_max_model_len: int = 4096,
    **user: Any,
) -> DrafterOptions:
    """The options of a replica's drafter, on a machine with `cpus`."""
    for name in ("OMP_PLACES", "VLLM_CPU_OMP_THREADS_BIND", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {REPLICAS_ENV: str(replicas), **(environment or {})}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(placement, "_allowed_cpus", lambda: set(placement.parse_cpus(cpus)))
    vllm_config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        parallel_config=SimpleNamespace(data_parallel_rank_local=replica),
        model_config=SimpleNamespace(max_model_len=target_max_model_len),
    )
    config = SSDConfig.from_user({"model": "x", **user})
    return placement.place_drafter(config, vllm_config, None, drafter).options


def test_cores_that_no_worker_is_bound_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def cores(**environment: str) -> list[int]:
        return place(monkeypatch, environment=environment).cpus

    assert cores() == [7]
    assert cores(OMP_PLACES="{0,1,2,3,4}") == [5, 6, 7]
    assert cores(OMP_PLACES="{0,1}", VLLM_CPU_OMP_THREADS_BIND="0-1|2-3|4,5") == [6, 7]
    assert cores(OMP_PLACES="{0,1,2,3,4,5,6,7}", VLLM_CPU_OMP_THREADS_BIND="auto") == [7]


@pytest.mark.parametrize(("bound", "named"), [("{0,1}", "1"), ("{0,1,2,3}", "1, 3"), ("{0}", ""), ("", "")])
def test_cores_that_threads_of_the_target_keep_are_named(monkeypatch: pytest.MonkeyPatch, bound, named) -> None:
    said: list[str] = []
    monkeypatch.setenv("OMP_PLACES", bound)
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr(start.logger, "warning", lambda text, *values: said.append(text % values))
    start.warn_of_crowded_cores({1, 3})
    assert len(said) == bool(named) and all(f"core {named}, too" in line for line in said)


def test_replicas_share_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def cores(replica: int, **user: Any) -> list[int]:
        bound = {"VLLM_CPU_OMP_THREADS_BIND": "0,1|2,3"}
        return place(monkeypatch, replica=replica, replicas=2, environment=bound, **user).cpus

    assert (cores(0), cores(1)) == ([4, 6], [5, 7])
    assert (cores(0, drafter_cpus="6-7"), cores(1, drafter_cpus="6-7")) == ([6], [7])
    assert (cores(0, drafter_cpus="7"), cores(1, drafter_cpus="7")) == ([7], [7])


def test_drafters_of_a_fleet_share_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def cores(replica: int, drafter: int, cpus: str) -> list[int]:
        user = {"num_drafters": 2, "drafter_cpus": cpus}
        return place(monkeypatch, replica=replica, replicas=2, drafter=drafter, **user).cpus

    everywhere = [(replica, drafter) for replica in range(2) for drafter in range(2)]
    assert [cores(*place, "2-7") for place in everywhere] == [[2, 6], [3, 7], [4], [5]]
    assert [cores(*place, "5-7") for place in everywhere] == [[5, 6, 7]] * 4


@pytest.mark.parametrize(("cpus", "threads"), [(None, None), ("2,3", "2")])
def test_a_drafter_that_listens_has_the_memory_that_its_keys_say(cpus: str | None, threads: str | None) -> None:
    keys = {"model": "x", "kv_cache_memory": "64MiB"} | ({"drafter_cpus": cpus} if cpus else {})
    options, environment, _ = placement.place_standalone(SSDConfig.from_user(keys), 4, on_cpu=True)
    assert options.engine_args["kv_cache_memory_bytes"] == 64 << 20
    assert environment["VLLM_CPU_KVCACHE_SPACE"] is None, "vLLM would take it in place of the bytes"
    assert environment["TRITON_INTERPRET"] is None and environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert environment.get("OMP_NUM_THREADS") == threads


def test_a_drafter_takes_no_longer_requests_than_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    def lengths(**user: Any) -> tuple[int | None, int]:
        options = place(monkeypatch, target_max_model_len=1000, **user)
        return options.engine_args.get("max_model_len"), options.engine_args["target_max_model_len"]

    assert lengths() == (None, 1000)
    assert lengths(max_model_len=500) == (500, 1000)
    assert lengths(max_model_len=2000) == (1000, 1000)
