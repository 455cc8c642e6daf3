"""The drafter's engine against a model that notices every wrong page."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from fake_model import FakePagedModel, reference_drafts, reference_logits
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ssd.drafter import device_steps
from vllm_ssd.drafter.engine import DraftEngine
from vllm_ssd.drafter.forward import Sampler
from vllm_ssd.drafter.pages.device import DevicePages
from vllm_ssd.drafter.pages.host import HostPages
from vllm_ssd.drafter.self_check import check_trees
from vllm_ssd.link.protocol import JIT_TOKEN, Push, SpeculationBlock
from vllm_ssd.policy import FanOut

K = 3


@pytest.fixture(scope="module", params=[HostPages, DevicePages], autouse=True)
def pages_type(request: pytest.FixtureRequest) -> Iterator[type]:
    """Every test runs with pages kept on the host and with pages kept by the kernels' references."""
    global PAGES
    PAGES = request.param
    yield PAGES


def make_engine(num_pages: int = 400, max_num_seqs: int = 4, fan_out=2, **options) -> DraftEngine:
    return DraftEngine(
        FakePagedModel(num_pages, **options),
        FanOut(K, fan_out),
        num_speculative_tokens=K,
        max_num_seqs=max_num_seqs,
        max_branches=2 * (K + 1),
        max_fan_out=2,
        top_m=5,
        seed=1,
        pages=PAGES,
    )


def check_conservation(engine: DraftEngine) -> None:
    """Every page is free or held; holders are exactly the trunks and branches that name the page."""
    alive = sum(len(s.rows) for s in engine.sequences.values())
    assert engine.branches.alive.sum() == alive
    if PAGES is HostPages:
        check_host_pages(engine)
    else:
        check_device_pages(engine)


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
    assert np.array_equal(holders, kept.pool.holders(np.arange(kept.pool.num_pages)))
    assert kept.num_free == (holders == 0).sum()


def check_device_pages(engine: DraftEngine) -> None:
    """What the host counted is what the kernels did, once they have done it."""
    kept = engine.pages
    kept.carry_out()
    pool, trees = kept.device_pool, kept.trees
    assert int(pool.num_free) == kept.num_free
    assert trees.num_pages.tolist() == kept.num_pages.tolist()
    spines = [table[:n] for table, n in zip(trees.page_tables, trees.num_pages.tolist())]
    held = torch.cat([*spines, trees.branch_pages[trees.branch_pages >= 0]]).long()
    assert torch.equal(torch.bincount(held, minlength=len(pool.holders)), pool.holders.long())
    assert kept.num_free == (pool.holders == 0).sum()
    assert (pool.holders[trees.branch_pages[trees.branch_pages >= 0].long()] == 1).all(), "a branch's page is shared"
    standing_in = np.concatenate([table[:n] for table, n in zip(kept.tables, kept.num_pages)])
    assert kept.pool.holders(standing_in).tolist() == pool.holders[torch.cat(spines).long()].tolist()
    assert not pool.holders[pool.free[: kept.num_free].long()].any()
    for slot, sequence in enumerate(engine._by_slot):
        rows = sequence.rows.tolist() if sequence else []
        outcomes = [(max(engine.branches.accept_length[r], 0), engine.branches.tokens[r, 0]) for r in rows]
        alive = trees.accept_lengths[slot] >= 0
        found = list(zip(trees.accept_lengths[slot][alive].tolist(), trees.first_tokens[slot][alive].tolist()))
        assert found == outcomes


class Target:
    """The target's view in plain dicts: what was pushed for each request's current round."""

    def __init__(self, engine: DraftEngine) -> None:
        self.engine = engine
        self.tokens: dict[str, list[int]] = {}
        self.drafts: dict[str, list[int]] = {}
        self.blocks: dict[str, dict[tuple[int, int], list[int]]] = {}
        self.epoch: dict[str, int] = {}
        self.temperature: dict[str, float] = {}
        self.evicted = 0

    def open(self, request_id: str, tokens: list[int], temperature: float = 0.0) -> None:
        self.epoch[request_id] = self.epoch.get(request_id, 0) + 1
        self.temperature[request_id] = temperature
        self.tokens[request_id], self.drafts[request_id], self.blocks[request_id] = list(tokens), [], {}
        self.engine.open(request_id, self.epoch[request_id], np.array(tokens, np.int32), temperature, K)
        check_conservation(self.engine)

    def step(self) -> None:
        push = self.engine.speculate()
        check_conservation(self.engine)
        self.absorb(push)

    def absorb(self, push: Push | None) -> None:
        for block in push.blocks if push else []:
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
                    check_proposals(block, i, prefix + known[: block.offset], self.temperature[block.request_id])
                else:
                    assert known == reference_drafts(prefix, len(known)), "a draft read the wrong prefix"
        for evicted in push.evicted if push else []:
            self.evicted += 1
            if self.epoch.get(evicted.request_id) == evicted.epoch:
                self.tokens.pop(evicted.request_id, None)

    def advance(self, request_id: str, emitted: list[int], drafts: list[int], jit: int = 0) -> None:
        self.tokens[request_id] += emitted
        self.drafts[request_id], self.blocks[request_id] = drafts, {}
        tokens = self.tokens[request_id]
        self.engine.advance(request_id, self.epoch[request_id], len(tokens), emitted, drafts, num_drafts=K, jit=jit)
        check_conservation(self.engine)

    def close(self, request_id: str) -> None:
        self.engine.close(request_id)
        self.tokens.pop(request_id, None)
        check_conservation(self.engine)


def check_proposals(block: SpeculationBlock, i: int, prefix: list[int], temperature: float) -> None:
    """The drafts of a branch after `prefix` were drawn from what they carry: the likeliest tokens' softmax."""
    for token, (ids, probs) in zip(block.drafts(i), block.proposals(i), strict=True):
        logits = reference_logits(prefix).numpy() / temperature
        order = np.argsort(-logits)[: len(ids)]
        weights = np.exp(logits[order] - logits[order].max())
        assert ids.tolist() == order.tolist() and token in ids
        assert np.allclose(probs, weights / weights.sum(), atol=1e-5)
        prefix = prefix + [token]


def grow(target: Target) -> None:
    while target.engine.has_work:
        target.step()


def test_hit_recomputes_nothing():
    target = Target(make_engine())
    target.open("a", [1, 2, 3, 4, 5])
    grow(target)
    (key, speculation), *_ = target.blocks["a"].items()
    target.advance("a", [key[1]], list(speculation))
    grow(target)
    outcome = next(key for key in target.blocks["a"] if key[0] == 2)
    following = target.blocks["a"][outcome]
    assert len(following) == K
    forwards = target.engine._model.num_forwards
    target.advance("a", speculation[:2] + [outcome[1]], list(following))
    assert not target.engine._unfinished, "a hit must leave nothing of the spine to compute"
    grow(target)
    assert target.engine._model.num_forwards - forwards == K + 1
    assert {k for k, _ in target.blocks["a"]} == set(range(K + 1))


def test_a_miss_frees_every_branch():
    target = Target(make_engine())
    target.open("a", [1, 2, 3])
    grow(target)
    used = {bonus for _, bonus in target.blocks["a"]}
    missed = next(t for t in range(FakePagedModel.vocab_size) if t not in used)
    target.advance("a", [missed], [])
    assert not len(target.engine.sequences["a"].rows)
    grow(target)
    assert {k for k, _ in target.blocks["a"]} == {0}


def test_trimmed_round_keeps_the_rest_of_the_speculation():
    target = Target(make_engine())
    target.open("a", [1, 2, 3])
    grow(target)
    (_, bonus), speculation = next(iter(target.blocks["a"].items()))
    target.advance("a", [bonus], list(speculation))
    grow(target)
    forwards = target.engine._model.num_forwards
    target.advance("a", speculation[:2], speculation[2:])
    assert not target.engine._unfinished
    grow(target)
    assert target.engine._model.num_forwards > forwards
    assert {k for k, _ in target.blocks["a"]} == {0, 1}


def test_just_in_time_speculation_becomes_the_spine():
    target = Target(make_engine())
    target.open("a", [1, 2, 3, 4])
    grow(target)
    missed = next(t for t in range(13) if (0, t) not in target.blocks["a"])
    target.advance("a", [missed], [], jit=K)
    grow(target)
    drafts = target.blocks["a"].pop((0, JIT_TOKEN))
    assert drafts == reference_drafts([1, 2, 3, 4, missed], K) and not target.blocks["a"]
    target.advance("a", [], drafts)
    assert not target.engine._unfinished
    grow(target)
    assert {k for k, _ in target.blocks["a"]} == set(range(K + 1))


def test_shared_prompts_share_pages():
    engine = make_engine(num_pages=40)
    target = Target(engine)
    prompt = [3] * 17
    target.open("a", prompt)
    grow(target)
    free = engine.pages.num_free
    target.open("b", prompt)
    assert engine.sequences["b"].computed == 16
    assert free == engine.pages.num_free
    grow(target)
    assert set(target.blocks["a"]) == set(target.blocks["b"])


def test_pages_that_are_shared_before_the_device_knows():
    """Nothing is carried out between the verbs: a second spine reads the first, a third the second, the first ends."""
    pages, nobody = PAGES(FakePagedModel(20), 4, 2, K, 3), np.empty(0, np.int64)
    pages.reserve(0, 30)
    pages.share(1, 0, 5)
    pages.share(2, 1, 3)
    pages.reserve(2, 13)
    assert pages.num_free == 20 - 8 - 1
    pages.close(0, nobody)
    assert pages.num_free == 20 - 5 - 1
    pages.close(1, nobody)
    pages.reserve(0, 1)
    assert pages.num_free == 20 - 4 - 1
    if PAGES is DevicePages:
        pages.carry_out()
        trees = pages.trees
        assert int(pages.device_pool.num_free) == pages.num_free
        assert trees.num_pages.tolist() == pages.num_pages.tolist() == [1, 0, 4, 0]
        assert not set(trees.page_tables[0, :1].tolist()) & set(trees.page_tables[2, :4].tolist())


def test_the_check_at_start_leaves_nothing_behind():
    """It takes requests through openings, shared pages, branches, a hit and their ends, and finds no fault."""
    engine = make_engine()
    check_trees(engine, engine._model, K)
    check_conservation(engine)
    assert not engine.sequences and engine.pages.num_free == engine._model.num_pages
    assert engine.num_steps > K + 1


@pytest.mark.parametrize("options", [{"fan_out": [0, 0, 2, 1]}, {"max_num_seqs": 1}, {"num_pages": 3}])
def test_the_check_at_start_takes_what_little_it_gets(options):
    """No branch after an opening; one request at a time; no room for any tree."""
    engine = make_engine(**options)
    check_trees(engine, engine._model, K)
    assert not engine.sequences and engine.pages.num_free == engine._model.num_pages


def nothing_copied(model, engine):
    model.copy_slots = model.copy_pages = lambda *copies: None
    model.kv[:] = 0  # of a token, so that the fake does not notice by itself


def flat_logits(model, engine):
    """Of branches alone, which a prompt computed at once does not show."""
    forward = model.forward
    model.forward = lambda batch: forward(batch) * (0 if len(batch.token_ids) > 1 and is_branch(batch) else 1)


def is_branch(batch) -> bool:
    return bool(batch.own_lens.any()) if hasattr(batch, "own_lens") else len(batch.seq_lens) > 1


def nan_logits(model, engine):
    forward = model.forward
    model.forward = lambda batch: forward(batch) * (float("nan") if is_branch(batch) else 1)


@pytest.mark.parametrize("break_it", [nothing_copied, flat_logits, nan_logits])
def test_the_check_at_start_notices_what_is_broken(break_it):
    engine = make_engine()
    break_it(engine._model, engine)
    with pytest.raises(RuntimeError):  # `WrongTrees`, or torch's of drawing from NaN
        check_trees(engine, engine._model, K)


def test_unknown_and_inconsistent_outcomes_are_evictions():
    engine = make_engine()
    engine.advance("x", 1, 5, [1], [], num_drafts=K)
    assert [e.request_id for e in engine.speculate().evicted] == ["x"]
    target = Target(engine)
    target.open("a", [1, 2])
    engine.advance("a", 1, 9, [1], [], num_drafts=K)
    assert [e.request_id for e in engine.speculate().evicted] == ["a"]
    assert not engine.sequences and engine.pages.num_free == engine._model.num_pages


def test_too_long_requests_are_refused_and_long_ones_let_go():
    target = Target(make_engine(max_model_len=16))
    target.open("a", list(range(12)) + [1])
    assert target.engine.speculate().evicted[0].request_id == "a"
    target.open("b", [1] * 8)
    grow(target)
    target.advance("b", [1, 2, 3], [4])
    assert target.engine.speculate().evicted[0].request_id == "b"


def test_sampled_branches_carry_the_distribution_they_were_drawn_from():
    target = Target(make_engine())
    target.open("a", [1, 2, 3], temperature=0.8)
    grow(target)
    assert [len(drafts) for drafts in target.blocks["a"].values()] == [K, K]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_every_step_is_pushed_while_the_next_ones_run(monkeypatch, temperature):
    """On the device, a step is launched before the host looks at what the one before it drew."""
    order: list[tuple[str, int]] = []
    for name in ("launch", "drawn"):
        original = getattr(device_steps._Bucket, name)

        def logged(self, step, *arguments, name=name, original=original):
            order.append((name, step))
            return original(self, step, *arguments)

        monkeypatch.setattr(device_steps._Bucket, name, logged)
    target = Target(make_engine())
    target.open("a", [1, 2, 3, 4, 5], temperature)
    target.step()
    for depth in range(1, K + 1):
        target.step()
        assert {len(drafts) for drafts in target.blocks["a"].values()} == {depth}
    target.step()
    assert not target.engine.has_work
    if PAGES is DevicePages:
        launched = [("launch", 0)]
        for step in range(K):
            launched += [("launch", step + 1), ("drawn", step)]
        assert order == launched + [("drawn", K)]


def test_an_outcome_between_steps_takes_what_was_launched():
    """The winner's tail was under way when its outcome came: its KV and its candidates are kept. Others go on."""
    target = Target(make_engine())
    target.open("a", [1, 2, 3, 4, 5])
    target.open("b", [2, 3])
    target.step()
    target.step()
    (_, bonus), speculation = next(iter(target.blocks["a"].items()))
    assert len(speculation) == 1
    target.advance("a", [bonus], list(speculation))
    ahead = PAGES is DevicePages
    sequence = target.engine.sequences["a"]
    assert sequence.is_computed == ahead and len(sequence.rows) == (4 if ahead else 2)
    grow(target)
    assert {k for k, _ in target.blocks["a"]} == {0, 1}
    assert {len(drafts) for name in "ab" for drafts in target.blocks[name].values()} == {K}
    assert target.engine.num_steps == target.engine._model.num_forwards


def test_an_end_between_steps_leaves_the_others_growing():
    target = Target(make_engine(max_num_seqs=2))
    for name in "ab":
        target.open(name, [5, ord(name) % 13])
    target.step()
    target.step()
    target.close("a")
    target.open("c", [1, 2, 3])  # in the place of "a", and its branches in those of "a"
    grow(target)
    for name in "bc":
        assert [len(drafts) for drafts in target.blocks[name].values()] == [K, K]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_operations_conserve_pages_and_read_the_right_prefix(data):
    """Joins, leaves, hits, misses, trims, skipped rounds, foreign drafts, late outcomes, a small pool."""
    num_pages = data.draw(st.sampled_from([24, 60, 300]))
    target = Target(make_engine(num_pages=num_pages, max_num_seqs=3, fan_out=data.draw(st.sampled_from([1, 2]))))
    token = st.integers(0, FakePagedModel.vocab_size - 1)
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
                target.advance(request_id, [data.draw(token)], [], jit=data.draw(st.integers(1, K)))
        elif action == "odd":
            emitted = data.draw(st.lists(token, min_size=1, max_size=6))
            target.advance(request_id, emitted, data.draw(st.lists(token, max_size=K)))
        else:
            k = data.draw(st.integers(0, len(drafts)))
            target.advance(request_id, drafts[:k] + [data.draw(token)], [])
    for request_id in list(target.tokens):
        target.close(request_id)
    for request_id in list(target.engine.sequences):
        target.engine.close(request_id)
    assert target.engine.pages.num_free == num_pages


if __name__ == "__main__":
    pytest.main([__file__])


def test_predicted_bonus_tokens_are_proposed_less_and_q_says_so():
    logits = torch.tensor([2.0, 0.5, 1.0, -1.0, 0.0]).repeat(40_000, 1)
    draw = Sampler(num_candidates=3, top_m=4, seed=0, saguaro_c=0.25).draw(
        logits, np.full(len(logits), 0.8, np.float32), np.full(len(logits), 2)
    )
    assert draw.q_token_ids[0].tolist() == [0, 2, 1, 4]
    weights = torch.exp(logits[0, [0, 2, 1, 4]] / 0.8) * torch.tensor([0.25, 0.25, 1, 1])
    expected = (weights / weights.sum()).numpy()
    np.testing.assert_allclose(draw.q_probs, np.broadcast_to(expected, draw.q_probs.shape), rtol=1e-5)
    seen = np.bincount(draw.drawn, minlength=5)[[0, 2, 1, 4]]
    chi_square = ((seen - len(logits) * expected) ** 2 / (len(logits) * expected)).sum()
    assert seen.sum() == len(logits) and chi_square < 25  # 3 degrees of freedom: 1.5e-5


@pytest.mark.parametrize("saguaro_c", [1.0, 0.2])
def test_branches_down_weight_what_the_next_tree_predicts(saguaro_c):
    """Two branches a fork point: their proposals have the two likeliest tokens down-weighted, and no others."""
    engine = DraftEngine(
        FakePagedModel(200, 200),
        FanOut(3, 2),
        num_speculative_tokens=3,
        max_num_seqs=2,
        max_branches=8,
        max_fan_out=2,
        top_m=5,
        seed=0,
        saguaro_c=saguaro_c,
        pages=PAGES,
    )
    prompt = [1, 2, 3]
    engine.open("sampled", 1, np.array(prompt, np.int32), 1.0, 3)
    engine.open("greedy", 1, np.array(prompt, np.int32), 0.0, 3)
    while engine.has_work:
        engine.speculate()
    branches, sequence = engine.branches, engine.sequences["sampled"]
    for row in sequence.rows:
        for depth in range(3):
            logits = reference_logits(prompt + branches.tokens[row, : depth + 1].tolist()).float()
            values, ids = torch.topk(logits, 5)
            weights = torch.exp(values - values[0]) * torch.tensor([saguaro_c] * 2 + [1.0] * 3)
            assert branches.q_token_ids[row, depth].tolist() == ids.tolist()
            np.testing.assert_allclose(branches.q_probs[row, depth], weights / weights.sum(), rtol=1e-4)
    assert len(sequence.rows) and len(engine.sequences["greedy"].rows)
