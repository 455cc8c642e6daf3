"""Samples of a model whose next-token probabilities are known, and how likely they are."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from engines import Engine, request, texts
from tiny_models import VOCAB_SIZE, next_token_logits

MIN_CONTEXT = 200
"""Samples for which a context is tested by itself; rarer ones are pooled by their position."""
MIN_EXPECTED = 5.0
"""Expected samples of a cell; ranks below are merged into one cell."""


def sample(
    engine: Engine,
    target: Path,
    sampling: list[dict[str, Any]],
    *,
    prompts: list[list[int]],
    num_samples: int,
    num_tokens: int,
    **pace: float,
) -> tuple[SimpleNamespace, SimpleNamespace]:
    """Run `num_samples` requests of `num_tokens` tokens, all prompts of one length; `pace`: of `Engine.generate`.

    -> the run and its tokens [N], their probs under the model in `target` [N, VOCAB_SIZE] and contexts [N] of any type.
    """
    num_requests = num_samples * len(sampling) // sum(params.get("n", 1) for params in sampling)
    choices = list(itertools.islice(itertools.cycle(itertools.product(prompts, sampling)), num_requests))
    run = engine.generate(
        [
            # Equal seeds would give equal samples.
            request(prompt, max_tokens=num_tokens, **(params | {"seed": i} if "seed" in params else params))
            for i, (prompt, params) in enumerate(choices)
        ],
        **pace,
    )
    rows = [(prompt, params, tokens) for (prompt, params), ids in zip(choices, texts(run)) for tokens in ids]
    generated = torch.tensor([tokens for _, _, tokens in rows])
    sequences = torch.cat([torch.tensor([prompt for prompt, _, _ in rows]), generated], dim=1)
    logits = next_token_logits(target, len(prompts[0]), sequences)
    probs = torch.stack([target_probs(row, **params) for row, (_, params, _) in zip(logits, rows)])
    contexts = [
        (params["temperature"], *prompt, *tokens[:i]) for prompt, params, tokens in rows for i in range(num_tokens)
    ]
    return run, SimpleNamespace(tokens=generated.flatten(), probs=probs.flatten(0, 1), contexts=contexts)


def target_probs(
    logits: torch.Tensor,
    temperature: float,
    top_k: int = VOCAB_SIZE,
    top_p: float = 1.0,
    min_p: float = 0.0,
    logit_bias: Mapping[int, float] = MappingProxyType({}),
    allowed_token_ids: Sequence[int] = range(VOCAB_SIZE),
    **_: Any,
) -> torch.Tensor:
    """What vLLM samples from, `logits` [T, VOCAB_SIZE] -> the same; all on the likeliest token at temperature 0."""
    logits = logits.clone()
    for token_id, bias in logit_bias.items():
        logits[:, token_id] += bias
    logits[:, [token_id for token_id in range(VOCAB_SIZE) if token_id not in allowed_token_ids]] = -torch.inf
    if not temperature:
        return torch.nn.functional.one_hot(logits.argmax(-1), VOCAB_SIZE).double()
    smallest = logits.topk(top_k).values[:, -1:]
    if min_p:
        smallest = torch.maximum(smallest, logits.amax(-1, keepdim=True) + temperature * math.log(min_p))
    probs = torch.softmax(logits.masked_fill(logits < smallest, -torch.inf) / temperature, dim=-1)
    ranked, token_ids = probs.sort(descending=True)
    ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
    return torch.zeros_like(probs).scatter(-1, token_ids, ranked / ranked.sum(-1, keepdim=True))


def p_value(samples: SimpleNamespace, min_degrees: int = 50) -> float:
    """Chance of a deviation at least as large if every token was sampled from its `probs`.

    Within a group of contexts, tokens are counted by their rank under the target. Counts minus expectations have the
    covariance sum(diag(p) - p p^T), tokens being independent of each other given their contexts; for a single context
    the statistic is Pearson's. Fewer than `min_degrees` degrees of freedom are inconclusive.
    """
    sizes = Counter(samples.contexts)
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, context in enumerate(samples.contexts):
        groups[context if sizes[context] >= MIN_CONTEXT else (context[0], len(context))].append(i)
    ranked, tokens_at_rank = samples.probs.sort(dim=1, descending=True)
    drawn = tokens_at_rank == samples.tokens[:, None]
    statistic, degrees = 0.0, 0
    for rows in groups.values():
        probs, counts = ranked[rows], drawn[rows].sum(0).double()
        expected = probs.sum(0)
        cells = int((expected >= MIN_EXPECTED).sum())
        if cells < 2:
            continue
        probs = torch.cat([probs[:, : cells - 1], probs[:, cells - 1 :].sum(1, keepdim=True)], dim=1)[:, :-1]
        deviation = counts[: cells - 1] - probs.sum(0)
        covariance = torch.diag(probs.sum(0)) - probs.T @ probs
        statistic += float(deviation @ torch.linalg.solve(covariance, deviation))
        degrees += cells - 1
    assert degrees >= min_degrees, f"inconclusive: {degrees} degrees of freedom"
    return float(torch.special.gammaincc(torch.tensor(degrees / 2.0).double(), torch.tensor(statistic / 2).double()))
