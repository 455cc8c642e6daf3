"""The proposer that vLLM's V1 worker constructs for speculative method "ssd"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group

from vllm_ssd.compat.target import runner_v1
from vllm_ssd.compat.target.runner_v1 import StartedRequest
from vllm_ssd.compat.target.seeded_rounds import SeededRounds
from vllm_ssd.link.protocol import Proposal
from vllm_ssd.target.start import start_drafters, user_config
from vllm_ssd.target.v1.round import Batch
from vllm_ssd.target.v1.verifier import Verifier


class SSDProposer:
    """A vLLM `custom_class` proposer: runs a `Verifier` on tensor-parallel rank 0 and does nothing on other ranks."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        runner_v1.install(SSDProposer)
        self.seeded_rounds = SeededRounds()
        self._verifier: Verifier | None = None
        self._request_ids: Sequence[str] = ()
        self._num_verified: Sequence[int] = ()
        if get_tp_group().rank_in_group != 0:
            return
        config = user_config(vllm_config)
        self._metrics, self._drafters = start_drafters(config, vllm_config)
        self._verifier = Verifier(config, self._drafters, self._metrics)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the drafter, which has been loading in parallel; vLLM calls this once the target is loaded."""
        if self._verifier is not None:
            self._drafters.wait_until_ready()

    def on_schedule(
        self,
        started: Sequence[StartedRequest],
        finished: Sequence[str],
    ) -> None:
        """Note requests that join or leave, before the target's forward."""
        if self._verifier is not None:
            self._verifier.finish_requests(finished)
            self._verifier.start_requests(started)

    def on_rows(self, request_ids: Sequence[str], num_verified: Sequence[int]) -> None:
        """Note the requests in the rows of the next `propose`, and how many drafts of each were verified."""
        self._request_ids, self._num_verified = request_ids, num_verified

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts for each row; see `Verifier.propose`."""
        if self._verifier is None:
            return [[] for _ in sampled_token_ids]
        return self._verifier.propose(
            Batch(list(self._request_ids), self._num_verified, sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
        )

    def proposals(
        self, request_ids: Sequence[str], num_tokens: Sequence[int], draft_token_ids: list[list[int]]
    ) -> list[list[Proposal | None]] | None:
        """The distributions of the drafts under verification; see `Verifier.proposals`."""
        assert self._verifier is not None  # only rank 0 is asked
        return self._verifier.proposals(request_ids, num_tokens, draft_token_ids)
