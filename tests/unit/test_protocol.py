"""Every message survives its encoding, and everything else is a ProtocolError."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.link.protocol import (
    MAX_ALLOWED_ID,
    MAX_BIASED,
    PROTOCOL_VERSION,
    Bias,
    Close,
    DrafterStats,
    Evicted,
    Hello,
    Open,
    Outcome,
    ProtocolError,
    Push,
    Refused,
    SpeculationBlock,
    Step,
    Truncation,
    Welcome,
    decode_to_drafter,
    decode_to_target,
    encode,
    fingerprint,
    pack_bias,
    pack_ids,
    unpack_ids,
)

COUNT = st.integers(0, 2**48)
TOKEN_ID = st.integers(0, 2**31 - 1)
TOKEN_IDS = st.lists(TOKEN_ID, max_size=8)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
DATA = st.binary(max_size=40)
FLOAT = st.floats(0, allow_nan=False)

EVENT = (
    st.builds(Open, TEXT, COUNT, TOKEN_IDS.map(pack_ids), FLOAT)
    | st.builds(Outcome, TEXT, COUNT, COUNT, TOKEN_IDS, TOKEN_IDS, COUNT)
    | st.builds(Close, TEXT)
)
BLOCK = st.builds(SpeculationBlock, TEXT, COUNT, COUNT, COUNT, DATA, DATA, st.booleans())
STATS = st.builds(DrafterStats, COUNT, COUNT, FLOAT, COUNT, COUNT)
TO_DRAFTER = st.builds(Hello, COUNT, COUNT, COUNT, TEXT) | st.builds(Step, st.lists(EVENT, max_size=5), COUNT)
TO_TARGET = (
    st.builds(Welcome, COUNT, COUNT, TEXT, COUNT, COUNT, COUNT)
    | st.builds(Refused, TEXT)
    | st.builds(
        Push,
        st.lists(BLOCK, max_size=3),
        st.lists(st.builds(Evicted, TEXT, COUNT), max_size=3),
        st.none() | STATS,
        COUNT,
        DATA,
        DATA,
    )
)
BOTH_WAYS = [pytest.param(decode_to_drafter, id="to drafter"), pytest.param(decode_to_target, id="to target")]

STEP = Step([Open("a", 1, pack_ids([1, 2]), 0.7), Outcome("b", 0, 9, [4], [5, 6]), Close("c")], 5)
PUSH = Push(
    [SpeculationBlock("a", 1, 9, 0, pack_ids([2, 77]), pack_ids([1, 2]))],
    [Evicted("b", 0)],
    DrafterStats(1, 2, 0.5, 3, 4),
)


@given(TO_DRAFTER)
def test_messages_to_the_drafter_round_trip(message):
    assert decode_to_drafter(encode(message)) == message


@given(TO_TARGET)
def test_messages_to_the_target_round_trip(message):
    assert decode_to_target(encode(message)) == message


def test_types_survive_and_optional_fields_default():
    step = decode_to_drafter(encode(STEP))
    assert [type(event) for event in step.events] == [Open, Outcome, Close]
    assert step.events[1].jit == 0
    (block,) = decode_to_target(encode(PUSH)).blocks
    assert (block.num_branches, block.find(2, 77), block.drafts(0)) == (1, 0, [1, 2])
    assert not block.sampled and PUSH.support == 0 and PUSH.q_token_ids == PUSH.q_probs == b""


@pytest.mark.parametrize("decode", BOTH_WAYS)
@given(data=st.binary(max_size=200))
def test_noise_is_a_protocol_error_or_a_message(decode, data):
    try:
        message = decode(data)
    except ProtocolError:
        return
    assert decode(encode(message)) == message


@given(st.data())
def test_damaged_messages_raise_nothing_but_protocol_errors(draw):
    decode, message = draw.draw(st.sampled_from([(decode_to_drafter, STEP), (decode_to_target, PUSH)]))
    data = bytearray(encode(message))
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        decode(data)
    except ProtocolError:
        pass


@pytest.mark.parametrize(("decode", "message"), [(decode_to_drafter, STEP), (decode_to_target, PUSH)])
def test_truncated_and_overlong_messages_are_refused(decode, message):
    data = encode(message)
    for wrong in [*(data[:length] for length in range(len(data))), data + b"\0", data + data]:
        with pytest.raises(ProtocolError):
            decode(wrong)


def opening(truncation: Truncation) -> bytes:
    return encode(Step([Open("a", 0, pack_ids([1]), 1.0, truncation)], 5))


def test_the_largest_bias_is_a_message():
    bias = pack_bias([MAX_ALLOWED_ID - 1], dict.fromkeys(range(MAX_BIASED), 1.0))
    decode_to_drafter(opening(Truncation(bias=bias)))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(encode(PUSH), id="other direction"),
        pytest.param(msgspec.msgpack.encode([99, "x"]), id="unknown tag"),
        pytest.param(msgspec.msgpack.encode([1, [[2, 7]], 5]), id="wrong field type"),
        pytest.param(msgspec.msgpack.encode([1, [[1, "a", 0, 9, [-1], []]], 5]), id="negative token id"),
        pytest.param(msgspec.msgpack.encode([1, [[1, "a", 0, 9, [2**31], []]], 5]), id="token id over int32"),
        pytest.param(msgspec.msgpack.encode([1, [], -1]), id="negative count"),
        pytest.param(msgspec.msgpack.encode([1, [], 2**53]), id="count that floats do not hold"),
        pytest.param(encode(Step([Open("a", 0, pack_ids([1]), float("nan"))], 5)), id="temperature of NaN"),
        pytest.param(encode(Step([Open("a", 0, pack_ids([1]), -0.5)], 5)), id="negative temperature"),
        pytest.param(encode(Step([Open("a", 0, pack_ids([1, -1]), 0.0)], 5)), id="negative id in a prompt"),
        pytest.param(opening(Truncation(bias=Bias(bytes(MAX_ALLOWED_ID // 8 + 1)))), id="bits of more ids than any"),
        pytest.param(opening(Truncation(bias=Bias(b"", *2 * [bytes(4 * MAX_BIASED + 4)]))), id="too many biases"),
        pytest.param(b"\x93\x01\x91\x92\x02\xa2\xff\xfe\x05", id="invalid UTF-8"),
        pytest.param(b"\x93\x01\xdd\xff\xff\xff\xff", id="four billion events announced"),
        pytest.param(b"\x94\x01\x90\x05" + b"\x91" * 100_000, id="nested too deeply"),
    ],
)
def test_malformed_bytes_are_refused(data):
    with pytest.raises(ProtocolError, match="not a message"):
        decode_to_drafter(data)


def test_a_hello_of_a_later_version_can_be_read():
    later = msgspec.msgpack.encode([0, PROTOCOL_VERSION + 1, 100, 5, "f", ["a"], True, 8, 24, 64, {"new": "field"}])
    assert decode_to_drafter(later) == Hello(PROTOCOL_VERSION + 1, 100, 5, "f", ["a"], True, 8, 24, 64)


def test_a_decoded_message_does_not_share_the_buffer_it_was_read_from():
    buffer = bytearray(encode(STEP))
    step = decode_to_drafter(memoryview(buffer))
    buffer[:] = bytes(len(buffer))
    assert step == STEP


@given(TOKEN_IDS)
def test_token_ids_round_trip(token_ids):
    packed = pack_ids(token_ids)
    assert packed == pack_ids(np.array(token_ids, dtype=np.int64)) == np.array(token_ids, "<i4").tobytes()
    assert unpack_ids(packed).dtype == np.int32
    assert unpack_ids(packed).tolist() == token_ids


def test_token_ids_are_packed_row_by_row_and_whole():
    assert unpack_ids(pack_ids(np.arange(6).reshape(2, 3).T)).tolist() == [0, 3, 1, 4, 2, 5]
    with pytest.raises(ProtocolError, match="7 bytes"):
        unpack_ids(bytes(7))


def test_fingerprint_depends_on_the_vocabulary_and_nothing_else():
    tokens = ["a", "b", "é\n", ""]
    expected = fingerprint(tokens)
    assert len(expected) == 16
    assert set(expected) <= set("0123456789abcdef")
    assert fingerprint(list(tokens)) == expected
    for other in (["b", "a", *tokens[2:]], [*tokens, "c"], ["a"], [*tokens[:3], "\x00"], [*tokens, ""]):
        assert fingerprint(other) != expected
    assert fingerprint([]) == "", "nothing to compare"


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 3)), unique=True, max_size=20), st.integers(1, 3))
def test_a_block_finds_the_branch_of_an_outcome(outcomes, depth):
    drafts = np.arange(len(outcomes) * depth).reshape(len(outcomes), depth)
    block = SpeculationBlock("a", 0, 1, 0, pack_ids(outcomes), pack_ids(drafts))
    for accept_length in range(4):
        for bonus in range(-1, 4):
            branch = block.find(accept_length, bonus)
            if (accept_length, bonus) in outcomes:
                assert branch == outcomes.index((accept_length, bonus))
                assert block.drafts(branch) == drafts[branch].tolist()
            else:
                assert branch == -1


def test_a_push_carries_the_proposal_of_every_sampled_draft():
    outcomes = pack_ids([[0, 5], [1, 6]])
    deep, shallow = pack_ids([[1, 2, 3], [4, 5, 6]]), pack_ids([[1], [4]])
    greedy = SpeculationBlock("g", 0, 1, 0, outcomes, deep)
    sampled = [
        SpeculationBlock(name, 0, 1, 0, outcomes, drafts, True) for name, drafts in (("a", deep), ("b", shallow))
    ]
    ids = np.arange(8 * 4, dtype="<i4").reshape(8, 4)
    probs = ids.astype("<f4") / 10
    push = Push([greedy, sampled[0], greedy, sampled[1]], [], None, 4, pack_ids(ids), probs.tobytes())
    proposals = [[pushed.proposals(branch) for branch in range(2)] for pushed in push.each()]
    assert proposals[0] == proposals[2] == [[None] * 3] * 2
    found = [proposal for of_block in proposals[1::2] for of_branch in of_block for proposal in of_branch]
    assert len(found) == 8
    for (q_ids, q_probs), expected_ids, expected_probs in zip(found, ids, probs):
        assert np.array_equal(q_ids, expected_ids) and np.array_equal(q_probs, expected_probs)
