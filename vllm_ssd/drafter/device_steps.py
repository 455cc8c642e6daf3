"""Branch steps that are launched before the host has read the previous one; on a GPU, replayed from CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch

from vllm_ssd.compat.drafter.graphs import Graphs, Replay, graphs_on
from vllm_ssd.compat.drafter.paged import PagedModel, TreeBatch
from vllm_ssd.drafter.branches import Branches
from vllm_ssd.drafter.buckets import MAX_ROWS, Buckets, BucketSize
from vllm_ssd.drafter.pages.device import DevicePages
from vllm_ssd.drafter.sampler import Draw
from vllm_ssd.drafter.sequence import Sequence
from vllm_ssd.drafter.step_tokens import StepTokens
from vllm_ssd.kernels import Trees, sample
from vllm_ssd.kernels.tree_attention import MAX_TILE
from vllm_ssd.link.protocol import HASHED_NOISE

MAX_TOP_M = 256
"""Widest proposal that `kernels.sample` keeps in registers; wider ones are drawn on the host, step by step."""
_NUM_GREEDY = 4
"""Number of arrays of draws that are copied to the host if no row samples."""
WAIT_S = 2e-4
"""Longest wait for a step before the target's messages are polled again."""


class DeviceSteps:
    """Runs steps entirely on the device: forward, sample, next token, next slot.

    The host copies a step's draws while the next step runs, so no host work lies between two steps.

    Batches are padded to buckets of rows and requests (`Buckets`). A row is a token of a branch (one per step, or
    several with parallel drafting) or, in a run with spines, a token of a spine. All buckets share buffers with fixed
    addresses, so on a GPU one step of each bucket is captured when the drafter starts and replayed for every step.
    Elsewhere the same function is called.
    """

    def __init__(
        self,
        model: PagedModel,
        pages: DevicePages,
        branches: Branches,
        top_m: int,
        seed: int,
        saguaro_c: float,
        graphs: Graphs | None = None,
        most_rows: int = MAX_ROWS,
    ) -> None:
        self._model = model
        self._pages = pages
        self._branches = branches
        self._random = np.random.default_rng(seed)
        rows_per_request = branches.per_request * branches.tokens_per_step + branches.num_speculative_tokens + 1
        self.sizes = Buckets(branches.max_num_seqs, rows_per_request, most_rows)
        num_candidates, table = branches.num_candidates, branches.biases.table
        sampling = {"top_m": top_m, "num_candidates": num_candidates, "factor": saguaro_c, "biases": table}
        self._buffers = _Buffers(model, pages, self.sizes.largest, sampling)
        self._graphs = graphs or graphs_on(torch.device(model.device))
        self._replays: dict[BucketSize, Replay] = {}

    @property
    def num_captured(self) -> int:
        """Number of buckets whose step has been captured, or would have been on a GPU."""
        return len(self._replays)

    def warm_up(self) -> int:
        """Compile and capture everything that later steps launch, without touching any KV; returns the bucket count."""
        warm_up_attention(self._model, self._pages.trees)
        for size in reversed(self.sizes.all):  # largest first, so that later graphs reuse its memory
            self._replay_of(size)
        return self.num_captured

    def carries(self, num_tokens: int, num_requests: int, spine_tokens: int = 0) -> bool:
        """Whether a bucket has room for the tokens and requests, and no spine has more than K + 1 tokens."""
        most = self._branches.num_speculative_tokens + 1
        return spine_tokens <= most and self.sizes.find(num_tokens, num_requests) is not None

    def start(self, rows: np.ndarray, num_steps: int, fan_out: np.ndarray | None) -> DeviceRun:
        """See `Runner.start`: until the run is done, no other may start and the pages must not be used.

        Every call draws new noise seeds for all rows, so draws are independent between branches and rounds.
        """
        return self._start(StepTokens.gather(self._branches, (), rows), num_steps, fan_out)

    def forward(
        self, spines: SequenceOf[tuple[Sequence, int]], rows: np.ndarray, fan_out: np.ndarray | None
    ) -> tuple[StepTokens, Draw]:
        """See `Runner.forward`."""
        tokens = StepTokens.gather(self._branches, spines, rows)
        run = self._start(tokens, 1, None if fan_out is None else fan_out[None])
        draw = run.take()
        kept = tokens.logit_indices  # after all other spine tokens the next token is known already
        return tokens, Draw(
            draw.candidates[kept],
            draw.candidate_probs[kept],
            draw.drawn[kept],
            draw.draft_probs[kept],
            None if draw.q_token_ids is None else draw.q_token_ids[kept],
            None if draw.q_probs is None else draw.q_probs[kept],
        )

    def _start(self, tokens: StepTokens, num_steps: int, fan_out: np.ndarray | None) -> DeviceRun:
        """Start `num_steps` steps over `tokens`, spine tokens first; num_steps must be 1 if there are spines."""
        began = time.perf_counter()
        pages, branches, rows, spines = self._pages, self._branches, tokens.token_rows, tokens.spines
        pages.carry_out()
        n, m = len(tokens.positions), len(rows)
        num_of_spine = np.array([num_tokens for _, num_tokens in spines], np.int64)
        slots = np.array([sequence.slot for sequence, _ in spines], np.int64)
        owners = np.concatenate([np.repeat(slots, num_of_spine), branches.owner[rows]])
        sampling = tokens.sampling(branches, [sequence for sequence, num in spines for _ in range(num)])
        base, shared = tokens.positions.copy(), tokens.positions + 1
        base[n - m :] = branches.base[rows]
        shared[n - m :] = branches.base[rows] // pages.page_size * pages.page_size
        indices = np.zeros(n, np.int64)
        indices[n - m :] = pages.index(rows)
        order = np.argsort(owners, kind="stable")  # group tokens by request
        place = np.empty_like(order)
        place[order] = np.arange(n)
        requests, counts = np.unique(owners, return_counts=True)
        size = self.sizes.find(n, len(requests))
        if size is None:
            raise ValueError(f"no bucket holds {n} rows of {len(requests)} requests")
        is_cold = size not in self._replays
        replay = self._replay_of(size)
        if fan_out is not None:
            fan_out = np.concatenate([np.zeros((num_steps, n - m), np.int64), fan_out], 1)[:, order]
        self._buffers.load(
            size,
            token_ids=tokens.token_ids[order],
            positions=tokens.positions[order],
            requests=requests,
            starts=np.cumsum([0, *counts]),
            owners=owners[order],
            indices=indices[order],
            steps=(tokens.positions - base)[order],
            shared_lens=shared[order],
            own_lens=(tokens.positions + 1 - shared)[order],
            temperatures=sampling.temperatures[order],
            truncations=sampling.truncations[order],
            bias_rows=sampling.biases[order],
            seeds=self._random.integers(1 << 63, size=n),
            target_seeds=sampling.noise_seeds[order],
            foreseen=(sampling.noise_kinds == HASHED_NOISE)[order],
            fan_out=fan_out,
        )
        sampled = bool(sampling.temperatures.any())
        return DeviceRun(
            self._buffers, replay, size, tokens.rows, place, num_steps, sampled, None if is_cold else began
        )

    def _replay_of(self, size: BucketSize) -> Replay:
        if size not in self._replays:
            buffers = self._buffers
            buffers.clear(size)
            self._replays[size] = self._graphs.capture(lambda: buffers.step(size))
            buffers.clear(size)
        return self._replays[size]


class DeviceRun:
    """Steps of `rows` in progress; call `take` for each until `is_done`.

    Since the device also works between two calls of `take`, a step's time is measured from the previous `take`.
    began: start of the first step, None if it was just compiled or captured, so that its time is not representative
    """

    def __init__(
        self,
        buffers: _Buffers,
        replay: Replay,
        size: BucketSize,
        rows: np.ndarray,
        place: np.ndarray,
        num_steps: int,
        sampled: bool,
        began: float | None,
    ) -> None:
        self.rows = rows
        self.step_s: float | None = None
        self._began = began
        self._buffers, self._replay, self._size = buffers, replay, size
        self._place = place  # index of each token in the bucket
        self._num_steps, self._num_launched, self._num_taken = num_steps, 0, 0
        self._sampled = sampled

    @property
    def is_done(self) -> bool:
        """Whether every step has been taken."""
        return self._num_taken == self._num_steps

    def is_ready(self) -> bool:
        """Launch the next step if needed, wait for it up to WAIT_S, and return whether it is done."""
        self._launch(self._num_taken)
        return self._buffers.is_drawn(self._num_taken, WAIT_S)

    def take(self) -> Draw:
        """Wait for the next step and return its draw for `rows`; launches the step after it first."""
        step = self._num_taken
        self._launch(step)
        self._buffers.wait(step)
        if step + 1 < self._num_steps:
            self._launch(step + 1)
        drawn = (values[self._place] for values in self._buffers.drawn(step))
        token_ids, draft_probs, candidate_ids, candidate_probs, q_token_ids, q_probs = drawn
        self._num_taken += 1
        now = time.perf_counter()
        self.step_s, self._began = None if self._began is None else now - self._began, now
        return Draw(
            candidate_ids,
            candidate_probs,
            token_ids,
            draft_probs,
            q_token_ids if self._sampled else None,
            q_probs if self._sampled else None,
        )

    def stop(self) -> None:
        """Launch no more steps; a step that has been launched must still be taken."""
        self._num_steps = self._num_launched

    def _launch(self, step: int) -> None:
        if step == self._num_launched:
            self._buffers.launch(step, self._replay, self._size, self._sampled)
            self._num_launched += 1


def warm_up_attention(model: PagedModel, trees: Trees) -> None:
    """Run forwards over padding that launch tree attention with every tile size."""

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=model.device)

    for log_rows in range(MAX_TILE.bit_length()):
        num_rows = 1 << log_rows
        with torch.inference_mode():
            model.forward(
                TreeBatch(
                    token_ids=zeros(num_rows),
                    positions=zeros(num_rows, dtype=torch.int64),
                    slots=zeros(num_rows, dtype=torch.int64) - 1,
                    page_tables=zeros(1, trees.page_tables.shape[1]),
                    query_start_loc=zeros(2),
                    shared_lens=zeros(num_rows),
                    own_pages=zeros(num_rows, trees.branch_pages.shape[2]),
                    own_lens=zeros(num_rows),
                    max_shared_len=trees.max_len,
                    max_rows=num_rows,
                    logit_indices=zeros(1, dtype=torch.int64),
                )
            )


class _Buffers:
    """Device buffers for the largest bucket, and the step that runs over a prefix of them."""

    def __init__(self, model: PagedModel, pages: DevicePages, largest: BucketSize, sampling: dict) -> None:
        self._model, self._trees, self._sampling = model, pages.trees, sampling
        num_rows, num_requests = largest.rows, largest.requests
        device = self._device = torch.device(model.device)
        most_steps = pages.trees.slots.shape[2]
        self._most_rows = largest.rows_per_request

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
            "bias_rows": zeros(num_rows, dtype=torch.int32),
            "seeds": zeros(num_rows),
            "target_seeds": zeros(num_rows),
            "foreseen": zeros(num_rows, dtype=torch.int32),
        }
        self._fan_out = zeros(most_steps, num_rows, dtype=torch.int32)
        self._done = zeros(1)  # steps since the last load
        top_m, self._on_gpu = sampling["top_m"], device.type == "cuda"
        num_candidates = sampling["num_candidates"]
        self._drawn = (  # token ids and their probabilities, candidates' and q's ids and probabilities
            zeros(most_steps, num_rows, dtype=torch.int32),
            zeros(most_steps, num_rows, dtype=torch.float32),
            zeros(most_steps, num_rows, num_candidates, dtype=torch.int32),
            zeros(most_steps, num_rows, num_candidates, dtype=torch.float32),
            zeros(most_steps, num_rows, top_m, dtype=torch.int32),
            zeros(most_steps, num_rows, top_m, dtype=torch.float32),
        )
        self._on_host = [torch.empty_like(drawn, device="cpu", pin_memory=self._on_gpu) for drawn in self._drawn]
        self._copied = [torch.cuda.Event() for _ in range(most_steps)] if self._on_gpu else []
        self._copies = torch.cuda.Stream(device) if self._on_gpu else None
        self._down_weighted = False  # whether `_fan_out` is nonzero

    def load(self, size: BucketSize, *, fan_out: np.ndarray | None, **inputs: np.ndarray) -> None:
        """Fill a bucket's part of the buffers; padding rows and requests read and write no KV."""
        num_rows = len(inputs["token_ids"])
        for name, values in inputs.items():
            buffer = self._part(name, size)
            padded = np.zeros(buffer.shape, values.dtype)
            padded[: len(values)] = values
            if name == "starts":  # padding requests are empty
                padded[len(values) :] = num_rows
            self._fill(buffer, padded)
        if fan_out is not None or self._down_weighted:
            self._down_weighted = fan_out is not None
            padded = np.zeros(self._fan_out.shape, np.int32)
            if fan_out is not None:
                padded[: len(fan_out), :num_rows] = fan_out
            self._fill(self._fan_out, padded)
        self._done.zero_()

    def clear(self, size: BucketSize) -> None:
        """Fill a bucket with padding."""
        for name in self._inputs:
            self._part(name, size).zero_()
        self._done.zero_()

    def _part(self, name: str, size: BucketSize) -> torch.Tensor:
        length = {"requests": size.requests, "starts": size.requests + 1}.get(name, size.rows)
        return self._inputs[name][:length]

    def _fill(self, buffer: torch.Tensor, values: np.ndarray) -> None:
        host = torch.from_numpy(values).to(buffer.dtype)
        buffer.copy_(host.pin_memory() if self._on_gpu else host, non_blocking=True)

    def launch(self, step: int, replay: Replay, size: BucketSize, sampled: bool) -> None:
        """Launch step number `step` of the loaded batch, and the copy of its draws, which overlaps the next step."""
        replay()
        buffers = [(drawn[step, : size.rows], on_host[step, : size.rows]) for drawn, on_host in self._drawn_on_host()]
        if self._copies is None:
            for drawn, on_host in buffers if sampled else buffers[:_NUM_GREEDY]:
                on_host.copy_(drawn)
            return
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            for drawn, on_host in buffers if sampled else buffers[:_NUM_GREEDY]:
                on_host.copy_(drawn, non_blocking=True)
            self._copied[step].record()

    def _drawn_on_host(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(self._drawn, self._on_host))

    def is_drawn(self, step: int, timeout_s: float) -> bool:
        """Whether a launched step's draws are on the host, after waiting for up to `timeout_s`."""
        if not self._copied:
            return True
        deadline = time.perf_counter() + timeout_s
        while not self._copied[step].query():
            if time.perf_counter() > deadline:
                return False
        return True

    def wait(self, step: int) -> None:
        """Wait until a launched step's draws are on the host."""
        if self._copied:
            self._copied[step].synchronize()

    def drawn(self, step: int) -> tuple[np.ndarray, ...]:
        """A step's draws after `wait`: ids and probabilities [B] of tokens, then [B, C] of candidates, [B, M] of q.

        q is valid only if any row samples. The arrays are views that a later run overwrites.
        """
        return tuple(on_host[step].numpy() for on_host in self._on_host)

    @torch.inference_mode()
    def step(self, size: BucketSize) -> None:
        """One step over the rows of a bucket; rows with `own_lens` 0 are spine tokens or padding."""
        trees = self._trees
        inputs = {name: self._part(name, size) for name in self._inputs}
        owners, indices, steps = inputs["owners"], inputs["indices"], inputs["steps"]
        own_lens, shared_lens, positions = inputs["own_lens"], inputs["shared_lens"], inputs["positions"]
        is_branch, page_size = own_lens > 0, trees.page_size
        spine_page = trees.page_tables[owners, positions // page_size].long()
        branch_slot = trees.slots[owners, indices, steps.clamp(max=trees.slots.shape[2] - 1)]
        slots = torch.where(is_branch, branch_slot, spine_page * page_size + positions % page_size)
        logits = self._model.forward(
            TreeBatch(
                token_ids=inputs["token_ids"],
                positions=positions,
                slots=slots.masked_fill(own_lens + shared_lens == 0, -1),
                page_tables=trees.page_tables[inputs["requests"]],
                query_start_loc=inputs["starts"],
                shared_lens=shared_lens,
                own_pages=trees.branch_pages[owners, indices],
                own_lens=own_lens,
                max_shared_len=trees.max_len,
                max_rows=min(size.rows, self._most_rows),
                logit_indices=None,
            )
        )
        fan_out = self._fan_out.index_select(0, self._done)[0, : size.rows]
        drawn = sample(
            logits,
            inputs["temperatures"],
            inputs["seeds"],
            positions,
            fan_out,
            truncations=inputs["truncations"],
            bias_rows=inputs["bias_rows"],
            target_seeds=inputs["target_seeds"],
            foreseen=inputs["foreseen"],
            **self._sampling,
        )
        of_tokens, of_q = (drawn.token_ids, drawn.draft_probs), (drawn.q_token_ids, drawn.q_probs)
        of_candidates = drawn.candidate_ids, drawn.candidate_probs
        for buffer, values in zip(self._drawn, of_tokens + of_candidates + of_q):
            buffer[:, : size.rows].index_copy_(0, self._done, values[None])
        inputs["token_ids"].copy_(drawn.token_ids)
        for counter in (positions, steps, own_lens):
            counter += is_branch.to(counter.dtype)
        self._done += 1
