"""Pages of the trees of several requests, and those that they share."""

from __future__ import annotations

import random

import numpy as np
from engine_target import drive, grow


def test_shared_prompts_share_pages(make_target):
    target = make_target(num_pages=40)
    engine = target.engine
    prompt = [3] * 17
    target.open("a", prompt)
    grow(target)
    free = engine.pages.num_free
    target.open("b", prompt)
    assert engine.sequences["b"].computed == 16
    assert free == engine.pages.num_free
    grow(target)
    assert set(target.blocks["a"]) == set(target.blocks["b"])


def test_pages_that_are_shared_before_the_device_knows(make_target):
    """Nothing is carried out between the verbs: a second spine reads the first, a third the second, the first ends."""
    pages, nobody = make_target(num_pages=20).engine.pages, np.empty(0, np.int64)
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
    if hasattr(pages, "trees"):
        pages.carry_out()
        trees = pages.trees
        assert int(pages.device_pool.num_free) == pages.num_free
        assert trees.num_pages.tolist() == pages.num_pages.tolist() == [1, 0, 4, 0]
        assert not set(trees.page_tables[0, :1].tolist()) & set(trees.page_tables[2, :4].tolist())


def test_pages_are_conserved_over_many_rounds(make_target):
    """Checked after every verb and every step, in a pool that is often too small for three trees."""
    target = make_target(num_pages=40, max_model_len=120, max_num_seqs=3)
    target.engine._budget.observe_window = lambda seconds: None  # trees as wide as may be, however fast this machine is
    drive(target, random.Random(0), 300)
    assert target.engine.num_evictions > 20 and target.engine.num_steps > 300
    for request_id in list(target.engine.sequences):
        target.close(request_id)
    assert target.engine.pages.num_free == 40
