"""`vllm-ssd profile` with real engines, and `plan` on what it wrote."""

from __future__ import annotations

import json
from dataclasses import replace

import fork_server
import pytest
from engines import ENVIRONMENT, PAIR, server
from typer.testing import CliRunner

from vllm_ssd.cli import app
from vllm_ssd.planning import Profile
from vllm_ssd.planning.engine_host import EngineProcess
from vllm_ssd.planning.measure import BRANCHES

ENGINE_ARGS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "kv_cache_memory_bytes": 64 << 20,
}


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the engines and their drafters from a process that has imported vLLM."""

    def start(self, program, connection, environment, output):
        assert program == ["-m", "vllm_ssd.planning"]
        return fork_server.fork(server().address, "host", program, connection, environment, output)

    monkeypatch.setattr(EngineProcess, "_start", start)
    for name, value in (ENVIRONMENT | {fork_server.ADDRESS: server().address}).items():
        monkeypatch.setenv(name, value)


def vllm_ssd(*arguments: object) -> str:
    """What the command prints; fails the test when it fails."""
    done = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_profile_of_real_engines_is_planned_with(tmp_path):
    out, trace = tmp_path / "profile.json", tmp_path / "trace.jsonl"
    printed = vllm_ssd(
        *("profile", PAIR / "target", PAIR / "drafter", "--out", out, "--trace", trace),
        *("--batch-sizes", "1,2", "--max-drafts", 3, "--turns", 2, "--tokens", 64, "--temperatures", "0,0.8"),
        *("--engine-args", json.dumps(ENGINE_ARGS)),
        *("--ssd", '{"dtype": "float32", "kv_cache_memory": "64MiB"}'),
    )
    profile = Profile.from_json(out.read_bytes())
    costs = profile.costs
    assert [(b, m) for b, m, _ in costs.verify] == [(b, m) for b in (1, 2) for m in (1, 2, 3, 4)]
    assert min(seconds for *_, seconds in costs.verify) > 0
    assert [n for n, _ in costs.draft_step] == list(BRANCHES)
    assert costs.draft_step_s(192) > 2 * costs.draft_step_s(1) > 0  # the bundled drafter: one row takes next to nothing
    assert [b for b, _ in costs.sync_step] == [1, 2] and costs.slowdown >= 1

    rounds = [json.loads(line) for line in trace.read_text().splitlines()]
    recorded = sum(a.rounds for a in profile.acceptance)
    assert len(rounds) - 4 <= recorded <= len(rounds)  # the drafter hears of the last outcomes when text is complete
    assert all(0 <= k <= m <= 3 for m, k, _, _ in rounds) and any(k for _, k, _, _ in rounds)
    greedy, sampled = profile.acceptance
    assert (greedy.temperature, sampled.temperature) == (0.0, 0.8)
    assert 0.1 < greedy.accept_probs(1, after_hit=True)[1] < 1
    assert f"{recorded} rounds recorded" in printed and not profile.guessed

    planned = json.loads(vllm_ssd("plan", "--profile", out, "--batch-size", 2, "--max-drafts", 3, "--json"))
    best = planned["plans"]["2"]
    assert best["plain"]["tokens_per_s"] == pytest.approx(2 / costs.verify_s(2, 1))
    assert best["sd"]["round_s"] > costs.verify_s(2, 1 + best["sd"]["num_drafts"])

    # Whether drafts pay at the measured costs is up to the machine; with a target whose rounds take a second they do.
    dear = [(rows, tokens, 1.0) for rows, tokens, _ in costs.verify]
    out.write_text(replace(profile, costs=replace(costs, verify=tuple(dear))).to_json())
    planned = json.loads(vllm_ssd("plan", "--profile", out, "--batch-size", 2, "--max-drafts", 3, "--json"))
    assert planned["plans"]["2"]["ssd"]["tokens_per_round"] > 1
