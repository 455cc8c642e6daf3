"""Check once at startup that trees grown on the device agree with the model's own logits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_ssd.compat.drafter.paged import ForwardBatch, PagedModel
from vllm_ssd.drafter.device_steps import warm_up_attention
from vllm_ssd.drafter.engine import DraftEngine
from vllm_ssd.drafter.pages.device import DevicePages
from vllm_ssd.kernels import reference_ops
from vllm_ssd.link.protocol import common_prefix, unpack_ids

TOLERANCE = {2: 0.25, 4: 0.02}
"""Largest RMS error of log-probabilities, in standard deviations of the logits, by bytes of the model's dtype. Rounding
errors are an order of magnitude smaller; reading KV from a wrong place causes larger ones."""
NEGLIGIBLE = 1e-6
"""Probabilities are clamped to this before they are compared."""
LONG_TOKENS = 4096
"""Length of a prompt whose trunk is read in many splits."""
REFERENCE_TOKENS = 256
"""Prompt tokens per forward of the reference."""
TIME_LIMIT_S = 120.0
"""Time limit of the check, compilation and capture; the rest of `startup_timeout_s` is for starting over."""


class WrongTrees(RuntimeError):
    """Raised if the trees' proposals disagree with the model's logits."""


@dataclass
class _Branch:
    """A branch as it was pushed: its prefix, its drafts, and each draft's proposal (ids, probabilities)."""

    prefix: list[int]
    drafts: list[int] = field(default_factory=list)
    proposals: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)


@dataclass
class _Request:
    """Committed tokens, and the drafts under verification."""

    name: str
    tokens: list[int]
    drafts: list[int] = field(default_factory=list)

    def open(self, engine: DraftEngine, num_drafts: int) -> None:
        """Open the request at temperature 1."""
        engine.open(self.name, 0, np.array(self.tokens, np.int32), 1.0, num_drafts)

    def advance(self, engine: DraftEngine, emitted: list[int], drafts: list[int], num_drafts: int) -> None:
        """Advance the engine by an outcome."""
        self.tokens, self.drafts = self.tokens + emitted, drafts
        engine.advance(self.name, 0, len(self.tokens), emitted, drafts, num_drafts=num_drafts)


def check_trees(engine: DraftEngine, model: PagedModel, num_drafts: int) -> None:
    """Run three requests through opening, a hit, a miss and closing on an idle `engine` of `model`.

    Two share a prompt; the third's is longer than `LONG_TOKENS` if the context length allows. Raises `WrongTrees`
    unless their proposals agree with the model's logits after the same tokens, computed without branches, graphs or
    Triton. This also compiles everything that requests will need.
    """
    most_tokens = _most_tokens(model, num_drafts)
    num_tokens = min(2 * model.page_size - 2, most_tokens)
    if num_tokens < 1:
        return  # no request is short enough to be drafted for
    if isinstance(engine.pages, DevicePages):
        warm_up_attention(model, engine.pages.trees)
    random_numbers = np.random.default_rng(0)
    some = random_numbers.integers(model.vocab_size, size=num_tokens + 1 + num_drafts).tolist()
    prompt, emitted, drafts = some[:num_tokens], some[num_tokens : num_tokens + 1], some[num_tokens + 1 :]
    first, second = _Request("first", prompt), _Request("second", prompt)
    trees = _miss_once(engine, first, emitted, drafts)
    second.open(engine, num_drafts)  # adopts cached pages of the first
    if trees[-1]:
        accept_length, bonus = max(trees[-1])
        hit = trees[-1][accept_length, bonus]
        first.advance(engine, [*drafts[:accept_length], bonus], hit.drafts, num_drafts)
    trees += _grow(engine, first, second)
    engine.close(first.name)
    if most_tokens > num_tokens:
        size = min(LONG_TOKENS + model.page_size // 2, most_tokens)
        third = _Request("third", random_numbers.integers(model.vocab_size, size=size).tolist())
        third.open(engine, num_drafts)
        second.advance(engine, emitted, drafts, num_drafts)
        trees += _grow(engine, second, third)
        engine.close(third.name)
    engine.close(second.name)
    engine.pages.forget_idle()  # the reference forwards below overwrite pages
    for tree in trees:
        error = _error(model, list(_spread(list(tree.values()), 6)))
        if not error <= TOLERANCE[model.dtype.itemsize]:
            raise WrongTrees(f"proposals differ from the model's own by {error:.2g} standard deviations")


def check_forward(engine: DraftEngine, model: PagedModel, num_drafts: int) -> None:
    """Draft for one request on an idle engine, through a miss, so that a model that cannot run fails at start.

    Raises what the forward raises, for example of a kernel that is not implemented for the dtype. This also compiles a
    model that is compiled.
    """
    num_tokens = min(model.page_size, _most_tokens(model, num_drafts))
    if num_tokens < 1:
        return  # no request is short enough to be drafted for
    request = _Request("first", [0] * num_tokens)
    _miss_once(engine, request, [0], [0] * num_drafts)
    engine.close(request.name)
    engine.pages.forget_idle()


@contextmanager
def time_limit(seconds: float, then: Callable[[Exception], object]) -> Iterator[None]:
    """Call `then` on another thread if the body does not finish within `seconds`, for example in a hung kernel."""
    error = TimeoutError(f"not done after {seconds:g} s")
    timer = threading.Timer(seconds, then, [error])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _most_tokens(model: PagedModel, num_drafts: int) -> int:
    """The longest prompt that leaves room for the rounds of a check."""
    return model.max_model_len - 3 * (num_drafts + 2)


def _miss_once(
    engine: DraftEngine, request: _Request, emitted: list[int], drafts: list[int]
) -> list[dict[tuple[int, int], _Branch]]:
    """Open a request and miss, so that all fork points start at once; its branches by outcome, before and after."""
    request.open(engine, len(drafts))
    trees = _grow(engine, request)
    request.advance(engine, emitted, drafts, len(drafts))
    return trees + _grow(engine, request)


def _grow(engine: DraftEngine, *requests: _Request) -> list[dict[tuple[int, int], _Branch]]:
    """Speculate until there is no work left; returns the branches of each of `requests` by outcome."""
    trees: dict[str, dict[tuple[int, int], _Branch]] = {request.name: {} for request in requests}
    by_name = {request.name: request for request in requests}
    while engine.has_work:
        push = engine.speculate()
        for pushed in push.each() if push else []:
            block = pushed.block
            request, branches = by_name[block.request_id], trees[block.request_id]
            for i, (k, bonus) in enumerate(unpack_ids(block.outcomes).reshape(-1, 2).tolist()):
                branch = branches.setdefault((k, bonus), _Branch([*request.tokens, *request.drafts[:k], bonus]))
                branch.drafts += block.drafts(i)
                assert block.sampled  # at temperature 1
                branch.proposals += [proposal for proposal in pushed.proposals(i) if proposal is not None]
    return list(trees.values())


def _spread(branches: list[_Branch], num: int) -> Iterator[_Branch]:
    """At most `num` branches, evenly spaced from the first to the last."""
    for i in sorted(set(np.linspace(0, len(branches) - 1, min(num, len(branches))).astype(int).tolist())):
        yield branches[i]


def _error(model: PagedModel, branches: list[_Branch]) -> float:
    """The largest error of any draft of `branches`, all of one request; infinite if a draft is not in its proposal."""
    if not branches:
        return 0.0
    first = branches[0].prefix
    num_shared = min(common_prefix(first, branch.prefix[:-1]) for branch in branches)
    for start in range(0, num_shared, REFERENCE_TOKENS):
        _reference_logits(model, first[: min(start + REFERENCE_TOKENS, num_shared)], start, num_logits=1)
    errors = []
    for branch in branches:
        before = branch.drafts[:-1] if model.mask_token_id is None else [model.mask_token_id] * (len(branch.drafts) - 1)
        tokens = branch.prefix + before
        logits = _reference_logits(model, tokens, num_shared, num_logits=len(branch.drafts))
        for row, token, (ids, probs) in zip(logits, branch.drafts, branch.proposals, strict=True):
            if token not in ids:
                return float("inf")
            ids = torch.from_numpy(ids.astype(np.int64))
            left_out = row.clone().index_fill_(0, ids, float("-inf")).max()
            proposed, expected = torch.from_numpy(probs.copy()), torch.softmax(row[ids], -1)
            difference = proposed.clamp(min=NEGLIGIBLE).log() - expected.clamp(min=NEGLIGIBLE).log()
            beyond = (left_out - row[ids].min()).clamp(min=0)  # a token outside the proposal is likelier than one in it
            errors.append(torch.maximum(difference.square().mean().sqrt(), beyond) / row.std())
    return float(torch.stack(errors).max())


def _reference_logits(model: PagedModel, tokens: list[int], start: int, num_logits: int) -> torch.Tensor:
    """Logits `[num_logits, vocab]` after the last tokens; KV of the first `start` tokens must be in the first pages."""
    n, num_pages = len(tokens), -(-len(tokens) // model.page_size)
    positions = np.arange(start, n)
    batch = ForwardBatch(
        token_ids=np.array(tokens[start:], np.int32),
        positions=positions,
        slots=positions,  # use the first pages, which are free in an idle engine
        query_start_loc=np.array([0, n - start], np.int32),
        seq_lens=np.array([n], np.int32),
        page_tables=np.arange(num_pages, dtype=np.int32)[None],
        logit_indices=np.arange(n - start - num_logits, n - start),
    )
    with reference_ops():
        return model.forward(batch).float().cpu()
