"""Pages of the trees of several requests, and those that they share."""

from __future__ import annotations

import random

import numpy as np
import pytest
from engine_target import K, check_conservation, drive, grow
from fake_model import FakePagedModel

PAGE_SIZE = FakePagedModel.page_size


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


def test_equal_prompts_that_open_at_once_are_read_once(make_target):
    """The first one reads, in steps of 256 tokens; the others wait for it and read its last page for themselves."""
    target = make_target(max_model_len=800)
    prompt = [i % 13 for i in range(601)]
    for name in "abcd":
        target.open(name, prompt)
    grow(target)
    assert target.model.num_tokens < 601 + 3 * 256 + 4 * 40  # of each of the others what came with the first one's end
    assert target.engine.num_cached_tokens >= 3 * 512
    assert set(target.blocks["a"]) == set(target.blocks["d"])


def test_pages_that_are_shared_before_the_device_knows(make_target):
    """Nothing is carried out between the verbs: a second spine reads the first, a third the second, the first ends."""
    pages, nobody = make_target(num_pages=20).engine.pages, np.empty(0, np.int64)
    digests = [b"%d" % i for i in range(5)]
    pages.reserve(0, 30)
    pages.publish(0, 0, digests[:2])
    pages.publish(0, 2, digests[2:])
    assert pages.adopt(1, digests) == 5
    assert pages.adopt(2, [*digests[:3], b"other", digests[3]]) == 3
    pages.reserve(2, 13)
    assert pages.num_free == 20 - 8 - 1
    pages.close(0, nobody)
    assert pages.num_free == 20 - 5 - 1
    pages.close(1, nobody)
    assert pages.num_free == 20 - 4
    pages.reserve(0, 1)
    assert pages.num_free == 20 - 4 - 1
    assert pages.adopt(1, digests[:4]) == 4, "the cache forgot pages that nobody needed"
    assert pages.num_free == 20 - 4 - 2
    if hasattr(pages, "trees"):
        pages.carry_out()
        trees = pages.trees
        assert int(pages.device_pool.num_free) == pages.num_free - 1  # digest 4 is idle
        assert trees.num_pages.tolist() == pages.num_pages.tolist() == [1, 4, 4, 0]
        assert trees.page_tables[1, :3].tolist() == trees.page_tables[2, :3].tolist()
        assert not set(trees.page_tables[0, :1].tolist()) & set(trees.page_tables[1:3, :4].flatten().tolist())


@pytest.mark.parametrize("num_tokens", [300, 3000])
def test_the_next_turn_of_a_chat_reads_what_is_new(make_target, num_tokens: int):
    """Ten turns: each begins with all that was said, of which at most a page and the last drafts are read again."""
    target, rng = make_target(num_pages=num_tokens // PAGE_SIZE + 300, max_model_len=num_tokens + 500), random.Random(0)
    chat, longest_wait = [rng.randrange(13) for _ in range(num_tokens)], 0
    for turn in range(10):
        said, name = len(chat), f"turn {turn}"
        chat = chat + [rng.randrange(13) for _ in range(5)]
        tokens, target.model.num_tokens = target.engine.num_prompt_tokens, 0
        target.open(name, chat)
        steps = target.engine.num_steps
        while not target.blocks[name]:
            target.step()
        if turn:
            longest_wait = max(longest_wait, target.engine.num_steps - steps)
            read = target.model.num_tokens
            assert read <= 5 + PAGE_SIZE + K + 40, f"turn {turn} began with {read} tokens of {said}"
        for _ in range(6):
            grow(target)
            (accept_length, bonus), drafts = max(target.blocks[name].items())
            target.advance(name, [*target.drafts[name][:accept_length], bonus], drafts)
        chat = list(target.tokens[name])
        target.close(name)
        assert target.engine.num_prompt_tokens > tokens
    assert longest_wait <= 2
    assert target.engine.num_cached_tokens > 0.9 * (target.engine.num_prompt_tokens - num_tokens - 5)


def test_the_least_recently_used_pages_go_first_and_no_request_goes_for_them(make_target):
    """Of seven chats of ten pages each, 60 pages hold the five used last, and what is open beside them."""
    target = make_target(num_pages=60, fan_out=1)
    chats = {name: [i] * 41 for i, name in enumerate("abcdefg")}
    for name, tokens in chats.items():
        target.open(name, tokens)
        grow(target)
        if name == "d":
            target.open("a again", chats["a"])  # nine pages and all of the tenth but the last token
            assert target.engine.sequences["a again"].computed == 40
            target.close("a again")
        target.close(name)
        assert target.engine.pages.num_free == 60
    found = {}
    for name, tokens in chats.items():
        before = target.engine.num_cached_tokens
        target.open(name, tokens)
        found[name] = target.engine.num_cached_tokens - before
        target.close(name)
    assert found["b"] == 0 and 0 < found["c"] < 40 and all(found[name] == 40 for name in "adefg"), found
    assert not target.engine.num_evictions


def test_a_request_evicted_before_its_turn_adopts_nothing(make_target):
    """Two read one prompt in one step; the first, advanced since, needs more pages than there are: both are evicted."""
    target = make_target(num_pages=70, max_model_len=800)
    prompt = [i % 13 for i in range(300)]
    for name in "ab":
        target.open(name, prompt)
    target.step()
    target.advance("a", [1], [])
    grow(target)
    assert target.evicted == 2 and not target.engine.sequences
    assert target.engine.pages.num_free == 70


def test_what_nobody_holds_is_forgotten_on_demand(make_target):
    target = make_target()
    target.open("a", [1] * 30)
    grow(target)
    target.close("a")
    target.open("b", [2] * 30)
    grow(target)
    target.engine.pages.forget_idle()
    check_conservation(target.engine)
    target.open("c", [1] * 30)
    target.open("d", [2] * 30)
    assert target.engine.sequences["c"].computed == 0 and target.engine.sequences["d"].computed == 28
    grow(target)


def test_pages_are_conserved_over_many_rounds(make_target):
    """Checked after every verb and every step, in a pool that is often too small for three trees."""
    target = make_target(num_pages=40, max_model_len=120, max_num_seqs=3)
    target.engine._budget.observe_window = lambda seconds: None  # trees as wide as may be, however fast this machine is
    drive(target, random.Random(0), 300)
    assert target.engine.num_evictions > 20 and target.engine.num_steps > 300
    for request_id in list(target.engine.sequences):
        target.close(request_id)
    assert target.engine.pages.num_free == 40
