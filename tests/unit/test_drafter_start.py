"""A drafter whose own attention fails starts over with vLLM's; one that cannot start says why."""

from __future__ import annotations

import os
import sys
import threading
import types

import msgspec
import pytest
import torch
from fake_model import FakePagedModel

from vllm_ssd.compat.drafter.graphs import CalledSteps
from vllm_ssd.compat.drafter.memory import max_rows
from vllm_ssd.compat.drafter.paged import TreeBatch, UnsupportedDraftModel
from vllm_ssd.drafter import device_steps, server
from vllm_ssd.drafter.buckets import Buckets
from vllm_ssd.link.options import DrafterOptions
from vllm_ssd.link.protocol import (
    PROTOCOL_VERSION,
    Hello,
    Open,
    Refused,
    Step,
    Welcome,
    fingerprint,
    pack_ids,
    unpack_ids,
)
from vllm_ssd.link.transport import socket_pair

OPTIONS = DrafterOptions(
    engine_args={"model": "fake"},
    num_speculative_tokens=3,
    fan_out=2,
    branch_budget=None,
    max_num_seqs=2,
    max_branches=8,
    top_m=5,
    cpus=[],
    parent_pid=1,
    tree_attention=True,
)


class FakeDraftModel(FakePagedModel):
    """As `DraftModel`, which boots vLLM."""

    def __init__(self, *, tree_attention: bool, model: str, num_drafts: int = 1) -> None:
        super().__init__(num_pages=60, tree_attention=tree_attention)

    def vocabulary(self) -> tuple[list[str], int]:
        return ["a"], 0


class Broken(FakeDraftModel):
    """Branches read what was in their pages before."""

    def copy_slots(self, *copies) -> None:
        self.kv[:] = 0


class Parallel(FakeDraftModel):
    """A draft model that draws all drafts of a branch in one forward."""

    def __init__(self, **arguments) -> None:
        super().__init__(**arguments)
        self.mask_token_id = 4


class WrongMask(Parallel):
    """Another token stands for the drafts of a step."""

    def forward(self, batch):
        if isinstance(batch, TreeBatch):
            batch.token_ids = torch.where(batch.token_ids == 4, 5, batch.token_ids)
        return super().forward(batch)


class Unsupported(FakeDraftModel):
    """As vLLM when it refuses a backend."""

    def __init__(self, *, tree_attention: bool, model: str, num_drafts: int = 1) -> None:
        if tree_attention:
            raise NotImplementedError("no sinks\nsecond line")
        raise ValueError("no such model")


class Recurrent(FakeDraftModel):
    """As a model that cannot draft."""

    def __init__(self, **_) -> None:
        raise UnsupportedDraftModel("it cannot draft")


class StartedOver(Exception):
    """In place of a process that becomes another."""


@pytest.fixture
def start(monkeypatch):
    """`start(model, options)` -> what is executed in the drafter's place, if anything; `start.target` is its target."""
    executed: list[list[str]] = []

    def execve(path: str, arguments: list[str], environment: dict[str, str]) -> None:
        executed.append(arguments)
        raise StartedOver

    def start(model: type, options: DrafterOptions) -> list[list[str]]:
        module = types.SimpleNamespace(DraftModel=model)
        monkeypatch.setitem(sys.modules, "vllm_ssd.compat.drafter.draft_model", module)
        monkeypatch.setattr(server.os, "execve", execve)
        monkeypatch.setattr(server.gc, "freeze", lambda: None)
        start.target, child = socket_pair()
        start.thread = threading.Thread(target=run, args=(child.detach(), options))
        start.thread.start()
        if options.tree_attention and model not in (FakeDraftModel, Parallel):
            start.thread.join()
        return executed

    def run(fd: int, options: DrafterOptions) -> None:
        try:
            server.run(fd, options)
        except (StartedOver, ValueError):
            pass

    yield start
    start.target.close()
    start.thread.join()


@pytest.mark.parametrize(
    "model, reason",
    [
        (Broken, "WrongTrees: proposals differ"),
        (WrongMask, "WrongTrees: proposals differ"),
        (Unsupported, "NotImplementedError: no sinks)"),
    ],
)
def test_a_drafter_whose_attention_fails_starts_over_without_it(start, caplog, model, reason):
    ((_, *arguments),) = start(model, OPTIONS)
    assert arguments[:2] == ["-m", "vllm_ssd.drafter"]
    options = msgspec.json.decode(arguments[3], type=DrafterOptions)
    assert options == msgspec.structs.replace(OPTIONS, tree_attention=False)
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert reason in warning.getMessage() and "second line" not in warning.getMessage()


def test_a_model_that_cannot_draft_is_not_tried_twice(start):
    executed = start(Recurrent, OPTIONS)
    (refused,) = start.target.poll(20.0)
    assert refused == Refused("UnsupportedDraftModel: it cannot draft") and not executed


class Hanging(FakeDraftModel):
    """A kernel never ends, until the process becomes another."""

    started_over = threading.Event()

    def copy_slots(self, *copies) -> None:
        assert self.started_over.wait(20.0)
        sys.exit()  # this thread's end is that of the process


def test_a_kernel_that_hangs_is_done_without(start, monkeypatch, caplog):
    """The target waits for its drafter's start; it hears from the next one, not from `startup_timeout_s`."""
    monkeypatch.setattr(server, "TIME_LIMIT_S", 0.5)
    start_over = server._start_over

    def and_tell(*arguments) -> None:
        try:
            start_over(*arguments)
        except StartedOver:
            Hanging.started_over.set()

    monkeypatch.setattr(server, "_start_over", and_tell)
    (arguments,) = start(Hanging, OPTIONS)
    options = msgspec.json.decode(arguments[4], type=DrafterOptions)
    assert options == msgspec.structs.replace(OPTIONS, tree_attention=False)
    assert "TimeoutError: not done after 0.5 s" in caplog.text


class Uncapturable(FakeDraftModel):
    """As vLLM's attention when it cannot be captured after all."""

    def warm_up(self, sizes) -> int:
        raise RuntimeError("operation not permitted when stream is capturing")


def test_vllms_attention_that_cannot_be_captured_is_launched(start, caplog):
    without = msgspec.structs.replace(OPTIONS, tree_attention=False)
    executed = start(Uncapturable, without)
    start.thread.join()
    (arguments,) = executed
    options = msgspec.json.decode(arguments[4], type=DrafterOptions)
    assert options == msgspec.structs.replace(without, graphs=False)
    assert "does without CUDA graphs" in caplog.text


class NotImplementedHere(FakeDraftModel):
    """As a quantised model whose kernel lacks the dtype: it loads."""

    def forward(self, batch):
        raise NotImplementedError("not implemented for 'Float'")


def test_a_model_whose_forward_fails_is_refused_before_it_serves(start):
    """Otherwise it would die at each request, and start again for ever."""
    executed = start(NotImplementedHere, msgspec.structs.replace(OPTIONS, tree_attention=False, graphs=False))
    assert start.target.poll(20.0) == [Refused("NotImplementedError: not implemented for 'Float'")] and not executed


@pytest.mark.parametrize("model", [FakeDraftModel, Parallel])
def test_a_sound_drafter_keeps_its_attention(start, model):
    executed = start(model, OPTIONS)
    start.target.send(Hello(PROTOCOL_VERSION, FakePagedModel.vocab_size, 3, fingerprint(["a"])))
    (welcome,) = start.target.poll(20.0)
    assert isinstance(welcome, Welcome) and not executed


NAMES = [f"t{i}" for i in range(FakePagedModel.vocab_size)]


class Named(FakeDraftModel):
    """A draft model with a token string for every id."""

    def vocabulary(self) -> tuple[list[str], int]:
        return NAMES, 4


def answer(start, tokens: list[str], size: int, **options) -> Welcome | Refused:
    start(Named, msgspec.structs.replace(OPTIONS, tree_attention=False))
    start.target.send(Hello(PROTOCOL_VERSION, size, 3, fingerprint(tokens), tokens, **options))
    return start.target.poll(20.0)[0]


def test_a_target_with_other_tokens_is_refused_in_words(start):
    refused = answer(start, NAMES[::-1], 13)
    assert isinstance(refused, Refused) and "set heterogeneous_vocab: true" in refused.reason


def test_a_target_with_other_tokens_is_served_if_that_was_asked_for(start):
    """The drafter answers in the target's ids: of its own 13 tokens, the target of 30 has one, as its 20th."""
    tokens = [*map(str, range(20)), "t7"]
    welcome = answer(start, tokens, 30, heterogeneous_vocab=True)
    assert isinstance(welcome, Welcome) and "1 of the target's 21 tokens (4.8%)" in welcome.notice
    start.target.send(Step([Open("a", 1, pack_ids([20, 1, 29]), 0.7)], 3))
    outcomes, drafts = set(), set()
    while not drafts:
        for push in start.target.poll(20.0):
            for block in push.blocks:
                outcomes |= set(unpack_ids(block.outcomes)[1::2].tolist())
                drafts |= set(unpack_ids(block.draft_token_ids).tolist())
            assert set(unpack_ids(push.q_token_ids).tolist()) <= {20} and bool(push.blocks) == bool(push.q_token_ids)
    assert outcomes == drafts == {20}


def test_without_a_tokenizer_it_is_said_that_none_was_compared(start, caplog):
    welcome = answer(start, [], 13)
    assert isinstance(welcome, Welcome) and not welcome.notice
    assert "were not compared" in caplog.text


def test_what_fails_without_it_too_is_the_reason_given(start):
    executed = start(Unsupported, msgspec.structs.replace(OPTIONS, tree_attention=False))
    (refused,) = start.target.poll(20.0)
    assert refused == Refused("ValueError: no such model") and not executed


def test_tokens_for_loading_are_gone_when_it_serves(start, monkeypatch):
    """A drafter that starts over loads again, and gets them again; one that serves has none."""
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN")
    seen: dict[str, list[str]] = {}
    for name in names:
        monkeypatch.setenv(name, "hf_x")

    class Asks(FakeDraftModel):
        def __init__(self, **arguments) -> None:
            seen["loading"] = [name for name in names if name in os.environ]
            super().__init__(**arguments)

    def serve(transport, engine) -> None:
        seen["serving"] = [name for name in names if name in os.environ]

    monkeypatch.setattr(server, "serve", serve)
    start(Asks, msgspec.structs.replace(OPTIONS, tree_attention=False))
    start.target.send(Hello(PROTOCOL_VERSION, FakePagedModel.vocab_size, 3, fingerprint(["a"])))
    start.thread.join(20)
    assert seen == {"loading": [*names], "serving": []}
    environments: list[dict[str, str]] = []
    monkeypatch.setattr(server.os, "execve", lambda path, arguments, environment: environments.append(environment))
    monkeypatch.setattr(server.os, "set_inheritable", lambda fd, inheritable: None)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    server._start_over(0, OPTIONS, dict(os.environ), ValueError("x"))
    assert environments[0]["HF_TOKEN"] == "hf_x"


@pytest.mark.parametrize("saguaro_c", [1.0, 0.5])
def test_steps_are_captured_once(start, monkeypatch, saguaro_c):
    """What the drafter checks before the handshake is what it serves with: a capture takes a GPU some 20 ms."""
    captured: list[int] = []

    class Counting(CalledSteps):
        def __init__(self) -> None:
            captured.append(0)

        def capture(self, step):
            captured[-1] += 1
            return step

    monkeypatch.setattr(device_steps, "graphs_on", lambda device: Counting())
    start(FakeDraftModel, msgspec.structs.replace(OPTIONS, saguaro_c=saguaro_c))
    start.target.send(Hello(PROTOCOL_VERSION, FakePagedModel.vocab_size, 3, fingerprint(["a"])))
    assert isinstance(start.target.poll(20.0)[0], Welcome)
    start.target.send(Step([Open("a", 1, pack_ids([1, 2, 3]), 0.7)], 3))
    while not (push := start.target.poll(20.0)[0]).blocks:
        pass
    assert push.support == OPTIONS.top_m
    *checked, served = captured
    assert served == len(Buckets(2, 8 + 1 + 3 + 1, max_rows(FakePagedModel.vocab_size, torch.float32)).all) > 3
    assert len(checked) == (saguaro_c != 1.0) and sum(checked) < served, "the check alone captures what it runs"
