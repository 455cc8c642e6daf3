"""One hostile drafter after another: `python -m hostile_drafters FD OPTIONS`, each start a line of VLLM_SSD_HOSTILE.

When all lines of that file are used up, the drafter is the real one.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import fork_server
import msgspec
import numpy as np
from hostile_drafter import UNSOUND, Sampled, act, block, framed, push, sampled, send_all

from vllm_ssd.link.options import DrafterOptions
from vllm_ssd.link.protocol import JIT_TOKEN, PROTOCOL_VERSION, Hello, Open, Outcome, SpeculationBlock, Step, Welcome
from vllm_ssd.link.transport import ProcessTransport

Content = Callable[[int, int], dict]
"""From the target's vocabulary and K to the fields of a block of one branch."""

AIMED: dict[str, Content] = {
    "drafts beyond the vocabulary": lambda v, k: {"draft_token_ids": [[v] * k]},
    "negative drafts": lambda v, k: {"draft_token_ids": [[-1] * k]},
    "a q over ids beyond the vocabulary": lambda v, k: with_q(k, [0.5, 0.5], [5, v]),
    "a q of NaN": lambda v, k: with_q(k, [0.5, float("nan")], [5, 6]),
    "an infinite q": lambda v, k: with_q(k, [0.5, float("inf")], [5, 6]),
    "a negative q": lambda v, k: with_q(k, [0.5, -0.5], [5, 6]),
    "a q that does not hold its draft": lambda v, k: with_q(k, [0.5, 0.5], [6, 7]),
}
"""Blocks for the requests and rounds that the target has just named, for every outcome that is likely and the one that
waits: a target that did not look would use them at once."""


def with_q(num_drafts: int, probs: list[float], ids: list[int]) -> dict:
    return {"draft_token_ids": [[5] * num_drafts], "probs": probs, "ids": ids}


def aimed(event: Open | Outcome, content: dict, max_branches: int) -> list[SpeculationBlock | Sampled]:
    """Blocks of one branch each: the just-in-time one, and the smallest bonus tokens after no draft."""
    length = event.length if isinstance(event, Outcome) else len(event.token_ids) // 4
    where = {"request_id": event.request_id, "epoch": event.epoch, "length": length}
    tokens = [JIT_TOKEN, *range(max_branches - 1)]
    make = sampled if "probs" in content else block
    return [make(**where, outcomes=[[0, token]], **content) for token in tokens]


def be_real(fd: int) -> NoReturn:
    """Be vllm-ssd's drafter, or the parent of one that is forked."""
    if (address := os.environ.get(fork_server.ADDRESS)) is None:
        os.execv(sys.executable, [sys.executable, "-m", "vllm_ssd.drafter", *sys.argv[1:]])
    drafter = fork_server.fork(address, "drafter", sys.argv[2:], fd, os.environ)
    os.close(fd)
    sys.exit(drafter.wait())


def main(fd: int, options: DrafterOptions) -> None:
    """Shake hands, then answer every step as the first unused line says."""
    path = Path(os.environ["VLLM_SSD_HOSTILE"])
    ways = path.read_text().splitlines()
    if not ways:
        be_real(fd)
    path.write_text("\n".join(ways[1:]))
    transport = ProcessTransport.from_fd(fd, "drafter")
    (hello,) = transport.poll(None)
    assert isinstance(hello, Hello)
    transport.send(Welcome(PROTOCOL_VERSION, hello.vocab_size, hello.tokenizer, 512, 100, 32))
    while True:
        for step in transport.poll(None):
            assert isinstance(step, Step)
            if ways[0] not in AIMED:
                act(transport, ways[0])
                time.sleep(100)
            content = AIMED[ways[0]](hello.vocab_size, hello.num_speculative_tokens)
            for event in step.events:
                if isinstance(event, Open | Outcome):
                    send_all(transport._socket, framed(push(*aimed(event, content, options.max_branches))))


WAYS = [*AIMED, "noise", "a header that asks for gigabytes", "a truncated frame", "silence in the middle of a frame"]
WAYS += ["a flood of small messages", "too many blocks"]
assert {"noise", "too many blocks"} <= UNSOUND.keys()

if __name__ == "__main__":
    np.seterr(all="ignore")
    main(int(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=DrafterOptions))
