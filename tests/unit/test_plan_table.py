"""The tables of docs/planning.md are what the planner says, from inputs that are what they claim to be."""

from __future__ import annotations

import pytest
from script_modules import load_script

cases = load_script("plan_cases")
script = load_script("plan_table")


def test_the_page_is_as_the_planner_has_it():
    text = script.PAGE.read_text()
    assert text == script.page(text), "run python scripts/plan_table.py"
    with pytest.raises(ValueError, match="has no <!-- what to run by"):
        script.page("without markers")


def test_the_page_names_the_rates_that_were_derived():
    text = script.PAGE.read_text()
    assert f"acceptance of 32B/0.6B, {cases.RATE_32B:.2f} a draft" in text
    assert f"lower rate: {cases.EAGLE_LOW:.2f} a draft" in text
    assert f"higher rate: {cases.EAGLE_OF_DRAFTER:.2f} of the draft model's" in text
    assert f"acceptance of 400B/1B, {cases.RATE_MIXTURE:g} a draft" in text


def test_an_acceptance_rate_gives_the_tokens_it_is_derived_from():
    for rate, num_drafts in ((0.3, 2), (0.75, 7)):
        tokens = sum(rate**j for j in range(num_drafts + 1))
        assert cases.accepted_of(tokens, num_drafts) == pytest.approx(rate)
    assert cases.COVERAGE_32B[2] == pytest.approx(0.74, abs=0.01)
    assert cases.COVERAGE_32B[5] == pytest.approx(0.84, abs=0.01)


def test_costs_meet_the_known_times_on_their_machine():
    targets = cases.targets()
    assert cases.costs(targets["70B"], "H100", 4).verify_s(8, 8) == pytest.approx(17.6e-3, rel=0.01)
    small = cases.costs(targets["8B"], "H100", 1)
    for branches, ms in cases.KNOWN["0.6B"]:
        assert small.draft_step_s(branches) == pytest.approx(ms / 1e3, rel=0.02)
    # The measured verifications had a short context; 1,024 tokens take a little longer.
    for rows, ms in cases.KNOWN["8B"]:
        assert 1 <= small.verify_s(rows, 6) / (ms / 1e3) < 1.3


def test_a_card_with_more_bandwidth_is_faster():
    for model in ("8B", "70B", "400B, 8 of 256"):
        slow, fast = (script.predict(device, model, 4, 4) for device in ("H100", "B200"))
        assert all(fast[name].tokens_per_s > slow[name].tokens_per_s for name in slow)


def test_methods_that_are_about_as_good_are_named_together():
    found = script.predict("H100", "70B", 4, 1)
    assert script.names(found, script.speed)[0] == "SSD"
    level = dict.fromkeys(("plain", "SSD"), found["SSD"])
    assert script.names(level, script.speed) == ["plain", "SSD"]
