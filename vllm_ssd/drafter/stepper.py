"""Choose and run the next forward of the draft model.

Unfinished spines share a step with all growing branches. Without such spines, branches grow in *runs*: steps of the
same branches until the first of them has all its drafts. Once no branch is growing, the finished ones take one more
step over their last draft, so that the candidates at all fork points of the next round are known before its outcome.
Steps of a run may be launched before earlier ones are taken (`DeviceSteps`); whoever changes the branches must `settle`
the run first.

A parallel draft model grows a branch in a single step, with masks in place of drafts, and has no finished branches: a
round is one step with the spines, and one of the branches that fork from them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Protocol

import numpy as np

from vllm_ssd.compat.drafter.paged import PagedModel
from vllm_ssd.drafter.branches import Branches
from vllm_ssd.drafter.buckets import MAX_ROWS, row_sizes
from vllm_ssd.drafter.noise import NUM_UNRANKED, hashed_noise
from vllm_ssd.drafter.pages.protocol import Pages
from vllm_ssd.drafter.sampler import Draw, Sampler
from vllm_ssd.drafter.sequence import Sequence
from vllm_ssd.drafter.step_tokens import StepTokens
from vllm_ssd.link.protocol import SEEDED_NOISE
from vllm_ssd.policy import BranchBudget

FanOutAfterHit = Callable[[int], SequenceOf[int]]
"""Maps the number of drafts after a hit to that round's branches by accept length."""


class Run(Protocol):
    """Steps of the branches in `rows` [n], taken one after the other.

    step_s: duration of the last step; None if it is not representative.
    """

    rows: np.ndarray
    step_s: float | None

    @property
    def is_done(self) -> bool:
        """Whether every step has been taken."""
        ...

    def is_ready(self) -> bool:
        """Launch the next step if needed, and return whether it can be taken without a long wait."""
        ...

    def take(self) -> Draw:
        """Return the next step's draw for `rows`."""
        ...

    def stop(self) -> None:
        """Launch no more steps; those already launched must still be taken."""


class Runner(Protocol):
    """Runs steps of branches, with or without spines."""

    def warm_up(self) -> int:
        """Compile and capture what later steps need; returns the number of captured batch sizes."""
        ...

    def carries(self, num_tokens: int, num_requests: int, spine_tokens: int = 0) -> bool:
        """Whether this runner supports steps of `num_tokens` tokens of `num_requests` requests.

        spine_tokens: largest number of spine tokens of one request
        """
        ...

    def forward(
        self, spines: SequenceOf[tuple[Sequence, int]], rows: np.ndarray, fan_out: np.ndarray | None
    ) -> tuple[StepTokens, Draw]:
        """Forward the next n tokens of each (sequence, n) in `spines` and the next of each branch in `rows`, and draw.

        The first draws belong to the spine tokens with logits. fan_out [m] int64: as in `start`, for the branch tokens.
        """
        ...

    def start(self, rows: np.ndarray, num_steps: int, fan_out: np.ndarray | None) -> Run:
        """Start `num_steps` steps of the branches in `rows` [n]; the pages must not be used until the run is done.

        fan_out [num_steps, m] int64: how many of the likeliest tokens to down-weight after each branch token in each
        step; None for none.
        """
        ...


class EagerRunner:
    """Runs each step as one forward, over pages of either kind, and draws on the host."""

    def __init__(self, model: PagedModel, pages: Pages, branches: Branches, sampler: Sampler) -> None:
        self._model = model
        self._pages = pages
        self._branches = branches
        self._sampler = sampler

    def start(self, rows: np.ndarray, num_steps: int, fan_out: np.ndarray | None) -> EagerRun:
        """See `Runner.start`; a step runs when it is taken."""
        return EagerRun(self, rows, num_steps, fan_out)

    def warm_up(self) -> int:
        """See `Runner.warm_up`; captures what the model captures."""
        branches = self._branches
        per_request = branches.per_request * branches.tokens_per_step + branches.num_speculative_tokens + 1
        most = branches.max_num_seqs * per_request
        return self._model.warm_up(row_sizes(min(most, MAX_ROWS)))

    def carries(self, num_tokens: int, num_requests: int, spine_tokens: int = 0) -> bool:
        """See `Runner.carries`; supports all steps."""
        return True

    def forward(
        self, spines: SequenceOf[tuple[Sequence, int]], rows: np.ndarray, fan_out: np.ndarray | None
    ) -> tuple[StepTokens, Draw]:
        """See `Runner.forward`."""
        tokens = StepTokens.gather(self._branches, spines, rows)
        sampling = tokens.sampling(self._branches, [sequence for sequence, _ in tokens.spine_logits])
        if fan_out is not None:
            fan_out = np.concatenate([np.zeros(len(tokens.spine_logits), np.int64), fan_out])
        logits = self._model.forward(self._pages.batch(tokens))
        self._branches.biases.add(logits, sampling.biases)
        kinds, positions = sampling.noise_kinds, tokens.positions[tokens.logit_indices]
        noise = hashed_noise(kinds, sampling.noise_seeds, positions, logits.shape[1])
        num_unranked = NUM_UNRANKED if (kinds == SEEDED_NOISE).any() else 0
        return tokens, self._sampler.draw(
            logits, sampling.temperatures, fan_out, sampling.truncations, noise, num_unranked
        )


class EagerRun:
    """Steps of an `EagerRunner`."""

    def __init__(self, runner: EagerRunner, rows: np.ndarray, num_steps: int, fan_out: np.ndarray | None) -> None:
        self.rows = rows
        self.step_s: float | None = None
        self._runner = runner
        self._num_steps, self._num_taken = num_steps, 0
        self._fan_out = fan_out

    @property
    def is_done(self) -> bool:
        """Whether every step has been taken."""
        return self._num_taken == self._num_steps

    def is_ready(self) -> bool:
        """Always true: a step runs when it is taken."""
        return True

    def take(self) -> Draw:
        """Run the next step."""
        began = time.perf_counter()
        fan_out = None if self._fan_out is None else self._fan_out[self._num_taken]
        self._num_taken += 1
        _, draw = self._runner.forward((), self.rows, fan_out)
        self.step_s = time.perf_counter() - began
        return draw

    def stop(self) -> None:
        """End the run; no launched step is left to take."""
        self._num_steps = self._num_taken


class Stepper:
    """Runs one step at a time, and stores the branches' draws.

    runner: used for all steps that it carries; eager: used for all others, may be the same object; max_rows: most
    branch tokens per step
    """

    def __init__(
        self,
        branches: Branches,
        eager: EagerRunner,
        runner: Runner,
        budget: BranchBudget,
        saguaro_c: float,
        max_rows: int = 1 << 30,
    ) -> None:
        self._branches = branches
        self._eager = eager
        self._runner = runner
        self._budget = budget
        self._down_weights = saguaro_c < 1
        self._max_rows = max(max_rows // branches.tokens_per_step, 1)
        self._run: Run | None = None
        self._is_usual = True  # whether the run is one of `runner`, whose step times the budget learns
        self.num_steps = self.num_eager_steps = 0

    def warm_up(self) -> int:
        """See `Runner.warm_up`."""
        return self._runner.warm_up()

    def step(
        self, spines: SequenceOf[tuple[Sequence, int]], fan_out_after_hit: FanOutAfterHit
    ) -> tuple[StepTokens, Draw] | None:
        """Run or advance one forward, if there is anything to forward; returns the draw of a step with spines.

        If a launched step takes long, this returns before it is done, so that the target's messages can be polled.
        spines: (sequence, tokens in this step), with their pages reserved; must be empty while a run is in progress.
        Draws after branches are stored in `Branches`; in a returned draw, the spines' rows come first.
        """
        if self._run is None:
            growing, finished = np.flatnonzero(self._branches.growing), self._branches.finished
            rows = self._first(growing)
            if spines:
                return self._step_spines(spines, rows, fan_out_after_hit)
            is_last = not len(rows) or (len(rows) == len(growing) and not finished.any())
            rows = rows if len(rows) else self._first(np.flatnonzero(finished))
            if not len(rows):
                return None
            self._run = self._start_run(rows, is_last, fan_out_after_hit)
        run = self._run
        if not run.is_ready():
            return None
        num_tokens = len(self._branches.due(run.rows)[0])
        self._take(run)
        if run.step_s is not None and self._is_usual:  # eager steps cost differently
            self._budget.observe_step(num_tokens, run.step_s)
        if run.is_done:
            self._run = None
        return None

    def settle(self) -> None:
        """End the run in progress after the steps that it has launched, whose draws are kept."""
        run, self._run = self._run, None
        if run is not None:
            run.stop()
            while not run.is_done:
                self._take(run)

    def _first(self, rows: np.ndarray) -> np.ndarray:
        """The least advanced of `rows`, as many as fit into one step."""
        if len(rows) <= self._max_rows:
            return rows
        order = np.argsort(self._branches.computed[rows], kind="stable")
        return np.sort(rows[order[: self._max_rows]])

    def _take(self, run: Run) -> None:
        self._branches.extend(run.rows, run.take())
        self.num_steps += 1

    def _step_spines(
        self, spines: SequenceOf[tuple[Sequence, int]], rows: np.ndarray, fan_out_after_hit: FanOutAfterHit
    ) -> tuple[StepTokens, Draw]:
        fan_out = self._predicted(rows, 0, fan_out_after_hit) if self._down_weights else None
        owners = {sequence.slot for sequence, _ in spines}.union(self._branches.owner[rows].tolist())
        num_tokens = [n for _, n in spines]
        num_row_tokens = len(self._branches.due(rows)[0])
        runner = self._choose(sum(num_tokens) + num_row_tokens, len(owners), max(num_tokens))
        tokens, draw = runner.forward(spines, rows, fan_out)
        self.num_steps += 1
        self._branches.extend(rows, draw, len(tokens.spine_logits))
        return tokens, draw

    def _start_run(self, rows: np.ndarray, is_last: bool, fan_out_after_hit: FanOutAfterHit) -> Run:
        """Start a run of `rows` until the first of them has all its drafts.

        is_last: no other branches wait for a step. If all of `rows` then finish together, the run takes one more step,
        over their last drafts.
        """
        branches = self._branches
        missing = branches.num_drafts[rows] - branches.computed[rows]
        num_steps = 1 if branches.is_parallel else max(int(missing.min()), 1)
        if is_last and not branches.is_parallel and (missing == num_steps).all():
            num_steps += 1
        fan_out = None
        if self._down_weights and branches.temperature[rows].any():
            fan_out = np.stack([self._predicted(rows, step, fan_out_after_hit) for step in range(num_steps)])
        runner = self._choose(len(branches.due(rows)[0]), len(set(branches.owner[rows].tolist())))
        return runner.start(rows, num_steps, fan_out)

    def _choose(self, num_tokens: int, num_requests: int, spine_tokens: int = 0) -> Runner:
        """The runner for a step, see `Runner.carries`."""
        self._is_usual = self._runner.carries(num_tokens, num_requests, spine_tokens)
        self.num_eager_steps += not self._is_usual
        return self._runner if self._is_usual else self._eager

    def _predicted(self, rows: np.ndarray, ahead: int, fan_out_after_hit: FanOutAfterHit) -> np.ndarray:
        """Number of bonus tokens that will be predicted at each token that a step of `rows` draws, [m] int64.

        ahead: 0 for the next step, or the number of steps after it
        """
        branches = self._branches
        token_rows, places = branches.due(rows)
        predicted = np.zeros(len(token_rows), np.int64)
        for num_drafts in set(branches.num_drafts[rows].tolist()):
            alike = branches.num_drafts[token_rows] == num_drafts
            counts = np.array(fan_out_after_hit(num_drafts))
            predicted[alike] = counts[places[alike] + ahead]
        return predicted
