"""A target on vLLM's V2 runner beside a stand-in for CUDA: asynchronous, a step ahead of its device."""

from __future__ import annotations

import logging
import select
from collections import deque
from dataclasses import dataclass, field

import fake_model
import numpy as np
import torch
from fake_cuda import FakeCuda
from fake_link import InProcessLink, K

from vllm_ssd.config import SSDConfig
from vllm_ssd.kernels import DeviceBlocks, DeviceSpeculation, Found, lookup
from vllm_ssd.target.metrics import Metrics
from vllm_ssd.target.v2.courier import Courier
from vllm_ssd.target.v2.lookup_cache import SpeculationCache

SLOTS = 3
LOGGER = logging.getLogger("test")


class Link(InProcessLink):
    """An in-process drafter that a thread can sleep on; it works when it is polled, so never for long."""

    closed = False

    def wait(self, wakeup: int, timeout_s: float) -> None:
        select.select([wakeup], [], [], min(timeout_s, 0.002))

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
    num_drafted: int = 0
    num_accepted: int = 0
    finished: bool = False
    found: list[int] = field(default_factory=list)


class Target:
    """Verifies drafts at temperature 0 and looks the next ones up, as the V2 runner and `SSDSpeculator` do."""

    def __init__(self, cuda: FakeCuda, device: str = "cuda:0", **options) -> None:
        user = {"model": "x", "num_speculative_tokens": K, "fan_out": 3, **options}
        self.cuda, self.device = cuda, torch.device(device)
        torch.cuda.set_device(self.device)
        self.link = Link()
        self.metrics = Metrics(K, LOGGER)
        self.cache = SpeculationCache(SLOTS, 3 * (K + 1), K, 5, self.device)
        self.courier = Courier(SSDConfig.from_user(user), self.link, self.metrics, self.cache, LOGGER)
        self.verifying = DeviceSpeculation.empty(SLOTS, K, 5, self.device)
        self.epochs = torch.full((SLOTS,), -1, dtype=torch.int64, device=self.device)
        self.requests: list[Request] = []
        self.num_started = 0
        self.buffers: set[int] = set()  # by identity, all that ever were
        self._launched: deque[tuple[list[Request], list[list[int]], torch.cuda.Event]] = deque()

    def start(self, token_ids: list[int]) -> Request:
        """A request joins with its scheduler's own list of tokens."""
        slot = min(set(range(SLOTS)) - {request.slot for request in self.requests})
        request = Request(self.num_started, slot, token_ids, list(token_ids))
        self.num_started += 1
        self.epochs[slot].fill_(request.serial)
        self.requests.append(request)
        self.courier.start(request.serial, slot, token_ids, 0.0)
        return request

    def finish(self, request: Request) -> None:
        self.requests.remove(request)
        request.finished = True
        self.courier.finish(request.serial)

    def step(self, late: int = 1) -> None:
        """Launch a round, and process the outputs of all but the `late` newest."""
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
        emitted: list[list[int]] = []
        buffer = self.courier.outcome_buffer()
        self.buffers.add(id(buffer))

        def round_(blocks, verifying, epochs, rows) -> None:
            self._round(requests, emitted, blocks, verifying, epochs, rows)

        self.cuda.kernel(round_)(self.cache.blocks, self.verifying, self.epochs, buffer.rows)
        self.courier.await_outcomes([request.serial for request in requests], buffer)
        done = torch.cuda.Event()
        done.record()
        self._launched.append((requests, emitted, done))

    def collect(self) -> None:
        """Process the output of the oldest round in flight, as the scheduler does; an ended request gets none."""
        if self._launched:
            requests, emitted, done = self._launched.popleft()
            done.synchronize()
            for request, new in zip(requests, emitted):
                if not request.finished:
                    request.token_ids += new

    def _round(
        self,
        requests: list[Request],
        emitted: list[list[int]],
        blocks: DeviceBlocks,
        verifying: DeviceSpeculation,
        epochs: torch.Tensor,
        rows: torch.Tensor,
    ) -> None:
        """On the device: verify what each row carries, look up what follows, and say so."""
        by_slot = torch.zeros(2, SLOTS, dtype=torch.int64)
        for request in requests:
            new: list[int] = []
            for draft in [*request.drafts, None]:
                new.append(next_token(request.on_device + new))
                if new[-1] != draft:
                    break
            request.on_device += new
            request.num_drafted += len(request.drafts)
            request.num_accepted += len(new) - 1
            by_slot[:, request.slot] = torch.tensor([len(request.on_device), new[-1]])
            emitted.append(new)
        drafts = torch.zeros(SLOTS, 1 + K, dtype=torch.int64)
        lookup(
            blocks,
            verifying,
            torch.tensor([request.slot for request in requests], dtype=torch.int64),
            torch.tensor([len(new) for new in emitted], dtype=torch.int32),
            epochs,
            by_slot[0].int(),
            by_slot[1],
            torch.zeros(SLOTS),
            K,
            drafts,
            rows,
        )
        for request, row, (num_drafts, *tokens) in zip(requests, rows.tolist(), drafts.tolist()):
            request.drafts = tokens[:num_drafts]
            request.found.append(Found(row[2]))


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
