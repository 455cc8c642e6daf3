"""Blocks and old drafts for the tests of `lookup`, and a query that compares the kernel with the reference."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace

import numpy as np
import torch
from cases import DEVICE, ints, reference, to

from vllm_ssd.kernels import OUTCOME_COLUMNS, DeviceBlocks, DeviceSpeculation, lookup

S, N, K = 5, 6, 3
BLOCK_FIELDS = [f.name for f in dataclasses.fields(DeviceBlocks) if not f.name.startswith("_")]


def block(rng: random.Random, n: int, top_m: int, depth: int = K) -> tuple[torch.Tensor, ...]:
    """Outcomes [n, 2], depths, drafts and q of a block of `n` branches."""
    keys = rng.sample([(k, token) for k in range(K + 1) for token in range(9)], n)
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    return (
        ints(keys).reshape(n, 2),
        torch.full((n,), depth, dtype=torch.int32),
        torch.randint(0, 50, (n, depth), dtype=torch.int32, generator=generator),
        torch.randint(0, 50, (n, depth, top_m), dtype=torch.int32, generator=generator),
        torch.rand(n, depth, top_m, generator=generator) + 0.1,
    )


def speculation(rng: random.Random, rows: int, top_m: int) -> DeviceSpeculation:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    return DeviceSpeculation(
        torch.randint(10, 20, (rows, K), dtype=torch.int32, generator=generator),
        torch.randint(0, 50, (rows, K, top_m), dtype=torch.int32, generator=generator),
        torch.rand(rows, K, top_m, generator=generator) + 0.1,
        ints([rng.randint(0, K) for _ in range(rows)]),
    )


def nothing(rows: int, top_m: int) -> DeviceSpeculation:
    return dataclasses.replace(speculation(random.Random(0), rows, top_m), num_drafts=ints([0] * rows))


def write(
    blocks: DeviceBlocks,
    slot: int,
    epoch: int,
    length: int,
    outcomes: torch.Tensor,
    depths: torch.Tensor,
    draft_token_ids: torch.Tensor,
    q_token_ids: torch.Tensor | None = None,
    q_probs: torch.Tensor | None = None,
) -> None:
    """What `DeviceBlocks.write` makes of [n, d] drafts of one request, n <= N and d <= K."""
    n, depth = draft_token_ids.shape if q_probs is not None else (0, 0)
    blocks.write(
        np.array([slot]),
        np.array([[epoch, length]]),
        on_host(blocks, [(outcomes, depths, draft_token_ids)]),
        np.zeros(1, bool),
        (K * (slot * N + np.arange(n)[:, None]) + np.arange(depth)).flatten(),
        np.full(n * depth, slot),
        [q_token_ids.numpy()] if n else [],
        [q_probs.numpy()] if n else [],
    )


def on_host(blocks: DeviceBlocks, contents: list[tuple[torch.Tensor, ...]]) -> np.ndarray:
    """Outcomes, depths and drafts of some requests as `DeviceBlocks.write` takes them."""
    branches = blocks.host_branches()[: len(contents)]
    for rows, (outcomes, depths, draft_token_ids) in zip(branches, contents):
        n, depth = draft_token_ids.shape
        rows[:2].reshape(N, 2)[:n] = outcomes
        rows[2, :n] = depths
        rows[3 : 3 + K].reshape(N, K)[:n, :depth] = draft_token_ids
    return branches


def look_up(
    blocks: DeviceBlocks,
    queries: list[tuple[int, int, int, int, int]],
    old: DeviceSpeculation,
    *,
    temperature: float = 1.0,
    wanted: int = K,
    ngram: torch.Tensor | None = None,
) -> SimpleNamespace:
    """`queries` of (slot, epoch, length, accept length, last token); the kernel must agree with the reference.

    Each query gets a slot of its own, with a copy of the slot's blocks, in an order that is not the batch's; after them
    comes a row of padding. found, branches, num_drafts, num_drafted (before the n-gram drafts), drafts (without filler)
    and q are in the batch's order.
    """
    n = len(queries)
    order = random.Random(n).sample(range(n + 1), n + 1)  # the last one stays empty
    place = torch.tensor(order[:n], dtype=torch.int64)
    source = torch.zeros(n + 1, dtype=torch.int64)
    source[place] = ints([query[0] for query in queries], torch.int64)
    blocks = dataclasses.replace(blocks, **{name: getattr(blocks, name)[source] for name in BLOCK_FIELDS})
    epochs, lengths, accept_lengths, last = ints([query[1:] for query in queries], torch.int64).reshape(n, 4).unbind(1)
    num_sampled = (accept_lengths + 1).int()

    def by_slot(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        field = torch.zeros(n + 1, *values.shape[1:], dtype=dtype)
        field[place] = values.to(dtype)
        return field

    verifying = DeviceSpeculation(
        *(by_slot(getattr(old, f.name), getattr(old, f.name).dtype) for f in dataclasses.fields(old))
    )
    rest = dict(
        slots=torch.cat((place, torch.tensor([-1]))),
        num_sampled=torch.cat((num_sampled, ints([2]))),
        epochs=by_slot(epochs, torch.int64),
        total_lens=by_slot(lengths + num_sampled, torch.int32),
        last_sampled=by_slot(last, torch.int64)[:, None],
        temperatures=torch.full((n + 1,), temperature),
        drafts=torch.full((n + 2, 1 + K), 99, dtype=torch.int64),
        outcomes=torch.full((n + 2, OUTCOME_COLUMNS + K), 99, dtype=torch.int32),
        ngram=None if ngram is None else torch.cat((ngram, ngram.new_zeros(1, K))),
    )

    def call(device: str) -> tuple[torch.Tensor, torch.Tensor, DeviceSpeculation]:
        tensors = {k: v if v is None else v.to(device, copy=True) for k, v in rest.items()}
        state = to(verifying, device)
        lookup(to(blocks, device), state, wanted=wanted, **tensors)
        return tensors["drafts"].cpu(), tensors["outcomes"].cpu(), to(state, "cpu")

    got = call(DEVICE)
    with reference():
        want = call("cpu")
    (drafts, outcomes, state), means = want, torch.arange(K) < want[2].num_drafts[:, None]
    for one, other in zip(
        (*got[:2], got[2].num_drafts, got[2].draft_token_ids), (*want[:2], state.num_drafts, state.draft_token_ids)
    ):
        assert torch.equal(one, other)
    for name in ("q_token_ids", "q_probs"):
        assert torch.equal(getattr(got[2], name)[means], getattr(state, name)[means])

    assert not drafts[n].any() and not outcomes[n].any() and (drafts[n + 1 :] == 99).all()
    assert torch.equal(state.num_drafts[place], drafts[:n, 0].int()) and not state.num_drafts[order[n]]
    assert torch.equal(outcomes[:n, :2], torch.stack((num_sampled, last.int()), 1))
    assert torch.equal(outcomes[:n, 4], state.num_drafts[place])
    assert ngram is not None or torch.equal(outcomes[:n, 5], outcomes[:n, 4])
    assert torch.equal(outcomes[:n, OUTCOME_COLUMNS:], state.draft_token_ids[place])
    filled = torch.where(means[place], state.draft_token_ids[place], last[:, None])
    assert torch.equal(drafts[:n, 1:], filled)
    return SimpleNamespace(
        found=outcomes[:n, 2].tolist(),
        branches=outcomes[:n, 3].tolist(),
        num_drafts=drafts[:n, 0].tolist(),
        num_drafted=outcomes[:n, 5].tolist(),
        drafts=[row[1 : 1 + row[0]] for row in drafts[:n].tolist()],
        q_token_ids=state.q_token_ids[place],
        q_probs=state.q_probs[place],
    )
