"""Every private symbol of vLLM's V2 runner that we replace or imitate, as it must be, and why it is needed."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hashed_noise import hashed
from vllm.config import VllmConfig
from vllm.config.speculative import NgramGPUTypes
from vllm.sampling_params import SamplingParams

from vllm_ssd.compat.target import runner
from vllm_ssd.link.protocol import HASHED_NOISE, NO_NOISE, UNKNOWN_NOISE, Noise

pytest.importorskip("vllm.v1.worker.gpu.spec_decode.ngram", reason="0.30: ssd uses the V1 runner")

from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.gpu import model_runner, spec_decode
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import SamplingStates
from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_ssd.compat.target import noise
from vllm_ssd.compat.target.runner_v2 import V2Speculator, _add_requests, _load_model


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


def new_request(name: str, **params: Any) -> SimpleNamespace:
    """vLLM's `NewRequestData`, as far as we read it."""
    return SimpleNamespace(
        req_id=name,
        sampling_params=SamplingParams(**params),
        prompt_token_ids=[1, 2, 3],
        prefill_token_ids=[1, 2, 3],
        prompt_embeds=None,
        mm_features=[],
    )


def new_target(names: Iterable[str], speculator: Any) -> SimpleNamespace:
    """A runner that has a slot for each request."""
    slots = {name: slot for slot, name in enumerate(names)}
    states = object.__new__(SamplingStates)  # whose tensors would need pinned memory
    for field in ("temperature", "top_p", "top_k", "min_p", "seeds"):
        setattr(states, field, SimpleNamespace(np=np.zeros(len(slots), np.int64 if field == "seeds" else np.float32)))
    states.vocab_size, states.seeds_set, states.num_logprobs = 7, np.zeros(len(slots)), np.zeros(len(slots))
    return SimpleNamespace(
        speculator=speculator,
        sampler=SimpleNamespace(sampling_states=states),
        req_states=SimpleNamespace(req_id_to_index=slots),
        vllm_config=SimpleNamespace(structured_outputs_config=SimpleNamespace(reasoning_parser="")),
    )


def test_requests_that_cannot_gain_are_left_alone_and_others_say_when_they_end() -> None:
    """The drafter gets no tokens of the first; a bounded one is told of the length with which it ends."""
    limits = {"one token": 1, "two tokens": 2, "bounded": 10, "unbounded": None, "_warmup_0": 10}
    opened: dict[str, tuple[int, list[int]]] = {}
    ends: dict[str, int] = {}
    speculator = SimpleNamespace(
        add_request=lambda name, slot, tokens, *_: opened.update({name: (slot, list(tokens))}),
        end_at=lambda name, length: ends.update({name: length}),
        noise_kind=UNKNOWN_NOISE,
    )
    target = new_target(limits, speculator)
    seen: list[Any] = []
    requests = [new_request(name, max_tokens=limit) for name, limit in limits.items()]
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


@pytest.mark.parametrize("kind", [HASHED_NOISE, UNKNOWN_NOISE])
def test_the_noise_of_a_request_is_that_of_the_seed_that_vllm_gave_it(kind: int) -> None:
    """A request that was preempted comes back as a new one, without a seed of its own with another one."""
    requests = [
        new_request("seeded", seed=-5),
        new_request("unseeded", temperature=0.5),
        new_request("greedy", temperature=0, seed=7),
    ]
    told: dict[str, Noise] = {}
    speculator = SimpleNamespace(add_request=lambda name, *args: told.update({name: args[-1]}), noise_kind=kind)
    speculator.end_at = lambda name, length: None
    target = new_target([request.req_id for request in requests], speculator)
    states = target.sampler.sampling_states

    def add_requests(runner: Any, output: Any) -> None:
        for slot, request in enumerate(output.scheduled_new_reqs):
            states.add_request(slot, request.sampling_params)

    seeds = []
    for _ in range(2):
        _add_requests(add_requests, target, SimpleNamespace(scheduled_new_reqs=requests))
        seeds.append(int(states.seeds.np[1]))
        known = {"seeded": Noise(kind, -5), "unseeded": Noise(kind, seeds[-1]), "greedy": NO_NOISE}
        assert told == (known if kind == HASHED_NOISE else dict.fromkeys(known, NO_NOISE))
    assert seeds[0] != seeds[1]


class OtherSampler(Sampler):
    """Such as the one with a watermark."""


@pytest.mark.parametrize(
    ("sampler", "use_fp64", "shift", "kind"),
    [
        (Sampler, False, 0, HASHED_NOISE),
        (Sampler, True, 0, UNKNOWN_NOISE),
        (Sampler, False, 1, UNKNOWN_NOISE),
        (OtherSampler, False, 0, UNKNOWN_NOISE),
        (None, False, 0, UNKNOWN_NOISE),
    ],
    ids=["known", "fp64", "another hash", "another sampler", "another judge"],
)
def test_noise_is_told_only_if_it_is_the_one_we_know(
    monkeypatch: pytest.MonkeyPatch, sampler: Any, use_fp64: bool, shift: int, kind: int
) -> None:
    """The target draws a few tokens once it is loaded; those of fp64 are hashed in another way."""

    def gumbel_sample(
        logits, expanded_idx_mapping, temperature, seed, pos, apply_temperature, is_drafting, use_fp64
    ) -> torch.Tensor:
        assert not logits.any() and (temperature == 1).all() and not (apply_temperature or is_drafting)
        token_ids = np.arange(logits.shape[1]) + shift + use_fp64
        rows = zip(seed[expanded_idx_mapping].tolist(), pos.tolist())
        return torch.tensor([int(hashed(*row, token_ids).argmin()) for row in rows])

    monkeypatch.setattr(noise, "gumbel_sample", gumbel_sample)
    judge = object.__new__(RejectionSampler) if sampler else SimpleNamespace()
    target = SimpleNamespace(
        sampler=object.__new__(sampler or Sampler),
        rejection_sampler=judge,
        speculator=SimpleNamespace(on_target_loaded=lambda: None),
        device=torch.device("cpu"),
    )
    target.sampler.use_fp64_gumbel = use_fp64
    _load_model(lambda runner: None, target)
    assert target.speculator.noise_kind == kind


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
