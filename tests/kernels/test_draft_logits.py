"""What the rejection sampler reads of a proposal: temperature times log q, and nothing of the round before."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE, ints, reference, to

from vllm_ssd.kernels import DeviceSpeculation, write_draft_logits

S, K, V = 6, 3, 53
RTOL = 1e-6
"""float32: a product and a logarithm."""


def proposals(generator: torch.Generator, top_m: int) -> DeviceSpeculation:
    """Distinct ids with positive probabilities, then ids 0 with none, as a short cut of q has."""
    token_ids = torch.rand(S, K, V, generator=generator).argsort(2)[:, :, :top_m].int()
    probs = torch.rand(S, K, top_m, generator=generator) + 0.1
    support = torch.randint(1, top_m + 1, (S, K, 1), generator=generator)
    inside = torch.arange(top_m) < support
    probs = torch.where(inside, probs, 0)
    return DeviceSpeculation(
        torch.zeros(S, K, dtype=torch.int32),
        torch.where(inside, token_ids, 0),
        probs / probs.sum(2, keepdim=True),
        torch.randint(0, K + 1, (S,), generator=generator, dtype=torch.int32),
    )


@pytest.mark.parametrize("top_m", (1, 5, 17))
def test_only_the_current_proposal_is_there(top_m):
    """Ten rounds over random rows; greedy requests and padding change nothing."""
    generator = torch.Generator().manual_seed(top_m)
    temperatures = torch.tensor([0.7, 0.0, 1.0, 1.3, 0.2, 1.0])
    logits = torch.full((S, K, V), -torch.inf, device=DEVICE)
    columns = torch.zeros(S, K, top_m, dtype=torch.int32, device=DEVICE)
    expected = torch.full((S, K, V), -torch.inf)
    for round in range(10):
        verifying = proposals(generator, top_m)
        slots = torch.randperm(S, generator=generator)[: round % S]
        slots = torch.cat((slots, torch.tensor([-1])))
        before = [logits.clone().cpu(), columns.clone().cpu()]
        write_draft_logits(logits, columns, to(verifying, DEVICE), slots.to(DEVICE), temperatures.to(DEVICE))
        with reference():
            write_draft_logits(*before, verifying, slots, temperatures)
        torch.testing.assert_close(logits.cpu(), before[0], rtol=RTOL, atol=0)
        assert torch.equal(columns.cpu(), before[1])
        for slot in slots[:-1].tolist():
            if temperatures[slot] == 0:
                continue
            expected[slot] = -torch.inf
            for draft in range(int(verifying.num_drafts[slot])):
                for token_id, prob in zip(verifying.q_token_ids[slot, draft], verifying.q_probs[slot, draft]):
                    if prob > 0:
                        expected[slot, draft, token_id] = temperatures[slot] * prob.log()
        torch.testing.assert_close(logits.cpu(), expected, rtol=RTOL, atol=0)


def test_the_sampler_reads_q_in_it():
    verifying = proposals(torch.Generator().manual_seed(0), 5)
    verifying.num_drafts.fill_(K)
    temperatures = torch.rand(S) + 0.2
    logits = torch.full((S, K, V), -torch.inf, device=DEVICE)
    columns = torch.zeros(S, K, 5, dtype=torch.int32, device=DEVICE)
    write_draft_logits(logits, columns, to(verifying, DEVICE), torch.arange(S, device=DEVICE), temperatures.to(DEVICE))
    q = torch.softmax(logits.cpu() / temperatures[:, None, None], 2).gather(2, verifying.q_token_ids.long())
    known = verifying.q_probs > 0
    torch.testing.assert_close(q[known], verifying.q_probs[known], rtol=1e-5, atol=0)


def test_slots_beyond_the_last_row_are_left_alone():
    """There may be fewer rows than requests: of the others the sampler is told that their drafts are one-hot."""
    verifying = proposals(torch.Generator().manual_seed(0), 5)
    memory = torch.full((S, K, V), -torch.inf, device=DEVICE), torch.zeros(S, K, 5, dtype=torch.int32, device=DEVICE)
    some = [tensor[: S - 2] for tensor in memory]
    write_draft_logits(*some, to(verifying, DEVICE), torch.arange(S, device=DEVICE), torch.ones(S, device=DEVICE))
    assert bool((memory[0][: S - 2] > -torch.inf).any()) and not bool((memory[0][S - 2 :] > -torch.inf).any())
    assert not memory[1][S - 2 :].any()


def test_empty_batch():
    state = torch.zeros(S, K, V, device=DEVICE), torch.zeros(S, K, 5, dtype=torch.int32, device=DEVICE)
    verifying = to(proposals(torch.Generator().manual_seed(0), 5), DEVICE)
    write_draft_logits(*state, verifying, ints([], torch.int64).to(DEVICE), torch.ones(S, device=DEVICE))
    assert not state[0].any()
