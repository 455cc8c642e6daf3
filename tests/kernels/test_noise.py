"""The noise of vLLM's V2 runner, against vLLM's own functions."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from cases import DEVICE, ints, reference

from vllm_ssd.compat.version import minor_of
from vllm_ssd.drafter.noise import philox_uniform
from vllm_ssd.kernels import hashed_gumbel, sample
from vllm_ssd.kernels.noise import add_hashed_gumbel, hashed_uniform

pytestmark = [
    pytest.mark.compat,
    pytest.mark.skipif(minor_of(version("vllm")) < (0, 31), reason="vLLM draws this noise from Philox before 0.31"),
]
SEEDS = (0, 1, -1, 42, -7, 2**31, 2**32 + 5, -(2**62) - 3, 2**63 - 1, -(2**63))
POSITIONS = (0, 5, 2**16, 70000, 2**31 + 1)
TOKEN_IDS = (0, 1, 63, 31999, 151935, 2**31 - 1)
LOWEST, HIGHEST = (-7, 70000, 5537269), (-7, 70000, 87796413)
"""Seed, position and token id where the uniform number rounds to 1, and where it is as small as it can be."""


@pytest.fixture
def vllm_gumbel(interpreter: None) -> ModuleType:
    """vLLM's module, with the Triton that runs here; vLLM itself takes none on a CPU."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / "v1/worker/gpu/sample/gumbel.py"
    spec = importlib.util.spec_from_file_location("gumbel_of_vllm", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vllm.triton_utils", SimpleNamespace(tl=tl, triton=triton, tldevice=None))
        spec.loader.exec_module(module)
    return module


def _both(
    seeds_ptr,
    positions_ptr,
    token_ids_ptr,
    uniform_ptr,
    noise_ptr,
    size,
    UNIFORM: tl.constexpr,
    OUR_UNIFORM: tl.constexpr,
    ARGMAX: tl.constexpr,
    ADD: tl.constexpr,
):
    """One program an element: uniform numbers and noise of vLLM in rows 0, ours in rows 1."""
    i = tl.program_id(0)
    seed, position = tl.load(seeds_ptr + i), tl.load(positions_ptr + i)
    token_ids = tl.load(token_ids_ptr + i + tl.arange(0, 1))
    place = i + tl.arange(0, 1)
    tl.store(uniform_ptr + place, UNIFORM(seed, position, token_ids))
    tl.store(uniform_ptr + size + place, OUR_UNIFORM(seed, position, token_ids))
    zero = tl.zeros([1], tl.float32)
    noise, _ = ARGMAX(zero, token_ids, token_ids >= 0, seed, position, 1.0, IS_DRAFTING=False, USE_FP64=False)
    tl.store(noise_ptr + i, noise)
    tl.store(noise_ptr + size + place, ADD(zero, seed, position, token_ids))


def test_noise_is_that_of_vllm(vllm_gumbel: ModuleType):
    """Of negative and large seeds, far positions, and where the uniform number is next to 0 and rounds to 1."""
    cases = [*itertools.product(SEEDS, POSITIONS, TOKEN_IDS), LOWEST, HIGHEST]
    seeds, positions, token_ids = ints(cases, torch.int64).to(DEVICE).T.contiguous()
    uniform = torch.empty(2, len(cases), device=DEVICE)
    noise = torch.empty(2, len(cases), device=DEVICE)
    functions = vllm_gumbel.murmur3_uniform32, hashed_uniform, vllm_gumbel.gumbel_noised_argmax, add_hashed_gumbel
    triton.jit(_both)[(len(cases),)](seeds, positions, token_ids.int(), uniform, noise, len(cases), *functions)
    assert uniform[0, -2] == 1 and uniform[0, -1] < 1e-8
    assert torch.equal(uniform[1], uniform[0])
    torch.testing.assert_close(noise[1], noise[0], atol=1e-6, rtol=2e-7)
    for device in {"cpu", DEVICE}:
        ours = hashed_gumbel(seeds.to(device), positions.to(device), token_ids.to(device))
        torch.testing.assert_close(ours.cpu(), noise[0].cpu(), atol=4e-6, rtol=0)


def _accept(seeds_ptr, positions_ptr, uniform_ptr, RAND: tl.constexpr):
    i = tl.program_id(0)
    tl.store(uniform_ptr + i, RAND(tl.load(seeds_ptr + i), tl.load(positions_ptr + i), includes_zero=False))


def test_uniform_numbers_of_drafts_are_those_of_vllm(vllm_gumbel: ModuleType):
    cases = [(seed, position) for seed in SEEDS for position in (0, 1, 5, 2**16, 70000)]
    seeds, positions = ints(cases, torch.int64).to(DEVICE).T.contiguous()
    uniform = torch.empty(len(cases), device=DEVICE)
    triton.jit(_accept)[(len(cases),)](seeds, positions, uniform, vllm_gumbel.tl_rand32)
    expected = torch.tensor([philox_uniform(seed, position) for seed, position in cases])
    torch.testing.assert_close(expected, uniform.cpu(), atol=1e-7, rtol=1e-6)


def test_noise_is_broadcast():
    seeds, positions = ints(SEEDS, torch.int64)[:, None], ints(range(10), torch.int64)[:, None]
    token_ids = ints(range(100))
    together = hashed_gumbel(seeds, positions, token_ids)
    assert together.shape == (10, 100) and together.dtype == torch.float32
    for i in range(10):
        assert torch.equal(together[i], hashed_gumbel(seeds[i], positions[i], token_ids))
    assert torch.equal(together[3, 7], hashed_gumbel(seeds[3, 0], positions[3, 0], token_ids[7]))


def test_the_first_candidate_is_what_vllm_draws(vllm_gumbel: ModuleType):
    """With the same logits, at the position that the logits follow."""
    rows, vocab_size = 12, 1003
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(8)).to(DEVICE) * 3
    temperatures = torch.linspace(0.3, 2.0, rows, device=DEVICE)
    seeds, positions = ints([3**i for i in range(rows)], torch.int64).to(DEVICE), torch.arange(rows).to(DEVICE) * 9999
    drawn = vllm_gumbel.gumbel_sample(
        logits,
        torch.arange(rows, device=DEVICE),
        temperatures,
        seeds,
        positions,
        apply_temperature=True,
        is_drafting=False,
    )
    ones = torch.ones(rows, dtype=torch.int32, device=DEVICE)
    for ops in (contextlib.nullcontext, reference):
        with ops():
            args = logits, temperatures, seeds + 1, positions, ones
            got = sample(*args, top_m=4, num_candidates=3, target_seeds=seeds, foreseen=ones)
        assert torch.equal(got.candidate_ids[:, 0], drawn.int())
    assert (got.q_token_ids[:, 0] != drawn).sum() >= rows // 3, "the noise decides nothing"
