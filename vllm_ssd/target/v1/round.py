"""One round of the batch: which rows hit, which missed, and the drafts of each row's next round.

The round is decided completely before it is reported: rows are looked up, the fallback fills those that missed, and
then the drafter gets one event per row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_ssd.target.requests import DrafterClient
from vllm_ssd.target.v1.request import Request, Speculation


@dataclass(slots=True)
class Batch:
    """A verified round, as vLLM reports it.

    request_ids [B]; num_verified [B]: drafts verified per row; sampled_token_ids [B]: lists of emitted tokens, empty
    for rows still in prefill; num_tokens [B] int32: committed lengths; token_ids [B, max_model_len] int32.
    """

    request_ids: list[str]
    num_verified: Sequence[int]
    sampled_token_ids: list[list[int]]
    num_tokens: np.ndarray
    token_ids: np.ndarray


@dataclass(slots=True)
class Row:
    """A row of the batch whose outcome is known."""

    index: int  # in the batch
    request: Request
    length: int  # committed tokens
    emitted: list[int] | None  # tokens since the last report to the drafter; None if the request must be opened first
    max_drafts: int  # limit for its next round
    drafts: Speculation  # for its next round
    num_ngram: int = 0  # n-gram drafts at the end of `drafts`
    jit: int = 0  # number of just-in-time drafts that it waits for

    def add_ngram(self, token_ids: list[int]) -> None:
        """Append n-gram drafts."""
        drafts = self.drafts
        self.drafts = Speculation(drafts.token_ids + token_ids, drafts.proposals + [None] * len(token_ids))
        self.num_ngram = len(token_ids)


class Round:
    """The rows of a batch that may carry drafts in their next round, at most `num_drafts` each."""

    def __init__(self, started_s: float, batch: Batch, num_drafts: int) -> None:
        self.started_s = started_s
        self.request_ids = batch.request_ids
        self.num_drafts = num_drafts
        self.rows: list[Row] = []
        self.waiting: list[Row] = []
        self.drafter_in_time = False  # whether the drafter had caught up when the round began
        self._batch = batch

    def look_up(self, requests: Mapping[str, Request], client: DrafterClient) -> None:
        """Look up the drafts for each row's outcome; counts hits and misses of held requests."""
        batch = self._batch
        lengths = batch.num_tokens[: len(batch.request_ids)].tolist()
        for index, (request_id, sampled, length) in enumerate(zip(batch.request_ids, batch.sampled_token_ids, lengths)):
            request = requests.get(request_id)
            if not sampled or request is None:
                continue
            remote, told = request.remote, request.remote.length
            max_drafts = request.most_drafts(self.num_drafts, length)
            if length >= told and client.holds(remote):
                emitted = sampled
                if told + len(sampled) != length:  # the drafter missed earlier rounds, or knows some tokens already
                    emitted = batch.token_ids[index, told:length].tolist()
                drafts = request.follow(emitted)
                client.looked_up(remote, hit=bool(drafts.token_ids), block=bool(request.blocks))
                if len(drafts.token_ids) > max_drafts:
                    drafts = drafts.since(0, max_drafts)
            else:
                emitted, drafts = None, Speculation()
            request.blocks = []
            self.rows.append(Row(index, request, length, emitted, max_drafts, drafts))

    @property
    def missed(self) -> list[Row]:
        """Rows without drafts that may carry some."""
        return [row for row in self.rows if not row.drafts.token_ids and row.max_drafts]

    @property
    def short(self) -> list[Row]:
        """Rows with drafts that may carry more."""
        return [row for row in self.rows if 0 < len(row.drafts.token_ids) < row.max_drafts]

    def tokens(self, row: Row) -> np.ndarray:
        """Committed tokens of a row, [L] int32."""
        return self._batch.token_ids[row.index, : row.length]

    def wait_for(self, rows: list[Row], num_drafts: int) -> None:
        """Let `rows` wait for `num_drafts` just-in-time drafts each."""
        self.waiting = rows
        for row in rows:
            row.jit = num_drafts

    def tell(self, client: DrafterClient) -> None:
        """Report each row's outcome and next drafts to the drafter; opens requests that are not held."""
        for row in self.rows:
            if row.emitted is None:
                client.open(row.request.remote, self.tokens(row), row.drafts.token_ids)
            else:
                client.outcome(row.request.remote, row.emitted, row.drafts.token_ids, row.jit)
        client.send(self.num_drafts)

    def hand_over(self) -> list[list[int]]:
        """Return the drafts of each row of the batch, [] if there are none, and store them in their requests."""
        proposed: list[list[int]] = [[] for _ in self.request_ids]
        for row in self.rows:
            request = row.request
            request.drafts, request.drafts_length = row.drafts, row.length
            request.num_drafted = len(row.drafts.token_ids) - row.num_ngram
            proposed[row.index] = row.drafts.token_ids
        return proposed
