"""Whether the trees that grow on the device say what the model says, asked once at start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_ssd.compat.drafter.paged import ForwardBatch, PagedModel
from vllm_ssd.drafter.engine import DraftEngine
from vllm_ssd.kernels import reference_ops
from vllm_ssd.link.protocol import unpack_ids

TOLERANCE = {2: 0.25, 4: 0.02}
"""Root mean square error of log-probabilities, in standard deviations of the logits, by bytes of the model's dtype.
Rounding stays an order of magnitude below; KV from a wrong place exceeds it."""


NEGLIGIBLE = 1e-6
"""Probability below which proposals are alike."""


class WrongTrees(RuntimeError):
    """What the trees propose is not what the model says after their tokens."""


@dataclass
class _Branch:
    """What was pushed of one branch: its prefix, its drafts, and the proposal (ids, probabilities) of each."""

    prefix: list[int]
    drafts: list[int] = field(default_factory=list)
    proposals: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)


@dataclass
class _Request:
    """Committed tokens, and the drafts under verification."""

    name: str
    tokens: list[int]
    drafts: list[int] = field(default_factory=list)

    def advance(self, engine: DraftEngine, emitted: list[int], drafts: list[int], num_drafts: int) -> None:
        """Tell the engine of an outcome."""
        self.tokens, self.drafts = self.tokens + emitted, drafts
        engine.advance(self.name, 0, len(self.tokens), emitted, drafts, num_drafts=num_drafts)


def check_trees(engine: DraftEngine, model: PagedModel, num_drafts: int) -> None:
    """Take two requests of one prompt through openings, a hit and their ends, on an idle `engine` of `model`.

    Raises `WrongTrees` unless what they propose agrees with the model's logits after the same tokens, computed without
    branches, graphs or Triton. All that requests will need is compiled on the way.
    """
    num_tokens = min(2 * model.page_size - 2, model.max_model_len - 3 * (num_drafts + 2))
    if num_tokens < 1:
        return  # nothing will ever be drafted
    some = np.random.default_rng(0).integers(model.vocab_size, size=num_tokens + 1 + num_drafts).tolist()
    prompt, emitted, drafts = some[:num_tokens], some[num_tokens : num_tokens + 1], some[num_tokens + 1 :]
    first, second = _Request("first", prompt), _Request("second", prompt)
    engine.open("first", 0, np.array(prompt, np.int32), 1.0, num_drafts)
    grown = [_grow(engine, first)]
    first.advance(engine, emitted, drafts, num_drafts)  # drafts that nobody predicted: all forks start at once
    grown.append(_grow(engine, first))
    if grown[-1]:
        accept_length, bonus = max(grown[-1])
        hit = grown[-1][accept_length, bonus]
        first.advance(engine, [*drafts[:accept_length], bonus], hit.drafts, num_drafts)
        grown.append(_grow(engine, first))
    engine.open("second", 0, np.array(prompt, np.int32), 1.0, num_drafts)  # reads pages of the first
    grown.append(_grow(engine, second))
    for request in (first, second):
        engine.close(request.name)
    engine.pages.forget_idle()  # what the model is asked next is written to any page
    for tree in grown:
        for branch in _spread(list(tree.values()), 6):
            error = _error(model, branch)
            if not error <= TOLERANCE[model.dtype.itemsize]:
                raise WrongTrees(f"proposals differ from the model's own by {error:.2g} standard deviations")


def _grow(engine: DraftEngine, request: _Request) -> dict[tuple[int, int], _Branch]:
    """Speculate until nothing is left to do; the branches of `request` by outcome."""
    branches: dict[tuple[int, int], _Branch] = {}
    while engine.has_work:
        push = engine.speculate()
        for block in push.blocks if push else []:
            for i, (k, bonus) in enumerate(unpack_ids(block.outcomes).reshape(-1, 2).tolist()):
                branch = branches.setdefault((k, bonus), _Branch([*request.tokens, *request.drafts[:k], bonus]))
                branch.drafts += block.drafts(i)
                proposals = block.proposals(i)
                assert proposals is not None  # at temperature 1
                branch.proposals += proposals
    return branches


def _spread(branches: list[_Branch], num: int) -> Iterator[_Branch]:
    """At most `num` of them, from the first to the last."""
    for i in sorted(set(np.linspace(0, len(branches) - 1, min(num, len(branches))).astype(int).tolist())):
        yield branches[i]


def _error(model: PagedModel, branch: _Branch) -> float:
    """The largest error of a draft of `branch`; infinite for a token outside its own proposal."""
    token_ids = np.array(branch.prefix + branch.drafts[:-1], np.int32)
    n, num_pages = len(token_ids), -(-len(token_ids) // model.page_size)
    positions = np.arange(n)
    batch = ForwardBatch(
        token_ids=token_ids,
        positions=positions,
        slots=positions,  # the first pages: an idle engine holds none
        query_start_loc=np.array([0, n], np.int32),
        seq_lens=np.array([n], np.int32),
        page_tables=np.arange(num_pages, dtype=np.int32)[None],
        logit_indices=positions[len(branch.prefix) - 1 :],
    )
    with reference_ops():
        logits = model.forward(batch).float().cpu()
    errors = []
    for row, token, (ids, probs) in zip(logits, branch.drafts, branch.proposals, strict=True):
        if token not in ids:
            return float("inf")
        ids = torch.from_numpy(ids.astype(np.int64))
        left_out = row.clone().index_fill_(0, ids, float("-inf")).max()
        proposed, expected = torch.from_numpy(probs.copy()), torch.softmax(row[ids], -1)
        difference = proposed.clamp(min=NEGLIGIBLE).log() - expected.clamp(min=NEGLIGIBLE).log()
        beyond = (left_out - row[ids].min()).clamp(min=0)  # likelier than the least likely proposed
        errors.append(torch.maximum(difference.square().mean().sqrt(), beyond) / row.std())
    return float(torch.stack(errors).max())
