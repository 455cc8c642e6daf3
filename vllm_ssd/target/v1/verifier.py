"""The target's side of SSD on the V1 runner: look up drafts for each outcome, and report outcomes to the drafter.

Tokens are only decided by vLLM's rejection sampler. Nothing here waits for the drafter except missed rows, and those
only for a bounded time.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from vllm_ssd.compat.target.runner_v1 import StartedRequest
from vllm_ssd.config import SSDConfig
from vllm_ssd.link.fleet import Fleet
from vllm_ssd.link.protocol import Proposal, Push, PushedBlock, SpeculationBlock
from vllm_ssd.policy import Adaptation
from vllm_ssd.target.metrics import Metrics
from vllm_ssd.target.requests import DrafterClient
from vllm_ssd.target.v1.fallback import Fallback
from vllm_ssd.target.v1.request import Request
from vllm_ssd.target.v1.round import Batch, Round


class Verifier:
    """Turns outcomes into drafts for one vLLM worker."""

    def __init__(self, config: SSDConfig, fleet: Fleet, metrics: Metrics) -> None:
        self._config = config
        self._metrics = metrics
        self._requests: dict[str, Request] = {}
        self._client = DrafterClient(config, fleet, metrics, self._keep_blocks)
        self._adaptation = Adaptation(config.num_speculative_tokens)
        self._fallback = Fallback(config, self._adaptation)
        self._last_round: Round | None = None

    def start_requests(self, requests: Iterable[StartedRequest]) -> None:
        """Open requests on the drafter while the target prefills them, except those without token ids."""
        for new in requests:
            if not new.token_ids:
                continue
            temperature = new.temperature if new.temperature >= 1e-5 else 0.0
            remote = self._client.add(new.request_id, temperature, new.truncation, new.cache_salt, new.noise)
            self._requests[new.request_id] = Request(remote, len(new.token_ids) + new.min_tokens)
            if self._num_drafts(len(self._requests)):
                self._client.open(remote, new.token_ids)
        self._client.send(self._config.num_speculative_tokens)

    def finish_requests(self, request_ids: Iterable[str]) -> None:
        """Close requests; the drafter is told with the next step, or at once if no requests are left."""
        for request_id in request_ids:
            if self._requests.pop(request_id, None) is not None:
                self._client.close(request_id)
        if not self._requests:
            self._client.send(self._config.num_speculative_tokens)

    def propose(self, batch: Batch) -> list[list[int]]:
        """Drafts for the next round of every row, `[]` if there are none."""
        started_s = time.perf_counter()
        self._client.begin_round()
        self._client.poll()
        self._observe(batch, started_s)
        round_ = Round(started_s, batch, self._num_drafts(sum(map(bool, batch.sampled_token_ids))))
        if round_.num_drafts:
            round_.look_up(self._requests, self._client)
            self._fallback.decide(round_, len(self._requests), self._client)
        round_.tell(self._client)
        if round_.waiting:
            self._metrics.waited(self._fallback.wait(round_, self._client))
        proposed = round_.hand_over()
        round_.drafter_in_time = self._client.in_time
        self._last_round = round_
        if not round_.waiting:
            self._metrics.handed_over(time.perf_counter() - started_s)
        self._metrics.log()
        return proposed

    def proposals(
        self, request_ids: Sequence[str], num_tokens: Sequence[int], draft_token_ids: list[list[int]]
    ) -> list[list[Proposal | None]] | None:
        """The proposal of each draft under verification, or None if no draft has one.

        num_tokens [B]: committed lengths before this round; draft_token_ids [B]: lists as vLLM verifies them, either a
        prefix of what was handed over at that length or filler, for which no proposal may be claimed.
        """
        found: list[list[Proposal | None]] = []
        for request_id, length, drafts in zip(request_ids, num_tokens, draft_token_ids):
            request = self._requests.get(request_id)
            found.append([None] * len(drafts) if request is None else request.known_proposals(length, drafts))
        return found if any(p is not None for row in found for p in row) else None

    def _num_drafts(self, batch_size: int) -> int:
        return self._adaptation.choose(batch_size) if self._config.adaptive else self._config.num_speculative_tokens

    def _keep_blocks(self, push: Push, blocks: list[SpeculationBlock], firsts: list[int]) -> None:
        for block, first in zip(blocks, firsts):
            self._requests[block.request_id].blocks.append(PushedBlock(block, push, first))

    def _observe(self, batch: Batch, now_s: float) -> None:
        """Count accepted drafts, and learn from pure decode rounds that directly follow one of the same requests."""
        last, self._last_round = self._last_round, None
        accepted: list[int] = []
        num_drafted: list[int] = []
        all_decoded = True
        for request_id, sampled in zip(batch.request_ids, batch.sampled_token_ids):
            accepted.append(len(sampled) - 1 if sampled else 0)
            all_decoded = all_decoded and bool(sampled)
            request = self._requests.get(request_id)
            num_drafted.append(self._config.num_speculative_tokens if request is None else request.num_drafted)
        self._metrics.accepted(batch.num_verified, accepted)
        seconds = None
        if (
            last is not None
            and all_decoded
            and last.request_ids == batch.request_ids
            and self._client.connected  # rounds without a drafter say nothing about speculation
        ):
            seconds = now_s - last.started_s
            self._adaptation.observe(
                len(accepted), last.num_drafts, batch.num_verified, accepted, seconds, last.drafter_in_time
            )
        self._fallback.observe(num_drafted, batch.num_verified, accepted, seconds)
