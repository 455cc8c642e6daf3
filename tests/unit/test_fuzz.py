"""Both ends of the link against bytes that no sound other end would send."""

from __future__ import annotations

import os
import threading

import msgspec
from engine_target import K, check_conservation, engine_of
from fake_model import FakePagedModel
from hypothesis import given, settings
from hypothesis import strategies as st
from test_protocol import PUSH, TO_DRAFTER, TO_TARGET

from vllm_ssd.drafter import server
from vllm_ssd.link.checks import PushChecker, max_push_bytes
from vllm_ssd.link.options import DrafterOptions
from vllm_ssd.link.protocol import Open, Outcome, Push, Step, encode, pack_ids
from vllm_ssd.link.transport import PREFIX_BYTES, ProcessTransport, TransportClosed, socket_pair

OPTIONS = DrafterOptions(
    engine_args={},
    num_speculative_tokens=K,
    fan_out=2,
    branch_budget=None,
    max_num_seqs=4,
    max_branches=8,
    top_m=5,
    cpus=[],
    parent_pid=os.getpid(),
)
SOUND = Step([Open("a", 1, pack_ids([1, 2, 3]), 0.0), Outcome("a", 1, 4, [5], [2, 2])], K)


def frame(message: bytes) -> bytes:
    return len(message).to_bytes(PREFIX_BYTES, "little") + message


@st.composite
def mutated(draw: st.DrawFn, messages: st.SearchStrategy) -> bytes:
    """A frame of one message with bytes changed, cut off or put in."""
    data = bytearray(frame(encode(draw(messages))))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=3))
    return bytes(data)


@settings(max_examples=40, derandomize=True)
@given(parts=st.lists(mutated(TO_DRAFTER) | st.binary(max_size=20), max_size=6))
def test_a_drafter_ends_at_worst_with_its_link(parts):
    """Whatever a target sends, the serving loop ends because the link does, with all pages accounted for."""
    engine = engine_of(FakePagedModel(40), max_num_seqs=2)
    target, child = socket_pair()
    drafter = ProcessTransport.from_fd(child.detach(), "drafter")
    raised: list[BaseException] = []

    def serve() -> None:
        try:
            server.serve(drafter, engine)
        except BaseException as error:
            raised.append(error)
        finally:
            drafter.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    target.send(SOUND)
    for part in parts:
        try:
            target._socket.sendall(part)
        except OSError:  # it has closed the link already
            break
    target.close()
    thread.join(20)
    assert not thread.is_alive()
    assert [type(error) for error in raised] == [TransportClosed], raised
    check_conservation(engine)


def sound_push(data: st.DataObject) -> Push:
    branches = data.draw(st.integers(1, 8))
    depth = data.draw(st.integers(1, K))
    ids = st.integers(-1, FakePagedModel.vocab_size)
    outcomes = [[data.draw(st.integers(-1, K + 1)), data.draw(ids)] for _ in range(branches)]
    drafts = [[data.draw(ids) for _ in range(depth)] for _ in range(branches)]
    arrays = {"outcomes": pack_ids(outcomes), "draft_token_ids": pack_ids(drafts)}
    block = msgspec.structs.replace(PUSH.blocks[0], offset=data.draw(st.integers(0, K)), **arrays)
    return msgspec.structs.replace(PUSH, blocks=[block])


@settings(max_examples=80, derandomize=True)
@given(parts=st.lists(mutated(TO_TARGET) | st.binary(max_size=20), max_size=6))
def test_a_target_s_end_only_ever_closes(parts):
    """Whatever a drafter sends, polling gives messages or says that the link is closed."""
    target, child = socket_pair(max_push_bytes(OPTIONS))
    checker = PushChecker.of(OPTIONS, FakePagedModel.vocab_size)
    with child:
        for part in parts:
            child.sendall(part)
    closed = False
    for _ in range(len(parts) + 2):
        try:
            for message in target.poll():
                if isinstance(message, Push):
                    reason = checker.reason(message)
                    assert reason is None or isinstance(reason, str)
        except TransportClosed:
            closed = True
            break
    assert closed
    target.close()


@settings(max_examples=80, derandomize=True)
@given(data=st.data())
def test_what_passes_the_checks_holds_only_tokens_of_the_vocabulary(data):
    push = sound_push(data)
    if PushChecker.of(OPTIONS, FakePagedModel.vocab_size).reason(push) is not None:
        return
    (block,) = push.blocks
    for branch in range(block.num_branches):
        assert all(0 <= token < FakePagedModel.vocab_size for token in block.drafts(branch))
        assert len(block.drafts(branch)) + block.offset <= K


def test_no_reason_that_is_logged_names_a_token():
    """A drafter that is lost is logged with the reason; token ids are text."""
    checker = PushChecker.of(OPTIONS, FakePagedModel.vocab_size)
    block = msgspec.structs.replace(PUSH.blocks[0], outcomes=pack_ids([0, 1]), draft_token_ids=pack_ids([987654321]))
    reason = checker.reason(msgspec.structs.replace(PUSH, blocks=[block]))
    assert reason and "987654321" not in reason
