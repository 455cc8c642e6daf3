"""An engine in a process of its own is started, called and stopped surely, with a host that has no vLLM in it."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
from waiting import wait_until

from vllm_ssd.planning import engine_host
from vllm_ssd.planning.engine_host import EngineFailed, EngineProcess, threads_on

HOST = """
import os, signal, subprocess, sys, threading, time
from vllm_ssd.planning.engine_host import serve

class Host:
    def add(self, a, b):
        return a + b

    def see(self, name):
        return os.environ.get(name), sorted(os.sched_getaffinity(0))

    def fail(self):
        print("a line of the log", flush=True)
        raise ValueError("no such model")

    def end(self):
        os._exit(3)

    def sleep(self, seconds):
        time.sleep(seconds)

    def start_child(self):
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid

    def refuse_to_end(self):
        threading.Thread(target=time.sleep, args=(60,)).start()

serve(Host)
"""


@pytest.fixture
def start(tmp_path):
    program = tmp_path / "host.py"
    program.write_text(HOST)
    started = []

    def start(**arguments):
        started.append(EngineProcess([str(program)], tmp_path / f"{len(started)}.log", **arguments))
        return started[-1]

    yield start
    for process in started:
        process.close()


def test_calls_are_answered_in_turn(start):
    engine = start()
    assert engine.call("add", a=2, b=3) == 5
    engine.send("add", a=1, b=1)
    engine.send("add", a=2, b=2)  # takes the answer to the one before
    assert engine.receive() == 4


def test_what_a_call_raises_is_the_last_line_of_the_error_and_the_next_call_works(start):
    engine = start(name="the engine that measures 'ssd'")
    with pytest.raises(EngineFailed, match="(?s)measures 'ssd' failed.*a line of the log") as failure:
        engine.call("fail")
    assert str(failure.value).splitlines()[-1] == "ValueError: no such model"
    assert engine.call("add", a=0, b=1) == 1


def test_an_engine_that_ends_is_reported_at_once(start):
    engine = start()
    with pytest.raises(EngineFailed, match="the engine ended"):
        engine.call("end")
    with pytest.raises(EngineFailed, match="the engine ended"):
        engine.call("add", a=0, b=1)


def test_an_engine_that_does_not_answer_is_killed(start):
    engine = start(answer_timeout_s=0.5)
    engine.send("add", a=1, b=1)
    assert engine.receive(timeout_s=10) == 2  # a start may take longer than what follows
    with pytest.raises(EngineFailed, match="no answer within 0.5 s"):
        engine.call("sleep", seconds=60)
    assert engine.process.poll() == -signal.SIGKILL


def test_environment_and_cores(start, monkeypatch):
    monkeypatch.setenv("UNWANTED", "1")
    core = max(os.sched_getaffinity(0))
    engine = start(environment={"WANTED": "2", "UNWANTED": None} | threads_on([core]), cpus=[core])
    assert engine.call("see", name="UNWANTED") == (None, [core])
    assert engine.call("see", name="WANTED")[0] == "2"
    assert engine.call("see", name="OMP_NUM_THREADS")[0] == "1"
    assert threads_on([]) == {}


def test_an_idle_engine_and_its_children_are_suspended(start):
    engine = start(idle_stop=True)
    child = psutil.Process(engine.call("start_child"))
    for process in (psutil.Process(engine.process.pid), child):
        wait_until(lambda process=process: process.status() == psutil.STATUS_STOPPED)
    assert engine.call("add", a=1, b=1) == 2
    engine.close()
    assert engine.process.returncode == 0
    child.kill()  # an engine that ends by itself looks after its own


def test_an_engine_that_does_not_end_is_killed_with_its_children(start, monkeypatch):
    monkeypatch.setattr(engine_host, "EXIT_TIMEOUT_S", 0.5)
    engine = start()
    child = psutil.Process(engine.call("start_child"))
    engine.call("refuse_to_end")
    engine.close()
    assert engine.process.returncode == -signal.SIGKILL
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_an_engine_dies_with_its_parent(tmp_path):
    """Also while it is suspended, when it cannot notice that its connection closed."""
    (tmp_path / "host.py").write_text(HOST)
    parent = (
        "import sys, time; from pathlib import Path; from vllm_ssd.planning.engine_host import EngineProcess\n"
        "engine = EngineProcess([sys.argv[1]], Path(sys.argv[2]), idle_stop=True)\n"
        "engine.call('add', a=1, b=1); print(engine.process.pid, flush=True); time.sleep(60)"
    )
    arguments = [sys.executable, "-c", parent, tmp_path / "host.py", tmp_path / "log"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        engine = psutil.Process(int(process.stdout.readline()))
        process.kill()
    wait_until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)
