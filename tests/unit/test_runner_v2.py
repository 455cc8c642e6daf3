"""Every private symbol of vLLM's V2 runner that we replace or imitate, as it must be, and why it is needed."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from vllm.config import VllmConfig
from vllm.config.speculative import NgramGPUTypes

from vllm_ssd.compat.target import runner

pytest.importorskip("vllm.v1.worker.gpu.spec_decode.ngram", reason="0.30: ssd uses the V1 runner")

from vllm.v1.worker.gpu import model_runner, spec_decode
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_ssd.compat.target.runner_v2 import V2Speculator


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_what_is_wrapped_is_called_as_we_expect() -> None:
    assert parameters(inspect.unwrap(spec_decode.init_speculator)) == ["vllm_config", "device", "req_states"]
    assert parameters(GPUModelRunner.add_requests) == ["self", "scheduler_output"]
    assert parameters(GPUModelRunner._remove_request) == ["self", "req_id"]
    assert parameters(RejectionSampler.__call__) == ["self", "logits", "input_batch", "draft_logits", "invalid_drafts"]
    source = inspect.getsource(GPUModelRunner)
    for call in (
        "init_speculator(\n                    self.vllm_config, self.device, self.req_states",
        "self._remove_request(req_id)",
        "self.rejection_sampler(\n",
        "self.speculator.draft_logits,\n                invalid_drafts,",
        "num_speculative_tokens=num_spec_tokens,\n",
    ):
        assert call in source, call


def test_our_speculator_is_asked_as_vllm_asks_its_own() -> None:
    assert parameters(V2Speculator.propose) == parameters(BaseSpeculator.propose)
    assert parameters(NgramGPUSpeculator.propose) == parameters(BaseSpeculator.propose)
    abstract = {"speculate", "want", "on_target_loaded", "add_request", "end_at", "remove_request"}
    assert V2Speculator.__abstractmethods__ == abstract, "vLLM wants more of a speculator than we have"


def test_a_dummy_run_drafts_nothing() -> None:
    """vLLM makes one to measure memory, to capture graphs, and where a data-parallel rank is idle."""

    class Speculator(V2Speculator):
        speculate = want = on_target_loaded = add_request = end_at = remove_request = None

    speculator = object.__new__(Speculator)
    speculator.draft_logits = torch.zeros(4, 5, 7)
    arguments = dict.fromkeys(parameters(V2Speculator.propose)[1:])
    batch = SimpleNamespace(num_reqs=3)
    drafts = speculator.propose(**arguments | {"input_batch": batch, "num_sampled": torch.ones(4), "dummy_run": True})
    assert drafts.shape == (3, 5) and drafts.dtype == torch.int64 and not drafts.any()


def test_vllm_builds_ours_where_ssd_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec_decode, "init_speculator", lambda *args: "vLLM's")
    monkeypatch.setattr(model_runner, "init_speculator", spec_decode.init_speculator)
    for _ in range(2):
        runner.install_speculator(lambda *args: "ours")
    for build in (spec_decode.init_speculator, model_runner.init_speculator):
        assert build(SimpleNamespace(additional_config={"ssd": {}}), None, None) == "ours"
        assert build(SimpleNamespace(additional_config={}), None, None) == "vLLM's"


def test_the_disguise_is_accepted_and_still_needed() -> None:
    assert runner.METHOD_ON_V2 in get_args(NgramGPUTypes), "vLLM would switch asynchronous scheduling off"

    def unsupported(method: str) -> list[str]:
        speculative = SimpleNamespace(method=method, parallel_drafting=False)
        parallel = SimpleNamespace(distributed_executor_backend="mp", pipeline_parallel_size=1, use_ubatching=False)
        config = SimpleNamespace(speculative_config=speculative, parallel_config=parallel)
        return VllmConfig._get_v2_model_runner_unsupported_features(config)

    assert not unsupported(runner.METHOD_ON_V2)
    assert unsupported("custom_class"), "the V2 runner takes custom_class now: the disguise can go"


@pytest.mark.parametrize(("asked", "expected"), [("0", False), ("1", True)])
def test_the_user_chooses_the_runner(monkeypatch: pytest.MonkeyPatch, asked: str, expected: bool) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", asked)
    assert runner.is_v2() is expected
