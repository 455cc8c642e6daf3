"""How rounds go to vLLM's V1 samplers, and what of vLLM that relies on."""

from __future__ import annotations

import dataclasses
import inspect
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_ssd.compat.target import runner_v1
from vllm_ssd.compat.target.seeded_rounds import SeededRounds

PROPOSER = SimpleNamespace(seeded_rounds=SeededRounds())


def a_runner(calls: list) -> SimpleNamespace:
    batch = SimpleNamespace(
        sampling_metadata=SimpleNamespace(logprob_token_ids=None),
        thinking_budget_state_holder=None,
        update_async_output_token_ids=lambda: calls.append("update_async_output_token_ids"),
    )
    return SimpleNamespace(input_batch=batch, sampler=lambda **arguments: calls.append(arguments))


@pytest.mark.parametrize("metadata", [None, SimpleNamespace(num_draft_tokens=[0, 0])], ids=["none", "no drafts"])
def test_a_round_without_drafts_is_sampled_as_bonus_tokens(metadata: SimpleNamespace | None) -> None:
    calls: list = []
    runner = a_runner(calls)
    runner_v1._sample(pytest.fail, runner, PROPOSER, "logits", metadata)
    sampled = {
        "logits": "logits",
        "sampling_metadata": runner.input_batch.sampling_metadata,
        "predict_bonus_token": True,
    }
    assert calls == ["update_async_output_token_ids", sampled]


def test_a_round_with_drafts_goes_to_the_rejection_sampler() -> None:
    calls: list = []
    metadata = SimpleNamespace(num_draft_tokens=[0, 2])
    runner_v1._sample(lambda *arguments: calls.append(arguments), a_runner(calls), PROPOSER, "logits", metadata)
    assert calls == [("logits", metadata)]


def test_with_logprobs_of_named_tokens_the_drafts_are_left_out() -> None:
    """Rows of three requests with two, no and one drafts: of each the first is sampled."""
    logits = torch.arange(6.0)[:, None].expand(6, 4)
    drafts = SimpleNamespace(num_draft_tokens=[2, 0, 1], bonus_logits_indices=torch.tensor([2, 3, 5]))
    calls: list = []
    runner = a_runner(calls)
    sampling = dict.fromkeys((field.name for field in dataclasses.fields(SamplingMetadata)), None)
    runner.input_batch.sampling_metadata = SamplingMetadata(
        **sampling | {"logprob_token_ids": {1: [3]}, "spec_token_ids": [[7, 8], [], [9]]}
    )
    runner_v1._sample(pytest.fail, runner, PROPOSER, logits, drafts)
    assert calls[1]["logits"][:, 0].tolist() == [0, 3, 4] and calls[1]["predict_bonus_token"]
    assert calls[1]["sampling_metadata"].spec_token_ids == [[], [], []]
    assert runner.input_batch.sampling_metadata.spec_token_ids == [[7, 8], [], [9]]


def test_a_row_at_the_limit_does_not_keep_vllm_from_asking_for_drafts() -> None:
    assert runner_v1._input_fits_in_drafter(pytest.fail, None, None, SimpleNamespace(max_seq_len=1 << 30))
    assert not runner_v1._input_fits_in_drafter(pytest.fail, None, None, None)


def test_vllm_samples_as_we_do_for_it() -> None:
    source = inspect.getsource(inspect.unwrap(GPUModelRunner._sample))
    assert "self.input_batch.update_async_output_token_ids()\n" in source
    assert (
        "self.sampler(\n                logits=logits,\n                sampling_metadata=sampling_metadata," in source
    )
    assert list(inspect.signature(Sampler.forward).parameters)[:4] == [
        "self",
        "logits",
        "sampling_metadata",
        "predict_bonus_token",
    ]
    assert "self._input_fits_in_drafter(\n" in inspect.getsource(GPUModelRunner.sample_tokens)
