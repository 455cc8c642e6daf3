"""Steps of the branches launched ahead of what is read of them; on a GPU, replayed from CUDA graphs."""

from __future__ import annotations

import time

import numpy as np
import torch

from vllm_ssd.compat.drafter.paged import PagedModel, TreeBatch
from vllm_ssd.drafter.branches import Branches
from vllm_ssd.drafter.pages.device import DevicePages
from vllm_ssd.drafter.sampler import Draw
from vllm_ssd.kernels import sample

MAX_TOP_M = 256
"""Widest proposal that `kernels.sample` keeps in registers; wider ones are drawn by the host, step by step."""
STEPS_AHEAD = 1
"""Steps launched beyond the one whose draws are waited for: the device works while the host reads and pushes those.
An outcome that comes meanwhile waits for them."""
SHORTEST_BUCKET = 1024
"""Context, in tokens, of the smallest bucket; each larger one is twice as long."""
MAX_BUCKETS = 64
"""Buckets that are kept, the latest used; a graph takes a megabyte or two."""


class DeviceSteps:
    """Feeds every drawn token back on the device: forward, sample, next token, next slot.

    The host copies what a step drew while the next one runs, so that nothing of its own lies between two steps.

    Batches are padded to buckets of branches, requests and context. A bucket's buffers never move, so that on a GPU one
    step is captured when the bucket is first used, and replayed as often as steps are wanted. Elsewhere the same step
    is called.
    """

    def __init__(
        self, model: PagedModel, pages: DevicePages, branches: Branches, top_m: int, seed: int, saguaro_c: float
    ) -> None:
        self._model = model
        self._pages = pages
        self._branches = branches
        self._sampling = {"top_m": top_m, "factor": saguaro_c}
        self._random = np.random.default_rng(seed)
        self._buckets: dict[tuple[int, int, int], _Bucket] = {}  # longest unused first
        self._memory = torch.cuda.graph_pool_handle() if torch.device(model.device).type == "cuda" else None

    def start(self, rows: np.ndarray, num_steps: int, fan_out: np.ndarray | None) -> DeviceRun:
        """As `Runner.start`: until the run is done no other may start, and nothing may be asked of the pages.

        Every call seeds the noise of each row anew: draws are independent between branches and rounds.
        """
        began = time.perf_counter()
        pages, branches = self._pages, self._branches
        pages.carry_out()
        order = np.argsort(branches.owner[rows], kind="stable")  # the branches of a request side by side
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        ordered, n = rows[order], len(rows)
        requests, counts = np.unique(branches.owner[ordered], return_counts=True)
        context = int(branches.base[ordered].max())
        unit = max(8, (1 << n.bit_length()) // 16)  # of all but small batches, an eighth at most is padding
        key = (
            -(-n // unit) * unit,
            1 << (len(requests) - 1).bit_length(),
            max(SHORTEST_BUCKET, 1 << context.bit_length()),
        )
        bucket = self._buckets.pop(key, None)
        if bucket is None:
            if len(self._buckets) == MAX_BUCKETS:
                del self._buckets[next(iter(self._buckets))]
            bucket = _Bucket(self._model, pages, self._sampling, self._memory, *key)
        self._buckets[key] = bucket
        step, base, temperatures = branches.computed[ordered], branches.base[ordered], branches.temperature[ordered]
        shared = base // pages.page_size * pages.page_size
        bucket.load(
            token_ids=branches.tokens[ordered, step],
            positions=base + step,
            requests=requests,
            starts=np.cumsum([0, *counts]),
            owners=branches.owner[ordered],
            indices=pages.index(ordered),
            steps=step,
            shared_lens=shared,
            own_lens=base + step + 1 - shared,
            temperatures=temperatures,
            truncations=branches.truncation[ordered],
            seeds=self._random.integers(1 << 63, size=n),
            fan_out=None if fan_out is None else fan_out[:, order],
        )
        return DeviceRun(bucket, rows, place, num_steps, branches.num_candidates, bool(temperatures.any()), began)


class DeviceRun:
    """Steps of `rows` under way, since `began`: `take` them one after the other, until it `is_done`.

    The device works between two takes, too: a step's time is that since the step before it was taken.
    """

    def __init__(
        self,
        bucket: _Bucket,
        rows: np.ndarray,
        place: np.ndarray,
        num_steps: int,
        num_candidates: int,
        sampled: bool,
        began: float,
    ) -> None:
        self.rows = rows
        self.step_s = 0.0
        self._began = began
        self._bucket = bucket
        self._place = place  # of each row in the bucket
        self._num_steps, self._num_launched, self._num_taken = num_steps, 0, 0
        self._num_candidates = num_candidates
        self._sampled = sampled

    @property
    def is_done(self) -> bool:
        """Whether every step was taken."""
        return self._num_taken == self._num_steps

    def take(self) -> Draw:
        """What the next step drew after `rows`, once it is done; as many as allowed are launched ahead of it."""
        step, bucket = self._num_taken, self._bucket
        while self._num_launched < min(step + 1 + STEPS_AHEAD, self._num_steps):
            bucket.launch(self._num_launched, self._sampled)
            self._num_launched += 1
        token_ids, q_token_ids, q_probs = (drawn[self._place] for drawn in bucket.drawn(step))
        self._num_taken += 1
        now = time.perf_counter()
        self.step_s, self._began = now - self._began, now
        return Draw(
            q_token_ids[:, : self._num_candidates],
            token_ids,
            q_token_ids if self._sampled else None,
            q_probs if self._sampled else None,
        )

    def stop(self) -> None:
        """Launch no more steps; those that were launched are still to be taken."""
        self._num_steps = self._num_launched


class _Bucket:
    """Buffers for up to `num_rows` branches of `num_requests` requests, and one step over them."""

    def __init__(
        self,
        model: PagedModel,
        pages: DevicePages,
        sampling: dict,
        memory: torch.cuda._POOL_HANDLE | None,
        num_rows: int,
        num_requests: int,
        context: int,
    ) -> None:
        self._model, self._trees, self._sampling, self._memory = model, pages.trees, sampling, memory
        self._context, self._num_rows, self._num_requests = context, num_rows, num_requests
        device = self._device = torch.device(model.device)
        _, most_branches, most_steps = pages.trees.slots.shape
        self._max_rows = min(num_rows, most_branches + max(8, num_rows // 8))  # of one request, with all the padding

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._inputs = {
            "token_ids": zeros(num_rows, dtype=torch.int32),
            "positions": zeros(num_rows),
            "requests": zeros(num_requests),
            "starts": zeros(num_requests + 1, dtype=torch.int32),
            "owners": zeros(num_rows),
            "indices": zeros(num_rows),
            "steps": zeros(num_rows),
            "shared_lens": zeros(num_rows, dtype=torch.int32),
            "own_lens": zeros(num_rows, dtype=torch.int32),
            "temperatures": zeros(num_rows, dtype=torch.float32),
            "truncations": zeros(num_rows, 3, dtype=torch.float32),
            "seeds": zeros(num_rows),
        }
        self._fan_out = zeros(most_steps, num_rows, dtype=torch.int32)
        self._done = zeros(1)  # steps since the last load
        top_m, on_gpu = sampling["top_m"], device.type == "cuda"
        self._drawn = (  # token ids, q's token ids, q's probabilities
            zeros(most_steps, num_rows, dtype=torch.int32),
            zeros(most_steps, num_rows, top_m, dtype=torch.int32),
            zeros(most_steps, num_rows, top_m, dtype=torch.float32),
        )
        self._on_host = [torch.empty_like(drawn, device="cpu", pin_memory=on_gpu) for drawn in self._drawn]
        self._copied = [torch.cuda.Event() for _ in range(most_steps)] if on_gpu else []
        self._copies = torch.cuda.Stream(device) if on_gpu else None
        self._down_weighted = False  # whether `_fan_out` holds anything
        self._graph = self._capture() if on_gpu else None

    def load(self, *, fan_out: np.ndarray | None, **inputs: np.ndarray) -> None:
        """Fill the buffers; rows and requests beyond the given ones are padding, which reads and writes no KV."""
        self._num_loaded = len(inputs["token_ids"])
        for name, values in inputs.items():
            padded = np.zeros(self._inputs[name].shape, values.dtype)
            padded[: len(values)] = values
            if name == "starts":  # padding belongs to the last request, the requests after it are empty
                padded[len(values) - 1 :] = self._num_rows
            self._fill(self._inputs[name], padded)
        if fan_out is not None or self._down_weighted:
            self._down_weighted = fan_out is not None
            padded = np.zeros(self._fan_out.shape, np.int32)
            if fan_out is not None:
                padded[: len(fan_out), : self._num_loaded] = fan_out
            self._fill(self._fan_out, padded)
        self._done.zero_()

    def _fill(self, buffer: torch.Tensor, values: np.ndarray) -> None:
        host = torch.from_numpy(values).to(buffer.dtype)
        buffer.copy_(host.pin_memory() if self._graph else host, non_blocking=True)

    def launch(self, step: int, sampled: bool) -> None:
        """The next step of what was loaded, number `step`, and the copy of what it draws, beside the step after it."""
        if self._graph:
            self._graph.replay()
        else:
            self._step()
        buffers = list(zip(self._drawn, self._on_host))[: 3 if sampled else 2]
        if self._copies is None:
            for drawn, on_host in buffers:
                on_host[step] = drawn[step]
            return
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            for drawn, on_host in buffers:
                on_host[step].copy_(drawn[step], non_blocking=True)
            self._copied[step].record()

    def drawn(self, step: int) -> tuple[np.ndarray, ...]:
        """Token ids [B], q's token ids and probabilities [B, M] of a launched step, once they are there.

        The arrays are views that a later run overwrites.
        """
        if self._copied:
            self._copied[step].synchronize()
        return tuple(on_host[step].numpy() for on_host in self._on_host)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """One step as a graph. The buffers hold padding only, so that warming up touches no KV."""
        self._inputs["starts"][1:] = self._num_rows
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._step()  # compiles kernels and fills caches, which a capture must not
            self._done.zero_()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):  # shared: never do two graphs run at once
            self._step()
        return graph

    @torch.inference_mode()
    def _step(self) -> None:
        trees, inputs = self._trees, self._inputs
        owners, indices, steps = inputs["owners"], inputs["indices"], inputs["steps"]
        own_lens, positions = inputs["own_lens"], inputs["positions"]
        alive = own_lens > 0
        last_step = trees.slots.shape[2] - 1
        slots = trees.slots[owners, indices, steps.clamp(max=last_step)].masked_fill(~alive, -1)
        logits = self._model.forward(
            TreeBatch(
                token_ids=inputs["token_ids"],
                positions=positions,
                slots=slots,
                page_tables=trees.page_tables[inputs["requests"]],
                query_start_loc=inputs["starts"],
                shared_lens=inputs["shared_lens"],
                own_pages=trees.branch_pages[owners, indices],
                own_lens=own_lens,
                max_shared_len=self._context,
                max_rows=self._max_rows,
                logit_indices=None,
            )
        )
        fan_out = self._fan_out.index_select(0, self._done)[0]
        drawn = sample(
            logits,
            inputs["temperatures"],
            inputs["seeds"],
            positions,
            fan_out,
            truncations=inputs["truncations"],
            **self._sampling,
        )
        for buffer, values in zip(self._drawn, (drawn.token_ids, drawn.q_token_ids, drawn.q_probs)):
            buffer.index_copy_(0, self._done, values[None])
        inputs["token_ids"].copy_(drawn.token_ids)
        for counter in (positions, steps, own_lens):
            counter += alive.to(counter.dtype)
        self._done += 1
