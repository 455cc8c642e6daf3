"""Speculation blocks in the target's device memory: written as they arrive, read where the outcome is known.

The writer is a thread with a stream of its own, the reader a kernel (`kernels.lookup`) that vLLM's thread launched long
before: neither waits for the other. Of two blocks a request one is whole while the other is written, and a version
tells which.
"""

from __future__ import annotations

import numpy as np
import torch

from vllm_ssd.kernels import DeviceBlocks
from vllm_ssd.link.protocol import SpeculationBlock


class SpeculationCache:
    """Two blocks for each of S request slots (`kernels.DeviceBlocks`), N branches of up to K drafts each.

    A block's epoch is the serial number of its request. On the host there is a copy of the newest block of each slot.
    """

    def __init__(
        self, num_slots: int, max_branches: int, num_drafts: int, top_m: int, device: torch.device | str
    ) -> None:
        self.device = torch.device(device)
        self._stream: torch.cuda.Stream | None = None
        shape = (num_slots, max_branches, num_drafts)
        self._outcomes = np.full((num_slots, max_branches, 2), -1, np.int32)
        self._depths = np.zeros(shape[:2], np.int32)
        self._draft_token_ids = np.zeros(shape, np.int32)
        self._q_token_ids = np.zeros((*shape, top_m), np.int32)
        self._q_probs = np.zeros((*shape, top_m), np.float32)
        self._answers = np.full((num_slots, 2), -1, np.int64)  # serial number and length
        self._num_branches = np.zeros(num_slots, np.int64)
        self._sampled = np.zeros(num_slots, np.bool_)
        self._dirty: set[int] = set()

        self.blocks = DeviceBlocks.empty(num_slots, max_branches, num_drafts, top_m, self.device)
        if self.device.type == "cuda":
            # Before the target's graphs, whose kernels would else hold up the next round's blocks.
            self._stream = torch.cuda.Stream(self.device, priority=-1)
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def put(self, slot: int, serial: int, block: SpeculationBlock) -> None:
        """Keep a pushed block for request `serial` in `slot`; readers see it after `flush`.

        Branches that do not continue what was pushed before, or exceed N, are left out.
        """
        outcomes = np.frombuffer(block.outcomes, "<i4").reshape(-1, 2)
        drafts = np.frombuffer(block.draft_token_ids, "<i4").reshape(len(outcomes), -1)
        if (self._answers[slot] != (serial, block.length)).any():
            self._answers[slot] = serial, block.length
            self._outcomes[slot], self._depths[slot], self._num_branches[slot] = -1, 0, 0
        held = (self._outcomes[slot] == outcomes[:, None]).all(2)
        rows, new = held.argmax(1), ~held.any(1)
        rows[new] = self._num_branches[slot] + np.arange(new.sum())
        fits = rows < self._depths.shape[1]
        fits[fits] = self._depths[slot, rows[fits]] == block.offset
        rows, stop = rows[fits], block.offset + drafts.shape[1]
        self._outcomes[slot, rows] = outcomes[fits]
        self._depths[slot, rows] = stop
        self._draft_token_ids[slot, rows, block.offset : stop] = drafts[fits]
        self._num_branches[slot] += (new & fits).sum()
        self._sampled[slot] = block.q_token_ids != b""
        if self._sampled[slot]:
            q_token_ids = np.frombuffer(block.q_token_ids, "<i4").reshape(*drafts.shape, -1)
            q_probs = np.frombuffer(block.q_probs, "<f4").reshape(*drafts.shape, -1)
            top_m = q_probs.shape[2]
            self._q_token_ids[slot, rows, block.offset : stop, :top_m] = q_token_ids[fits]
            self._q_probs[slot, rows, block.offset : stop, :top_m] = q_probs[fits]
            self._q_probs[slot, rows, block.offset : stop, top_m:] = 0.0
        self._dirty.add(slot)

    def flush(self) -> None:
        """Bring what was put to the device, in the order of the cache's own stream; returns before it is there."""
        if not self._dirty:
            return
        slots = np.array(sorted(self._dirty))
        self._dirty.clear()
        is_sampled = self._sampled[slots]
        sampled = slots[is_sampled]
        with torch.cuda.stream(self._stream):  # None changes nothing
            self.blocks.write(
                slots,
                self._answers[slots],
                self._outcomes[slots],
                self._depths[slots],
                self._draft_token_ids[slots],
                is_sampled,
                self._q_token_ids[sampled],
                self._q_probs[sampled],
            )
