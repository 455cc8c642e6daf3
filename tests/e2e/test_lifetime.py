"""Starts that must fail say why in one sentence, and nothing outlives the engine that started it."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
from drafter_processes import is_drafter
from engines import ON_GPU, PAIR, Engine, EngineFailed, free_port, request, server
from tiny_models import random_llama, save

GONE_S = 5.0
"""Longest time that a process may outlive its parent, and a port its server."""


@pytest.fixture
def engine(start_engine: Callable[..., Engine], tmp_path: Path) -> Iterator[Engine]:
    """An engine whose temporary files go to `tmp_path`."""
    engine = start_engine(speculative={}, environment={"TMPDIR": str(tmp_path)}, own_drafters=True)
    yield engine
    engine.close()


def drafters_of(engine: Engine) -> list[psutil.Process]:
    """Its children, and those forked drafters whose options name it as their parent."""
    parents = [engine.process.pid, *([] if ON_GPU else [server().pid])]
    children = [child for parent in parents for child in psutil.Process(parent).children()]
    return [process for process in children if is_drafter(process) and started_by(process) == engine.process.pid]


def started_by(drafter: psutil.Process) -> int | None:
    with suppress(psutil.Error):
        if named := re.search(r'"parent_pid":(\d+)', " ".join(drafter.cmdline())):
            return int(named[1])
    return None


def wait_for_drafter(engine: Engine) -> list[psutil.Process]:
    """The drafter that a start has just begun to boot."""
    deadline = time.monotonic() + 60
    while not (drafters := drafters_of(engine)):
        assert time.monotonic() < deadline and engine.process.poll() is None, engine.log.read_text()[-4000:]
        time.sleep(0.01)
    return drafters


def wait_until_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=GONE_S)
    assert not alive, f"still there: {alive}"


def test_nothing_is_left_behind(engine: Engine, corpus: list[int], tmp_path: Path) -> None:
    assert engine.generate([request(corpus[:20], max_tokens=20)]).counts["vllm:generation_tokens"] == 20
    drafter = psutil.Process(engine.call("drafter").pid)
    listening = [c.laddr.ip for c in drafter.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert set(listening) <= {"127.0.0.1", "::1"}
    engine.close()
    wait_until_gone([drafter])
    assert not list(tmp_path.iterdir())


def test_drafter_dies_with_a_killed_server(engine: Engine, corpus: list[int]) -> None:
    engine.generate([request(corpus[:20], max_tokens=20)])
    drafter = psutil.Process(engine.call("drafter").pid)
    assert drafter.is_running()
    engine.process.kill()
    wait_until_gone([drafter])


def test_drafter_dies_with_a_server_killed_at_start(engine: Engine) -> None:
    drafters = wait_for_drafter(engine)
    engine.process.kill()
    wait_until_gone(drafters)


def test_a_killed_server_frees_its_metrics_port(start_engine: Callable[..., Engine]) -> None:
    """The engine's process, a child of the killed one, may live on; drafter and port go."""
    port = free_port()
    engine = start_engine(
        speculative={"metrics_port": port},
        environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        patches={"vllm.v1.engine.utils.get_mp_context": partial(multiprocessing.get_context, "fork")},
        own_drafters=True,
    )
    try:
        deadline = time.monotonic() + 120
        drafters: list[psutil.Process] = []
        while not drafters or not is_served(port):
            assert time.monotonic() < deadline and engine.process.poll() is None, engine.log.read_text()[-4000:]
            time.sleep(0.1)
            children = psutil.Process(engine.process.pid).children(recursive=True)
            drafters = [p for p in children if is_drafter(p)]
        engine.process.kill()
        wait_until_gone(drafters)
        deadline = time.monotonic() + GONE_S
        while is_served(port):
            assert time.monotonic() < deadline, "the port outlives its server"
            time.sleep(0.1)
    finally:
        engine.close()


def is_served(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def failing(start_engine: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A process in which one start after the other fails; the first, of a drafter without a model, is under way."""
    engine = start_engine(speculative={"model": str(tmp_path_factory.mktemp("empty"))})
    yield engine
    engine.close()


def start_with(engine: Engine, **speculative: object) -> str:
    """The last line of what a start with other `speculative` keys raises."""
    config = engine.arguments["speculative_config"] | speculative
    with pytest.raises(EngineFailed) as failure:
        engine.call("start", **engine.arguments | {"speculative_config": config})
    assert not drafters_of(engine)
    return str(failure.value).strip().splitlines()[-1]


def test_drafter_in_an_empty_folder(failing: Engine) -> None:
    with pytest.raises(EngineFailed, match=r"(?s)SSD drafter cannot serve: .*empty"):
        failing.receive()


def test_drafter_that_does_not_exist(failing: Engine) -> None:
    assert "neither a folder nor the name of a model" in start_with(failing, model="/nowhere/at/all")


def test_drafter_with_another_vocabulary(failing: Engine, tmp_path: Path) -> None:
    save(random_llama(seed=1), tmp_path / "drafter")
    reason = start_with(failing, model=str(tmp_path / "drafter"))
    assert "only 0 of the target's 2,048 tokens" in reason and "set heterogeneous_vocab: true" in reason


def test_drafter_with_another_tokenizer(failing: Engine, tmp_path: Path) -> None:
    folder = shutil.copytree(PAIR / "drafter", tmp_path / "drafter")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    last = list(vocab)[-100:]
    vocab |= dict(zip(last, [vocab[token] for token in reversed(last)]))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "only 1,948 of the target's 2,048 tokens (95.1%)" in start_with(failing, model=str(folder))


def test_drafter_without_memory(failing: Engine) -> None:
    """2 KiB a token: the whole of the target's length takes 4 MiB."""
    speculative = failing.arguments["speculative_config"] | {"model": str(PAIR / "drafter")}
    arguments = failing.arguments | {"max_model_len": 2048}
    with pytest.raises(EngineFailed) as failure:
        failing.call("start", **arguments | {"speculative_config": speculative | {"kv_cache_memory": "1MiB"}})
    reason = str(failure.value).strip().splitlines()[-1]
    assert "SSD drafter cannot serve: ValueError: kv_cache_memory = 1MiB cannot hold" in reason
    assert 'set kv_cache_memory in speculative_config to "8MiB" or more, or max_model_len to 256 or less' in reason
    assert not drafters_of(failing)


@pytest.mark.parametrize("works", [{"kv_cache_memory": "8MiB"}, {"kv_cache_memory": "1MiB", "max_model_len": 256}])
def test_the_memory_that_is_advised_suffices(start_engine: Callable[..., Engine], works: dict[str, object]) -> None:
    engine = start_engine(speculative=works, max_model_len=2048)
    try:
        assert engine.call("drafter").connected
    finally:
        engine.close()


@pytest.fixture
def booting(failing: Engine) -> Engine:
    """The same process, whose drafters are no forks from now on: they take seconds to boot."""
    failing.call("start_own_drafters")
    return failing


def test_drafter_that_takes_too_long(booting: Engine) -> None:
    assert "startup_timeout_s=0.5" in start_with(booting, model=str(PAIR / "drafter"), startup_timeout_s=0.5)


def test_drafter_that_is_killed_while_it_boots(booting: Engine) -> None:
    config = booting.arguments["speculative_config"] | {"model": str(PAIR / "drafter")}
    booting.send("start", **booting.arguments | {"speculative_config": config})
    wait_for_drafter(booting)[0].kill()
    with pytest.raises(EngineFailed, match="the SSD drafter ended with status -9 before it was ready"):
        booting.receive()


def test_key_that_does_not_exist(failing: Engine) -> None:
    reason = start_with(failing, model=str(PAIR / "drafter"), fanout=3)
    assert "unknown key 'fanout'" in reason and "did you mean 'fan_out'" in reason
