"""A request on the V1 runner: its drafts under verification, and the blocks that wait for their outcome."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_ssd.link.protocol import Proposal, PushedBlock, common_prefix
from vllm_ssd.target.requests import RemoteRequest


@dataclass(slots=True)
class Speculation:
    """Draft tokens and, where they were sampled, the proposal of each (None: declared one-hot)."""

    token_ids: list[int] = field(default_factory=list)
    proposals: list[Proposal | None] = field(default_factory=list)

    def since(self, start: int, stop: int | None = None) -> Speculation:
        """The drafts from `start` to `stop`."""
        return Speculation(self.token_ids[start:stop], self.proposals[start:stop])


@dataclass(slots=True)
class Request:
    """One request of the batch, and what is speculated for it."""

    remote: RemoteRequest
    min_length: int = 0  # committed tokens below which stop tokens are censored (`min_tokens`)
    drafts: Speculation = field(default_factory=Speculation)  # handed over last
    drafts_length: int = 0  # committed tokens that `drafts` follow
    by_ngram: bool = False  # `drafts` are what followed an earlier n-gram
    blocks: list[PushedBlock] = field(default_factory=list)  # accepted for the outcome at `remote.length`, in order

    def lookup(self, accept_length: int, bonus_token_id: int) -> Speculation:
        """What was pushed for one outcome so far; empty when it was not predicted."""
        token_ids: list[int] = []
        proposals: list[Proposal | None] = []
        for pushed in self.blocks:
            block = pushed.block
            branch = block.find(accept_length, bonus_token_id)
            if branch >= 0 and block.offset == len(token_ids):
                drafts = block.drafts(branch)
                token_ids += drafts
                proposals += pushed.proposals(branch) if block.sampled else [None] * len(drafts)
        return Speculation(token_ids, proposals)

    def follow(self, emitted: list[int]) -> Speculation:
        """What was speculated after `emitted`, the tokens since `drafts_length`; empty when nothing was.

        Usually `emitted` is an accepted prefix of the drafts and a bonus token. It may also end inside the
        drafts (the scheduler verified fewer: the rest of them stands) or cover several rounds.
        """
        drafts = self.drafts.token_ids
        k = common_prefix(emitted, drafts)
        if k == len(emitted):
            return self.drafts.since(k)
        branch = self.lookup(k, emitted[k])
        if k + 1 == len(emitted):
            return branch
        rest = emitted[k + 1 :]
        return branch.since(len(rest)) if branch.token_ids[: len(rest)] == rest else Speculation()

    def most_drafts(self, wanted: int, length: int) -> int:
        """Drafts that a round starting at `length` may carry.

        vLLM censors the bonus token of a round by where the round starts (`MinTokensLogitsProcessor`, 0.30 to 0.32):
        a round must not reach over `min_length`, or a stop token due there would be lost.
        """
        return wanted if length >= self.min_length else min(wanted, self.min_length - length - 1)

    def known_proposals(self, length: int, draft_token_ids: list[int]) -> list[Proposal | None]:
        """The distribution of each draft verified at `length`; None for one-hot drafts and for filler."""
        n = len(draft_token_ids)
        if length == self.drafts_length and self.drafts.token_ids[:n] == draft_token_ids:
            return self.drafts.proposals[:n]
        return [None] * n
