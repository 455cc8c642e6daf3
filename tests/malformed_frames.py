"""What no sound target says to a drafter: bytes, each of which ends its connection."""

from __future__ import annotations

import random
from typing import NamedTuple

import msgspec

from vllm_ssd.link.protocol import Hello, Open, Outcome, ProtocolError, Step, decode_to_drafter, encode, pack_ids
from vllm_ssd.link.transport import MAX_MESSAGE_BYTES, PREFIX_BYTES

STEP = Step([Open("x", 1, pack_ids([1, 2, 3]), 0.7), Outcome("x", 1, 4, [5], [2, 2])], 3)


class Malformed(NamedTuple):
    """A frame; whether the drafter can tell what it is, or the target must end the connection in the middle of it."""

    data: bytes
    is_whole: bool


def frame(message: bytes) -> bytes:
    """A message as it travels."""
    return len(message).to_bytes(PREFIX_BYTES, "little") + message


def is_message(data: bytes) -> bool:
    """Whether a drafter can read it."""
    try:
        decode_to_drafter(memoryview(data))
    except ProtocolError:
        return False
    return True


def noise(rng: random.Random) -> bytes:
    """Bytes at random."""
    while is_message(data := rng.randbytes(rng.choice([0, 1, 30, 3000]))):
        pass
    return data


def mutant(rng: random.Random, sound: bytes) -> bytes:
    """A sound message with bytes changed, cut out or put in, until it is none."""
    data = bytearray(sound)
    while is_message(bytes(data)):
        at = rng.randrange(len(data) + 1)
        data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(4))
    return bytes(data)


def malformed(rng: random.Random, hello: Hello, welcomed: bool) -> Malformed:
    """One frame, for a connection whose Hello was or was not answered."""
    kind = rng.randrange(5)
    if kind == 0:
        return Malformed(frame(noise(rng)), True)
    if kind == 1:
        return Malformed(frame(mutant(rng, encode(STEP if welcomed else hello))), True)
    if kind == 2:  # of the wrong kind
        return Malformed(frame(encode(hello if welcomed else STEP)), True)
    if kind == 3:
        size = rng.randrange(MAX_MESSAGE_BYTES + 1, 1 << 32)
        return Malformed(size.to_bytes(PREFIX_BYTES, "little") + rng.randbytes(30), True)
    message = encode(msgspec.structs.replace(hello, tokenizer="t" * 2000))
    return Malformed(frame(message)[: rng.randrange(1, len(message))], False)
