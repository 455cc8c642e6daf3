"""Measure what the courier of vLLM's V2 runner costs the target's process: thread CPU time a round, by rows.

    python scripts/bench_courier.py [--out courier.json]

A drafter's pushes are encoded beforehand and come through a socket, as they do while serving: a tree that is whole in
time in one push, one that may be late in as many as K is deep; both are measured. The courier receives, decodes and
checks them, notes them, copies their proposals into memory that it has (PyTorch keeps pinned memory), launches the
stores, takes the round's outcomes and tells the drafter. What the device does is left out, and each operation that a
GPU would be sent counts as `--launch-us`.
"""

import argparse
import json
import logging
import select
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from bench_report import environment
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_ssd.config import SSDConfig
from vllm_ssd.kernels import OUTCOME_COLUMNS, blocks
from vllm_ssd.link.checks import PushChecker
from vllm_ssd.link.fleet import Fleet
from vllm_ssd.link.protocol import Push, SpeculationBlock, Step, pack_ids
from vllm_ssd.link.transport import MAX_MESSAGE_BYTES, ProcessTransport
from vllm_ssd.target.metrics import Metrics
from vllm_ssd.target.v2.courier import Courier
from vllm_ssd.target.v2.lookup_cache import SpeculationCache

VOCAB_SIZE = 151_936
PROMPT = 512
GOALS_MS = {64: 2.0, 256: 8.0}
"""Thread CPU time a round, by rows."""
HIT = 2


@dataclass
class Clock:
    """Thread CPU seconds by part of the work."""

    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, part: str, function: Any) -> Any:
        """`function`, its thread CPU time added to `part`."""

        def call(*args):
            before = time.thread_time()
            try:
                return function(*args)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.thread_time() - before

        return call


class Link:
    """The target's end of a socket whose messages are checked, as in `link.process`."""

    generation, connected, leaving, max_model_len = 1, True, False, 1 << 20

    def __init__(self, transport: ProcessTransport, checker: PushChecker, clock: Clock) -> None:
        self._transport = transport
        self._receive = clock.timed("receive", transport.poll)
        self._check = clock.timed("check", checker.reason)
        self.sent: list[Step] = []

    def poll(self, timeout_s: float = 0.0) -> list[Push]:
        """What has arrived."""
        pushes = self._receive(timeout_s)
        for push in pushes:
            reason = self._check(push)
            if reason is not None:
                raise ValueError(reason)
        return pushes

    def send(self, step: Step) -> None:
        """Through the socket, as it is."""
        self.sent.append(step)
        self._transport.send(step)

    suspect = False
    settled = True

    def descriptor(self) -> int:
        """Nobody sleeps: the work is called by hand."""
        return -1

    def wait_until_ready(self) -> None:
        """It is."""

    def close(self) -> None:
        """Nothing to end."""


def tree(rng: np.random.Generator, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Outcomes, drafts and proposals of one request's branches."""
    n, k, m = args.branches, args.drafts, args.top_m
    outcomes = np.stack([np.arange(n) % (k + 1), 100 + np.arange(n)], 1)
    q_token_ids = rng.integers(0, VOCAB_SIZE, (n, k, m))
    q_probs = rng.random((n, k, m)).astype(np.float32)
    q_probs /= q_probs.sum(2, keepdims=True) * (1 + 1e-6)
    return {
        "outcomes": outcomes,
        "drafts": q_token_ids[:, :, 0],
        "q_token_ids": q_token_ids,
        "q_probs": q_probs,
    }


def pushes(
    trees: list[dict[str, np.ndarray]], length: int, greedy: bool, whole: bool, args: argparse.Namespace
) -> list[Push]:
    """The trees of a round, whole or one depth a push."""
    num_depths = args.drafts if whole else 1

    def block(i: int, depth: int) -> SpeculationBlock:
        found = trees[i]
        span = np.s_[:, depth : depth + num_depths]
        return SpeculationBlock(
            str(i),
            i + 1,
            length,
            depth,
            pack_ids(found["outcomes"]),
            pack_ids(found["drafts"][span]),
            not greedy,
        )

    def push(depth: int) -> Push:
        blocks = [block(i, depth) for i in range(len(trees))]
        if greedy:
            return Push(blocks, [], None)
        span = np.s_[:, depth : depth + num_depths]
        ids = pack_ids(np.stack([found["q_token_ids"][span] for found in trees]))
        probs = np.stack([found["q_probs"][span] for found in trees]).astype("<f4").tobytes()
        return Push(blocks, [], None, args.top_m, ids, probs)

    return [push(depth) for depth in range(0, args.drafts, num_depths)]


def measure(num_rows: int, greedy: bool, whole: bool, args: argparse.Namespace) -> dict:
    """Milliseconds a round: the median, the worst, and the mean of each part."""
    logger, clock = logging.getLogger("bench"), Clock()
    config = SSDConfig.from_user({"model": "x", "num_speculative_tokens": args.drafts, "top_m": args.top_m})
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    target = ProcessTransport(ends[0], "target", max_message_bytes=MAX_MESSAGE_BYTES)
    drafter = ProcessTransport(ends[1], "drafter", max_pending_bytes=1 << 30)
    checker = PushChecker(
        vocab_size=VOCAB_SIZE,
        num_drafts=args.drafts,
        max_branches=args.branches,
        max_support=args.top_m,
        max_num_seqs=num_rows,
    )
    link = Link(target, checker, clock)
    cache = SpeculationCache(num_rows, args.branches, args.drafts, args.top_m, "cpu")
    cache.flush = clock.timed("write", cache.flush)
    courier = Courier(config, Fleet([link]), Metrics(args.drafts, logger), cache, logger, num_batches=2)
    courier._client.poll = clock.timed("poll", courier._client.poll)
    courier._client.send = clock.timed("send", courier._client.send)
    courier._take_outcomes = clock.timed("outcomes", courier._take_outcomes)
    launches = [0]
    staging = torch.empty(64 << 20, dtype=torch.uint8)
    blocks._staging = lambda num_bytes, device: staging[:num_bytes]
    blocks._store = counted(launches, 1)
    blocks._copy = counted(launches, 2)
    rng = np.random.default_rng(0)
    trees = [tree(rng, args) for _ in range(num_rows)]
    for i in range(num_rows):
        courier.start(i, i, list(range(PROMPT)), 0.0 if greedy else 0.8)
    courier.work()
    rounds_s, length, num_pushes = [], PROMPT, 1 if whole else args.drafts
    for round_ in range(args.rounds + 1):
        if round_ == 1:
            clock.seconds.clear()
        launches[0] = 0
        seconds = 0.0
        for push in pushes(trees, length, greedy, whole, args):
            drafter.send(push)
            while True:
                before = time.thread_time()
                courier.work()
                seconds += time.thread_time() - before
                drafter.poll()  # what the socket had no room for
                if not drafter.pending_bytes and not target.mid_message and not readable(target):
                    break
        buffer = courier.outcome_buffer()
        k = args.drafts - 1
        columns = [1 + k if round_ else 1, 7, HIT, 0, args.drafts, args.drafts]
        buffer.rows[:num_rows, :OUTCOME_COLUMNS] = buffer.rows.new_tensor(columns)
        buffer.rows[:num_rows, OUTCOME_COLUMNS:] = 9
        courier.await_outcomes(round_, list(range(num_rows)), [args.drafts] * num_rows, buffer)
        before = time.thread_time()
        courier.work()
        seconds += time.thread_time() - before
        drafter.poll()
        length += 1 + k if round_ else 1
        if round_:
            rounds_s.append(seconds + 1e-6 * args.launch_us * (launches[0] + num_pushes))  # and a copy each
    ends[1].close()
    parts = {name: 1e3 * value / args.rounds for name, value in clock.seconds.items()}
    parts["launches"] = 1e-3 * args.launch_us * (launches[0] + num_pushes)
    parts["keep"] = parts.pop("poll") - parts["receive"] - parts["check"]
    return {
        "rows": num_rows,
        "greedy": greedy,
        "pushes": num_pushes,
        "ms": 1e3 * median(rounds_s),
        "worst_ms": 1e3 * max(rounds_s),
        "goal_ms": GOALS_MS.get(num_rows),
        "parts_ms": parts,
    }


def counted(launches: list[int], number: int):
    """In place of what launches `number` operations."""

    def launch(*arguments: torch.Tensor) -> None:
        launches[0] += number

    return launch


def readable(transport: ProcessTransport) -> bool:
    """Whether there is more to receive."""
    return bool(select.select([transport], [], [], 0.0)[0])


def show(rows: list[dict]) -> None:
    """One line a measurement."""
    names = ("receive", "check", "keep", "write", "launches", "outcomes", "send")
    table = Table(box=SIMPLE_HEAD)
    for heading in ("rows", "decoding", "pushes", "ms a round", "worst", "goal", *names):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        parts = [f"{row['parts_ms'].get(name, 0.0):.2f}" for name in names]
        goal = "" if row["goal_ms"] is None else f"{row['goal_ms']:.0f}"
        decoding = "greedy" if row["greedy"] else "sampled"
        table.add_row(
            str(row["rows"]), decoding, str(row["pushes"]), f"{row['ms']:.2f}", f"{row['worst_ms']:.2f}", goal, *parts
        )
    Console(width=120).print(table)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--drafts", type=int, default=5, help="K")
    parser.add_argument("--branches", type=int, default=24, help="of each request")
    parser.add_argument("--top-m", type=int, default=64, help="tokens in a proposal")
    parser.add_argument("--launch-us", type=float, default=6.0, help="host time of one operation on a GPU")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    return parser.parse_args()


def main() -> int:
    """Measure every number of rows, sampled and greedy, in one push and in K; 1 where a goal is missed."""
    args = parse_arguments()
    torch.set_num_threads(1)
    both = False, True
    rows = [measure(n, greedy, whole, args) for n in args.rows for greedy in both for whole in reversed(both)]
    show(rows)
    if args.out is not None:
        report = {"environment": environment(sys.argv), "settings": vars(args) | {"out": None}, "measured": rows}
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(row["goal_ms"] is not None and row["ms"] > row["goal_ms"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
