"""`vllm-ssd drafter`: targets on either runner share it, and each of them may end, and so may it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import (
    ENVIRONMENT,
    ON_V2,
    PAIR,
    Engine,
    EngineFailed,
    assert_conclusive,
    free_port,
    own_cores,
    request,
    texts,
)
from fleet_watch import assert_bounded
from marks import needs_v2

pytestmark = pytest.mark.timed

SSD = Path(sys.executable).with_name("vllm-ssd")
ROUND_S = 0.1
"""Of the targets: three processes share the cores of a small machine, of which the drafter has one."""
SIZES = {"branch_budget": 12}
WAIT_MS = 20
READY_S, END_S, USED_S = 120.0, 5.0, 5.0


class Drafter:
    """A drafter on a loopback port, which stays the same when it is started again."""

    def __init__(self, folder: Path) -> None:
        self.key = folder / "ssd.pem"
        subprocess.run([SSD, "key", self.key], check=True, stdout=subprocess.DEVNULL)
        self.address = f"127.0.0.1:{free_port()}"
        self.log = folder / "drafter.log"

    def start(self) -> None:
        core = str(own_cores()[-1])  # the engines have the others
        config = json.dumps({**SIZES, "dtype": "float32", "kv_cache_memory": "64MiB", "drafter_cpus": core})
        arguments = ["--model", PAIR / "drafter", "--listen", self.address, "--key", self.key, "--config", config]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [SSD, "drafter", *arguments], env=os.environ | ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT
            )

    def wait_until_it_listens(self) -> None:
        deadline = time.monotonic() + READY_S
        while "listens on" not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.05)

    def end(self) -> float:
        """SIGTERM; the seconds until it has ended, with status 0."""
        started = time.monotonic()
        self.process.terminate()
        assert self.process.wait(30) == 0, self.log.read_text()[-4000:]
        return time.monotonic() - started


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drafter]:
    drafter = Drafter(tmp_path_factory.mktemp("standalone"))
    drafter.start()
    yield drafter
    drafter.process.kill()
    drafter.process.wait()


@pytest.fixture(scope="module")
def start(start_engine: Callable[..., Engine], drafter: Drafter) -> Callable[..., Engine]:
    def start(**environment: str) -> Engine:
        wait = {"on_miss": "skip"} if environment else {"on_miss": "wait", "wait_ms": WAIT_MS}
        speculative = {**SIZES, **wait, "drafters": [drafter.address], "drafter_key": str(drafter.key)}
        return start_engine(speculative=speculative, environment=environment)

    return start


@pytest.fixture(scope="module")
def engine(start: Callable[..., Engine]) -> Engine:
    engine = start()
    engine.call("watch_fleet")
    return engine


@pytest.fixture(scope="module")
def requests(prompts: Callable[..., list[list[int]]]) -> list[dict[str, Any]]:
    return [request(prompt, max_tokens=80) for prompt in prompts(6, 10, 60, seed=21)]


@pytest.fixture(scope="module")
def expected(target_alone: Engine, requests: list[dict[str, Any]]) -> list[list[list[int]]]:
    return texts(target_alone.generate(requests))


@needs_v2
def test_two_targets_share_it_until_one_is_killed(
    engine: Engine, start: Callable[..., Engine], drafter: Drafter, requests: list[dict[str, Any]], expected: Any
) -> None:
    other = start(**ON_V2)
    engine.call("counts")
    other.call("counts")
    other.send("generate", requests=requests, min_seconds=ROUND_S)
    run = engine.generate(requests, min_seconds=ROUND_S)
    assert texts(run) == expected
    assert_conclusive(run, hits=30, accepted=30)
    shared = other.receive()
    assert texts(shared) == expected
    assert_conclusive(shared, hits=30, accepted=30)
    other.send("generate", requests=requests, min_seconds=ROUND_S)
    threading.Timer(0.5, other.process.kill).start()
    run = engine.generate(requests, min_seconds=ROUND_S)
    assert texts(run) == expected
    assert_conclusive(run, hits=30, accepted=30)
    assert drafter.process.poll() is None
    assert engine.call("drafter").generation == 1
    assert_bounded(engine.call("fleet_seen"), WAIT_MS)


def test_it_ends_and_comes_back(
    engine: Engine, drafter: Drafter, requests: list[dict[str, Any]], expected: Any
) -> None:
    engine.send("generate", requests=requests, min_seconds=ROUND_S)
    time.sleep(0.3)
    assert drafter.end() <= END_S
    assert texts(engine.receive()) == expected
    assert not engine.call("drafter").connected
    drafter.start()
    drafter.wait_until_it_listens()
    listens_at = time.monotonic()
    assert engine.call("wait_for_drafter", generation=2, timeout_s=READY_S)
    assert time.monotonic() - listens_at <= USED_S
    run = engine.generate(requests, min_seconds=ROUND_S)
    assert texts(run) == expected
    assert_conclusive(run, hits=30, accepted=30)
    assert_bounded(engine.call("fleet_seen"), WAIT_MS)


def test_a_start_fails_in_words_without_it(start_engine: Callable[..., Engine], drafter: Drafter) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    speculative = {**SIZES, "drafters": [nobody], "drafter_key": str(drafter.key), "startup_timeout_s": 1}
    engine = start_engine(speculative=speculative)
    with pytest.raises(EngineFailed, match="cannot be reached"):
        engine.call("counts")
