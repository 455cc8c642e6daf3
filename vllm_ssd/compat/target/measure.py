"""Access to the internals of an in-process vLLM engine, for measurements and tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from vllm import LLMEngine

from vllm_ssd.compat.target import runner_v1
from vllm_ssd.compat.target.seeded_rounds import SeededRounds

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.core_client import InprocClient


def _core(engine: LLMEngine) -> EngineCore:
    return cast("InprocClient", engine.engine_core).engine_core


def scheduler(engine: LLMEngine) -> Any:
    """The engine's scheduler."""
    return _core(engine).scheduler


def proposer(engine: LLMEngine) -> Any:
    """V1's drafter or V2's speculator; None without speculation or with several workers."""
    worker = getattr(_core(engine).model_executor, "driver_worker", None)
    runner = getattr(getattr(worker, "worker", None), "model_runner", None)
    return getattr(runner, "drafter", None) or getattr(runner, "speculator", None)


class ConstantDrafts:
    """A `custom_class` proposer of free drafts; the number per round is the prompt's first token id."""

    def __init__(self, vllm_config: Any) -> None:
        runner_v1.install(ConstantDrafts)
        self.seeded_rounds = SeededRounds()
        self._most = vllm_config.speculative_config.num_speculative_tokens

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to load."""

    def on_schedule(self, started: Sequence[Any], finished: Sequence[str]) -> None:
        """Not needed: requests are not tracked."""

    def on_rows(self, request_ids: Sequence[str], num_verified: Sequence[int]) -> None:
        """Not needed: rows are not identified."""

    def proposals(self, *args: Any) -> None:
        """Every draft is one-hot."""

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens: np.ndarray,
        token_ids: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts of token 1 for every row that decodes."""
        return [[1] * min(int(token_ids[i, 0]), self._most) if s else [] for i, s in enumerate(sampled_token_ids)]
