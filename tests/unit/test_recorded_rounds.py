"""Rounds that the scripts record and replay: the target's own text, and what is written down of it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from pair_model import DRAFTER, TARGET, continue_text, load  # noqa: E402
from record_rounds import CUTS, PAIR, Recorder, Rounds, record  # noqa: E402
from replay_rounds import POLICIES, levels_of, replay, standard_error  # noqa: E402
from round_ceilings import accepted_drafts, truncated  # noqa: E402

from vllm_ssd.policy import Draws  # noqa: E402


def told(**options) -> argparse.Namespace:
    defaults = dict(pair=PAIR, temperature=0.0, noise=0.0, drafts=3, top_m=64, prompts=6, tokens=10, seed=0)
    return argparse.Namespace(**(defaults | dict(every_position=False, foresee=False) | options))


@pytest.fixture(scope="module")
def models():
    return load(PAIR / "target", TARGET), load(PAIR / "drafter", DRAFTER)


@pytest.fixture(scope="module")
def sampled() -> Rounds:
    return record(told(temperature=0.9, drafts=4, prompts=16, tokens=12))


@pytest.mark.parametrize("every_position", [False, True])
@torch.no_grad()
def test_greedy_rounds_emit_the_text_of_the_target(models, every_position):
    prompts = torch.randint(2048, (3, 20), generator=torch.Generator().manual_seed(1))
    recorder = Recorder(*models, prompts, told(every_position=every_position))
    accepted = 0
    while (recorder.num_emitted < 10).any():
        accepted += int(recorder.round()["accept_length"].sum())
    assert accepted, "inconclusive: no draft was accepted"
    texts = continue_text(models[0], prompts, 30)[:, 20:].tolist()
    assert [text[:10] for text in recorder.texts] == texts


@torch.no_grad()
def test_a_drafter_that_is_the_target_is_always_accepted(models):
    prompts = torch.randint(2048, (4, 20), generator=torch.Generator().manual_seed(2))
    recorder = Recorder(models[0], models[0], prompts, told(temperature=1.0, top_m=2048, tokens=20))
    for _ in range(4):
        found = recorder.round()
        assert (found["accept_length"] == 3).all()
        torch.testing.assert_close(found["overlap"][..., -1], torch.ones(4, 3), atol=1e-3, rtol=0)
        assert (found["overlap"][..., 0] < 1).all(), "a cut q is not the target's"


@torch.no_grad()
def test_a_drafter_that_is_the_target_foresees_every_bonus_token(models):
    prompts = torch.randint(2048, (4, 20), generator=torch.Generator().manual_seed(2))
    recorder = Recorder(models[0], models[0], prompts, told(temperature=1.0, top_m=2048, tokens=20, foresee=True))
    for _ in range(4):
        found = recorder.round()
        assert (found["accept_length"] == 3).all() and (found["bonus_rank"] == 0).all()
        assert ((found["draft_probs"] > 0) & (found["draft_probs"] <= 1)).float().mean() > 0.9
        assert ((found["uniforms"] >= 0) & (found["uniforms"] < 1)).all()


def test_foreseen_rounds_hit_more_often():
    known, foreseen = (
        record(told(temperature=1.0, prompts=12, tokens=40, foresee=foresee)) for foresee in (False, True)
    )
    hits = []
    for rounds, draws in ((known, Draws.SAMPLED), (foreseen, Draws.FORESEEN)):
        policy = POLICIES["confidence"](rounds.draft_probs.shape[1], 12, draws)
        hits.append(replay(rounds, levels_of(rounds), policy)[60:].mean())
    assert hits[1] > hits[0] + 0.15, hits


def test_what_is_recorded_agrees_with_itself(sampled):
    assert (np.diff(sampled.candidate_probs, axis=2) <= 0).all()
    judged = ~np.isnan(sampled.overlap)
    assert (judged.sum(1)[:, 0] == np.minimum(sampled.accept_length + 1, 4)).all()
    rates = np.nanmean(sampled.overlap[..., CUTS.index(64)], axis=0)
    assert abs((sampled.accept_length > 0).mean() - rates[0]) < 4 * (0.25 / len(sampled.request)) ** 0.5
    assert accepted_drafts(sampled, 8)[-1] < accepted_drafts(sampled, 2048)[-1]


def test_fewer_drafts_end_where_more_went_on(sampled):
    short = truncated(sampled, 2)
    beyond = sampled.accept_length > 2
    assert beyond.any() and (short.accept_length == np.minimum(sampled.accept_length, 2)).all()
    assert (short.bonus_rank[beyond] == sampled.draft_ranks[beyond, 2]).all()
    assert (short.bonus_rank[sampled.accept_length < 2] == sampled.bonus_rank[sampled.accept_length < 2]).all()
    assert (np.diff(short.candidate_probs[:, 2], axis=1) <= 0).all()


def test_replayed_policies_hit_as_often_as_they_can(sampled):
    levels = levels_of(sampled)
    hits = {name: replay(sampled, levels, policy(4, 12)) for name, policy in POLICIES.items()}
    assert (hits["oracle"] == (sampled.bonus_rank < 12)).all()
    assert all((found <= hits["oracle"]).all() and found.any() for found in hits.values())
    assert 0 < standard_error(hits["marginal"].astype(float), sampled.request) < 0.1
