"""The target's side of SSD: take the speculation that waits for an outcome, tell the drafter the outcome.

vLLM's rejection sampler stays the only judge of tokens. Nothing here waits for the drafter but a missed row,
and that only up to a bound.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from vllm_ssd.config import SSDConfig
from vllm_ssd.link.protocol import JIT_TOKEN, Close, Open, Outcome, Proposal, Push
from vllm_ssd.policy import Adaptation, NgramGain, jit_drafts, jit_gain, ngram_drafts
from vllm_ssd.target.metrics import Metrics
from vllm_ssd.target.requests import Link, Session, Sessions, Speculation

SLOWNESS_KEPT = 0.998
"""Of the time just-in-time drafts take, at each miss that does not wait for them: a drafter that was slow once is tried
again, after some hundred misses (a guess)."""


class Verifier(Sessions[Session]):
    """Turn outcomes into drafts for one vLLM worker."""

    def __init__(self, config: SSDConfig, link: Link, metrics: Metrics) -> None:
        super().__init__(config, link, metrics)
        self._adaptation = Adaptation(config.num_speculative_tokens)
        self._ngram_gain = NgramGain(config.num_speculative_tokens)
        self._last_round: tuple[float, list[str], int] | None = None
        self._survival = [0.0] * config.num_speculative_tokens
        self._tokens_per_s = 0.0
        self._jit_first_s = self._jit_step_s = 0.0
        self._answers = True

    # ---- what vLLM tells -------------------------------------------------------------------------------

    def start_requests(self, requests: Iterable[tuple[str, Sequence[int], float, int]]) -> None:
        """Open `(request_id, prompt token ids, temperature, min_tokens)` on the drafter, while the target prefills."""
        events = []
        for request_id, token_ids, temperature, min_tokens in requests:
            session = Session(request_id, temperature if temperature >= 1e-5 else 0.0, len(token_ids))
            session.min_length = len(token_ids) + min_tokens
            self._sessions[request_id] = session
            if not self._config.adaptive or self._adaptation.choose(len(self._sessions)):
                events += self._open(session, np.asarray(token_ids, np.int32))
        if events:
            self._send(events)

    def propose(
        self,
        request_ids: Sequence[str],
        num_verified: Sequence[int],
        sampled_token_ids: list[list[int]],
        num_tokens: np.ndarray,
        token_ids: np.ndarray,
    ) -> list[list[int]]:
        """Drafts for the next round of every row, `[]` where there are none.

        request_ids [B]; num_verified [B] drafts that each row's round verified; sampled_token_ids [B] lists of what
        it emitted, empty for rows still in prefill; num_tokens [B] int32 committed lengths; token_ids
        [B, max_model_len] int32.
        """
        started = time.perf_counter()
        self._round += 1
        self._absorb(self._link.poll())
        batch_size = sum(1 for sampled in sampled_token_ids if sampled)
        self._observe_round(started, request_ids, num_verified, sampled_token_ids)
        wanted = self._adaptation.choose(batch_size) if self._config.adaptive else self._config.num_speculative_tokens
        proposed: list[list[int]] = [[] for _ in sampled_token_ids]
        events: list[Open | Outcome | Close] = []
        missed: list[tuple[int, Session]] = []
        for i, sampled in enumerate(sampled_token_ids):
            session = self._sessions.get(request_ids[i])
            if not sampled or session is None or not wanted:
                continue
            length = int(num_tokens[i])
            if session.generation != self._link.generation or length < session.length:
                events += self._reopen(session, token_ids[i, :length])
                self._hand_over(session, Speculation(), i, proposed)
                missed.append((i, session))
                continue
            emitted = token_ids[i, session.length : length].tolist()
            speculation = session.follow(emitted)
            self._metrics.outcome(hit=bool(speculation.token_ids), block=bool(session.blocks))
            self._hand_over(session, speculation.since(0, session.most_drafts(wanted, length)), i, proposed)
            session.blocks = []
            session.length = length
            if not proposed[i] and session.most_drafts(wanted, length):
                missed.append((i, session))
            events.append(Outcome(session.request_id, session.epoch, length, emitted, proposed[i]))
        waited = self._answer_misses(missed, events, proposed, token_ids, num_tokens, wanted)
        self._last_round = (started, list(request_ids), wanted)
        if not waited:
            self._metrics.handed_over(time.perf_counter() - started)
        self._metrics.log()
        return proposed

    def proposals(
        self, request_ids: Sequence[str], num_tokens: Sequence[int], draft_token_ids: list[list[int]]
    ) -> list[list[Proposal | None]] | None:
        """The distribution of each draft now under verification, or None when no row has any.

        num_tokens [B] committed lengths before this round; draft_token_ids [B] lists as vLLM verifies them: a prefix
        of what was handed over at that length, or filler, which no distribution must be claimed for.
        """
        found: list[list[Proposal | None]] = []
        known = False
        for request_id, length, drafts in zip(request_ids, num_tokens, draft_token_ids):
            session = self._sessions.get(request_id)
            row: list[Proposal | None] = [None] * len(drafts)
            named = session.drafts.token_ids if session is not None and session.length == length else []
            if drafts and named[: len(drafts)] == drafts:
                row = session.drafts.proposals[: len(drafts)]
                known = known or any(p is not None for p in row)
            found.append(row)
        return found if known else None

    def _absorb(self, pushes: list[Push]) -> None:
        self._answers = self._answers or bool(pushes)
        super()._absorb(pushes)

    # ---- misses ----------------------------------------------------------------------------------------

    def _answer_misses(
        self,
        missed: list[tuple[int, Session]],
        events: list[Open | Outcome | Close],
        proposed: list[list[int]],
        token_ids: np.ndarray,
        num_tokens: np.ndarray,
        wanted: int,
    ) -> bool:
        """Send `events` with what the fallback makes of the rows that missed; fills `proposed`.

        Returns whether just-in-time drafts were waited for.
        """
        opened = {event.request_id for event in events if isinstance(event, Open)}  # an Open asks for nothing in haste
        waiting, jit = self._fall_back(missed, opened, proposed, token_ids, num_tokens, wanted)
        if missed:
            named = {session.request_id: session.drafts.token_ids for _, session in missed}
            told_to_hurry = {session.request_id for _, session in waiting}
            for n, event in enumerate(events):
                if isinstance(event, Outcome) and event.request_id in named:
                    hurry = jit if event.request_id in told_to_hurry else 0
                    events[n] = msgspec.structs.replace(event, draft_token_ids=named[event.request_id], jit=hurry)
        if events or self._closing:
            self._send(events, wanted)
        if jit:
            self._wait_for_drafts(waiting, proposed, jit, wanted)
        return bool(jit)

    def _fall_back(
        self,
        missed: list[tuple[int, Session]],
        opened: set[str],
        proposed: list[list[int]],
        token_ids: np.ndarray,
        num_tokens: np.ndarray,
        wanted: int,
    ) -> tuple[list[tuple[int, Session]], int]:
        """Hand n-gram drafts to missed rows where those gain most.

        Returns the rows that should wait for just-in-time drafts, and for how many.
        """
        matches: list[tuple[int, Session, list[int]]] = []
        matched_gain = 0.0
        if missed and self._config.on_miss in ("ngram", "auto"):
            matches, matched_gain = self._ngram_matches(missed, token_ids, num_tokens, wanted)
        waiting: list[tuple[int, Session]] = []
        if self._config.on_miss in ("wait", "auto") and self._link.connected and self._answers:
            held = [(i, s) for i, s in missed if s.generation == self._link.generation]
            waiting = [(i, s) for i, s in held if s.request_id not in opened]
        jit, gain = self._num_jit_drafts(len(waiting), wanted)
        if waiting and not jit:
            self._jit_first_s *= SLOWNESS_KEPT
            self._jit_step_s *= SLOWNESS_KEPT
        if matches:
            matched = {i for i, *_ in matches}
            others = [(i, s) for i, s in waiting if i not in matched]
            others_jit, others_gain = self._num_jit_drafts(len(others), wanted)
            if gain > matched_gain + others_gain:
                return waiting, jit
            waiting, jit = others, others_jit
        for i, session, drafts in matches:
            self._hand_over(session, Speculation(drafts, [None] * len(drafts)), i, proposed)
            session.by_ngram = True
        return waiting, jit

    def _ngram_matches(
        self, missed: list[tuple[int, Session]], token_ids: np.ndarray, num_tokens: np.ndarray, wanted: int
    ) -> tuple[list[tuple[int, Session, list[int]]], float]:
        """n-gram drafts of the rows that have any, as many as pay, and the tokens they are expected to gain."""
        config = self._config
        matches, total = [], 0.0
        lost_per_draft = self._tokens_per_s * self._adaptation.draft_seconds(len(self._sessions))
        for i, session in missed:
            most = session.most_drafts(wanted, int(num_tokens[i]))
            drafts = ngram_drafts(token_ids[i, : num_tokens[i]], most, config.ngram_min, config.ngram_max)
            if drafts and config.on_miss == "auto":
                num_drafts, gain = self._ngram_gain.drafts(len(drafts), lost_per_draft)
                drafts = drafts[:num_drafts]
                total += gain
            if drafts:
                matches.append((i, session, drafts))
        return matches, total

    def _hand_over(self, session: Session, speculation: Speculation, i: int, proposed: list[list[int]]) -> None:
        session.drafts, session.by_ngram = speculation, False
        proposed[i] = speculation.token_ids

    def _num_jit_drafts(self, num_missed: int, wanted: int) -> tuple[int, float]:
        """Just-in-time drafts worth waiting for, and tokens gained: all with "wait", what was measured with "auto"."""
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

    def _wait_for_drafts(
        self, waiting: list[tuple[int, Session]], proposed: list[list[int]], jit: int, wanted: int
    ) -> None:
        """Wait, boundedly, for the just-in-time speculations of the missed rows, and name what is taken."""
        started = now = time.perf_counter()
        deadline = started + self._config.wait_ms / 1e3
        first_s, ready = None, 0
        while self._link.connected:
            ready = min(len(s.lookup(0, JIT_TOKEN).token_ids) if s.generation >= 0 else jit for _, s in waiting)
            now = time.perf_counter()
            if first_s is None and ready:
                first_s = now - started
            if ready >= jit or now >= deadline:
                break
            self._answers = False  # until it is heard again, a drafter that stays silent here is not waited for
            self._absorb(self._link.poll(deadline - now))
        if self._link.connected and all(s.generation >= 0 and s.heard for _, s in waiting):
            self._learn_wait(now - started, first_s, ready, jit)  # of drafting, not of reading a new prompt
        self._metrics.waited(now - started)
        events = []
        for i, session in waiting:
            if session.generation < 0:
                continue
            self._hand_over(
                session, session.lookup(0, JIT_TOKEN).since(0, session.most_drafts(jit, session.length)), i, proposed
            )
            session.blocks = []
            events.append(Outcome(session.request_id, session.epoch, session.length, [], proposed[i]))
        self._send(events, wanted)

    # ---- measuring -------------------------------------------------------------------------------------

    def _learn_wait(self, waited_s: float, first_s: float | None, ready: int, jit: int) -> None:
        """Learn from a wait in which `ready` of `jit` drafts came, the first after `first_s` (None: not even that)."""
        first_s = waited_s if first_s is None else first_s
        steps = jit - 1 if ready >= jit else ready  # of an unfinished wait, at least so long was the step it ended in
        step_s = (waited_s - first_s) / steps if steps else first_s / 2
        weight = 0.1 if self._jit_step_s else 1.0
        self._jit_first_s += weight * (first_s - step_s - self._jit_first_s)
        self._jit_step_s += weight * (step_s - self._jit_step_s)

    def _observe_round(
        self,
        now: float,
        request_ids: Sequence[str],
        num_verified: Sequence[int],
        sampled_token_ids: list[list[int]],
    ) -> None:
        """Count what was accepted, and learn from rounds of pure decoding that followed directly on another."""
        last, self._last_round = self._last_round, None
        accepted = [max(len(sampled) - 1, 0) for sampled in sampled_token_ids]
        self._metrics.accepted(num_verified, accepted)
        sessions = [self._sessions.get(request_id) for request_id in request_ids]
        by_ngram = [session is not None and session.by_ngram for session in sessions]
        for guessed, m, k in zip(by_ngram, num_verified, accepted):
            if guessed and m:
                self._ngram_gain.observe(m, k)
        if last is None or last[1] != list(request_ids) or not all(sampled_token_ids) or not self._link.connected:
            return  # rounds without a drafter say nothing about speculation
        started, _, wanted = last
        seconds = now - started
        self._adaptation.observe(len(request_ids), wanted, num_verified, accepted, seconds)
        rate = (sum(accepted) + len(accepted)) / seconds
        self._tokens_per_s += 0.05 * (rate - self._tokens_per_s)
        for guessed, m, k in zip(by_ngram, num_verified, accepted):
            for j in range(0 if guessed else m):
                self._survival[j] += 0.02 * ((k > j) - self._survival[j])
