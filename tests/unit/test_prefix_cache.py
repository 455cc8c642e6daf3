"""The prefix cache under random use: pages are conserved, found by content, and never written while shared."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from engine_target import Target, check_conservation
from fake_model import FakePagedModel
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_ssd.drafter.engine import DraftEngine
from vllm_ssd.drafter.pages.pool import OutOfPages, PagePool

NUM_PAGES = 12
SETTINGS = settings(max_examples=25, stateful_step_count=40, derandomize=True)


class Pool(RuleBasedStateMachine):
    """Spines of pages in a small pool; a page's content is named by a number, its digest by all numbers up to it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES)
        self.spines: dict[int, list[int]] = {}  # pages
        self.contents: dict[int, list[int]] = {}

    def digests(self, contents: list[int]) -> list[bytes]:
        return [bytes(contents[: i + 1]) for i in range(len(contents))]

    @rule(spine=st.integers(0, 3), contents=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def open(self, spine: int, contents: list[int]) -> None:
        self.close(spine)
        pool, digests = self.pool, self.digests(contents)
        found = pool.find(digests)
        idle_before = pool.num_free - pool.num_unused
        assert all(pool._digest_of[page] == digest for page, digest in zip(found.tolist(), digests))
        pool.share(found)
        assert pool.num_free - pool.num_unused == idle_before - (pool.holders(found) == 2).sum()
        self.spines[spine], self.contents[spine] = found.tolist(), contents
        missing, free, oldest = len(contents) - len(found), pool.num_free, list(pool._idle)
        if missing > free:
            with pytest.raises(OutOfPages):
                pool.allocate(missing)
            assert pool.num_free == free and list(pool._idle) == oldest
            self.contents[spine] = contents[: len(found)]
            return
        self.spines[spine] += pool.allocate(missing).tolist()
        assert pool.num_free == free - missing
        assert oldest[len(oldest) - len(pool._idle) :] == list(pool._idle), "not the least recently used went first"

    @rule(spine=st.integers(0, 3), num_pages=st.integers(0, 5))
    def publish(self, spine: int, num_pages: int) -> None:
        for page, digest in list(zip(self.spines.get(spine, []), self.digests(self.contents.get(spine, []))))[
            :num_pages
        ]:
            is_known = digest in self.pool._page_of or bool(self.pool.is_cached(np.array([page]))[0])
            assert self.pool.cache(page, digest) == (not is_known)

    @rule(spine=st.integers(0, 3))
    def close(self, spine: int) -> None:
        self.pool.release(np.array(self.spines.pop(spine, [])[::-1], np.int32))

    @rule(num_pages=st.integers(0, NUM_PAGES))
    def make_room(self, num_pages: int) -> None:
        if num_pages <= self.pool.num_free:
            self.pool.make_room(num_pages)
            assert self.pool.num_unused >= num_pages

    @invariant()
    def every_page_is_unused_or_held(self) -> None:
        pool, held = self.pool, Counter(page for pages in self.spines.values() for page in pages)
        unused = set(pool._unused[: pool.num_unused].tolist())
        assert len(unused) == pool.num_unused and not unused & held.keys()
        cached = set(pool._digest_of)
        assert cached == set(pool._page_of.values()) == set(np.flatnonzero(pool._is_cached).tolist())
        assert len(pool._page_of) == len(cached)
        for page in range(NUM_PAGES):
            assert pool.holders(np.array([page]))[0] == held[page] + (page in cached)
        assert set(pool._idle) == cached - held.keys()
        assert len(unused) + len(pool._idle) + len(held) == NUM_PAGES


TestPool = Pool.TestCase
TestPool.settings = SETTINGS


class Chats(RuleBasedStateMachine):
    """Chats that begin, go on in a new request, and end, in a pool that is often too small for three trees."""

    on_device = False

    def __init__(self) -> None:
        super().__init__()
        model = FakePagedModel(48, 160, tree_attention=self.on_device)
        self.target = Target(model, max_num_seqs=3, fan_out=1)
        self.target.engine._budget.observe_window = lambda seconds: None
        self.said: list[list[int]] = []  # by chats that have ended
        self.contents: dict[tuple[int, bytes], list[int]] = {}  # of cached pages, since they are
        self.num_opened = 0

    tokens = st.lists(st.integers(0, FakePagedModel.vocab_size - 1), min_size=1, max_size=12)

    @rule(message=tokens)
    def begin(self, message: list[int]) -> None:
        self._open(message)

    @precondition(lambda self: self.said)
    @rule(data=st.data(), message=tokens)
    def go_on(self, data: st.DataObject, message: list[int]) -> None:
        self._open(data.draw(st.sampled_from(self.said))[:100] + message)

    @precondition(lambda self: self.target.tokens)
    @rule(data=st.data(), message=tokens)
    def share(self, data: st.DataObject, message: list[int]) -> None:
        self._open(data.draw(st.sampled_from(sorted(self.target.tokens.items())))[1][:100] + message)

    @rule(num_steps=st.integers(1, 8))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            if self.target.engine.has_work:
                self.target.step()

    @precondition(lambda self: self.target.tokens)
    @rule(data=st.data(), token=st.integers(0, FakePagedModel.vocab_size - 1))
    def outcome(self, data: st.DataObject, token: int) -> None:
        target, name = self.target, data.draw(st.sampled_from(sorted(self.target.tokens)))
        drafts, block = target.drafts[name], target.blocks[name]
        if len(target.tokens[name]) > 130:
            self.end(name)
        elif block and data.draw(st.booleans()):
            accept_length, bonus = data.draw(st.sampled_from(sorted(block)))
            target.advance(name, [*drafts[:accept_length], bonus], block[accept_length, bonus])
        else:
            target.advance(name, [*drafts[: data.draw(st.integers(0, len(drafts)))], token], [])

    @precondition(lambda self: self.target.tokens)
    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.target.tokens))))

    @rule()
    def forget(self) -> None:
        self.target.engine.pages.forget_idle()
        check_conservation(self.target.engine)

    def end(self, name: str) -> None:
        self.said.append(list(self.target.tokens[name]))
        self.target.close(name)

    def _open(self, tokens: list[int]) -> None:
        if len(self.target.tokens) == 3:
            self.end(min(self.target.tokens))
        self.num_opened += 1
        self.target.open(f"{self.num_opened:03}", tokens)

    @invariant()
    def no_cached_page_was_written(self) -> None:
        kv = self.target.model.kv
        now = {(page, digest): kv[page].tolist() for page, digest in cached_pages(self.target.engine)}
        for page, content in now.items():
            assert self.contents.get(page, content) == content
        self.contents = now

    def teardown(self) -> None:
        for name in list(self.target.engine.sequences):
            self.target.close(name)
        assert self.target.engine.pages.num_free == self.target.model.num_pages


def cached_pages(engine: DraftEngine) -> list[tuple[int, bytes]]:
    """Pages of the model that the cache holds, and their digests; on the device, those that it had to keep so far."""
    pages, digests = engine.pages, engine.pages.pool._digest_of
    if hasattr(pages, "trees"):
        return [(int(pages._kept_pages[name]), digests[name]) for name in np.flatnonzero(pages._is_kept).tolist()]
    return list(digests.items())


class ChatsOnDevice(Chats):
    """The same over the references of the kernels."""

    on_device = True


TestChats, TestChatsOnDevice = Chats.TestCase, ChatsOnDevice.TestCase
TestChats.settings = TestChatsOnDevice.settings = SETTINGS


@pytest.mark.parametrize("on_device", [False, True])
def test_requests_of_different_salts_share_no_pages(on_device: bool) -> None:
    """Whoever times tokens learns of the prompts of its own salt alone."""
    target = Target(FakePagedModel(48, 160, tree_attention=on_device), max_num_seqs=4, fan_out=1)
    prompt = [i % 13 for i in range(25)]
    cached = []
    for i, salt in enumerate([b"", b"mine", b"mine", b"yours", b"yours", b"", b"mine"]):
        before = target.engine.num_cached_tokens
        target.open(f"{i}", prompt, cache_salt=salt)
        while target.engine.has_work:
            target.step()
        cached.append(target.engine.num_cached_tokens - before)
        if i % 2:
            target.close(f"{i}")
    assert cached == [0, 0, 24, 0, 24, 24, 24]
