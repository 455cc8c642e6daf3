"""While the target sleeps the drafter rests, and on the target's own GPU it is gone until the target is back."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_target import engine_of
from fake_model import FakePagedModel
from vllm.v1.worker.gpu_worker import Worker
from waiting import wait_until

from vllm_ssd.compat.target import worker as seam
from vllm_ssd.link import process
from vllm_ssd.link.options import DrafterOptions
from vllm_ssd.link.process import DrafterProcess
from vllm_ssd.link.protocol import Hello, Welcome, encode
from vllm_ssd.link.transport import PREFIX_BYTES
from vllm_ssd.target.start import sleep_hooks


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A link whose drafters shake hands and then do nothing."""
    welcome = encode(Welcome(1, 1, "", 1, 1, 1))
    (tmp_path / "welcome").write_bytes(len(welcome).to_bytes(PREFIX_BYTES, "little") + welcome)
    script = tmp_path / "drafter"
    script.write_text(f"#!/bin/bash\ncat {tmp_path}/welcome >&$3; exec sleep 100\n")
    script.chmod(0o755)
    monkeypatch.setattr(process.sys, "executable", str(script))
    monkeypatch.setattr(process, "BACKOFF_S", (0.01, 0.05))
    monkeypatch.setattr(process, "WATCH_S", 0.05)
    link = DrafterProcess(
        DrafterOptions({}, 1, 1, None, 1, 2, 1, [], os.getpid()),
        Hello(1, 1, 1, ""),
        environment={},
        startup_timeout_s=20,
        logger=logging.getLogger("test"),
    )
    link.wait_until_ready()
    link.poll()
    yield link
    link.close()


class Backend:
    """vLLM's memory that sleeps, which sees whether a drafter runs beside it."""

    def __init__(self, link: DrafterProcess) -> None:
        self.link = link
        self.seen: list[tuple[str, bool]] = []

    def suspend(self, level: int) -> None:
        self.seen.append(("suspend", self.link._process.poll() is None))

    def resume(self, tags: list[str] | None) -> None:
        self.seen.append(("resume", self.link._process.poll() is None))


class Config(SimpleNamespace):
    """In place of a `VllmConfig`; unlike its parent, it can be referred to weakly."""


def worker_of(link: DrafterProcess, beside_target: bool, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What vLLM's `sleep` and `wake_up` need of a worker, whose hooks are ours."""
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (1 << 30, 1 << 30))
    worker = SimpleNamespace(
        vllm_config=Config(model_config=SimpleNamespace(enable_nccl_comm_suspend=False)),
        sleep_mode_backend=Backend(link),
        _sleep_saved_buffers={},
        _sleep_saved_parameters={},
        _sleep_saved_draft_buffers={},
        synchronize_device=lambda: None,
    )
    seam.attach(worker.vllm_config, sleep_hooks(link, beside_target, 0))
    return worker


def test_a_drafter_on_the_targets_gpu_is_gone_while_it_sleeps(link, monkeypatch, caplog) -> None:
    worker = worker_of(link, True, monkeypatch)
    with caplog.at_level(logging.WARNING, "test"):
        Worker.sleep(worker, level=1)
        assert worker.sleep_mode_backend.seen == [("suspend", False)] and not link.connected
        time.sleep(10 * process.WATCH_S)
        link.poll()
        assert not link.connected and link._process.poll() is not None, "started again while the target sleeps"
        Worker.wake_up(worker, ["weights"])
        time.sleep(5 * process.WATCH_S)
        assert link._process.poll() is not None, "the pages of the target may be another's still"
        Worker.wake_up(worker, ["kv_cache"])
    wait_until(lambda: link.poll() == [] and link.connected)
    assert link.generation == 2
    assert not caplog.records, "nothing was lost"


def test_a_drafter_on_its_own_gpu_stays(link, monkeypatch) -> None:
    worker = worker_of(link, False, monkeypatch)
    Worker.sleep(worker, level=1)
    Worker.wake_up(worker)
    link.poll()
    assert worker.sleep_mode_backend.seen == [("suspend", True), ("resume", True)]
    assert link.connected and link.generation == 1


def test_other_workers_sleep_as_before(link, monkeypatch) -> None:
    worker = worker_of(link, True, monkeypatch)
    other = SimpleNamespace(**vars(worker) | {"vllm_config": Config(**vars(worker.vllm_config))})
    Worker.sleep(other, level=1)
    assert link.connected


def test_a_drafter_that_starts_while_it_is_sent_to_rest_ends(link) -> None:
    for pause_s in (0.0, 0.02, 0.1):
        link.rest()
        link.wake()
        time.sleep(pause_s)
    link.rest()
    wait_until(lambda: link._process.poll() is not None)
    time.sleep(5 * process.WATCH_S)
    assert link._process.poll() is not None and link._newcomer is None
    link.wake()
    wait_until(lambda: link.poll() == [] and link.connected)


@pytest.mark.parametrize("tree_attention", [False, True])
def test_without_outcomes_no_branch_grows_for_long(tree_attention: bool) -> None:
    """Requests may stay open over a sleep; their trees are complete after a few steps."""
    model = FakePagedModel(400, tree_attention=tree_attention)
    engine = engine_of(model)
    for i in range(3):
        engine.open(str(i), 1, np.arange(1, 6, dtype=np.int32), 0.0, 3)
    for _ in range(20):
        if not engine.has_work:
            break
        engine.speculate()
    assert not engine.has_work and model.num_forwards > 3


@pytest.mark.parametrize("tree_attention", [False, True])
def test_a_step_over_too_many_branches_is_split(monkeypatch, tree_attention: bool) -> None:
    """Every request has a tree, of right branches, and no step's logits are larger than what was kept for them."""

    def drafts(most: int) -> tuple[dict, int]:
        monkeypatch.setattr("vllm_ssd.drafter.server.max_rows", lambda vocab_size, dtype: most)
        model = FakePagedModel(400, tree_attention=tree_attention)
        sizes, forward = [], model.forward

        def counted(batch):
            logits = forward(batch)
            sizes.append(len(logits))
            return logits

        model.forward = counted
        engine = engine_of(model, max_num_seqs=12)
        found: dict = {}
        for i in range(12):
            engine.open(str(i), 1, np.arange(1, 6 + i % 5, dtype=np.int32), 0.0, 3)
        for _ in range(200):
            if not engine.has_work:
                break
            for block in getattr(engine.speculate(), "blocks", ()):
                for branch in range(block.num_branches):
                    key = block.request_id, block.outcomes[8 * branch : 8 * branch + 8]
                    found.setdefault(key, []).extend(block.drafts(branch))
        assert not engine.has_work
        return found, max(sizes[2:])

    whole, largest = drafts(1 << 20)
    parts, most = drafts(4)
    assert parts.items() <= whole.items() and len({request_id for request_id, _ in parts}) == 12
    assert most <= (8 if tree_attention else 4) < largest  # on a device, with the padding of a bucket
