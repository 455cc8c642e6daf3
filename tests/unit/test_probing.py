"""The probe controller on scripted predictions: when it probes, for how long, and what that costs."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ssd.policy.estimator import Prediction
from vllm_ssd.policy.probing import (
    MAX_PLAIN_GAP,
    MAX_PROBE_GAP,
    MAX_PROBE_ROUNDS,
    MIN_PROBE_GAP,
    PROBE_CREDIT,
    PROBE_LOSS,
    PROBE_ROUNDS,
    ProbeController,
    draft_grid,
)


@dataclass
class Load:
    """Rounds of one row with known tokens and seconds by number of drafts; believed, believed_s: those predicted."""

    tokens: list[float]
    seconds: list[float]
    believed: list[float] = field(default_factory=list)
    evidence: list[float] = field(default_factory=list)
    believed_s: list[float] = field(default_factory=list)
    num_predictions: int = 0

    def __post_init__(self) -> None:
        self.believed = self.believed or self.tokens
        self.evidence = self.evidence or [0.0] * len(self.tokens)

    def predict(self) -> Prediction:
        self.num_predictions += 1
        seconds = self.believed_s or self.seconds
        measured_s = [s if rounds else 0.0 for s, rounds in zip(seconds, self.evidence)]
        return Prediction(self.believed, seconds, list(self.evidence), measured_s)

    def controller(self, start: int) -> ProbeController:
        return ProbeController(range(len(self.tokens)), start, self.predict)

    def play(self, controller: ProbeController, rounds: int) -> list[tuple[int, bool]]:
        """(arm, whether it was on trial) of each round; arms that were used become known."""
        played = []
        for _ in range(rounds):
            arm = controller.choice
            played.append((arm, controller.is_probing))
            if not controller.skips(self.seconds[arm]):
                controller.count(1, self.tokens[arm], self.seconds[arm])
                self.evidence[arm] += 1
            controller.step()
        return played


def probes(played: list[tuple[int, bool]]) -> list[tuple[int, int, int]]:
    """(first round, arm, number of rounds) of every probe."""
    found: list[tuple[int, int, int]] = []
    for i, (arm, probing) in enumerate(played):
        if probing and i and played[i - 1] == (arm, True):
            start, _, length = found[-1]
            found[-1] = start, arm, length + 1
        elif probing:
            found.append((i, arm, 1))
    return found


EVEN = [1.0, 1.0, 1.0, 1.0]


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.floats(1, 2), st.floats(0.5, 2)), min_size=2, max_size=9),
    st.integers(0, 8),
    st.integers(50, 1500),
)
def test_probes_cost_at_most_the_stated_share(arms, start, rounds):
    """Lost: what a probe's rounds fell short of the best arm by, in rounds of it; the last probe may overdraw."""
    load = Load([tokens for tokens, _ in arms], [seconds for _, seconds in arms], evidence=[9.0] * len(arms))
    controller = load.controller(min(start, len(arms) - 1))
    lost = most = probe_lost = 0.0
    for _ in range(rounds):
        arm, probing = controller.choice, controller.is_probing
        load.play(controller, 1)
        settled = controller.settled
        if probing:
            seconds, tokens = load.seconds, load.tokens
            probe_lost += seconds[arm] / seconds[settled] - tokens[arm] / tokens[settled]
            if not controller.is_probing or controller.choice != arm:
                lost, most, probe_lost = lost + max(probe_lost, 0.0), max(most, probe_lost), 0.0
    assert lost <= PROBE_CREDIT + PROBE_LOSS * rounds + most + 1e-6


def test_nothing_is_predicted_before_the_first_probe():
    load = Load(EVEN, EVEN)
    controller = load.controller(3)
    load.play(controller, MIN_PROBE_GAP - 1)
    assert load.num_predictions == 0 and not controller.is_probing
    load.play(controller, 1)
    assert load.num_predictions == 1 and controller.is_probing


def test_a_probe_that_wins_is_settled_on():
    load = Load([1.0, 2.0], [1.0, 1.0])
    controller = load.controller(0)
    played = load.play(controller, 200)
    assert controller.settled == 1
    assert all(arm == 1 or probing for arm, probing in played[2 * MIN_PROBE_GAP :])


@pytest.mark.parametrize(("settled", "rounds"), [(0, 1), (1, 3)])
def test_a_probe_that_cannot_win_ends_early(settled, rounds):
    """From plain decoding one round tells, by its duration; else two, after one that is skipped."""
    load = Load([1.0, 1.0, 1.9], [1.0, 0.9, 50.0], evidence=[9.0, 9.0, 0.0])
    controller = ProbeController({settled, 2}, settled, load.predict)
    assert probes(load.play(controller, 30))[0] == (MIN_PROBE_GAP, 2, rounds)
    assert controller.settled == settled


def test_a_probe_waits_for_the_drafter_at_its_own_expense():
    """Rounds in which the drafter is behind leave a probe where it is, and are paid for like its own."""
    for waited in (0, 60):
        load = Load([1.0, 1.0], [1.0, 1.3], believed=[1.0, 1.2], evidence=[9.0, 0.0])
        controller = load.controller(0)
        load.play(controller, MIN_PROBE_GAP)
        assert controller.choice == 1
        for _ in range(waited):
            controller.wait(1, 1, 1.15)
        assert controller.choice == 1 and controller.is_probing
        first, second, *_ = probes(load.play(controller, 1000))
        assert first == (0, 1, PROBE_ROUNDS)
        paid_after = (0.18 * waited - PROBE_CREDIT) / PROBE_LOSS
        assert second[0] == pytest.approx(max(paid_after, PROBE_ROUNDS + 2 * MIN_PROBE_GAP), rel=0.2)


def test_a_probe_from_plain_decoding_ends_when_waiting_for_the_drafter_takes_too_long():
    """Once the drafter works the target is five times slower: the probe pays for that round alone."""
    load = Load([1.0, 2.0], [1.0, 1.2], evidence=[9.0, 0.0])
    controller = load.controller(0)
    load.play(controller, MIN_PROBE_GAP)
    assert controller.choice == 1
    controller.wait(1, 1, 5.0)
    assert controller.choice == 0 and not controller.is_probing
    (start, arm, _), *_ = probes(load.play(controller, 1000))
    assert arm == 1 and start <= max((4.1 - PROBE_CREDIT) / PROBE_LOSS, 2 * MIN_PROBE_GAP)


def test_a_probe_from_another_arm_waits_however_long_it_takes():
    load = Load([1.0, 2.0, 2.0], [1.0, 1.2, 1.2], evidence=[9.0, 9.0, 0.0])
    controller = load.controller(1)
    load.play(controller, MIN_PROBE_GAP)
    assert controller.choice == 2
    controller.wait(1, 1, 5.0)
    assert controller.choice == 2 and controller.is_probing


def test_a_probe_is_repeated_soon_where_rounds_are_no_longer_too_slow():
    """It emitted too little, but its rounds take what they may: what made the last probe's slow has gone."""
    load = Load([1.0, 1.0], [1.0, 9.0], believed=[1.0, 1.5], evidence=[9.0, 0.0])
    controller = load.controller(0)
    slow = probes(load.play(controller, 8000))
    assert all(length == 1 for *_, length in slow)
    assert all(b[0] - a[0] > MAX_PLAIN_GAP for a, b in zip(slow[2:], slow[3:]))
    load.seconds, load.believed_s = [1.0, 1.4], load.seconds
    quick = probes(load.play(controller, 1500))
    gaps = [b[0] - (a[0] + a[2]) for a, b in zip(quick, quick[1:])]
    assert gaps[:4] == [MIN_PROBE_GAP << i for i in range(3)] + [MAX_PLAIN_GAP]


@pytest.mark.parametrize(("tokens", "length"), [(2.5, MAX_PROBE_ROUNDS), (1.5, PROBE_ROUNDS)])
def test_a_probe_goes_on_while_it_is_ahead(tokens, length):
    """Even where the prediction does not follow."""
    load = Load([1.0, 1.0, tokens], EVEN[:3], believed=[1.0, 2.0, 0.5])
    controller = ProbeController({1, 2}, 1, load.predict)
    assert probes(load.play(controller, 100))[0] == (MIN_PROBE_GAP, 2, length)


def test_the_gap_between_fruitless_probes_doubles_up_to_its_limit():
    for settled, longest in ((0, MAX_PLAIN_GAP), (1, MAX_PROBE_GAP)):
        load = Load([1.0, 1.5, 1.5], [1.0, 1.45 + 0.15 * (settled == 0), 1.6])
        controller = ProbeController({settled, 2}, settled, load.predict)
        found = probes(load.play(controller, 3000))
        gaps = [b - (a + length) for (a, _, length), (b, _, _) in zip(found, found[1:])]
        assert gaps[:4] == [min(MIN_PROBE_GAP << i, longest) for i in (1, 2, 3, 4)]
        assert set(gaps[4:]) == {longest}


def test_a_costly_probe_delays_the_next_until_it_is_paid_for():
    load = Load([1.0, 1.0], [1.0, 20.0], evidence=[9.0, 0.0])
    controller = load.controller(0)
    first, second, *_ = probes(load.play(controller, 20_000))
    lost = first[2] * 19
    assert second[0] >= (lost - PROBE_CREDIT) / PROBE_LOSS


def test_a_restart_probes_at_once_and_with_full_credit():
    load = Load([1.0, 1.0], [1.0, 20.0])
    controller = load.controller(0)
    load.play(controller, 100)
    assert not controller.is_probing
    controller.restart()
    load.play(controller, 1)
    assert controller.is_probing


def test_first_rounds_of_an_arm_are_skipped():
    load = Load(EVEN, [2.0, 1.0, 1.0, 1.0])
    controller = load.controller(3)
    assert [controller.skips(1.0) for _ in range(4)] == [True, True, False, False], "the drafter starts"
    load.play(controller, MIN_PROBE_GAP)
    assert controller.choice != 3 and [controller.skips(1.0) for _ in range(2)] == [True, False]


def test_plain_rounds_are_skipped_for_as_long_as_a_speculative_round_took():
    load = Load([1.0, 4.0], [1.0, 3.0])
    controller = load.controller(1)
    while controller.choice:
        load.play(controller, 1)
    assert [controller.skips(1.0) for _ in range(5)] == [True, True, True, False, False]


def test_plain_rounds_after_a_probe_are_skipped_for_as_long_as_its_rounds_took():
    load = Load([1.0, 1.0], [1.0, 3.0])
    controller = load.controller(0)
    while not controller.choice:
        load.play(controller, 1)
    while controller.choice:
        load.play(controller, 1)
    assert [controller.skips(1.0) for _ in range(4)] == [True, True, True, False]


def test_slower_rounds_are_held_against_plain_decoding_first():
    for slower, probed in ((True, 0), (False, 2)):
        load = Load([1.0, 1.0, 1.0], EVEN[:3], evidence=[9.0, 9.0, 0.0])
        controller = load.controller(1)
        controller.restart(slower=slower)
        assert probes(load.play(controller, 2))[0][1] == probed


def test_a_probe_tells_once_when_its_rounds_take_another_time_than_before():
    for seconds, changed in ((1.0, False), (1.4, True), (0.6, True)):
        load = Load([1.0, 9.0], [1.0, 1.0], evidence=[9.0, 9.0])
        controller = load.controller(0)
        while not controller.choice:
            load.play(controller, 1)
        told = []
        for _ in range(8):
            controller.count(1, 9, seconds)
            told.append(controller.finds_change())
            controller.step()
        assert told == [False] * 3 + [changed] + [False] * 4


def test_every_grid_arm_is_probed_and_only_arms_are():
    load = Load([1.0] * 9, [1.0] * 9)
    arms = {0, 1, 3, 8}
    controller = ProbeController(arms, 8, load.predict)
    played = load.play(controller, 4000)
    assert {arm for arm, _ in played} == arms
    assert set(draft_grid(8)) & arms <= {arm for _, arm, _ in probes(played)}


@pytest.mark.parametrize(("settled", "evidence", "probed"), [(2, 0.4, 1), (2, 0.6, 0), (0, 0.4, 2)])
def test_a_stale_arm_is_probed_though_it_promises_little(settled, evidence, probed):
    """But not from plain decoding."""
    load = Load([1.0, 0.5, 1.0], EVEN[:3], evidence=[9.0, evidence, 9.0])
    assert probes(load.play(load.controller(settled), MIN_PROBE_GAP + 1))[0][1] == probed


def test_equal_arms_end_in_plain_decoding():
    """Speculation must gain 3 %."""
    load = Load(EVEN, EVEN)
    controller = load.controller(3)
    load.play(controller, 500)
    assert controller.settled == 0


@pytest.mark.parametrize(("most", "grid"), [(1, [0, 1]), (5, [0, 1, 2, 4, 5]), (8, [0, 1, 2, 4, 8])])
def test_draft_grid(most, grid):
    assert draft_grid(most) == grid
