"""Thinking budgets with SSD: reasoning ends at the same token as without speculation.

vLLM counts thinking tokens per request (`ThinkingBudgetStateHolder` on V1, `ThinkingBudgetState` on V2) and forces the
end marker once the budget is spent. "def" starts reasoning and "return" ends it: one token each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from engines import PAIR, Engine, assert_conclusive, request, texts

Prompts = Callable[..., list[list[int]]]

REASONING = {"reasoning_start_str": "def", "reasoning_end_str": "return"}


@pytest.fixture(scope="module")
def markers() -> tuple[int, int]:
    """Token ids that start and end reasoning."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(PAIR / "target" / "tokenizer.json"))
    (start,), (end,) = (tokenizer.encode(REASONING[f"reasoning_{side}_str"]).ids for side in ("start", "end"))
    return start, end


@pytest.fixture(scope="module")
def engine(start_engine: Callable[..., Engine]) -> Iterator[Engine]:
    engine = start_engine(speculative={"branch_budget": 12}, reasoning_config=REASONING)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def expecting(start_engine: Callable[..., Engine]) -> Iterator[Engine]:
    """The target alone, with the same reasoning markers."""
    engine = start_engine(reasoning_config=REASONING)
    yield engine
    engine.close()


def test_a_spent_budget_ends_reasoning_at_once(engine: Engine, prompts: Prompts, markers: tuple[int, int]) -> None:
    """Eight prompts that end inside reasoning and are prefilled together: no row has drafts in the first round."""
    start, end = markers
    requests = [
        request([*prompt, start], max_tokens=24, thinking_token_budget=0) for prompt in prompts(8, 20, 40, seed=60)
    ]
    run = engine.generate(requests, lockstep=1.0)
    assert [tokens[0] for (tokens,) in texts(run)] == [end] * 8
    assert_conclusive(run, hits=10, accepted=10)


@pytest.mark.parametrize("others", ["none", "plain"])
def test_reasoning_ends_where_it_would_without_speculation(
    engine: Engine, expecting: Engine, prompts: Prompts, markers: tuple[int, int], others: str
) -> None:
    """Budgets that run out in the first round, within a round's drafts and much later, beside rows without a budget."""
    start, _ = markers
    requests = [
        request([*prompt, start], max_tokens=40, join_step=i // 4, thinking_token_budget=i)
        for i, prompt in enumerate(prompts(16, 20, 60, seed=61))
    ]
    if others == "plain":
        requests[::3] = [
            request(prompt, max_tokens=40, join_step=i) for i, prompt in enumerate(prompts(6, 20, 60, seed=62))
        ]
    run, expected = engine.generate(requests, lockstep=1.0), expecting.generate(requests)
    assert texts(run) == texts(expected)
    assert_conclusive(run, hits=20, accepted=20)
