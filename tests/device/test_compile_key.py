"""No key that only the drafter reads makes vLLM compile the target anew."""

from __future__ import annotations

import dataclasses

import pytest
from engines import PAIR
from vllm import EngineArgs

from vllm_ssd import config
from vllm_ssd.config import TARGET_FIELDS, SSDConfig

OTHERS = {
    "model": str(PAIR / "target"),
    "fan_out": 2,
    "branch_budget": 7,
    "on_miss": "skip",
    "wait_ms": 1.5,
    "ngram_min": 1,
    "ngram_max": 9,
    "adaptive": False,
    "drafter_device": "cpu",
    "drafter_cpus": "0",
    "dtype": "float32",
    "quantization": "fp8",
    "revision": "x",
    "trust_remote_code": True,
    "enforce_eager": False,
    "max_model_len": 100,
    "kv_cache_memory": "64MiB",
    "gpu_memory_utilization": 0.3,
    "top_m": 9,
    "saguaro_c": 0.5,
    "tree_attention": False,
    "seed": 5,
    "startup_timeout_s": 9,
    "metrics_port": 9999,
}
"""Another value than the default for every key but those of the target."""


@pytest.fixture
def compile_hash(monkeypatch: pytest.MonkeyPatch):
    for name in (config.RUNTIME_ENV, config.SERVER_PID_ENV, config.REPLICAS_ENV):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")

    def compute(**user: object) -> str:
        speculative = {"method": "ssd", "model": str(PAIR / "drafter")} | user
        engine_args = EngineArgs(
            model=str(PAIR / "target"), max_model_len=256, dtype="float32", speculative_config=speculative
        )
        return engine_args.create_engine_config().compute_hash()

    return compute


def test_the_hash_is_the_same_over_every_key_of_the_drafter(compile_hash) -> None:
    keys = {field.name for field in dataclasses.fields(SSDConfig)}
    assert set(TARGET_FIELDS) == {"num_speculative_tokens"}
    unknown = keys - OTHERS.keys() - set(TARGET_FIELDS)
    values = {name: value for name, value in OTHERS.items() if name in keys}
    # Keys that this table does not know yet are checked with their defaults alone, by the fields that travel.
    assert unknown.isdisjoint(SSDConfig.from_user({"model": "x"}).to_json())
    alone = compile_hash()
    apart = {"fan_out", "branch_budget"}  # one replaces the other
    together = {name: value for name, value in values.items() if name != "branch_budget"}
    assert compile_hash(**together) == alone
    assert compile_hash(branch_budget=values["branch_budget"]) == alone and apart <= keys
    assert compile_hash(num_speculative_tokens=3) != alone
