"""Several steps of the branches with nothing of the host's between them; on a GPU, replayed from CUDA graphs."""

from __future__ import annotations

import numpy as np
import torch

from vllm_ssd.compat.paged import PagedModel, TreeBatch
from vllm_ssd.drafter.branches import Branches
from vllm_ssd.drafter.device_pages import DevicePages
from vllm_ssd.drafter.forward import Draw
from vllm_ssd.kernels import sample

MAX_TOP_M = 256
"""Widest proposal that `kernels.sample` keeps in registers; wider ones are drawn by the host, step by step."""
ROWS_PER_BUCKET = 8
SHORTEST_BUCKET = 1024
"""Context, in tokens, of the smallest bucket; each larger one is twice as long."""


class DeviceSteps:
    """Feeds every drawn token back on the device: forward, sample, next token, next slot.

    Batches are padded to buckets of branches, requests and context. A bucket's buffers never move, so that on a GPU one
    step is captured when the bucket is first used, and replayed as often as steps are wanted. Elsewhere the same step
    is called.
    """

    def __init__(
        self, model: PagedModel, pages: DevicePages, num_candidates: int, top_m: int, seed: int, saguaro_c: float
    ) -> None:
        self._model = model
        self._pages = pages
        self._num_candidates = num_candidates
        self._sampling = {"top_m": top_m, "factor": saguaro_c}
        self._random = np.random.default_rng(seed)
        self._buckets: dict[tuple[int, int, int], _Bucket] = {}

    def run(self, branches: Branches, rows: np.ndarray, temperatures: np.ndarray, fan_out: np.ndarray) -> list[Draw]:
        """The next token of every branch in `rows` [n], and so on, for as many steps as `fan_out` [steps, n] has.

        temperatures [n] float32, 0 for greedy branches. fan_out: how many of the likeliest tokens of each step are
        down-weighted. Every call seeds the noise of each row anew: draws are independent between branches and rounds.
        """
        pages = self._pages
        pages.carry_out()
        order = np.argsort(branches.owner[rows], kind="stable")  # the branches of a request side by side
        rows, n = rows[order], len(rows)
        requests, counts = np.unique(branches.owner[rows], return_counts=True)
        context = int(branches.base[rows].max())
        key = (
            -(-n // ROWS_PER_BUCKET) * ROWS_PER_BUCKET,
            1 << (len(requests) - 1).bit_length(),
            max(SHORTEST_BUCKET, 1 << context.bit_length()),
        )
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket(self._model, pages, self._sampling, *key)
        step, base = branches.computed[rows], branches.base[rows]
        shared = base // pages.page_size * pages.page_size
        bucket.load(
            token_ids=branches.tokens[rows, step],
            positions=base + step,
            requests=requests,
            starts=np.cumsum([0, *counts]),
            owners=branches.owner[rows],
            indices=pages.index(rows),
            steps=step,
            shared_lens=shared,
            own_lens=base + step + 1 - shared,
            temperatures=temperatures[order],
            seeds=self._random.integers(1 << 63, size=n),
            fan_out=fan_out[:, order],
        )
        token_ids, q_token_ids, q_probs = bucket.run(len(fan_out))
        place = np.argsort(order)
        token_ids, q_token_ids, q_probs = token_ids[:, place], q_token_ids[:, place], q_probs[:, place]
        sampled = temperatures.any()
        return [
            Draw(
                q_token_ids[i, :, : self._num_candidates],
                token_ids[i],
                q_token_ids[i] if sampled else None,
                q_probs[i] if sampled else None,
            )
            for i in range(len(fan_out))
        ]


class _Bucket:
    """Buffers for up to `num_rows` branches of `num_requests` requests, and one step over them."""

    def __init__(
        self, model: PagedModel, pages: DevicePages, sampling: dict, num_rows: int, num_requests: int, context: int
    ) -> None:
        self._model, self._trees, self._sampling = model, pages.trees, sampling
        self._context, self._num_rows, self._num_requests = context, num_rows, num_requests
        device = self._device = torch.device(model.device)
        _, most_branches, most_steps = pages.trees.slots.shape
        self._max_rows = min(num_rows, most_branches + ROWS_PER_BUCKET - 1)  # of one request, with all the padding

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._inputs = {
            "token_ids": zeros(num_rows),
            "positions": zeros(num_rows),
            "requests": zeros(num_requests),
            "starts": zeros(num_requests + 1, dtype=torch.int32),
            "owners": zeros(num_rows),
            "indices": zeros(num_rows),
            "steps": zeros(num_rows),
            "shared_lens": zeros(num_rows, dtype=torch.int32),
            "own_lens": zeros(num_rows, dtype=torch.int32),
            "temperatures": zeros(num_rows, dtype=torch.float32),
            "seeds": zeros(num_rows),
        }
        self._fan_out = zeros(most_steps, num_rows, dtype=torch.int32)
        self._done = zeros(1)  # steps since the last load
        top_m = sampling["top_m"]
        self._token_ids = zeros(most_steps, num_rows, dtype=torch.int32)
        self._q_token_ids = zeros(most_steps, num_rows, top_m, dtype=torch.int32)
        self._q_probs = zeros(most_steps, num_rows, top_m, dtype=torch.float32)
        self._down_weighted = False  # whether `_fan_out` holds anything
        self._graph = self._capture() if device.type == "cuda" else None

    def load(self, *, fan_out: np.ndarray, **inputs: np.ndarray) -> None:
        """Fill the buffers; rows and requests beyond the given ones are padding, which reads and writes no KV."""
        self._num_loaded = len(inputs["token_ids"])
        for name, values in inputs.items():
            padded = np.zeros(len(self._inputs[name]), values.dtype)
            padded[: len(values)] = values
            if name == "starts":  # padding belongs to the last request, the requests after it are empty
                padded[len(values) - 1 :] = self._num_rows
            self._fill(self._inputs[name], padded)
        if fan_out.any() or self._down_weighted:
            self._down_weighted = bool(fan_out.any())
            padded = np.zeros(self._fan_out.shape, np.int32)
            padded[: len(fan_out), : self._num_loaded] = fan_out
            self._fill(self._fan_out, padded)
        self._done.zero_()

    def _fill(self, buffer: torch.Tensor, values: np.ndarray) -> None:
        host = torch.from_numpy(values).to(buffer.dtype)
        buffer.copy_(host.pin_memory() if self._graph else host, non_blocking=True)

    def run(self, num_steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`num_steps` steps of what was loaded: token ids [steps, n], q's token ids and probabilities [steps, n, M]."""
        for _ in range(num_steps):
            if self._graph:
                self._graph.replay()
            else:
                self._step()
        outputs = self._token_ids, self._q_token_ids, self._q_probs
        first, second, third = (output[:num_steps, : self._num_loaded].cpu().numpy() for output in outputs)
        return first, second, third

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
        with torch.cuda.graph(graph):
            self._step()
        return graph

    @torch.inference_mode()
    def _step(self) -> None:
        trees, of = self._trees, self._inputs
        owners, indices, own_lens, positions = of["owners"], of["indices"], of["own_lens"], of["positions"]
        alive = own_lens > 0
        last_step = trees.slots.shape[2] - 1
        slots = trees.slots[owners, indices, of["steps"].clamp(max=last_step)].masked_fill(~alive, -1)
        logits = self._model.forward(
            TreeBatch(
                token_ids=of["token_ids"],
                positions=positions,
                slots=slots,
                page_tables=trees.page_tables[of["requests"]],
                query_start_loc=of["starts"],
                shared_lens=of["shared_lens"],
                own_pages=trees.branch_pages[owners, indices],
                own_lens=own_lens,
                max_shared_len=self._context,
                max_rows=self._max_rows,
                logit_indices=None,
            )
        )
        fan_out = self._fan_out.index_select(0, self._done)[0]
        drawn = sample(logits, of["temperatures"], of["seeds"], positions, fan_out, **self._sampling)
        self._token_ids.index_copy_(0, self._done, drawn.token_ids[None])
        self._q_token_ids.index_copy_(0, self._done, drawn.q_token_ids[None])
        self._q_probs.index_copy_(0, self._done, drawn.q_probs[None])
        of["token_ids"].copy_(drawn.token_ids)
        for counter in (positions, of["steps"], own_lens):
            counter += alive.to(counter.dtype)
        self._done += 1
