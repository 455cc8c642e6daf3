"""The link to a drafter, without a drafter: silence, death and return."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import msgspec
import psutil
import pytest
from fake_link import pair
from waiting import wait_until

from vllm_ssd.link import process as launch
from vllm_ssd.link.options import DrafterOptions
from vllm_ssd.link.protocol import DrafterStats, Hello, Push, Refused, SpeculationBlock, Step, Welcome, encode
from vllm_ssd.link.transport import MAX_POLL_MESSAGES, PREFIX_BYTES

SOON_S = 30.0
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
    link._newcomer = launch.Drafter(transport, generation=1, max_model_len=100)
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
    deadline = time.monotonic() + SOON_S
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


WELCOME = encode(Welcome(1, 1, "", 1, 1, 1))


@pytest.fixture
def obliging(start, tmp_path):
    """Start drafters that shake hands, then do `then`."""
    (tmp_path / "welcome").write_bytes(len(WELCOME).to_bytes(PREFIX_BYTES, "little") + WELCOME)

    def begin(then: str = "exec sleep 100", **more) -> launch.DrafterProcess:
        link = start(f"cat {tmp_path}/welcome >&$FD; {then}", **more)
        link.wait_until_ready()
        return link

    return begin


def test_a_drafter_that_dies_while_the_target_is_idle_is_replaced(obliging, monkeypatch, caplog):
    monkeypatch.setattr(launch, "BACKOFF_S", (0.01, 0.05))
    link, looks, attend = obliging(), [], launch.DrafterProcess._attend
    with caplog.at_level(logging.WARNING, "test"):
        link._process.kill()
        link._process.wait()
        monkeypatch.setattr(launch.DrafterProcess, "_attend", lambda link: looks.append(1) or attend(link))
        wait_until(lambda: caplog.records)
        assert len(looks) <= 2, "noticed at the next look, of which there is one every WATCH_S"
        wait_until(lambda: link.generation == 2 and link.connected)
    (warning,) = caplog.records
    assert "ended with status -9" in warning.getMessage()


def test_a_drafter_that_hangs_up_while_the_target_is_idle_is_replaced(obliging, monkeypatch):
    monkeypatch.setattr(launch, "BACKOFF_S", (0.01, 0.05))
    link = obliging('eval "exec $FD>&-"; exec sleep 100')
    wait_until(lambda: link.generation >= 2)


def test_statistics_arrive_while_the_target_is_idle(link):
    reported = []
    link._on_stats = lambda stats, generation: reported.append((stats, generation))
    block = SpeculationBlock("a", 1, 9, 0, b"\0" * 8, b"\0" * 4)
    link.drafter.send(Push([block], [], DrafterStats(3, 9, 1.0, 1, 0)))
    link.clock[0] += launch.WATCH_S + 0.1
    link._attend()
    assert reported == [(DrafterStats(3, 9, 1.0, 1, 0), 1)]
    assert link.poll() == [Push([block], [], None)], "what was read in the target's place is not lost to it"
    assert link.poll() == []


def test_an_idle_target_keeps_no_more_than_its_bound(link, monkeypatch):
    monkeypatch.setattr(launch, "MAX_IDLE_BYTES", 100)
    for _ in range(5):
        link.drafter.send(Push([SpeculationBlock("a", 1, 9, 0, b"\0" * 8, b"\0" * 4)] * 3, [], None))
        link.clock[0] += launch.WATCH_S + 0.1
        link._attend()
    assert link._kept_bytes < 300
    assert len(link.poll()) + len(link.poll()) == 5


def test_no_new_drafter_is_taken_up_between_two_polls(obliging, monkeypatch):
    """Or the events of one step would be written for one drafter and sent to the next."""
    monkeypatch.setattr(launch, "BACKOFF_S", (0.01, 0.05))
    monkeypatch.setattr(launch, "WATCH_S", 30.0)  # a target that polls twice in so long is busy
    link = obliging()
    link.poll()
    link._process.kill()
    link._process.wait()
    wait_until(lambda: link.poll() == [] and not link.connected)
    wait_until(lambda: link._num_started == 2 and link._newcomer)
    link.send(STEP)
    assert (link.generation, link.connected) == (1, False)
    link.poll()
    assert (link.generation, link.connected) == (2, True)


@pytest.mark.parametrize("call", ["send", "poll"])
def test_closing_waits_for_the_thread_that_sends_or_polls(link, monkeypatch, call):
    """The supervisor closes the link of an orphaned worker; its socket was closed under the target's hands."""
    transport = link._drafter.transport
    write, closers = transport._write, []
    transport._outbox += b"left over"

    def write_while_it_is_closed(data):
        if not closers[0].is_alive():
            closers[0].start()
            closers[0].join(0.2)
            monkeypatch.setattr(transport, "_write", write)
        return write(data)

    monkeypatch.undo()  # threads start again, and time passes
    closers.append(threading.Thread(target=link.close))
    monkeypatch.setattr(transport, "_write", write_while_it_is_closed)
    link.poll() if call == "poll" else link.send(STEP)
    closers[0].join(5.0)
    assert not link.connected and transport.fileno() == -1
    assert link.poll() == []


def test_a_flood_is_read_in_bounded_parts_and_then_given_up(link, caplog):
    for full_polls in range(1, launch.MAX_FULL_POLLS + 2):
        for _ in range(MAX_POLL_MESSAGES + 1):
            link.drafter.send(PUSH)
        assert len(link.poll()) == (MAX_POLL_MESSAGES if full_polls <= launch.MAX_FULL_POLLS else 0)
    assert not link.connected and "sent more than the target can read" in caplog.text


def test_part_of_a_message_is_not_waited_for(link):
    link.drafter._socket.send(b"\x30\0\0\0part")
    polls(link, launch.HANG_S - 1)
    assert link.connected
    polls(link, 3)
    assert not link.connected


def test_a_process_id_that_is_another_s_by_now_is_no_server(link, monkeypatch):
    monkeypatch.undo()
    child = subprocess.Popen(["sleep", "100"])
    link._server._process = psutil.Process(child.pid)
    assert not link._ends()
    with monkeypatch.context() as patch:
        patch.setattr(psutil.Process, "is_running", lambda self: False)  # it compares the times of creation
        assert link._server.has_ended()
    child.kill()
    wait_until(link._server.has_ended)  # a zombie serves nobody
    child.wait()
    assert link._ends()


SERVER = """
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]]).pid, flush=True)
sys.stdin.read()
"""
WORKER = """
import logging, os, sys, time
from vllm_ssd.link import process
from vllm_ssd.link.options import DrafterOptions
from vllm_ssd.link.protocol import Hello
from vllm_ssd.target.metrics import Metrics

port, process.DRAFTER_MODULE = int(sys.argv[1]), "hostile_drafter"
metrics = Metrics(1, logging.getLogger())
metrics.serve(port)
link = process.DrafterProcess(
    DrafterOptions({}, 1, 1, None, 1, 2, 1, [], os.getpid()), Hello(1, 1, 1, ""),
    environment={"VLLM_SSD_HOSTILE_ONCE": sys.argv[2]}, startup_timeout_s=20, logger=logging.getLogger(),
    server_pid=os.getppid(), on_end=metrics.close,
)
metrics.watch(link)
link.wait_until_ready()
time.sleep(100)
"""


def test_an_orphaned_worker_keeps_neither_drafter_nor_port(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def is_served() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, WORKER, str(port), str(tmp_path / "started")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    )
    worker = psutil.Process(int(server.stdout.readline()))
    try:
        wait_until(lambda: (tmp_path / "started").exists() and is_served(), 60.0)
        (drafter,) = worker.children()
        server.kill()
        server.wait()
        assert worker.is_running()
        wait_until(lambda: not is_served() and not drafter.is_running())
        assert worker.is_running()
    finally:
        worker.kill()
        server.stdin.close()


def test_the_drafter_is_told_no_secrets(start, monkeypatch, tmp_path):
    kept = {
        "PATH", "HOME", "LD_PRELOAD_X", "PYTHONPATH", "OMP_NUM_THREADS", "MKL_X", "KMP_X", "CUDA_HOME", "NVIDIA_X",
        "NCCL_X", "HSA_X", "HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "VLLM_CACHE_ROOT", "VLLM_SSD_TRACE", "TORCH_HOME",
        "TORCHINDUCTOR_X", "TRITON_CACHE_DIR", "TMPDIR", "XDG_CACHE_HOME", "LANG", "LC_ALL", "https_proxy", "NO_PROXY",
        "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE",
    }  # fmt: skip
    secret = {
        "VLLM_API_KEY", "OPENAI_API_KEY", "NVIDIA_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "VLLM_TOKEN",
        "GOOGLE_APPLICATION_CREDENTIALS", "AZURE_CLIENT_SECRET", "GITHUB_TOKEN", "DATABASE_URL", "WANDB_API_KEY",
        "KUBECONFIG", "SSH_AUTH_SOCK",
    }  # fmt: skip
    for_workers = {"VLLM_SSD_RUNTIME", "VLLM_SSD_SERVER_PID", "VLLM_SSD_REPLICAS", "VLLM_SSD_METRICS"}
    for name in kept | secret | for_workers:
        monkeypatch.setenv(name, os.environ.get(name, "x"))
    with pytest.raises(launch.DrafterFailed):
        start(f"compgen -e >{tmp_path}/names; exit 1").wait_until_ready()
    names = set((tmp_path / "names").read_text().split())
    assert kept - names == set()
    assert names & (secret | for_workers) == set()


def test_a_closed_socket_is_a_lost_drafter(link):
    link.drafter.close()
    link.send(STEP)
    assert link.poll() == []
    assert not link.connected and link._wanted.is_set()
