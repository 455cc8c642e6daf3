"""Whatever a drafter sends costs the target its drafts for a while, and nothing else."""

from __future__ import annotations

import gc
import logging
import os
import resource
import sys
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import hostile_drafter as hostile
import msgspec
import numpy as np
import pytest
from hostile_drafter import ACTED, SOUND, UNSOUND
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ssd.link import checks
from vllm_ssd.link import process as launch
from vllm_ssd.link.checks import PushChecker, max_push_bytes
from vllm_ssd.link.options import DrafterOptions
from vllm_ssd.link.protocol import (
    JIT_TOKEN,
    PROTOCOL_VERSION,
    Hello,
    ProtocolError,
    Push,
    SpeculationBlock,
    Step,
    decode_to_target,
    pack_ids,
)

OPTIONS = DrafterOptions(
    engine_args={},
    num_speculative_tokens=hostile.K,
    fan_out=3,
    branch_budget=None,
    max_num_seqs=4,
    max_branches=12,
    top_m=hostile.TOP_M,
    cpus=[],
    parent_pid=os.getpid(),
)
POLL_S = 0.5
"""No poll takes so much of the target's thread, flooded or not."""


@pytest.fixture
def frozen_heap():
    """Keep this process's other objects out of garbage collection, as vLLM does in its engine and worker.

    A full collection of all that the suite has imported takes up to half a second, and can fall into a poll.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Start a link to a drafter that is hostile once, in the way that is named."""
    monkeypatch.setattr(launch, "DRAFTER_MODULE", "hostile_drafter")
    monkeypatch.setattr(launch, "BACKOFF_S", (0.01, 0.05))
    monkeypatch.setattr(launch, "HANG_S", 1.0)
    monkeypatch.setenv("PYTHONPATH", str(Path(hostile.__file__).parent))
    links = []

    def start(what: str) -> launch.DrafterProcess:
        environment = {"VLLM_SSD_HOSTILE": what, "VLLM_SSD_HOSTILE_ONCE": str(tmp_path / "started")}
        links.append(
            launch.DrafterProcess(
                OPTIONS,
                Hello(PROTOCOL_VERSION, hostile.VOCAB_SIZE, hostile.K, ""),
                environment=environment,
                startup_timeout_s=60,
                logger=logging.getLogger("test_hostile"),
            )
        )
        links[-1].wait_until_ready()
        return links[-1]

    yield start
    for link in links:
        link.close()


def poll_until(link: launch.DrafterProcess, done, timeout_s: float = 20.0) -> float:
    """Poll until `done(pushes)`; the most time of this thread that one poll took."""
    longest, deadline = 0.0, time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        started = time.thread_time()
        pushes = link.poll()
        longest = max(longest, time.thread_time() - started)
        if done(pushes):
            return longest
        time.sleep(0.005)
    raise AssertionError("it did not come to that")


@pytest.mark.parametrize("what", [*ACTED, "drafts beyond the vocabulary", "a q of NaN", "noise", "negative statistics"])
def test_a_hostile_drafter_is_replaced(start, frozen_heap, caplog, what):
    link = start(what)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    link.send(Step([], hostile.K))
    with caplog.at_level(logging.WARNING, "test_hostile"):
        longest = poll_until(link, lambda _: link.generation == 2)
    (warning,) = caplog.records
    assert "SSD drafter lost" in warning.getMessage()
    assert longest < POLL_S
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib < 64 << 10
    link.send(Step([], hostile.K))
    poll_until(link, lambda pushes: pushes == [Push([], [], hostile.DrafterStats(1, 2, 0.5, 3, 4))])
    assert link.generation == 2


@pytest.mark.parametrize("what", UNSOUND)
def test_an_unsound_message_is_refused(what):
    checker = PushChecker.of(OPTIONS, hostile.VOCAB_SIZE)
    try:
        message = decode_to_target(UNSOUND[what])
    except ProtocolError:
        return
    assert not isinstance(message, Push) or checker.reason(message)


@pytest.mark.parametrize("what", SOUND)
def test_a_sound_push_is_let_through(what):
    assert PushChecker.of(OPTIONS, hostile.VOCAB_SIZE).reason(decode_to_target(SOUND[what])) is None


def pushed(num_branches: int, sampled: bool) -> Any:
    """Branches of 5 drafts, greedy or with 64 ids in each proposal."""
    outcomes, drafts = [[i % 6, i] for i in range(num_branches)], [[i, 1, 2, 3, 4] for i in range(num_branches)]
    if not sampled:
        return decode_to_target(hostile.push(hostile.block(outcomes=outcomes, draft_token_ids=drafts)))
    proposals = [[draft, *range(10, 73)] for row in drafts for draft in row]
    block = hostile.sampled([1 / 64] * 64, outcomes=outcomes, draft_token_ids=drafts, q_token_ids=proposals)
    return decode_to_target(hostile.push(block))


def num_calls(function: Callable[[], object]) -> int:
    """Functions that are called meanwhile, in Python and in C."""
    calls: list[str] = []
    sys.setprofile(lambda frame, event, argument: calls.append(event) if event in ("call", "c_call") else None)
    try:
        function()
    finally:
        sys.setprofile(None)
    return len(calls)


@pytest.mark.parametrize("sampled", [False, True])
def test_checking_a_block_costs_a_few_calls_whatever_its_size(sampled: bool) -> None:
    """4 µs for 24 branches of greedy drafts, 8 µs for sampled ones where this was written: some passes over the ids.

    The least of many times, as other processes run, too, and in units of one pass, as machines differ.
    """
    options = msgspec.structs.replace(OPTIONS, num_speculative_tokens=5, max_branches=96, top_m=64)
    checker = PushChecker.of(options, hostile.VOCAB_SIZE)
    small, large = pushed(24, sampled), pushed(96, sampled)
    assert checker.reason(small) is None and checker.reason(large) is None
    with mock.patch.object(checks, "SMALL_BYTES", 0):
        assert num_calls(lambda: checker.reason(small)) == num_calls(lambda: checker.reason(large)) < 80
    assert num_calls(lambda: checker.reason(small)) < 80
    ids = np.frombuffer(small.q_token_ids or small.blocks[0].draft_token_ids, "<u4")
    check_s = pass_s = np.inf
    for _ in range(50):
        check_s = min(check_s, timeit.timeit(lambda: checker.reason(small), number=100))
        pass_s = min(pass_s, timeit.timeit(lambda: np.maximum.reduce(ids), number=100))
    assert check_s < 25 * pass_s, (check_s, pass_s)


edges = st.sampled_from([0, 1, hostile.VOCAB_SIZE - 1, hostile.VOCAB_SIZE, 2**31 - 1, -1, -(2**31)])


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(-1, hostile.K + 1), edges | st.just(JIT_TOKEN)), min_size=1, max_size=12),
    st.lists(edges, min_size=1, max_size=1),
    st.lists(st.integers(0, hostile.VOCAB_SIZE - 1), min_size=12, max_size=12),
)
def test_a_small_block_is_checked_as_a_large_one_is(outcomes, edge, drafts):
    drafts = [*drafts[: len(outcomes) - 1], *edge]
    block = SpeculationBlock("a", 1, 10, 0, pack_ids(np.array(outcomes)), pack_ids(drafts))
    checker = PushChecker.of(OPTIONS, hostile.VOCAB_SIZE)
    assert len(block.outcomes) + len(block.draft_token_ids) <= checks.SMALL_BYTES
    reason = checker.reason(Push([block], [], None))
    with mock.patch.object(checks, "SMALL_BYTES", 0):
        assert checker.reason(Push([block], [], None)) == reason


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_each_id_of_small_blocks_is_checked(num_blocks):
    """One id out of range, at each place in turn, among the largest that are allowed."""
    checker = PushChecker.of(OPTIONS, hostile.VOCAB_SIZE)
    sound = np.full((num_blocks, 2, 2 + 3), hostile.VOCAB_SIZE - 1, np.int64)
    sound[:, :, 0] = hostile.K

    def reason(values):
        blocks = [
            SpeculationBlock(str(i), 1, 10, 0, pack_ids(of_block[:, :2]), pack_ids(of_block[:, 2:]))
            for i, of_block in enumerate(values)
        ]
        return checker.reason(Push(blocks, [], None))

    assert reason(sound) is None
    for at in np.ndindex(sound.shape):
        for value in (sound[at] + 1, 2**31 - 1, -1, -(2**31)):
            wrong = sound.copy()
            wrong[at] = value
            found = reason(wrong)
            with mock.patch.object(checks, "SMALL_BYTES", 0):
                assert found is not None and found == reason(wrong), (at, value)


def test_the_target_s_vocabulary_bounds_ids():
    push = decode_to_target(hostile.push(hostile.block(draft_token_ids=[[3, 4, 99], [6, 7, 8]])))
    assert PushChecker.of(OPTIONS, 100).reason(push) is None
    reason = PushChecker.of(OPTIONS, 99).reason(push)
    assert reason is not None and "draft that is not in the target's vocabulary" in reason


def test_the_largest_sound_push_fits_the_bound():
    rows = OPTIONS.max_branches + 1
    largest = hostile.sampled(
        outcomes=[[1, 2]] * rows, draft_token_ids=[[3, 4, 5]] * rows, request_id="chatcmpl-" + "0" * 64
    )
    assert len(hostile.push(*[largest] * OPTIONS.max_num_seqs)) < max_push_bytes(OPTIONS)
