"""A request on the V1 runner: its drafts under verification, and the blocks for their outcome."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_ssd.link.protocol import Proposal, PushedBlock, common_prefix
from vllm_ssd.target.requests import RemoteRequest


@dataclass(slots=True)
class Speculation:
    """Draft tokens and the proposal of each, None for drafts that are declared one-hot."""

    token_ids: list[int] = field(default_factory=list)
    proposals: list[Proposal | None] = field(default_factory=list)

    def since(self, start: int, stop: int | None = None) -> Speculation:
        """The drafts from `start` to `stop`."""
        return Speculation(self.token_ids[start:stop], self.proposals[start:stop])


@dataclass(slots=True)
class Request:
    """A request and its speculation."""

    remote: RemoteRequest
    min_length: int = 0  # committed tokens below which stop tokens are suppressed (`min_tokens`)
    drafts: Speculation = field(default_factory=Speculation)  # those handed to vLLM last
    drafts_length: int = 0  # committed tokens before `drafts`
    num_drafted: int = 0  # `drafts` before the first n-gram draft
    blocks: list[PushedBlock] = field(default_factory=list)  # accepted for the outcome at `remote.length`, in order

    def lookup(self, accept_length: int, bonus_token_id: int) -> Speculation:
        """The drafts pushed so far for an outcome; empty if it was not predicted."""
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
        """The drafts that follow `emitted`, the tokens since `drafts_length`; empty if there are none.

        Usually `emitted` is an accepted prefix of the drafts plus a bonus token. It may also end inside the drafts, if
        the scheduler verified fewer (the rest stays valid), or cover several rounds.
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
        """Number of drafts that a round starting at `length` may carry, at most `wanted`.

        vLLM decides by a round's start whether to suppress stop tokens for its bonus token (`MinTokensLogitsProcessor`,
        0.30 to 0.32). So a round must not cross `min_length`, or a stop token there would be lost.
        """
        return wanted if length >= self.min_length else min(wanted, self.min_length - length - 1)

    def known_proposals(self, length: int, draft_token_ids: list[int]) -> list[Proposal | None]:
        """The proposal of each draft verified at `length`; None for one-hot drafts and filler."""
        n = len(draft_token_ids)
        if length == self.drafts_length and self.drafts.token_ids[:n] == draft_token_ids:
            return self.drafts.proposals[:n]
        return [None] * n
