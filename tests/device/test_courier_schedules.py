"""The courier's threads beside vLLM's and the device, in every order: each may be held for a while at any line."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from unittest import mock

import pytest
from fake_cuda import Event, FakeCuda
from v2_target import SLOTS, Request, Target, continued

from vllm_ssd.kernels import Found, blocks
from vllm_ssd.target.v2 import courier, lookup_cache

SWITCHED = {module.__file__ for module in (courier, lookup_cache, blocks)}
"""Files between whose lines another thread may take over."""
VLLM, CARRIER, WAITER = "vLLM", "ssd-courier", "ssd-outcomes"
THREAD = "_run"
PACES = (0.02, 1.0, 5.0)
"""How often a thread is chosen, against others; drawn anew now and then."""


class Schedule:
    """Lets one thread run at a time, and chooses at every line of `SWITCHED` who does."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.paces = {VLLM: 1.0}
        self.fixed = False  # `paces` are the test's
        self._turn = VLLM
        self._outcomes: list[Any] = []  # between the courier's two threads
        self._resting: set[str] = set()
        self._num_rests = 0
        self._waits_for: dict[str, Callable[[], bool]] = {}
        self._names = threading.local()
        self._condition = threading.Condition()

    @contextmanager
    def running(self, target: Target) -> Iterator[None]:
        """Run the courier's threads under this schedule."""
        target.courier._on_device = mock.Mock(put=self._outcomes.append, get=self._get)
        target.fleet.wait = self._rest
        self._names.name = VLLM
        threading.settrace(self._trace)
        sys.settrace(self._trace)
        try:
            target.courier.run()
            with self._condition:
                self._condition.wait_for(lambda: len(self.paces) == 3, timeout=10)
            yield
            self.settle(target)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            target.courier.stop()
            self.wait_for(lambda: set(self.paces) == {VLLM})

    def switch(self, until: Callable[[], bool] = lambda: True) -> None:
        """Another thread's turn, or one's own again; once `until` is true."""
        me = self._names.name
        self._waits_for[me] = until
        with self._condition:
            self._choose()
            assert self._condition.wait_for(lambda: self._turn == me, timeout=20), f"{me} waits for ever"

    wait_for = switch

    def _choose(self) -> None:
        if not self.fixed and self.rng.random() < 0.02:
            self.paces = {name: self.rng.choice(PACES) for name in self.paces}
        able = [name for name in self.paces if self._waits_for.get(name, bool)() or name not in self._waits_for]
        assert able, "all threads wait for each other"
        self._turn = self.rng.choices(able, [self.paces[name] + 1e-9 for name in able])[0]
        self._condition.notify_all()

    def settle(self, target: Target) -> None:
        """Let the courier do all that it was told."""
        at_rest = {CARRIER, WAITER}
        self.wait_for(lambda: self._resting == at_rest and not target.courier._tasks and not self._outcomes)
        rests = self._num_rests
        self.wait_for(lambda: self._num_rests >= rests + 2)  # what the drafter makes of it has arrived

    def _get(self) -> Any:
        self._resting.add(WAITER)
        self.switch(lambda: bool(self._outcomes))
        self._resting.remove(WAITER)
        return self._outcomes.pop(0)

    def _rest(self, wakeup: int, timeout_s: float) -> None:
        self._resting.add(CARRIER)
        self._num_rests += 1
        self.switch()
        self._resting.remove(CARRIER)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if code.co_filename not in SWITCHED:
            return None
        if event == "call" and code.co_name == THREAD:
            name = self._names.name = threading.current_thread().name
            with self._condition:
                self.paces[name] = 1.0
                self._condition.notify_all()
                assert self._condition.wait_for(lambda: self._turn == name, timeout=20)
        elif event == "return" and code.co_name == THREAD:
            with self._condition:
                del self.paces[self._names.name]
                self._choose()
        elif event == "line" and self.rng.random() < 0.2:
            self.switch()
        return self._trace


def play(cuda: FakeCuda, seed: int, steps: int = 40) -> tuple[Target, Schedule]:
    """Random joins, leaves and rounds beside delayed threads and a device that comes to its work late."""
    target, schedule = Target(cuda), Schedule(seed)
    rng, prompts = random.Random(seed), dict[int, list[int]]()
    progress = rng.choice([(0,), (0, 0, 1, 6)])  # a device that works when it is waited for only, or now and then
    with schedule.running(target):
        for _ in range(steps):
            if len(target.requests) < SLOTS and rng.random() < 0.3:
                prompt = [rng.randrange(13) for _ in range(rng.randint(1, 12))]
                prompts[target.start(list(prompt)).serial] = prompt
            if target.requests and rng.random() < 0.05:
                target.finish(rng.choice(target.requests))
            target.step(late=rng.choice((0, 1, 1)))
            for stream in cuda.streams:
                cuda.advance(rng.choice(progress), stream)
            for _ in range(rng.randint(1, 12)):
                schedule.switch()
        target.drain()
        schedule.settle(target)
        for request in target.requests:
            assert request.token_ids == continued(prompts[request.serial], len(request.token_ids))
            assert_known(target, request)
            request.found.clear()
        for _ in range(12):
            target.step()
            target.drain()
            schedule.settle(target)
            cuda.synchronize()
        for request in target.requests:
            assert Found.LATE not in request.found[1:], f"no block for a request: {request.found}"
            assert Found.HIT in request.found, f"nothing is found any more: {request.found}"
    return target, schedule


@pytest.mark.parametrize("seed", range(4))
def test_counts_are_the_scheduler_s_in_every_order(cuda: FakeCuda, seed: int) -> None:
    """Requests end in the result of one round while the next, which vLLM throws away, is on the device."""
    target, schedule, rng = Target(cuda), Schedule(seed), random.Random(seed)
    with schedule.running(target):
        for _ in range(40):
            if len(target.requests) < SLOTS and rng.random() < 0.4:
                target.start([rng.randrange(13) for _ in range(rng.randint(1, 12))])
            target.step()
            target.finish(*[request for request in target.requests if rng.random() < 0.1])
            for _ in range(rng.randint(1, 12)):
                schedule.switch()
            if rng.random() < 0.7:
                cuda.synchronize()  # the outcome is there
                schedule.settle(target)
                cuda.synchronize()  # and the block for it
        target.step()
        target.finish(*target.requests)
        schedule.settle(target)
    counts = target.metrics.counts
    assert {name: counts[name] for name in target.counted} == target.counted
    assert min(target.counted.values()) > 10


def assert_known(target: Target, request: Request) -> None:
    """The courier has exactly the tokens that the scheduler has."""
    assert target.courier._requests[request.serial].token_ids == request.token_ids


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with FakeCuda() as cuda:
        yield cuda


@pytest.mark.parametrize("seed", range(12))
def test_no_order_loses_an_outcome_a_block_or_a_buffer(cuda: FakeCuda, seed: int) -> None:
    target, _ = play(cuda, seed)
    assert target.link.closed
    assert target.buffers <= {id(buffer) for buffer in target.courier._buffers}, "a buffer was lost"
    assert target.metrics.counts["hits"] >= 4


def test_a_prompt_is_copied_before_the_scheduler_appends_to_it(cuda: FakeCuda) -> None:
    """vLLM passes the request's own list, and may process outputs before the courier's thread has its turn."""
    target, schedule = Target(cuda), Schedule(0)
    with schedule.running(target):
        schedule.fixed, schedule.paces[CARRIER] = True, 0.0
        request = target.start([1, 2, 3])
        for _ in range(3):
            target.step()
        target.drain()
        schedule.paces[CARRIER] = 1.0
        schedule.settle(target)
        assert_known(target, request)


def test_a_missing_wait_is_found(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """A courier that reads outcomes without waiting for the device, which on a fast one would rarely show."""
    waits, wait = [], Event.synchronize

    def omitted_by_ours(event: Event) -> None:
        if sys._getframe(1).f_code.co_filename in SWITCHED:
            waits.append(event)
        else:
            wait(event)

    monkeypatch.setattr(Event, "synchronize", omitted_by_ours)
    with pytest.raises(AssertionError):
        for seed in range(8):
            play(cuda, seed)
    assert waits, "the wait is no longer there"
