"""A drafter that shakes hands and then sends what no sound drafter sends: `python -m hostile_drafter FD OPTIONS`.

VLLM_SSD_HOSTILE names what it does, VLLM_SSD_HOSTILE_ONCE a file: once it exists, the drafter is a sound one.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from vllm_ssd.link.options import DrafterOptions
from vllm_ssd.link.protocol import (
    JIT_TOKEN,
    PROTOCOL_VERSION,
    DrafterStats,
    Evicted,
    Hello,
    Push,
    SpeculationBlock,
    Step,
    Welcome,
    encode,
    pack_ids,
)
from vllm_ssd.link.transport import ProcessTransport

VOCAB_SIZE, K, TOP_M = 100, 3, 4
OUTCOMES = [[0, 1], [1, 2]]
DRAFTS = [[3, 4, 5], [6, 7, 8]]


def block(**changes) -> SpeculationBlock:
    """A sound block of two branches of K greedy drafts, with fields replaced by token ids or bytes."""
    fields = {"outcomes": OUTCOMES, "draft_token_ids": DRAFTS} | changes
    packed = {
        name: value if isinstance(value, (str, int, bytes)) else pack_ids(value) for name, value in fields.items()
    }
    return SpeculationBlock(**{"request_id": "a", "epoch": 1, "length": 9, "offset": 0} | packed)


class Sampled(NamedTuple):
    """A block and the proposals of its drafts."""

    block: SpeculationBlock
    q_token_ids: bytes
    q_probs: bytes
    support: int


def sampled(
    probs: Sequence[float] = (0.4, 0.3, 0.2, 0.1),
    ids: list[int] | None = None,
    q_token_ids: list[list[int]] | None = None,
    **changes,
) -> Sampled:
    """A sound block whose drafts carry a q of `probs`: over themselves and three others, over `ids`, draft first, or
    over `q_token_ids`, of all drafts."""
    drafts = np.ravel(changes.get("draft_token_ids", DRAFTS))
    if q_token_ids is None:
        q_token_ids = [sorted(ids or [draft, 90, 91, 92], key=lambda token: token != draft) for draft in drafts]
    q_probs = np.tile(np.asarray(probs, "<f4"), (len(drafts), 1)).tobytes()
    return Sampled(block(sampled=True, **changes), pack_ids(q_token_ids), q_probs, len(probs))


def push(*blocks: SpeculationBlock | Sampled, stats: DrafterStats | None = None, **changes) -> bytes:
    """The blocks with their proposals, whose fields are replaced by `changes`."""
    with_q = [each for each in blocks if isinstance(each, Sampled)]
    proposals = {
        "support": with_q[0].support if with_q else 0,
        "q_token_ids": b"".join(each.q_token_ids for each in with_q),
        "q_probs": b"".join(each.q_probs for each in with_q),
    }
    plain = [each.block if isinstance(each, Sampled) else each for each in blocks]
    return encode(Push(plain, [], stats, **proposals | changes))


SOUND = {
    "greedy": push(block()),
    "sampled": push(sampled()),
    "a q with zeros": push(sampled([0.5, 0.5, 0.0, 0.0])),
    "just in time": push(block(outcomes=[[0, JIT_TOKEN]], draft_token_ids=[[1, 2, 3]])),
    "a deeper part": push(block(offset=2, draft_token_ids=[[3], [6]])),
    "sampled and greedy blocks": push(sampled(), block(), sampled(draft_token_ids=[[3], [4]]), block()),
    "other requests, lengths, epochs": push(block(request_id="nobody"), block(length=10**9), block(epoch=99)),
    "evictions": encode(Push([], [Evicted("nobody", 3)] * 500, None)),
}
"""Pushes that the target's checks let through; those for others are dropped where requests are known."""

UNSOUND = {
    "drafts beyond the vocabulary": push(block(draft_token_ids=[[3, 4, VOCAB_SIZE], [6, 7, 8]])),
    "negative drafts": push(block(draft_token_ids=[[3, 4, -5], [6, 7, 8]])),
    "a bonus token beyond the vocabulary": push(block(outcomes=[[0, 1], [1, VOCAB_SIZE]])),
    "a negative bonus token": push(block(outcomes=[[0, -2], [1, 2]])),
    "just in time after a draft": push(block(outcomes=[[0, 1], [1, JIT_TOKEN]])),
    "an accept length over K": push(block(outcomes=[[0, 1], [K + 1, 2]])),
    "a negative accept length": push(block(outcomes=[[0, 1], [-1, 2]])),
    "an offset that is too deep": push(block(offset=1)),
    "an offset of 2**52": push(block(offset=2**52)),
    "too many drafts": push(block(draft_token_ids=[[3, 4, 5, 6], [6, 7, 8, 9]])),
    "too many branches": push(block(outcomes=[[0, 1]] * 14, draft_token_ids=[[1]] * 14)),
    "too many blocks": push(*[block()] * 200),
    "no branches": push(block(outcomes=b"")),
    "half an outcome": push(block(outcomes=b"\0" * 12)),
    "arrays of different lengths": push(block(draft_token_ids=[3, 4, 5, 6, 7])),
    "q without probabilities": push(sampled(), q_probs=b""),
    "probabilities without ids": push(sampled(), q_token_ids=b""),
    "drafts without their q": push(sampled(), support=0, q_token_ids=b"", q_probs=b""),
    "more q than drafts": push(sampled(), q_token_ids=b"\0" * 112, q_probs=b"\0" * 112),
    "a q for nobody": push(block(), support=1, q_token_ids=b"\0" * 4, q_probs=b"\0\0\x80\x3f"),
    "half a probability": push(sampled(), q_token_ids=b"\0" * 94, q_probs=b"\0" * 94),
    "two widths of q": push(sampled(), sampled([0.6, 0.4], [3, 4], draft_token_ids=[[3], [4]])),
    "a width of 2**52": push(sampled(), support=2**52),
    "a q that is too wide": push(sampled([0.1] * 10, list(range(10)))),
    "q over ids beyond the vocabulary": push(sampled(ids=[3, 4, 5, VOCAB_SIZE], draft_token_ids=[[3], [3]])),
    "q over negative ids": push(sampled(ids=[3, 4, 5, -7], draft_token_ids=[[3], [3]])),
    "a q of NaN": push(sampled([0.4, float("nan"), 0.2, 0.1])),
    "an infinite q": push(sampled([0.4, float("inf"), 0.2, 0.1])),
    "a negative q": push(sampled([0.4, -0.1, 0.2, 0.1])),
    "a q that sums to 2": push(sampled([0.8, 0.6, 0.4, 0.2])),
    "a q of zeros": push(sampled([0.0, 0.0, 0.0, 0.0])),
    "a q that does not hold its draft": push(sampled(ids=[50, 51, 52, 53])),
    "a q that holds its draft later": push(
        sampled([0.5, 0.5], q_token_ids=[[3, 9], [4, 9], [5, 9], [6, 9], [9, 7], [8, 9]])
    ),
    "q that sum to NaN": push(sampled([0.4, float("inf"), -float("inf"), 0.1])),
    "a q whose sum a negative one brings down to 1": push(sampled([0.9, 0.9, -0.8, 0.0])),
    "a q that gives its draft nothing": push(sampled([0.0, 0.5, 0.3, 0.2])),
    "one bad q of many": push(sampled(), sampled(), sampled([0.4, float("nan"), 0.2, 0.1])),
    "statistics of NaN": push(stats=DrafterStats(1, 2, float("nan"), 3, 4)),
    "infinite statistics": push(stats=DrafterStats(1, 2, float("inf"), 3, 4)),
    "negative statistics": push(stats=DrafterStats(-1, 2, 1.0, 3, 4)),
    "more free pages than pages": push(stats=DrafterStats(3, 2, 1.0, 3, 4)),
    "noise": b"\x13\x37" * 50,
    "an empty message": b"",
    "a second welcome": encode(Welcome(1, VOCAB_SIZE, "", 100, 10, 16)),
    "a message of the target's": encode(Step([], 3)),
    "four billion blocks announced": b"\x94\x02\xdd\xff\xff\xff\xff",
}
"""Whole messages that lose a drafter its link."""


def framed(message: bytes) -> bytes:
    return len(message).to_bytes(4, "little") + message


def send_all(sock: socket.socket, data: bytes) -> None:
    sock.setblocking(True)
    sock.sendall(data)


def act(transport: ProcessTransport, what: str) -> None:
    """Send something; what is not one message is acted out here."""
    sock = transport._socket
    match what:
        case "a header that asks for gigabytes":
            send_all(sock, (2**32 - 1).to_bytes(4, "little"))
        case "a header that asks for as much as any message may have":
            send_all(sock, (256 << 20).to_bytes(4, "little"))
        case "a truncated frame":
            send_all(sock, framed(SOUND["greedy"])[:-3])
            os._exit(0)
        case "silence in the middle of a frame":
            send_all(sock, framed(SOUND["greedy"])[:-3])
        case "a byte now and then":
            for byte in framed(SOUND["greedy"] * 10_000):
                send_all(sock, bytes([byte]))
                time.sleep(0.05)
        case "a flood of small messages":
            while True:
                send_all(sock, framed(encode(Push([], [], None))) * 10_000)
        case "a flood of blocks":
            while True:
                send_all(sock, framed(push(*[sampled()] * 50)) * 100)
        case _:
            send_all(sock, framed((UNSOUND | SOUND)[what]))


ACTED = (
    "a header that asks for gigabytes",
    "a header that asks for as much as any message may have",
    "a truncated frame",
    "silence in the middle of a frame",
    "a byte now and then",
    "a flood of small messages",
    "a flood of blocks",
)


def main(fd: int, options: DrafterOptions) -> None:
    """Shake hands and wait for the first step; then be hostile, the first time that this is started."""
    transport = ProcessTransport.from_fd(fd, "drafter")
    (hello,) = transport.poll(None)
    assert isinstance(hello, Hello)
    transport.send(Welcome(PROTOCOL_VERSION, hello.vocab_size, hello.tokenizer, 100, 10, 16))
    marker = Path(os.environ["VLLM_SSD_HOSTILE_ONCE"])
    is_sound = marker.exists()
    marker.touch()
    while True:
        for _ in transport.poll(None):
            if not is_sound:
                act(transport, os.environ["VLLM_SSD_HOSTILE"])
                time.sleep(100)
            transport.send(Push([], [], DrafterStats(1, 2, 0.5, 3, 4)))


if __name__ == "__main__":
    main(int(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=DrafterOptions))
