"""Make the noise of sampled requests known before their rounds, on vLLM's V1 runner on a CPU.

vLLM draws the tokens of all requests without a seed from one generator, so a request's noise depends on the whole
batch. Here such a request gets a generator of its own, as a request with a seed has, which is seeded before each round
by its random seed and its committed length. The distribution stays that of vLLM, and the drafter can repeat the draws
(`link.noise.Replay`). Requests with a seed of their user's keep their generator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from vllm.platforms import current_platform

from vllm_ssd.link.noise import Replay, round_seed
from vllm_ssd.link.protocol import NO_NOISE, SEEDED_NOISE, Noise

_TRIES = 8
"""Draws that must be as expected before vLLM's sampler is trusted to be the known one."""


class SeededRounds:
    """The random seeds of a runner's requests; all ranks of a group draw the same ones, as they do vLLM's own noise."""

    def __init__(self) -> None:
        self._is_known: bool | None = None  # whether the runner draws as the drafter expects; None until it is asked
        self._seeds: dict[str, int] = {}
        self._generators: list[torch.Generator] = []

    def start(self, runner: Any, request_id: str, params: Any) -> Noise:
        """The noise of a new request of vLLM's V1 model runner with these `SamplingParams`."""
        if params.temperature < 1e-5 or params.seed is not None:
            return NO_NOISE
        if self._is_known is None:
            self._is_known = current_platform.is_cpu() and _draws_as_expected(runner)
        if not self._is_known:
            return NO_NOISE
        seed = self._seeds[request_id] = int(torch.randint(2**63 - 1, (1,)))
        return Noise(SEEDED_NOISE, seed)

    def finish(self, request_ids: Iterable[str]) -> None:
        """Forget requests that have ended; unknown ones are ignored."""
        for request_id in request_ids:
            self._seeds.pop(request_id, None)

    @contextlib.contextmanager
    def seeded(self, batch: Any) -> Iterator[None]:
        """Let the requests of vLLM's `InputBatch` draw from their own generators, seeded for this round."""
        if not self._seeds:
            yield
            return
        theirs, ours = batch.sampling_metadata.generators, {}
        for row, request_id in enumerate(batch.req_ids):
            seed = self._seeds.get(request_id)
            if seed is None or row in theirs:
                continue
            if row >= len(self._generators):
                self._generators += [torch.Generator() for _ in range(row + 1 - len(self._generators))]
            ours[row] = self._generators[row].manual_seed(round_seed(seed, int(batch.num_tokens_no_spec[row])))
        theirs.update(ours)
        try:
            yield
        finally:
            for row in ours:
                del theirs[row]


def _draws_as_expected(runner: Any) -> bool:
    """Whether vLLM's V1 model runner draws the token after the last draft as `Replay` does."""
    logits = torch.randn(_TRIES, 97, generator=torch.Generator().manual_seed(0))
    token_ids = np.arange(logits.shape[1])
    expected = [int((row.numpy() + Replay(i, 0, 0).after_last(token_ids)).argmax()) for i, row in enumerate(logits)]
    generators = {i: torch.Generator().manual_seed(round_seed(i, 0)) for i in range(_TRIES)}
    try:
        drawn, _ = runner.sampler.topk_topp_sampler(logits.clone(), generators, None, None)
        return drawn.tolist() == expected
    except Exception:  # another vLLM's sampler, which is not known
        return False
