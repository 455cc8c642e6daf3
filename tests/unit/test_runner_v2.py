"""Every private symbol of vLLM's V2 runner that we replace or imitate, as it must be, and why it is needed."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from vllm.config import VllmConfig
from vllm.config.speculative import NgramGPUTypes
from vllm.sampling_params import SamplingParams

from vllm_ssd.compat.target import runner

pytest.importorskip("vllm.v1.worker.gpu.spec_decode.ngram", reason="0.30: ssd uses the V1 runner")

from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.gpu import model_runner, spec_decode
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_ssd.compat.target.runner_v2 import V2Speculator, _add_requests


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_what_is_wrapped_is_called_as_we_expect() -> None:
    assert parameters(inspect.unwrap(spec_decode.init_speculator)) == ["vllm_config", "device", "req_states"]
    assert parameters(GPUModelRunner.add_requests) == ["self", "scheduler_output"]
    assert parameters(GPUModelRunner.finish_requests) == ["self", "scheduler_output"]
    assert parameters(GPUModelRunner.sample_tokens) == ["self", "grammar_output"]
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
    abstract = {"speculate", "want", "on_target_loaded", "add_request", "end_at", "finish_requests", "remove_request"}
    assert V2Speculator.__abstractmethods__ == abstract, "vLLM wants more of a speculator than we have"


class Speculator(V2Speculator):
    """One that does nothing of its own."""

    speculate = want = on_target_loaded = add_request = end_at = remove_request = None

    def __init__(self) -> None:
        self.finished: list[str] = []

    def finish_requests(self, request_ids: Any) -> None:
        self.finished += request_ids


def test_a_dummy_run_drafts_nothing() -> None:
    """vLLM makes one to measure memory, to capture graphs, and where a data-parallel rank is idle."""
    speculator = Speculator()
    speculator.draft_logits = torch.zeros(4, 5, 7)
    arguments = dict.fromkeys(parameters(V2Speculator.propose)[1:])
    batch = SimpleNamespace(num_reqs=3)
    drafts = speculator.propose(**arguments | {"input_batch": batch, "num_sampled": torch.ones(4), "dummy_run": True})
    assert drafts.shape == (3, 5) and drafts.dtype == torch.int64 and not drafts.any()


def test_requests_that_cannot_gain_are_left_alone_and_others_say_when_they_end() -> None:
    """The drafter gets no tokens of the first; a bounded one is told of the length with which it ends."""
    limits = {"one token": 1, "two tokens": 2, "bounded": 10, "unbounded": None, "_warmup_0": 10}
    requests = [
        SimpleNamespace(
            req_id=name,
            sampling_params=SamplingParams(max_tokens=limit),
            prompt_token_ids=[1, 2, 3],
            prefill_token_ids=[1, 2, 3],
            prompt_embeds=None,
            mm_features=[],
        )
        for name, limit in limits.items()
    ]
    opened: dict[str, tuple[int, list[int]]] = {}
    ends: dict[str, int] = {}
    speculator = SimpleNamespace(
        add_request=lambda name, slot, tokens, *_: opened.update({name: (slot, list(tokens))}),
        end_at=lambda name, length: ends.update({name: length}),
    )
    target = SimpleNamespace(
        speculator=speculator,
        req_states=SimpleNamespace(req_id_to_index={name: slot for slot, name in enumerate(limits)}),
        vllm_config=SimpleNamespace(structured_outputs_config=SimpleNamespace(reasoning_parser="")),
    )
    seen: list[Any] = []
    output = SimpleNamespace(scheduled_new_reqs=requests)
    _add_requests(lambda *args: seen.extend(args), target, output)
    assert seen == [target, output]
    assert opened == {
        "one token": (0, []),
        "two tokens": (1, []),
        "bounded": (2, [1, 2, 3]),
        "unbounded": (3, [1, 2, 3]),
    }
    assert ends == {"bounded": 13}


@pytest.mark.parametrize(
    ("pending", "acceptable", "counted"),
    [(True, [1, 0], [4, 1, 0]), (False, [0, 0], [4, 4, 4]), (True, None, [4, 4, 4])],
    ids=["drafts seen by the scheduler", "placeholders", "no numbers"],
)
def test_drafts_that_fit_no_grammar_are_not_counted(pending: bool, acceptable: Any, counted: list[int]) -> None:
    """vLLM counts the drafts of a row less those it saw to break its grammar, which it does only a step late."""
    speculator = Speculator()
    speculator.begin_step(SimpleNamespace(pending_structured_output_tokens=pending, finished_req_ids={"z"}))
    assert (speculator.step, speculator.finished) == (1, ["z"])
    speculator.note_grammars(GrammarOutput(["b", "c"], np.zeros((2, 1), np.int32), acceptable))
    batch = SimpleNamespace(num_reqs=3, req_ids=["a", "b", "c"], num_draft_tokens_per_req=np.array([4, 4, 4]))
    assert speculator.num_scheduled_drafts(batch) == counted
    speculator.note_grammars(None)
    assert speculator.num_scheduled_drafts(batch) == [4, 4, 4]
    assert speculator.num_scheduled_drafts(SimpleNamespace(num_reqs=2, num_draft_tokens_per_req=None)) == [0, 0]


def test_vllm_subtracts_what_fits_no_grammar_where_it_saw_the_drafts() -> None:
    padded = inspect.getsource(Scheduler.update_draft_token_ids_in_output)
    assert "num_invalid_spec_tokens[req_id] = num_invalid_tokens" in padded
    assert "num_draft_tokens -= num_invalid_spec_tokens.get(request_id, 0)" in inspect.getsource(
        Scheduler.make_spec_decoding_stats
    )


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
