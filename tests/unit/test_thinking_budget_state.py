"""Thinking budgets under speculation force what vLLM's own holder forces without it, at every position."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

from vllm_ssd.compat.target.thinking_budget import ThinkingBudget

VOCAB_SIZE, K = 12, 4
MARKERS = [([1], [2]), ([1], [2, 3]), ([1, 4], [2, 3, 5])]


def holder_of(markers: tuple[list[int], list[int]], num_spec_tokens: int) -> ThinkingBudgetStateHolder:
    start, end = markers
    config = SimpleNamespace(reasoning_start_token_ids=start, reasoning_end_token_ids=end)
    return ThinkingBudgetStateHolder(config, 8, num_spec_tokens, torch.device("cpu"), False)


def join(holder: ThinkingBudgetStateHolder, requests: list[SimpleNamespace]) -> None:
    added = [
        (row, SamplingParams(thinking_token_budget=request.budget), request.prompt, request.output)
        for row, request in enumerate(requests)
    ]
    holder.sync_batch(BatchUpdate(len(requests), removed=[], added=added, moved=[]))


def forced(logits: torch.Tensor) -> list[int | None]:
    return [int(row.argmax()) if row.max() > 1e8 else None for row in logits]


def without_speculation(holder: ThinkingBudgetStateHolder, outputs: list[list[int]]) -> list[int | None]:
    holder.update_state(outputs, None)
    return forced(holder.apply_to_logits(torch.zeros(len(outputs), VOCAB_SIZE), False, None))


def with_drafts(
    holder: ThinkingBudgetStateHolder, outputs: list[list[int]], drafts: list[list[int]]
) -> list[list[int | None]]:
    """What is forced at each draft and bonus position of each row, as the rejection sampler asks for it."""
    holder.update_state(outputs, drafts)
    bonus = forced(holder.apply_to_logits(torch.zeros(len(outputs), VOCAB_SIZE), True, drafts))
    targets = forced(holder.apply_to_logits(torch.zeros(sum(map(len, drafts)), VOCAB_SIZE), False, drafts))
    rows = []
    for row, tokens in enumerate(drafts):
        rows.append([*targets[: len(tokens)], bonus[row]])
        del targets[: len(tokens)]
    return rows


def decode(seed: int, markers: tuple[list[int], list[int]], exact: bool) -> int:
    """Decode three random requests with and without drafts -> positions at which another token was forced."""
    rng = random.Random(seed)
    token = lambda: rng.choice([1, 2, 3, 4, 5, 6, 7, 7, 8])  # noqa: E731
    requests = [
        SimpleNamespace(prompt=[token() for _ in range(rng.randint(1, 9))], budget=rng.randint(0, 7), output=[])
        for _ in range(3)
    ]
    plain, speculative = holder_of(markers, 0), holder_of(markers, K)
    if exact:
        ThinkingBudget.take_over(speculative)
        assert type(speculative) is ThinkingBudget
    join(plain, requests)
    join(speculative, requests)
    if rng.random() < 0.5:  # a piece of the prompts whose samples are thrown away
        without_speculation(plain, [[] for _ in requests])
        with_drafts(speculative, [[] for _ in requests], [[] for _ in requests])
    wrong = 0
    for _ in range(12):
        outputs = [request.output for request in requests]
        drafts = [[token() for _ in range(rng.choice([0, 0, 1, K]))] for _ in requests]
        found = with_drafts(speculative, [list(output) for output in outputs], [list(row) for row in drafts])
        active = {row: list(drafts[row]) for row in range(len(requests))}
        # Token by token, as long as a row's drafts are what is sampled.
        for position in range(K + 1):
            wanted = without_speculation(plain, [list(output) for output in outputs])
            for row in list(active):
                wrong += found[row][position] != wanted[row]
                if position == len(active[row]):
                    outputs[row].append(token() if wanted[row] is None else wanted[row])
                    del active[row]
                    continue
                draft = active[row][position]
                accepted = draft if rng.random() < 0.7 else token()
                sampled = accepted if wanted[row] is None else wanted[row]
                outputs[row].append(sampled)
                if sampled != draft:
                    del active[row]
            if not active:
                break
    return wrong


@pytest.mark.parametrize("markers", MARKERS)
def test_every_position_is_forced_as_without_speculation(markers: tuple[list[int], list[int]]) -> None:
    assert sum(decode(seed, markers, exact=True) for seed in range(150)) == 0


@pytest.mark.parametrize("markers", MARKERS)
def test_vllm_alone_forces_other_tokens_under_speculation(markers: tuple[list[int], list[int]]) -> None:
    """When this fails vLLM has mended it, and `ThinkingBudget` can go."""
    assert sum(decode(seed, markers, exact=False) for seed in range(150)) > 0


def test_a_row_without_a_budget_does_not_inherit_one() -> None:
    """A request with a budget leaves row 0, the one without from row 1 moves there."""
    inherits = {}
    for exact in (True, False):
        holder = holder_of(MARKERS[0], K)
        if exact:
            ThinkingBudget.take_over(holder)
        join(
            holder,
            [SimpleNamespace(prompt=[1], budget=0, output=[]), SimpleNamespace(prompt=[1], budget=None, output=[])],
        )
        # `condense` takes row 0 out of the removed ones as it moves row 1 there.
        holder.sync_batch(BatchUpdate(1, removed=[], added=[], moved=[(1, 0, MoveDirectionality.UNIDIRECTIONAL)]))
        inherits[exact] = holder.has_tracked_requests()
    assert inherits == {True: False, False: True}


def test_a_request_that_returns_with_its_tokens_is_taken_up_there() -> None:
    """Preempted inside reasoning: the tokens so far count."""
    holder = holder_of(MARKERS[0], K)
    ThinkingBudget.take_over(holder)
    join(holder, [SimpleNamespace(prompt=[6, 1], budget=5, output=[7, 7, 7])])
    assert with_drafts(holder, [[7, 7, 7]], [[8, 8, 2]]) == [[None, None, 2, None]]
