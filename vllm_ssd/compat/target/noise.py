"""The noise with which vLLM's V2 runner draws a request's tokens, which its drafter can foresee.

A token is the argmax of `logits / temperature + noise`. The Gumbel noise is a hash of the request's seed, the token's
id, and a position: the index in the request of the row's input token, be it the last of the prompt, the last one
emitted, or a draft. M-RoPE's positions play no part.

FlashInfer draws with other noise. vLLM takes it in a batch without drafts or filler, such as one of prompts alone, if a
row has top-k or top-p, and none is greedy or has a seed of its own. The drafter foresees such a token wrongly.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_ssd.link.protocol import HASHED_NOISE, NO_NOISE, UNKNOWN_NOISE, Noise

VOCAB_SIZE = 4096
DRAWS = (
    (0, 0, 887),
    (1, 1, 2631),
    (1, 2, 465),
    (7, 1000, 3111),
    (2**40 + 5, 77, 733),
    (-1, 3, 949),
    (-(2**63), 40_000, 3978),
    (2**62 + 9, 131_071, 2136),
)
"""Seed, position, and the token that the noise we know draws from `VOCAB_SIZE` equal logits."""


def noise_kind(runner: Any) -> int:
    """The kind of `Noise` of the target that is loaded, found out by drawing some tokens."""
    if type(runner.sampler) is not Sampler or type(runner.rejection_sampler) is not RejectionSampler:
        return UNKNOWN_NOISE  # a watermark, or a model that samples by itself
    seeds, positions, expected = zip(*DRAWS)
    drawn = gumbel_sample(
        torch.zeros(len(DRAWS), VOCAB_SIZE, dtype=torch.float32, device=runner.device),
        torch.arange(len(DRAWS), device=runner.device),
        torch.ones(len(DRAWS), dtype=torch.float32, device=runner.device),
        torch.tensor(seeds, device=runner.device),
        torch.tensor(positions, device=runner.device),
        apply_temperature=False,
        is_drafting=False,
        use_fp64=runner.sampler.use_fp64_gumbel,
    )
    return HASHED_NOISE if drawn.tolist() == list(expected) else UNKNOWN_NOISE


def noise_of(runner: Any, slot: int, kind: int) -> Noise:
    """The noise of the request in `slot`, as the last `add_requests` has left it; none at temperature 0.

    vLLM draws a seed for a request that has none, and another one when it resumes the request.
    """
    states = runner.sampler.sampling_states
    if kind == UNKNOWN_NOISE or states.temperature.np[slot] == 0:
        return NO_NOISE
    return Noise(kind, int(states.seeds.np[slot]))
