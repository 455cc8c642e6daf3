"""A target in plain dicts, which checks all that a drafter's engine pushes against what the model says."""

from __future__ import annotations

from random import Random
from typing import Protocol

import numpy as np
import torch
from hypothesis import strategies as st

from vllm_ssd.compat.drafter.paged import PagedModel
from vllm_ssd.drafter.biases import dense_bias
from vllm_ssd.drafter.engine import DraftEngine
from vllm_ssd.drafter.server import build_engine
from vllm_ssd.link.protocol import ALL_TOKENS, JIT_TOKEN, NO_BIAS, NO_NOISE, Bias, Noise, Push, PushedBlock, Truncation
from vllm_ssd.policy import FanOut

K = 3


class CheckedModel(PagedModel, Protocol):
    """A model that can be asked what it should have said."""

    num_forwards: int
    vocab_size: int

    def reference_logits(self, prefix: list[int]) -> torch.Tensor:
        """Logits `[vocab]` after `prefix`, distinct for all tokens."""
        ...


def engine_of(
    model: PagedModel, fan_out: int | list[int] = 2, num_speculative_tokens: int = K, **options
) -> DraftEngine:
    k = num_speculative_tokens
    defaults = dict(max_num_seqs=4, max_branches=2 * (k + 1), max_fan_out=2, top_m=5, seed=1)
    return build_engine(model, FanOut(k, fan_out), num_speculative_tokens=k, **(defaults | options))


def reference_drafts(model: CheckedModel, prefix: list[int], num_drafts: int, bias: Bias = NO_BIAS) -> list[int]:
    """The greedy continuation of `prefix`; with a mask token, what is likeliest in each place whatever precedes it."""
    drafts: list[int] = []
    for i in range(num_drafts):
        before = drafts if model.mask_token_id is None else [model.mask_token_id] * i
        logits = model.reference_logits(prefix + before).numpy() + dense_bias(bias, model.vocab_size)
        drafts.append(int(logits.argmax()))
    return drafts


def reference_jit_drafts(model: CheckedModel, tokens: list[int], num_drafts: int, bias: Bias = NO_BIAS) -> list[int]:
    """As `reference_drafts` of just-in-time drafts: the first one is known when the others are drawn."""
    first = reference_drafts(model, tokens, min(num_drafts, 1), bias)
    return first + reference_drafts(model, tokens + first, num_drafts - 1, bias)


def check_conservation(engine: DraftEngine) -> None:
    """Every page is free or held; holders are exactly the trunks and branches that name the page."""
    alive = sum(len(s.rows) for s in engine.sequences.values())
    assert engine.branches.alive.sum() == alive
    if hasattr(engine.pages, "trees"):
        check_device_pages(engine)
    else:
        check_host_pages(engine)


def check_host_pages(engine: DraftEngine) -> None:
    kept = engine.pages
    holders = np.zeros(kept.pool.num_pages, np.int32)
    for sequence in engine.sequences.values():
        pages = kept.tables[sequence.slot, : kept.num_pages[sequence.slot]]
        assert len(set(pages.tolist())) == len(pages)
        np.add.at(holders, pages, 1)
        branch_pages = kept.owned(sequence.rows)
        np.add.at(holders, branch_pages, 1)
        assert not set(branch_pages.tolist()) & set(pages.tolist())
        for row in sequence.rows.tolist():
            held = kept.branch_pages[row, : kept.num_branch_pages[row]]
            assert (kept.pool.holders(held) == 1).all(), "a branch writes to a shared page"
    assert kept.num_free == (holders == 0).sum()
    all_pages = np.arange(kept.pool.num_pages)
    assert np.array_equal(holders + kept.pool.is_cached(all_pages), kept.pool.holders(all_pages))


def check_device_pages(engine: DraftEngine) -> None:
    """What the host counted is what the kernels did, once they have done it."""
    kept = engine.pages
    kept.carry_out()
    pool, trees = kept.device_pool, kept.trees
    held_by_cache = torch.from_numpy(kept._is_kept)
    kept_pages = kept._kept_pages[held_by_cache].long()
    idle = (pool.holders[kept_pages] == 1).sum()
    assert int(pool.num_free) + idle == kept.num_free
    assert trees.num_pages.tolist() == kept.num_pages.tolist()
    spines = [table[:n] for table, n in zip(trees.page_tables, trees.num_pages.tolist())]
    held = torch.cat([*spines, trees.branch_pages[trees.branch_pages >= 0]]).long()
    holders = torch.bincount(torch.cat([held, kept_pages]), minlength=len(pool.holders))
    assert torch.equal(holders, pool.holders.long())
    assert int(pool.num_free) == (pool.holders == 0).sum()
    assert (pool.holders[trees.branch_pages[trees.branch_pages >= 0].long()] == 1).all(), "a branch's page is shared"
    standing_in = np.concatenate([table[:n] for table, n in zip(kept.tables, kept.num_pages)])
    kept_late = kept.pool.is_cached(standing_in) & ~kept._is_kept[standing_in]  # so far the host alone counts its cache
    assert (kept.pool.holders(standing_in) - kept_late).tolist() == pool.holders[torch.cat(spines).long()].tolist()
    assert not pool.holders[pool.free[: int(pool.num_free)].long()].any()
    for slot, sequence in enumerate(engine._by_slot):
        rows = sequence.rows.tolist() if sequence else []
        outcomes = [(max(engine.branches.accept_length[r], 0), engine.branches.tokens[r, 0]) for r in rows]
        alive = trees.accept_lengths[slot] >= 0
        found = list(zip(trees.accept_lengths[slot][alive].tolist(), trees.first_tokens[slot][alive].tolist()))
        assert found == outcomes


class Target:
    """The target's view in plain dicts: what was pushed for each request's current round."""

    def __init__(self, model: CheckedModel, num_speculative_tokens: int = K, **options) -> None:
        self.model, self.num_drafts = model, num_speculative_tokens
        self.engine = engine_of(model, num_speculative_tokens=num_speculative_tokens, **options)
        self.tokens: dict[str, list[int]] = {}
        self.drafts: dict[str, list[int]] = {}
        self.blocks: dict[str, dict[tuple[int, int], list[int]]] = {}
        self.epoch: dict[str, int] = {}
        self.temperature: dict[str, float] = {}
        self.truncation: dict[str, Truncation] = {}
        self.evicted = 0

    def open(
        self,
        request_id: str,
        tokens: list[int],
        temperature: float = 0.0,
        truncation: Truncation = ALL_TOKENS,
        cache_salt: bytes = b"",
        noise: Noise = NO_NOISE,
    ) -> None:
        self.epoch[request_id] = self.epoch.get(request_id, 0) + 1
        self.temperature[request_id], self.truncation[request_id] = temperature, truncation
        self.tokens[request_id], self.drafts[request_id], self.blocks[request_id] = list(tokens), [], {}
        told = temperature, self.num_drafts, truncation, cache_salt, noise
        self.engine.open(request_id, self.epoch[request_id], np.array(tokens, np.int32), *told)
        check_conservation(self.engine)

    def step(self) -> None:
        push = self.engine.speculate()
        check_conservation(self.engine)
        self.absorb(push)

    def absorb(self, push: Push | None) -> None:
        for pushed in push.each() if push else []:
            block = pushed.block
            tokens = self.tokens[block.request_id]
            assert (block.epoch, block.length) == (self.epoch[block.request_id], len(tokens))
            for i, (accept_length, bonus) in enumerate(np.frombuffer(block.outcomes, "<i4").reshape(-1, 2).tolist()):
                known = self.blocks[block.request_id].setdefault((accept_length, bonus), [])
                assert block.offset == len(known), "a push left a gap or repeated tokens"
                known += block.drafts(i)
                prefix = list(tokens)
                if bonus != JIT_TOKEN:
                    drafts = self.drafts[block.request_id]
                    assert drafts[accept_length : accept_length + 1] != [bonus]
                    prefix += drafts[:accept_length] + [bonus]
                if self.temperature[block.request_id]:
                    sampling = self.temperature[block.request_id], self.truncation[block.request_id]
                    check_proposals(self.model, pushed, i, prefix, known, bonus == JIT_TOKEN, *sampling)
                else:
                    expected = (reference_jit_drafts if bonus == JIT_TOKEN else reference_drafts)(
                        self.model, prefix, len(known), self.truncation[block.request_id].bias
                    )
                    assert known == expected, "a draft read the wrong prefix"
        for evicted in push.evicted if push else []:
            self.evicted += 1
            if self.epoch.get(evicted.request_id) == evicted.epoch:
                self.tokens.pop(evicted.request_id, None)

    def advance(self, request_id: str, emitted: list[int], drafts: list[int], jit: int = 0) -> None:
        self.tokens[request_id] += emitted
        self.drafts[request_id], self.blocks[request_id] = drafts, {}
        tokens = self.tokens[request_id]
        self.engine.advance(
            request_id, self.epoch[request_id], len(tokens), emitted, drafts, num_drafts=self.num_drafts, jit=jit
        )
        check_conservation(self.engine)

    def close(self, request_id: str) -> None:
        self.engine.close(request_id)
        self.tokens.pop(request_id, None)
        check_conservation(self.engine)


def check_proposals(
    model: CheckedModel,
    pushed: PushedBlock,
    i: int,
    prefix: list[int],
    known: list[int],
    is_jit: bool,
    temperature: float,
    truncation: Truncation = ALL_TOKENS,
) -> None:
    """The drafts pushed of a branch, the last of `known`, were drawn from what they carry.

    That is the softmax of the likeliest tokens after `prefix` and the drafts or masks before them, cut. The draft
    has changed places with the likeliest token, the others are in order.
    """
    masks = [] if model.mask_token_id is None else [model.mask_token_id]
    for place, (token, (ids, probs)) in enumerate(
        zip(pushed.block.drafts(i), pushed.proposals(i), strict=True), start=pushed.block.offset
    ):
        drawn = place if not masks else min(place, int(is_jit))
        before = known[:drawn] + masks * (place - drawn)
        logits = model.reference_logits(prefix + before).numpy() + dense_bias(truncation.bias, model.vocab_size)
        logits = logits / temperature
        order = np.argsort(-logits)[: len(ids)]
        weights = truncated(np.exp(logits[order] - logits[order].max()), truncation)
        drawn_from = int((order == token).argmax())
        for array in (order, weights):
            array[[0, drawn_from]] = array[[drawn_from, 0]]
        assert ids.tolist() == order.tolist() and ids[0] == token and weights[0] > 0
        assert np.allclose(probs, weights / weights.sum(), atol=1e-5)


def truncated(weights: np.ndarray, truncation: Truncation) -> np.ndarray:
    """Weights [M], likeliest first, without those that the request cannot sample, one by one."""
    left = [w if w >= truncation.min_p * weights[0] else 0.0 for w in weights.tolist()]
    left[truncation.top_k or len(left) :] = [0.0] * len(left[truncation.top_k or len(left) :])
    total = above = sum(left)
    for i in reversed(range(1, len(left))):
        above -= left[i]
        if above >= truncation.top_p * total:
            left[i] = 0.0
    return np.array(left)


def grow(target: Target) -> None:
    while target.engine.has_work:
        target.step()


def drive(target: Target, rng: Random, num_rounds: int) -> None:
    """Requests join, hit, miss and leave, some of them between the steps of a tree, three at a time."""
    for i in range(num_rounds):
        live = sorted(target.tokens)
        if len(live) < 3:
            shared = target.tokens[live[0]][:40] if live else []
            target.open(f"r{i}", shared + [rng.randrange(13) for _ in range(rng.randint(1, 9))], rng.choice([0.0, 0.8]))
        for _ in range(rng.choice([1, 2, 3, 9])):
            if target.engine.has_work:
                target.step()
        request_id = rng.choice(sorted(target.tokens))
        drafts, block = target.drafts[request_id], target.blocks[request_id]
        if rng.random() < 0.1 or len(target.tokens[request_id]) > 80:
            target.close(request_id)
        elif block and rng.random() < 0.7:
            accept_length, bonus = rng.choice(sorted(block))
            target.advance(request_id, [*drafts[:accept_length], bonus], block[accept_length, bonus])
        else:
            target.advance(request_id, [*drafts[: rng.randint(0, len(drafts))], rng.randrange(13)], [])


def operate(target: Target, data: st.DataObject) -> None:
    """Joins, leaves, hits, misses, trims, skipped rounds, foreign drafts and late outcomes, until all have left."""
    token = st.integers(0, target.model.vocab_size - 1)
    for _ in range(data.draw(st.integers(5, 40))):
        live = sorted(target.tokens)
        action = data.draw(st.sampled_from(["open", "close", "step", "step", "hit", "miss", "trim", "odd", "jit"]))
        if action == "open" and len(live) < 3:
            shared = target.tokens[live[0]] if live and data.draw(st.booleans()) else []
            target.open(
                data.draw(st.sampled_from("abc")),
                shared[:30] + data.draw(st.lists(token, min_size=1, max_size=9)),
                data.draw(st.sampled_from([0.0, 0.8])),
            )
            continue
        if action == "step":
            target.step()
            continue
        if not live:
            continue
        request_id = data.draw(st.sampled_from(live))
        drafts, block = target.drafts[request_id], target.blocks[request_id]
        if action == "close":
            target.close(request_id)
        elif action == "hit" and any(key[1] != JIT_TOKEN for key in block):
            key = data.draw(st.sampled_from(sorted(k for k in block if k[1] != JIT_TOKEN)))
            depth = data.draw(st.integers(0, len(block[key])))
            target.advance(request_id, drafts[: key[0]] + [key[1]], block[key][:depth])
        elif action == "trim" and drafts:
            n = data.draw(st.integers(1, len(drafts)))
            target.advance(request_id, drafts[:n], drafts[n:])
        elif action == "jit":
            if (0, JIT_TOKEN) in block:
                taken = block[(0, JIT_TOKEN)]
                target.advance(request_id, [], taken[: data.draw(st.integers(0, len(taken)))])
            else:
                target.advance(request_id, [data.draw(token)], [], jit=data.draw(st.integers(1, target.num_drafts)))
        elif action == "odd":
            emitted = data.draw(st.lists(token, min_size=1, max_size=6))
            target.advance(request_id, emitted, data.draw(st.lists(token, max_size=target.num_drafts)))
        else:
            k = data.draw(st.integers(0, len(drafts)))
            target.advance(request_id, drafts[:k] + [data.draw(token)], [])
    for request_id in list(target.tokens):
        target.close(request_id)
    for request_id in list(target.engine.sequences):
        target.engine.close(request_id)
