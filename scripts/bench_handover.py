"""Measure the host's time from an outcome to its drafts on vLLM's V1 runner, when every row hits, by rows and by part.

    python scripts/bench_handover.py [--rows 1 4 16] [--out handover.json]

A drafter's pushes come through a socket, as they do while serving; `Verifier.propose` receives, decodes and checks
them, learns from the round, looks the outcomes up, and tells the drafter. Between two rounds a walk over `--evict-mib`
of memory empties the core's caches, as a forward does; with 0 they stay warm. Prints medians in µs.
"""

import argparse
import json
import logging
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from bench_courier import Clock, Link
from bench_report import environment
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_ssd.compat.target.runner_v1 import StartedRequest
from vllm_ssd.config import SSDConfig
from vllm_ssd.link.checks import PushChecker
from vllm_ssd.link.fleet import Fleet
from vllm_ssd.link.protocol import ALL_TOKENS, NO_NOISE, Push, SpeculationBlock, pack_ids
from vllm_ssd.link.transport import ProcessTransport
from vllm_ssd.target.metrics import Metrics
from vllm_ssd.target.v1.round import Batch, Round
from vllm_ssd.target.v1.verifier import Verifier

DRAFTS, BRANCHES, ACCEPTED, PROMPT, VOCAB_SIZE = 5, 24, 3, 64, 151_936
GOAL_US, GOAL_ROW_US = 120, 12
"""At one row, and for each further one."""
WARM_UP = 32
"""Rounds before those that count."""


class Target:
    """A verifier whose rows hit in every round, and the drafter's end of its socket."""

    def __init__(self, num_rows: int) -> None:
        logger = logging.getLogger("bench")
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._drafter = ProcessTransport(ends[1], "drafter")
        checker = PushChecker(
            vocab_size=VOCAB_SIZE, num_drafts=DRAFTS, max_branches=BRANCHES, max_support=64, max_num_seqs=num_rows
        )
        transport = ProcessTransport(ends[0], "target")
        link = Link(transport, checker, Clock())
        link._receive, link._check = transport.poll, checker.reason  # its clock is not read here
        config = SSDConfig.from_user({"model": "x", "num_speculative_tokens": DRAFTS})
        self.metrics = Metrics(DRAFTS, logger)
        self.verifier = Verifier(config, Fleet([link]), self.metrics)
        self.verifier._adaptation.choose = lambda batch_size: DRAFTS  # learn as ever, but probe nothing
        self._ids = [f"request-{i}-{i:032x}" for i in range(num_rows)]
        self._tokens = np.zeros((num_rows, 1 << 14), np.int32)
        self._lengths = np.full(num_rows, PROMPT, np.int32)
        self._drafts: list[list[int]] = [[] for _ in self._ids]
        rng = np.random.default_rng(0)
        self._outcomes = pack_ids(np.stack([np.arange(BRANCHES) % (DRAFTS + 1), 100 + np.arange(BRANCHES)], 1))
        self._branches = pack_ids(rng.integers(0, VOCAB_SIZE, (BRANCHES, DRAFTS)))
        prompt = list(range(PROMPT))
        started = (StartedRequest(name, prompt, 0.0, 0, ALL_TOKENS, b"", NO_NOISE) for name in self._ids)
        self.verifier.start_requests(started)

    def round(self) -> float:
        """Push a tree for each row, accept three drafts and a predicted bonus token; seconds of `propose`."""
        blocks = []
        for name in self._ids:
            remote = self.verifier._requests[name].remote
            blocks.append(SpeculationBlock(name, remote.epoch, remote.length, 0, self._outcomes, self._branches))
        self._drafter.poll()
        self._drafter.send(Push(blocks, [], None))
        k = min(ACCEPTED, len(self._drafts[0]))
        sampled = [[*drafts[:k], 100 + k] for drafts in self._drafts]
        for i, row in enumerate(sampled):
            start = self._lengths[i]
            self._tokens[i, start : start + len(row)] = row
        self._lengths += k + 1
        batch = Batch(list(self._ids), [len(d) for d in self._drafts], sampled, self._lengths, self._tokens)
        started = time.perf_counter()
        self._drafts = self.verifier.propose(batch)
        return time.perf_counter() - started


def timed(parts: dict[str, float], owner: Any, name: str, part: str) -> Callable[[], None]:
    """Add the time of a method's calls to `part`; returns what puts the method back."""
    function = getattr(owner, name)

    def call(*args, **kwargs):
        before = time.perf_counter_ns()
        try:
            return function(*args, **kwargs)
        finally:
            parts[part] += (time.perf_counter_ns() - before) / 1e3

    setattr(owner, name, call)
    return lambda: setattr(owner, name, function)


def instrument(target: Target, parts: dict[str, float]) -> list[Callable[[], None]]:
    """Time the parts of a round; returns what undoes it."""
    verifier = target.verifier
    client = verifier._client
    link = client._fleet.links[0]
    places = (
        (link, "_receive", "receive, decode"),
        (link, "_check", "check"),
        (client, "poll", "take blocks"),  # with the two above
        (target.metrics, "accepted", "count"),
        (verifier._adaptation, "observe", "adaptation"),
        (verifier._fallback, "observe", "fallback"),
        (Round, "look_up", "look up"),
        (link, "send", "encode, send"),
        (Round, "tell", "tell"),  # with the one above
        (Round, "hand_over", "hand over"),
    )
    return [timed(parts, *place) for place in places]


def measure(num_rows: int, rounds: int, evict_mib: int) -> dict[str, Any]:
    """Medians in µs: of a whole round, without instruments, and of its parts, with them."""
    target, ballast, rng = Target(num_rows), np.ones(evict_mib << 17), np.random.default_rng(1)
    whole_us: list[float] = []
    parts_us: dict[str, list[float]] = defaultdict(list)
    for number in range(WARM_UP + 2 * rounds):
        ballast += 1
        parts: dict[str, float] = defaultdict(float)
        undo = instrument(target, parts) if rng.random() < 0.5 else []  # not in turn: the policies count rounds, too
        us = 1e6 * target.round()
        for put_back in undo:
            put_back()
        if number < WARM_UP:
            continue
        if not undo:
            whole_us.append(us)
            continue
        parts["take blocks"] -= parts["receive, decode"] + parts["check"]
        parts["tell"] -= parts["encode, send"]
        parts["rest"] = us - sum(parts.values())
        for part, spent in parts.items():
            parts_us[part].append(spent)
    counts = target.metrics.counts
    if counts["misses"] or counts["late"] or counts["hits"] < num_rows * (WARM_UP + 2 * rounds - 1):
        raise RuntimeError(f"not every row hit: {counts}")
    return {
        "rows": num_rows,
        "us": median(whole_us),
        "parts_us": {part: median(spent) for part, spent in sorted(parts_us.items(), key=lambda p: -median(p[1]))},
    }


def main() -> None:
    """Measure every number of rows, and judge the goals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--evict-mib", type=int, default=64)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = [measure(num_rows, args.rounds, args.evict_mib) for num_rows in args.rows]
    table = Table(box=SIMPLE_HEAD)
    for name in ("rows", "µs", *found[0]["parts_us"]):
        table.add_column(name, justify="right")
    for row in found:
        parts = (f"{row['parts_us'][part]:.0f}" for part in found[0]["parts_us"])
        table.add_row(str(row["rows"]), f"{row['us']:.0f}", *parts)
    console = Console(highlight=False, width=150)
    console.print(table)
    for row in found:
        goal = GOAL_US + GOAL_ROW_US * (row["rows"] - 1)
        verdict = "reached" if row["us"] <= goal else "missed"
        console.print(f"{row['rows']} rows: at most {goal} µs: {verdict}, {row['us']:.0f} µs")
    if args.out:
        args.out.write_text(json.dumps({"environment": environment(sys.argv), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
