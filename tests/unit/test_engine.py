"""Outcomes as an engine's token trees take them, against a model that notices every wrong page."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from engine_target import K, grow, operate, reference_drafts
from fake_model import FakePagedModel
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ssd.link.protocol import JIT_TOKEN


def test_hit_recomputes_nothing(make_target):
    target = make_target()
    target.open("a", [1, 2, 3, 4, 5])
    grow(target)
    (key, speculation), *_ = target.blocks["a"].items()
    target.advance("a", [key[1]], list(speculation))
    grow(target)
    outcome = next(key for key in target.blocks["a"] if key[0] == 2)
    following = target.blocks["a"][outcome]
    assert len(following) == K
    steps = target.engine.num_steps  # not the model's forwards: a GPU replays them
    target.advance("a", speculation[:2] + [outcome[1]], list(following))
    assert not target.engine._unfinished, "a hit must leave nothing of the spine to compute"
    grow(target)
    assert target.engine.num_steps - steps == K + 1
    assert {k for k, _ in target.blocks["a"]} == set(range(K + 1))


def test_a_miss_frees_every_branch(make_target):
    target = make_target()
    target.open("a", [1, 2, 3])
    grow(target)
    used = {bonus for _, bonus in target.blocks["a"]}
    missed = next(t for t in range(FakePagedModel.vocab_size) if t not in used)
    target.advance("a", [missed], [])
    assert not len(target.engine.sequences["a"].rows)
    grow(target)
    assert {k for k, _ in target.blocks["a"]} == {0}


def test_trimmed_round_keeps_the_rest_of_the_speculation(make_target):
    target = make_target()
    target.open("a", [1, 2, 3])
    grow(target)
    (_, bonus), speculation = next(iter(target.blocks["a"].items()))
    target.advance("a", [bonus], list(speculation))
    grow(target)
    forwards = target.model.num_forwards
    target.advance("a", speculation[:2], speculation[2:])
    assert not target.engine._unfinished
    grow(target)
    assert target.model.num_forwards > forwards
    assert {k for k, _ in target.blocks["a"]} == {0, 1}


def test_outcomes_found_together_share_the_time_since_the_one_before(make_target, monkeypatch):
    """A drafter that was busy with a prompt finds them all at once; what covers several rounds tells nothing."""
    target, windows, now = make_target(), [], 100.0
    monkeypatch.setattr("vllm_ssd.drafter.engine.time", SimpleNamespace(perf_counter=lambda: now))
    target.engine._budget.observe_window = windows.append
    target.open("a", [1, 2, 3])
    for seconds, outcomes in [(0.5, [[4], [5]]), (0.02, [[6]]), (0.08, [[7], [8], [9], [1]]), (0.3, [[2, 3, 4]])]:
        now += seconds
        for emitted in outcomes:
            target.advance("a", emitted, [])
        grow(target)
    assert windows == pytest.approx([0.02, 0.02])
    now += 0.01
    target.advance("a", [5], [])
    grow(target)
    assert windows == pytest.approx([0.02, 0.02, 0.01])


def test_just_in_time_speculation_becomes_the_spine(make_target):
    target = make_target()
    target.open("a", [1, 2, 3, 4])
    grow(target)
    missed = next(t for t in range(13) if (0, t) not in target.blocks["a"])
    target.advance("a", [missed], [], jit=K)
    grow(target)
    drafts = target.blocks["a"].pop((0, JIT_TOKEN))
    assert drafts == reference_drafts(target.model, [1, 2, 3, 4, missed], K) and not target.blocks["a"]
    target.advance("a", [], drafts)
    assert not target.engine._unfinished
    grow(target)
    assert {k for k, _ in target.blocks["a"]} == set(range(K + 1))


def test_just_in_time_drafts_come_after_an_outcome_that_was_foreseen(make_target):
    """The target waits, as the block was late, and the drafter has computed all that it knows by then."""
    target = make_target()
    target.open("a", [1, 2, 3, 4])
    grow(target)
    (_, bonus), speculation = next(iter(target.blocks["a"].items()))
    path = [bonus, *speculation]
    target.advance("a", path[:2], [], jit=K)
    grow(target)
    drafts = target.blocks["a"].pop((0, JIT_TOKEN))
    assert drafts == reference_drafts(target.model, [1, 2, 3, 4, *path[:2]], K) and not target.blocks["a"]


def test_unknown_and_inconsistent_outcomes_are_evictions(make_target):
    target = make_target()
    engine = target.engine
    engine.advance("x", 1, 5, [1], [], num_drafts=K)
    assert [e.request_id for e in engine.speculate().evicted] == ["x"]
    target.open("a", [1, 2])
    engine.advance("a", 1, 9, [1], [], num_drafts=K)
    assert [e.request_id for e in engine.speculate().evicted] == ["a"]
    assert not engine.sequences and engine.pages.num_free == target.model.num_pages


def test_too_long_requests_are_refused_and_long_ones_let_go(make_target):
    target = make_target(max_model_len=16)
    target.open("a", list(range(12)) + [1])
    assert target.engine.speculate().evicted[0].request_id == "a"
    target.open("b", [1] * 8)
    grow(target)
    target.advance("b", [1, 2, 3], [4])
    assert target.engine.speculate().evicted[0].request_id == "b"


def test_an_outcome_between_steps_takes_what_was_launched(make_target):
    """The winner's tail was under way when its outcome came: its KV and its candidates are kept. Others go on."""
    target = make_target()
    target.open("a", [1, 2, 3, 4, 5])
    target.open("b", [2, 3])
    target.step()
    target.step()
    (_, bonus), speculation = next(iter(target.blocks["a"].items()))
    assert len(speculation) == 1
    target.advance("a", [bonus], list(speculation))
    ahead = target.model.tree_attention
    sequence = target.engine.sequences["a"]
    assert sequence.is_computed == ahead and len(sequence.rows) == (4 if ahead else 2)
    grow(target)
    assert {k for k, _ in target.blocks["a"]} == {0, 1}
    assert {len(drafts) for name in "ab" for drafts in target.blocks[name].values()} == {K}
    assert target.engine.num_steps == target.model.num_forwards


def test_an_end_between_steps_leaves_the_others_growing(make_target):
    target = make_target(max_num_seqs=2)
    for name in "ab":
        target.open(name, [5, ord(name) % 13])
    target.step()
    target.step()
    target.close("a")
    target.open("c", [1, 2, 3])  # in the place of "a", and its branches in those of "a"
    grow(target)
    for name in "bc":
        assert [len(drafts) for drafts in target.blocks[name].values()] == [K, K]


@settings(max_examples=60, derandomize=True)
@given(data=st.data())
def test_random_operations_conserve_pages_and_read_the_right_prefix(make_target, data):
    """Joins, leaves, hits, misses, trims, skipped rounds, foreign drafts, late outcomes, a small pool."""
    num_pages = data.draw(st.sampled_from([24, 60, 300]))
    target = make_target(num_pages=num_pages, max_num_seqs=3, fan_out=data.draw(st.sampled_from([1, 2])))
    operate(target, data)
    assert target.engine.pages.num_free == num_pages
