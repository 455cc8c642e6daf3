"""The link to a drafter, without a drafter: silence, death and return."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref

import msgspec
import pytest
from fake_link import pair

from vllm_ssd.link import process as launch
from vllm_ssd.link.options import DrafterOptions
from vllm_ssd.link.protocol import Hello, Push, Refused, Step, Welcome, encode
from vllm_ssd.link.transport import PREFIX_BYTES

OPTIONS = DrafterOptions({}, 1, 1, None, 1, 2, 1, [], os.getpid())
HELLO = Hello(1, 1, 1, "")
STEP = Step([], 1)
PUSH = Push([], [], None)


@pytest.fixture
def link(monkeypatch):
    """A connected link over a socket pair, with a clock that the test turns, and no thread to restart anything."""
    monkeypatch.setattr(launch.threading.Thread, "start", lambda self: None)
    clock = [1000.0]
    monkeypatch.setattr(launch.time, "monotonic", lambda: clock[0])
    link = launch.DrafterProcess(OPTIONS, HELLO, environment={}, startup_timeout_s=1, logger=logging.getLogger("test"))
    transport, drafter = pair()
    link._newcomer = launch.Drafter(None, transport, generation=1, max_model_len=100)
    link.clock, link.drafter = clock, drafter
    link._wanted.clear()
    link.poll()
    assert link.connected
    return link


def polls(link, seconds: float, every: float = 0.5) -> None:
    for _ in range(int(seconds / every)):
        link.clock[0] += every
        link.poll()


def test_a_drafter_that_is_silent_while_asked_is_lost(link):
    link.poll()
    link.send(STEP)
    polls(link, launch.HANG_S - 1)
    assert link.connected
    polls(link, 3)
    assert not link.connected and link._wanted.is_set()
    assert link.poll() == []
    link.send(STEP)


def test_a_drafter_that_answers_late_is_kept(link):
    link.poll()
    for _ in range(4):
        link.send(STEP)
        polls(link, launch.HANG_S - 1)
        link.drafter.send(PUSH)
        assert link.poll() == [PUSH]
    assert link.connected


def test_pauses_of_the_server_are_not_the_drafters_silence(link):
    link.send(STEP)
    link.poll()
    for _ in range(3):
        link.clock[0] += 100  # idle, suspended, or one long prefill
        link.send(STEP)
        link.poll()
        assert link.connected
    polls(link, 100)
    assert not link.connected


def test_a_drafter_that_says_something_else_than_pushes_is_lost(link):
    link.drafter.send(PUSH)
    link.drafter.send(Refused("no"))
    assert link.poll() == []
    assert not link.connected and link._wanted.is_set()


def test_a_drafter_that_was_told_nothing_may_be_silent(link):
    polls(link, 100)
    assert link.connected


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Start a link whose drafter is the shell script `drafter`; FD is its socket."""
    links = []

    def start(drafter: str = "", cpus: list[int] = (), **more) -> launch.DrafterProcess:
        script = tmp_path / "drafter"
        script.write_text(f"#!/bin/bash\nFD=$3\n{drafter}\n")
        script.chmod(0o755)
        monkeypatch.setattr(launch.sys, "executable", str(script))
        monkeypatch.setattr(launch, "EXIT_S", 0.2)
        options = msgspec.structs.replace(OPTIONS, cpus=list(cpus), **more)
        links.append(
            launch.DrafterProcess(
                options, HELLO, environment={}, startup_timeout_s=20, logger=logging.getLogger("test")
            )
        )
        return links[-1]

    yield start
    for link in links:
        link.close()


def test_a_drafter_that_hangs_up_and_stays_is_not_waited_for(start):
    link = start('eval "exec $FD>&-"; exec sleep 100')
    with pytest.raises(launch.DrafterFailed, match="was lost .* before it was ready"):
        link.wait_until_ready()
    assert link._process.poll() is not None


def test_a_drafter_that_ends_before_it_is_ready_says_how(start):
    with pytest.raises(launch.DrafterFailed, match="ended with status 7 before it was ready"):
        start("exit 7").wait_until_ready()


@pytest.mark.parametrize("end, trees", [("exit 1", "false"), ("kill -ABRT $$", "false"), ("kill -KILL $$", "true")])
def test_a_drafter_that_crashes_is_not_given_its_own_attention_again(start, monkeypatch, tmp_path, end, trees):
    """It may have crashed there. One that was killed is started again as it was."""
    monkeypatch.setattr(launch, "BACKOFF_S", (0.01, 0.05))
    welcome, started = encode(Welcome(1, 1, "", 1, 1, 1)), tmp_path / "started"
    (tmp_path / "welcome").write_bytes(len(welcome).to_bytes(PREFIX_BYTES, "little") + welcome)
    once = f"if [ $(wc -l <{started}) = 1 ]; then sleep 0.2; {end}; fi"
    link = start(f"echo $4 >>{started}; cat {tmp_path}/welcome >&$FD; {once}; exec sleep 100", tree_attention=True)
    link.wait_until_ready()
    deadline = time.monotonic() + 10
    while link.generation < 2 and time.monotonic() < deadline:
        link.poll(0.01)
    assert link.connected and link.generation == 2
    first, second = started.read_text().splitlines()
    assert '"tree_attention":true' in first and f'"tree_attention":{trees}' in second


@pytest.mark.parametrize("cpus", [[4000], [min(os.sched_getaffinity(0)), 4000]])
def test_cpus_that_are_not_there_are_named(start, cpus):
    with pytest.raises(launch.DrafterFailed, match="drafter_cpus.*CPU 4000$"):
        start(cpus=cpus).wait_until_ready()


def test_the_pause_before_a_restart_doubles_until_a_drafter_lives(link):
    pauses, lives_s = [], []

    class Wanted(threading.Event):
        """Set when the drafter that came up has lived its time."""

        def wait(self, timeout=None):
            link.clock[0] += lives_s.pop() if lives_s else 0
            return True

    def pause(pause_s):
        pauses.append(pause_s)
        link.clock[0] += pause_s
        return len(pauses) == 12

    def start():
        link.clock[0] += 30  # loading takes its time, whether it ends well or not
        if len(pauses) != 10:
            raise launch.DrafterFailed("no memory")
        lives_s.append(launch.BACKOFF_S[1] + 1)

    link._num_started, link._wanted, link._pause, link._start = 1, Wanted(), pause, start
    link._kill = link._do_without_trees = lambda: None
    launch._supervise(weakref.ref(link))
    assert pauses == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0, 60.0, 60.0, 1.0, 2.0]


def test_a_closed_socket_is_a_lost_drafter(link):
    link.drafter.close()
    link.send(STEP)
    assert link.poll() == []
    assert not link.connected and link._wanted.is_set()
