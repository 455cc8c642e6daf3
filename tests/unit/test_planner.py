"""The profile, the predictions against hand-made cases, the plan, and the priors."""

import dataclasses
import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ssd.planning import (
    DEVICES,
    Acceptance,
    Costs,
    Profile,
    Recorded,
    Setting,
    Shape,
    Synthetic,
    drafter_size_prior,
    guess_profile,
    plan,
    predict_plain,
    predict_sd,
    predict_ssd,
)
from vllm_ssd.planning.published import published_profile

probabilities = st.floats(0.0, 1.0)
COSTS = Costs(
    verify=((1, 1, 0.0100), (1, 5, 0.0108), (8, 1, 0.0120), (8, 5, 0.0180)),
    draft_step=((1.0, 0.0010), (24.0, 0.0014), (96.0, 0.0030)),
    sync_step=((1.0, 0.0015), (8.0, 0.0020)),
    handover_s=2e-4,
    latency_s=1e-4,
    spread=0.05,
)
ACCEPTANCE = dataclasses.replace(Acceptance.prior(0.7), rounds=1000)
PROFILE = Profile("target", "drafter", COSTS, (ACCEPTANCE,))


# ---- the profile -----------------------------------------------------------------------------------------


def test_costs_are_interpolated_and_extended():
    assert COSTS.verify_s(1, 3) == pytest.approx(0.0104)
    assert COSTS.verify_s(4.5, 1) == pytest.approx(0.0110)
    assert COSTS.verify_s(8, 9) == pytest.approx(0.0240)
    assert COSTS.verify_s(16, 1) == pytest.approx(0.0120 + 8 * 0.002 / 7)
    one_batch = dataclasses.replace(COSTS, verify=((4, 1, 0.01), (4, 3, 0.03)))
    assert one_batch.verify_s(8, 1) == pytest.approx(0.02)
    assert one_batch.verify_s(1, 1) == pytest.approx(0.01)


@given(st.lists(probabilities, min_size=1, max_size=6), st.integers(0, 9))
def test_accept_probs_sum_to_one(chances, num_drafts):
    acceptance = dataclasses.replace(ACCEPTANCE, after_hit=tuple(chances))
    probs = acceptance.accept_probs(num_drafts, after_hit=True)
    assert len(probs) == num_drafts + 1 and min(probs) >= -1e-12 and sum(probs) == pytest.approx(1.0)


def test_acceptance_is_learned_from_rounds():
    law = Acceptance((0.9, 0.6, 0.8), (0.3,), (0.4, 0.7, 0.8), (0.6, 0.9), (0.2, 0.5, 0.6))
    source, rng = Synthetic(law, seed=1), random.Random(2)
    rounds = []
    for _ in range(8000):
        m, after_hit = rng.choice([0, 3, 3, 3]), rng.random() < 0.7
        k, rank = source.draw(m, after_hit)
        rounds.append((m, k, rank, after_hit))
    learned = Acceptance.from_rounds(rounds, 3)
    assert learned.after_hit == pytest.approx(law.after_hit, abs=0.03)
    assert learned.after_miss[0] == pytest.approx(0.3, abs=0.04)
    assert learned.rejected[:3] == pytest.approx(law.rejected, abs=0.03)
    assert learned.accepted[:2] == pytest.approx(law.accepted, abs=0.04)
    assert learned.undrafted[:3] == pytest.approx(law.undrafted, abs=0.03)
    assert learned.rounds == 8000
    with pytest.raises(ValueError, match="29 rounds are too few"):
        Acceptance.from_rounds(rounds[:29], 3)


def test_recorded_rounds_replay_in_order_and_are_cut_to_fewer_drafts():
    source = Recorded([(3, 3, 5, True), (3, 1, 2, True), (0, 0, 7, False)])
    drawn = [source.draw(3, True) for _ in range(4)]
    assert sorted(set(drawn)) == [(1, 2), (3, 5)] and drawn[0] == drawn[2]
    assert source.draw(0, False) == (0, 7)
    assert {source.draw(1, True) for _ in range(4)} == {(1, 5)}
    with pytest.raises(ValueError, match="accepted all"):
        Recorded([(3, 1, 2, True)])


def test_more_drafts_than_were_recorded_are_no_rejection():
    """Of drafts that are right with chance 2/3, those after the recorded ones are, too."""
    always = Recorded([(2, 2, 0, True)])
    assert {always.draw(5, True) for _ in range(4)} == {(5, 0)}
    accepts = [random.Random(i).random() < 2 / 3 for i in range(3000)]
    source = Recorded([(1, 1, 0, True) if accept else (1, 0, 3, True) for accept in accepts])
    drawn = [source.draw(3, True) for _ in range(1000)]
    assert sum(k == 3 for k, _ in drawn) / 1000 == pytest.approx(8 / 27, abs=0.05)
    assert {rank for k, rank in drawn if k < 3} == {3}


def test_profile_round_trips_through_json():
    profile = dataclasses.replace(published_profile(), environment={"cpu": "some"})
    assert Profile.from_json(profile.to_json()) == profile


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(version=2), "version 2"),
        (lambda p: p.update(acceptance=[]), "acceptance"),
        (lambda p: p["costs"].update(verify=[]), "at least one verification"),
        (lambda p: p["costs"].update(draft_step=[[2, 1.0], [1, 1.0]]), "draft_step must be sorted"),
        (lambda p: p["costs"].update(draft_step=[[1, 0]]), "over 0"),
        (lambda p: p["acceptance"][0].update(rejected=[0.5, 0.4]), "undrafted must not decrease"),
        (lambda p: p["acceptance"][0].update(after_hit=[1.2]), "after_hit must hold probabilities"),
        (lambda p: p["costs"].update(verify="soon"), "costs.verify"),
        (lambda p: p.pop("costs"), "costs"),
    ],
)
def test_invalid_profiles_are_rejected_with_a_message(change, message):
    values = json.loads(PROFILE.to_json())
    change(values)
    with pytest.raises(ValueError, match=message):
        Profile.from_json(json.dumps(values))


def test_a_drafter_with_a_mask_token_is_planned_as_a_parallel_one():
    config = {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    }
    target, plain = Shape.of_size(70e9), Shape.from_config(config)
    parallel = Shape.from_config(config | {"pard_token": 5})
    assert parallel == dataclasses.replace(plain, parallel=True)
    assert not Shape.from_config(config | {"pard_token": None, "mask_token_id": 5}).parallel
    sequential, at_once = (guess_profile(target, shape, DEVICES["H100"], 4, 0.8) for shape in (plain, parallel))
    depths = [plan(profile, drafts=range(1, 13)).ssd.num_drafts for profile in (sequential, at_once)]
    assert depths[0] < depths[1], "two steps hide behind a round, however deep"
    setting = Setting(1, 12, 52, "skip")
    late, in_time = (predict_ssd(p, p.acceptance[0], setting) for p in (sequential, at_once))
    assert in_time.tokens_per_s > 1.1 * late.tokens_per_s
    stock = [predict_sd(p, p.acceptance[0], 1, 10).round_s for p in (sequential, at_once)]
    assert stock[0] - stock[1] > 8 * sequential.costs.sync_step_s(1)


# ---- predictions -----------------------------------------------------------------------------------------


def test_plain_and_stock_follow_their_formulas():
    assert predict_plain(PROFILE, 8).tokens_per_s == pytest.approx(8 / 0.012)
    tokens = sum(0.7**j for j in range(5))
    sd = predict_sd(PROFILE, ACCEPTANCE, 1, 4)
    assert sd.tokens_per_round == pytest.approx(tokens)
    assert sd.tokens_per_s == pytest.approx(tokens / (0.0108 + 4 * 0.0015))


def test_ssd_that_always_hits_in_time_hides_all_drafting():
    sure = (1.0,) * 16
    acceptance = Acceptance((0.7,), (0.7,), sure, sure, sure, rounds=1000)
    costs = dataclasses.replace(COSTS, draft_step=((1.0, 1e-4),), handover_s=0.0, latency_s=0.0)
    ssd = predict_ssd(Profile("t", "d", costs, (acceptance,)), acceptance, Setting(1, 4, 20, "skip"))
    assert ssd.hit_rate == pytest.approx(1.0)
    assert ssd.tokens_per_s == pytest.approx(sum(0.7**j for j in range(5)) / 0.0108, rel=1e-3)


def test_a_window_of_exactly_the_tree_and_one_step_does_not_divide_by_zero():
    sure = (1.0,) * 16
    acceptance = Acceptance((0.7,), (0.7,), sure, sure, sure, rounds=1000)
    costs = Costs(((1, 1, 0.01),), ((1.0, 0.0019),), spread=0.0)
    ssd = predict_ssd(Profile("t", "d", costs, (acceptance,)), acceptance, Setting(1, 4, 20, "skip"))
    assert ssd.hit_rate == pytest.approx(1.0)


def test_ssd_that_never_hits_decodes_plainly():
    never = (0.0,) * 16
    acceptance = Acceptance((0.7,), (0.7,), never, never, never, rounds=1000)
    costs = dataclasses.replace(COSTS, handover_s=0.0)
    ssd = predict_ssd(Profile("t", "d", costs, (acceptance,)), acceptance, Setting(1, 4, 20, "skip"))
    assert ssd.hit_rate == 0 and ssd.tokens_per_s == pytest.approx(predict_plain(PROFILE, 1).tokens_per_s, rel=1e-3)


def test_padded_rows_are_verified_with_all_drafts_and_never_wait():
    settings = [Setting(8, 4, 20, "wait", padded=padded) for padded in (True, False)]
    padded, usual = (predict_ssd(PROFILE, ACCEPTANCE, setting) for setting in settings)
    assert padded.stall_s == 0 < usual.stall_s
    assert padded.round_s == pytest.approx(COSTS.verify_s(8, 5) + COSTS.handover_s, rel=1e-3)
    assert padded.drafts_per_round < 4


def test_a_drafter_that_is_too_slow_is_late():
    costs = dataclasses.replace(COSTS, draft_step=((1.0, 0.05),), spread=0.01)
    ssd = predict_ssd(Profile("t", "d", costs, (ACCEPTANCE,)), ACCEPTANCE, Setting(1, 4, 20, "skip"))
    assert ssd.hit_rate < 0.01 and ssd.late_rate > 0.8
    assert ssd.tokens_per_round == pytest.approx(1.0, abs=0.02)


@settings(max_examples=40)
@given(
    st.integers(1, 16),
    st.integers(1, 8),
    st.integers(2, 64),
    st.sampled_from(["skip", "auto", "wait"]),
    st.integers(1, 4),
    st.floats(0.1, 0.95),
    st.floats(0.2, 5),
)
def test_ssd_predictions_are_in_bounds(batch_size, num_drafts, budget, on_miss, num_drafters, accept, slowdown):
    steps = tuple((n, slowdown * seconds) for n, seconds in COSTS.draft_step)
    acceptance = dataclasses.replace(Acceptance.prior(accept), rounds=100)
    profile = Profile("t", "d", dataclasses.replace(COSTS, draft_step=steps), (acceptance,))
    setting = Setting(batch_size, num_drafts, budget, on_miss, num_drafters)
    ssd = predict_ssd(profile, acceptance, setting)
    assert 0 <= ssd.hit_rate <= 1 and 0 <= ssd.late_rate <= 1 - ssd.hit_rate + 1e-9
    assert 1 <= ssd.tokens_per_round <= 1 + ssd.drafts_per_round + 1e-9 and ssd.drafts_per_round <= num_drafts + 1e-9
    assert ssd.branches <= budget
    assert ssd.round_s >= profile.costs.verify_s(batch_size, 1) and ssd.stall_s >= 0
    assert on_miss != "skip" or ssd.stall_s == 0
    assert ssd.per_device == pytest.approx(ssd.tokens_per_s / (1 + num_drafters))


@given(st.integers(1, 7), st.floats(0.3, 0.95))
def test_better_drafts_never_predict_fewer_tokens(num_drafts, accept):
    rates = []
    for chance in (accept, accept + 0.04):
        acceptance = Acceptance.prior(chance)
        rates.append(predict_ssd(PROFILE, acceptance, Setting(1, num_drafts, 24, "skip")).tokens_per_s)
        rates.append(predict_sd(PROFILE, acceptance, 1, num_drafts).tokens_per_s)
    assert rates[2] >= rates[0] * 0.999 and rates[3] >= rates[1]


# ---- the plan --------------------------------------------------------------------------------------------


def test_plan_prefers_ssd_where_drafting_is_half_of_a_round():
    best = plan(published_profile(), 1)
    assert best.recommended.method == "ssd" and best.second_device_pays
    assert best.draft_share > best.break_even_share
    assert best.recommended.tokens_per_s == max(p.tokens_per_s for p in (best.plain, best.sd, best.ssd))
    assert 0.8 < best.confidence <= 1


def test_plan_needs_no_second_device_when_drafting_is_free():
    costs = dataclasses.replace(COSTS, sync_step=((1.0, 1e-5),))
    best = plan(dataclasses.replace(PROFILE, costs=costs), 1)
    assert best.recommended.method == "sd" and not best.second_device_pays
    assert best.draft_share < best.break_even_share


def test_plan_turns_speculation_off_when_a_draft_costs_a_round():
    costs = dataclasses.replace(COSTS, verify=((8, 1, 0.01), (8, 2, 0.02), (8, 9, 0.09)))
    best = plan(dataclasses.replace(PROFILE, costs=costs), 8)
    assert best.recommended.method == "plain" and best.recommended_per_device.method == "plain"


def test_plan_picks_the_factor_with_the_most_tokens_not_the_most_hits():
    hot = [
        dataclasses.replace(
            Acceptance((accept,), (accept,), *[(hit,) * 16] * 3), temperature=1.0, saguaro=c, rounds=1000
        )
        for c, accept, hit in ((1.0, 0.6, 0.5), (0.5, 0.58, 0.8), (0.1, 0.1, 0.95))
    ]
    assert plan(dataclasses.replace(PROFILE, acceptance=(ACCEPTANCE, *hot)), 1, 1.0).saguaro == 0.5
    assert plan(dataclasses.replace(PROFILE, acceptance=(ACCEPTANCE, *hot)), 1, 0.0).saguaro == 1.0


def test_predictions_have_larger_errors_with_fewer_rounds_and_guesses():
    few, many = (dataclasses.replace(ACCEPTANCE, rounds=n) for n in (50, 5000))
    errors = [predict_ssd(PROFILE, a, Setting()).relative_error for a in (few, many)]
    assert errors[0] > errors[1]
    assert predict_ssd(PROFILE, Acceptance.prior(0.7), Setting()).relative_error > errors[0]
    guessed = dataclasses.replace(PROFILE, guessed=("costs",))
    assert predict_plain(guessed, 1).relative_error > predict_plain(PROFILE, 1).relative_error


# ---- priors ----------------------------------------------------------------------------------------------

LLAMA_8B = dict(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=14336,
    vocab_size=128256,
    tie_word_embeddings=False,
)


def test_parameters_are_counted_from_a_config():
    shape = Shape.from_config(LLAMA_8B)
    assert shape.weights == pytest.approx(8.03e9, rel=0.01)
    assert shape.kv_per_token == 2 * 32 * 8 * 128
    mixture = Shape.from_config(LLAMA_8B | {"num_local_experts": 8, "num_experts_per_tok": 2})
    assert mixture.weights == pytest.approx(46.7e9, rel=0.02) and mixture.active == pytest.approx(12.9e9, rel=0.05)
    with pytest.raises(ValueError, match="hidden_size"):
        Shape.from_config({"d_model": 768})


def test_rooflines_are_near_the_published_costs_of_70b_and_1b():
    """The overhead constants were fitted to these (docs/theory.md, Priors)."""
    profile = guess_profile(Shape.of_size(70e9), Shape.of_size(1.24e9), DEVICES["H100"], 4, 0.88)
    assert profile.costs.verify_s(1, 1) == pytest.approx(0.01503, rel=0.1)
    assert profile.costs.draft_step_s(1) == pytest.approx(0.00204, rel=0.2)
    assert profile.guessed and predict_plain(profile, 1).relative_error > 0.2


def test_ssd_affords_a_larger_drafter_where_rounds_are_long():
    """With 8e9 parameters on four devices about two draft steps fit into a round, and the smallest drafter is best."""
    sizes = [drafter_size_prior(Shape.of_size(size), DEVICES["H100"], 4) for size in (8e9, 32e9, 70e9)]
    assert all(size["ssd"] > size["sd"] for size in sizes[1:])
    for a, b in itertools.pairwise(sizes):
        assert b["sd"] >= a["sd"] and b["ssd"] >= a["ssd"]
