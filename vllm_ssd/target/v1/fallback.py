"""Drafts for rows that missed: n-gram drafts, just-in-time drafts after a wait, or none. Short hits are extended."""

from __future__ import annotations

import time
from collections.abc import Sequence

from vllm_ssd.config import SSDConfig
from vllm_ssd.link.protocol import JIT_TOKEN
from vllm_ssd.policy import Adaptation, NgramGain, jit_drafts, jit_gain, ngram_drafts
from vllm_ssd.target.requests import DrafterClient
from vllm_ssd.target.v1.round import Round, Row

SLOWNESS_KEPT = 0.998
"""Factor on the expected time of just-in-time drafts at each miss that does not wait, so that a drafter that was slow
once is tried again after some hundred misses (a guess)."""

Matches = list[tuple[Row, list[int]]]
"""Rows with their n-gram drafts."""


class Fallback:
    """Decides what missed rows do, and learns from the results."""

    def __init__(self, config: SSDConfig, adaptation: Adaptation) -> None:
        self._config = config
        self._adaptation = adaptation
        self._ngram_gain = NgramGain(config.num_speculative_tokens)  # of n-gram drafts instead of none
        self._extension_gain = NgramGain(config.num_speculative_tokens)  # of those after accepted drafts
        self._survival = [0.0] * config.num_speculative_tokens
        self._tokens_per_s = 0.0
        self._jit_first_s = self._jit_step_s = 0.0

    def decide(self, round_: Round, num_requests: int, client: DrafterClient) -> None:
        """Give n-gram drafts to missed rows, or let them wait, whichever gains most; num_requests: open requests.

        Rows with fewer drafts than they may carry are extended.
        """
        if self._config.on_miss in ("ngram", "auto") and (short := round_.short):
            self._extend(round_, short, num_requests)
        missed = round_.missed
        if not missed:
            return
        matches: Matches = []
        matched_gain = 0.0
        if self._config.on_miss in ("ngram", "auto"):
            matches, matched_gain = self._match_ngrams(round_, missed, num_requests)
        waiting = self._may_wait(missed, client)
        jit, gain = self._num_jit_drafts(len(waiting), round_.num_drafts)
        if waiting and not jit:
            self._jit_first_s *= SLOWNESS_KEPT
            self._jit_step_s *= SLOWNESS_KEPT
        if matches:
            matched = {row.index for row, _ in matches}
            others = [row for row in waiting if row.index not in matched]
            others_jit, others_gain = self._num_jit_drafts(len(others), round_.num_drafts)
            if gain <= matched_gain + others_gain:
                for row, drafts in matches:
                    row.add_ngram(drafts)
                waiting, jit = others, others_jit
        if jit:
            round_.wait_for(waiting, jit)

    def wait(self, round_: Round, client: DrafterClient) -> float:
        """Wait up to `wait_ms` for just-in-time drafts and report those that are used; returns the seconds waited."""
        waiting, jit = round_.waiting, round_.waiting[0].jit
        started = now = time.perf_counter()
        deadline = started + self._config.wait_ms / 1e3
        first_s, ready = None, 0
        remotes = [row.request.remote for row in waiting]
        while any(map(client.reaches, remotes)):
            ready = min(_num_ready(row, client) for row in waiting)
            now = time.perf_counter()
            if first_s is None and ready:
                first_s = now - started
            if ready >= jit or now >= deadline:
                break
            client.poll(deadline - now, remotes)
        seconds = now - started
        held = [row for row in waiting if client.reaches(row.request.remote)]
        reading = any(row.request.remote.behind_until for row in held)
        if len(held) == len(waiting) and not reading:
            self._learn_wait(seconds, first_s, ready, jit)  # of drafting, not of reading a new prompt
        for row in held:
            row.drafts = row.request.lookup(0, JIT_TOKEN).since(0, min(jit, row.max_drafts))
            row.request.blocks = []
            client.outcome(row.request.remote, [], row.drafts.token_ids)
        client.send(round_.num_drafts)
        return seconds

    def observe(
        self, num_drafted: Sequence[int], num_verified: Sequence[int], accepted: Sequence[int], seconds: float | None
    ) -> None:
        """Learn from a verified round.

        num_drafted, num_verified, accepted [B]: how many of a row's drafts came before its n-gram drafts, how many were
        verified, and how many accepted; seconds: time since the previous round, None if it is not representative of
        decoding
        """
        for n, m, k in zip(num_drafted, num_verified, accepted):
            if n < m and n <= k:
                (self._extension_gain if n else self._ngram_gain).observe(m - n, k - n)
        if seconds is None:
            return
        rate = (sum(accepted) + len(accepted)) / seconds
        self._tokens_per_s += 0.05 * (rate - self._tokens_per_s)
        for n, m, k in zip(num_drafted, num_verified, accepted):
            for j in range(min(n, m)):
                self._survival[j] += 0.02 * ((k > j) - self._survival[j])

    def _lost_per_draft(self, num_requests: int) -> float:
        """Tokens that the batch could emit in the time that verifying one more draft takes."""
        return self._tokens_per_s * self._adaptation.draft_seconds(num_requests)

    def _extend(self, round_: Round, short: list[Row], num_requests: int) -> None:
        """Extend short hits by n-gram drafts whose first tokens are the drafts themselves, if that pays."""
        config = self._config
        lost_per_draft = self._lost_per_draft(num_requests)
        for row in short:
            num_drafts = len(row.drafts.token_ids)
            most = row.max_drafts - num_drafts
            if config.on_miss == "auto":
                reached = max(self._survival[num_drafts - 1], 1e-3)
                most, _ = self._extension_gain.drafts(most, lost_per_draft / reached)
            if most:
                drafts = ngram_drafts(round_.tokens(row), num_drafts + most, config.ngram_min, config.ngram_max)
                if drafts[:num_drafts] == row.drafts.token_ids:
                    row.add_ngram(drafts[num_drafts:])

    def _match_ngrams(self, round_: Round, missed: list[Row], num_requests: int) -> tuple[Matches, float]:
        """n-gram drafts of the rows that have a match, as many as pay, and the tokens they are expected to gain."""
        config = self._config
        matches: Matches = []
        total = 0.0
        lost_per_draft = self._lost_per_draft(num_requests)
        for row in missed:
            drafts = ngram_drafts(round_.tokens(row), row.max_drafts, config.ngram_min, config.ngram_max)
            if drafts and config.on_miss == "auto":
                num_drafts, gain = self._ngram_gain.drafts(len(drafts), lost_per_draft)
                drafts = drafts[:num_drafts]
                total += gain
            if drafts:
                matches.append((row, drafts))
        return matches, total

    def _may_wait(self, missed: list[Row], client: DrafterClient) -> list[Row]:
        """Missed rows that may wait for just-in-time drafts."""
        if self._config.on_miss not in ("wait", "auto"):
            return []
        return [row for row in missed if row.emitted is not None and client.may_wait(row.request.remote, row.length)]

    def _num_jit_drafts(self, num_missed: int, wanted: int) -> tuple[int, float]:
        """Number of just-in-time drafts to wait for and the tokens they gain; always all with on_miss "wait"."""
        if not num_missed:
            return 0, 0.0
        if self._config.on_miss == "wait" or not self._jit_step_s:
            return wanted, float(num_missed)
        first_s, step_s = self._jit_first_s, self._jit_step_s
        bound_s = self._config.wait_ms / 1e3
        drafts = jit_drafts(num_missed, wanted, self._survival, self._tokens_per_s, first_s, step_s, bound_s)
        if not drafts:
            return 0, 0.0
        return drafts, jit_gain(num_missed, drafts, self._survival, self._tokens_per_s, first_s + drafts * step_s)

    def _learn_wait(self, seconds: float, first_s: float | None, ready: int, jit: int) -> None:
        """Learn from a wait in which `ready` of `jit` drafts arrived, the first after `first_s` (None: none did)."""
        first_s = seconds if first_s is None else first_s
        steps = jit - 1 if ready >= jit else ready  # a wait that timed out includes part of one more step
        step_s = (seconds - first_s) / steps if steps else first_s / 2
        weight = 0.1 if self._jit_step_s else 1.0
        self._jit_first_s += weight * (first_s - step_s - self._jit_first_s)
        self._jit_step_s += weight * (step_s - self._jit_step_s)


def _num_ready(row: Row, client: DrafterClient) -> int:
    """Just-in-time drafts of a row that have arrived; counts as complete if its drafter is gone."""
    return len(row.request.lookup(0, JIT_TOKEN).token_ids) if client.reaches(row.request.remote) else row.jit
