"""A target on vLLM's V2 runner beside a stand-in for CUDA: asynchronous, a step ahead of its device."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field

import fake_model
import numpy as np
import torch
from fake_cuda import FakeCuda
from fake_link import InProcessLink, K, PolledFleet

from vllm_ssd.config import SSDConfig
from vllm_ssd.kernels import DeviceBlocks, DeviceSpeculation, Found, lookup
from vllm_ssd.target.metrics import Metrics
from vllm_ssd.target.v2.courier import Courier
from vllm_ssd.target.v2.lookup_cache import SpeculationCache

SLOTS = 3
NUM_BATCHES = 2
"""Steps that the scheduler has under way at most."""
LOGGER = logging.getLogger("test")


class Link(InProcessLink):
    """An in-process drafter that is told when it is over."""

    closed = False

    def close(self) -> None:
        self.closed = True


@dataclass(slots=True)
class Request:
    """A request as vLLM's scheduler has it: `token_ids` is the list that grows with every output."""

    serial: int
    slot: int
    token_ids: list[int]
    on_device: list[int]  # what the device has, a step ahead
    drafts: list[int] = field(default_factory=list)
    is_decoding: bool = False  # vLLM schedules K drafts for it, some of which may be filler
    finished: bool = False
    found: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Row:
    """A request in one round: what it carries, filler included, and once the device came to it, what that was."""

    request: Request
    num_scheduled: int
    num_drafts: int = 0
    emitted: list[int] = field(default_factory=list)


class Target:
    """Verifies drafts at temperature 0 and looks the next ones up, as the V2 runner and `SSDSpeculator` do."""

    def __init__(self, cuda: FakeCuda, device: str = "cuda:0", **options) -> None:
        user = {"model": "x", "num_speculative_tokens": K, "fan_out": 3, **options}
        self.cuda, self.device = cuda, torch.device(device)
        torch.cuda.set_device(self.device)
        self.link = Link()
        self.metrics = Metrics(K, LOGGER)
        self.cache = SpeculationCache(SLOTS, 3 * (K + 1), K, 5, self.device)
        self.fleet = PolledFleet([self.link])
        self.courier = Courier(SSDConfig.from_user(user), self.fleet, self.metrics, self.cache, LOGGER, NUM_BATCHES)
        self.verifying = DeviceSpeculation.empty(SLOTS, K, 5, self.device)
        self.epochs = torch.full((SLOTS,), -1, dtype=torch.int64, device=self.device)
        self.requests: list[Request] = []
        self.num_started = self.num_steps = 0
        self.counted = {"draft_tokens": 0, "accepted_tokens": 0, "filler_tokens": 0}  # by vLLM's scheduler
        self.buffers: set[int] = set()  # by identity, all that ever were
        self._launched: deque[tuple[list[Row], torch.cuda.Event]] = deque()

    def start(self, token_ids: list[int]) -> Request:
        """A request joins with its scheduler's own list of tokens."""
        slot = min(set(range(SLOTS)) - {request.slot for request in self.requests})
        request = Request(self.num_started, slot, token_ids, list(token_ids))
        self.num_started += 1
        self.epochs[slot].fill_(request.serial)
        self.requests.append(request)
        self.courier.start(request.serial, slot, token_ids, 0.0)
        return request

    def finish(self, *requests: Request) -> None:
        """All requests that have ended since the last step."""
        for request in requests:
            self.requests.remove(request)
            request.finished = True
        self.courier.finish(self.num_steps + 1, [request.serial for request in requests])

    def step(self, late: int = 1) -> None:
        """Launch a round, and process the outputs of all but the `late` newest."""
        self.num_steps += 1
        if self.requests:
            self.launch()
        while len(self._launched) > late:
            self.collect()

    def drain(self) -> None:
        """Process all outputs."""
        while self._launched:
            self.collect()

    def launch(self) -> None:
        """Launch a round of all requests; the device comes to it when it does."""
        requests = list(self.requests)
        rows = [Row(request, K if request.is_decoding else 0) for request in requests]
        for request in requests:
            request.is_decoding = True
        buffer = self.courier.outcome_buffer()
        self.buffers.add(id(buffer))

        def round_(blocks, verifying, epochs, outcomes) -> None:
            self._round(rows, blocks, verifying, epochs, outcomes)

        self.cuda.kernel(round_)(self.cache.blocks, self.verifying, self.epochs, buffer.rows)
        serials, scheduled = [row.request.serial for row in rows], [row.num_scheduled for row in rows]
        self.courier.await_outcomes(self.num_steps, serials, scheduled, buffer)
        done = torch.cuda.Event()
        done.record()
        self._launched.append((rows, done))

    def collect(self) -> None:
        """Process the output of the oldest round in flight, as the scheduler does; an ended request gets none."""
        if self._launched:
            rows, done = self._launched.popleft()
            done.synchronize()
            for row in rows:
                if not row.request.finished:
                    row.request.token_ids += row.emitted
                    self.counted["draft_tokens"] += row.num_drafts
                    self.counted["filler_tokens"] += row.num_scheduled - row.num_drafts
                    self.counted["accepted_tokens"] += len(row.emitted) - 1

    def _round(
        self,
        rows: list[Row],
        blocks: DeviceBlocks,
        verifying: DeviceSpeculation,
        epochs: torch.Tensor,
        outcomes: torch.Tensor,
    ) -> None:
        """On the device: verify what each row carries, look up what follows, and say so."""
        by_slot = torch.zeros(2, SLOTS, dtype=torch.int64)
        for row in rows:
            request, new = row.request, row.emitted
            for draft in [*request.drafts, None]:
                new.append(next_token(request.on_device + new))
                if new[-1] != draft:
                    break
            request.on_device += new
            row.num_drafts = len(request.drafts)
            by_slot[:, request.slot] = torch.tensor([len(request.on_device), new[-1]])
        drafts = torch.zeros(SLOTS, 1 + K, dtype=torch.int64)
        lookup(
            blocks,
            verifying,
            torch.tensor([row.request.slot for row in rows], dtype=torch.int64),
            torch.tensor([len(row.emitted) for row in rows], dtype=torch.int32),
            epochs,
            by_slot[0].int(),
            by_slot[1],
            torch.zeros(SLOTS),
            K,
            drafts,
            outcomes,
        )
        for row, outcome, (num_drafts, *tokens) in zip(rows, outcomes.tolist(), drafts.tolist()):
            row.request.drafts = tokens[:num_drafts]
            row.request.found.append(Found(outcome[2]))


def next_token(prefix: list[int]) -> int:
    """The target's choice: usually the drafter's first or second."""
    order = np.argsort(-fake_model.reference_logits(prefix).numpy())
    return int(order[(0, 0, 0, 1, 1, 5)[sum(prefix) % 6]])


def continued(prompt: list[int], length: int) -> list[int]:
    """The target's own text, `length` tokens with the prompt."""
    tokens = list(prompt)
    while len(tokens) < length:
        tokens.append(next_token(tokens))
    return tokens
