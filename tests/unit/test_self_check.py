"""The check of the trees at a drafter's start."""

from __future__ import annotations

import pytest
from engine_target import K, check_conservation

from vllm_ssd.drafter.self_check import check_forward, check_trees


def test_the_check_at_start_leaves_nothing_behind(make_target):
    """It takes requests through openings, shared pages, branches, a hit and their ends, and finds no fault."""
    target = make_target()
    check_trees(target.engine, target.model, K)
    check_conservation(target.engine)
    assert not target.engine.sequences and target.engine.pages.num_free == target.model.num_pages
    assert target.engine.num_steps > K + 1


@pytest.mark.parametrize("options", [{}, {"fan_out": [0, 0, 2, 1]}, {"max_num_seqs": 1}, {"num_pages": 1}])
def test_the_first_forward_leaves_nothing_behind(make_target, options):
    target = make_target(**options)
    check_forward(target.engine, target.model, K)
    check_conservation(target.engine)
    assert not target.engine.sequences and target.engine.pages.num_free == target.model.num_pages
    assert target.engine.num_steps


@pytest.mark.parametrize("options", [{"fan_out": [0, 0, 2, 1]}, {"max_num_seqs": 1}, {"num_pages": 3}])
def test_the_check_at_start_takes_what_little_it_gets(make_target, options):
    """No branch after an opening; one request at a time; no room for any tree."""
    target = make_target(**options)
    check_trees(target.engine, target.model, K)
    assert not target.engine.sequences and target.engine.pages.num_free == target.model.num_pages


def nothing_copied(model):
    model.copy_slots = model.copy_pages = lambda *copies: None
    model.kv[:] = 0  # of a token, so that the fake does not notice by itself


def flat_logits(model):
    """Of branches alone, which a prompt computed at once does not show."""
    forward = model.forward
    model.forward = lambda batch: forward(batch) * (0 if len(batch.token_ids) > 1 and is_branch(batch) else 1)


def is_branch(batch) -> bool:
    return bool(batch.own_lens.any()) if hasattr(batch, "own_lens") else len(batch.seq_lens) > 1


def nan_logits(model):
    forward = model.forward
    model.forward = lambda batch: forward(batch) * (float("nan") if is_branch(batch) else 1)


@pytest.mark.parametrize("break_it", [nothing_copied, flat_logits, nan_logits])
def test_the_check_at_start_notices_what_is_broken(make_target, break_it):
    target = make_target()
    break_it(target.model)
    with pytest.raises(RuntimeError):  # `WrongTrees`, or torch's of drawing from NaN
        check_trees(target.engine, target.model, K)
