"""The command line: output, files written, and errors."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from fake_cluster import fake_cluster
from typer.testing import CliRunner

import vllm_ssd.planning.measure
from vllm_ssd.cli import app
from vllm_ssd.planning import Profile
from vllm_ssd.planning.measure import EngineFailed
from vllm_ssd.planning.published import published_profile

CONFIG = dict(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=14336,
    vocab_size=128256,
)


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    path.write_text(published_profile().to_json())
    return path


def test_plan_recommends_a_configuration_with_its_confidence(profile):
    done = run("plan", "--profile", profile, "--batch-size", 1, "--batch-size", 16)
    assert done.exit_code == 0, done.output
    assert "batch 1," in done.output and "batch 16," in done.output
    assert '"method": "ssd"' in done.output and "A second device pays" in done.output
    assert "% sure" in done.output
    assert "Guessed, not measured: draft steps over more than 64 branches" in done.output


def test_plan_as_json_has_a_configuration_for_vllm(profile):
    done = run("plan", "--profile", profile, "--json", "--max-drafts", 4)
    found = json.loads(done.output)["plans"]["1"]
    config = found["speculative_config"]
    assert config["method"] == "ssd" and config["num_speculative_tokens"] <= 4
    assert config["branch_budget"] == found["recommended"]["branch_budget"]
    assert found["second_device_pays"] and 0.5 < found["confidence"] <= 1
    assert found["recommended"]["per_device"] == pytest.approx(found["recommended"]["tokens_per_s"] / 5)
    assert {p["num_drafts"] for p in found["grid"]} == {1, 2, 3, 4}


def test_further_profiles_add_acceptance_at_other_factors(profile, tmp_path):
    sampled = dataclasses.replace(published_profile().acceptance[0], temperature=1.0)
    paths = []
    for factor, accept in ((1.0, 0.4), (0.5, 0.8)):
        acceptance = dataclasses.replace(sampled, saguaro=factor, after_hit=(accept,))
        paths.append(tmp_path / f"{factor}.json")
        paths[-1].write_text(dataclasses.replace(published_profile(), acceptance=(acceptance,)).to_json())
    options = [part for path in paths for part in ("--profile", path)]
    done = run("plan", *options, "--temperature", 1.0, "--json", "--max-drafts", 3)
    found = json.loads(done.output)["plans"]["1"]
    assert found["saguaro"] == 0.5 == found["speculative_config"]["saguaro_c"]


def test_plan_plots_rate_over_drafts_and_budget(profile, tmp_path):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "plan.png"
    done = run("plan", "--profile", profile, "--batch-size", 1, "--batch-size", 4, "--max-drafts", 3, "--plot", figure)
    assert done.exit_code == 0, done.output
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_plan_from_configs_is_marked_as_guessed(tmp_path):
    target, drafter = tmp_path / "target", tmp_path / "drafter.json"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(CONFIG))
    drafter.write_text(json.dumps(CONFIG | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}))
    done = run("plan", "--target", target, "--drafter", drafter, "--max-drafts", 3, "--target-devices", 2)
    assert done.exit_code == 0, done.output
    assert "Drafter size, a prior" in done.output
    assert "Guessed, not measured: costs, from shapes and data sheets; acceptance" in done.output
    assert "30%" in done.output


def test_given_costs_replace_guessed_and_measured_ones(profile):
    given = run("plan", "--json", "--verify-ms", 20, "--draft-step-ms", 1, "--acceptance", 0.8)
    assert json.loads(given.output)["plans"]["1"]["plain"]["tokens_per_s"] == pytest.approx(50)
    scaled = run("plan", "--json", "--profile", profile, "--verify-ms", 30.02, "--max-drafts", 2)
    assert json.loads(scaled.output)["plans"]["1"]["plain"]["round_s"] == pytest.approx(0.03002)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --profile; or --target and --drafter"),
        (["--verify-ms", 3], "give --profile"),
        (["--profile", "nowhere.json"], "nowhere.json"),
        (["--target", "{tmp}/empty.json", "--drafter", "{tmp}/empty.json"], "hidden_size"),
        (["--target", "{tmp}/config.json", "--drafter", "{tmp}/config.json", "--device", "H900"], "H900"),
        (["--profile", "{tmp}/empty.json"], "missing required field"),
        (["--profile", "{tmp}/config.json", "--max-drafts", 40], "--max-drafts"),
    ],
)
def test_plan_rejects_invalid_options_with_a_message(arguments, message, tmp_path):
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    done = run("plan", *(str(a).replace("{tmp}", str(tmp_path)) for a in arguments))
    assert done.exit_code == 2 and message in done.output
    assert "Traceback" not in done.output


class FakeProfiler:
    """Records its subjects and returns the published profile without starting an engine."""

    subjects: list = []
    fails = False

    def __init__(self, subject, folder, together):
        self.subjects.append((subject, together))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def run(self, turns, progress):
        if self.fails:
            raise EngineFailed("the engine that measures 'ssd' ended\nOSError: no such model")
        progress(f"{turns} turns")

    def profile(self):
        return dataclasses.replace(published_profile(), guessed=())

    def write_trace(self, path):
        path.write_text("[3, 1, 0, true]\n")


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(vllm_ssd.planning.measure, "Profiler", FakeProfiler)
    monkeypatch.setattr(FakeProfiler, "subjects", [])
    return FakeProfiler


def test_profile_writes_a_file_that_plan_reads(fake, tmp_path):
    out, trace, prompts = tmp_path / "profile.json", tmp_path / "trace.jsonl", tmp_path / "prompts.jsonl"
    prompts.write_text('"Once"\n[1, 2, 3]\n')
    done = run(
        *("profile", "TARGET", "DRAFTER", "--out", out, "--trace", trace, "--prompts", prompts, "--together"),
        *("--engine-args", '{"tensor_parallel_size": 4}', "--batch-sizes", "1,16", "--target-cpus", "0-2"),
        *("--temperatures", "0,0.8", "--no-stock", "--max-drafts", 6),
    )
    assert done.exit_code == 0, done.output
    ((subject, together),) = fake.subjects
    assert together and subject.prompts == ["Once", [1, 2, 3]] and not subject.stock
    assert subject.batch_sizes == (1, 16) and subject.temperatures == (0, 0.8) and subject.max_drafts == 6
    assert subject.target_devices == 4 and subject.target_cpus == (0, 1, 2)
    assert Profile.from_json(out.read_bytes()) == FakeProfiler.profile(None)
    assert trace.exists() and "15.01 ms" in done.output
    assert run("plan", "--profile", out, "--max-drafts", 2).exit_code == 0


def test_profile_reports_an_engine_that_failed(fake, monkeypatch, tmp_path):
    monkeypatch.setattr(fake, "fails", True)
    done = run("profile", "TARGET", "DRAFTER", "--out", tmp_path / "profile.json")
    assert done.exit_code == 1 and "no such model" in done.output and not (tmp_path / "profile.json").exists()


@pytest.mark.parametrize(
    "arguments", [["--engine-args", "{"], ["--batch-sizes", "one"], ["--target-cpus", "x"], ["--prompts", "nowhere"]]
)
def test_profile_rejects_invalid_options_with_a_message(fake, arguments, tmp_path):
    done = run("profile", "TARGET", "DRAFTER", "--out", tmp_path / "p.json", *arguments)
    assert done.exit_code == 2 and "Traceback" not in done.output and not fake.subjects


def test_a_credential_is_made_once_and_a_drafter_wants_one(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "execve", lambda *arguments: pytest.fail("the tests would become a drafter"))
    key = tmp_path / "ssd.pem"
    drafter = ("drafter", "--model", "m", "--key", key)
    assert "vllm-ssd key FILE" in run(*drafter, "--listen", "127.0.0.1:1").output
    assert run("key", key).exit_code == 0 and key.stat().st_mode & 0o077 == 0
    again = run("key", key)
    assert again.exit_code == 1 and "File exists" in again.output
    for arguments, reason in (
        (("--listen", "127.0.0.1"), "no HOST:PORT"),
        (("--listen", "127.0.0.1:1", "--config", "[]"), "must be a JSON object"),
        (("--listen", "127.0.0.1:1", "--config", '{"fanout": 3}'), "did you mean 'fan_out'?"),
        (("--listen", "127.0.0.1:1", "--config", '{"drafter_device": "cpu"}'), "drafter_device is for drafters that a"),
        (("--listen", "127.0.0.1:1", "--config", '{"drafter_args": {"seed": 3}}'), "seed is not allowed in"),
        (("--listen", "127.0.0.1:1", "--config", '{"drafter_args": {"sed": 3}}'), "did you mean 'seed'?"),
    ):
        done = run(*drafter, *arguments)
        assert done.exit_code == 1 and reason in done.output, done.output


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--config", '{"drafter_args": {"seed": 3}}'), "seed is not allowed in drafter_args"),
        (("--config", '{"drafter_device": "cpu"}'), "Ray places the drafters of a pool"),
        (("--resources", '{"GPU": 1.5}'), "a fraction of one GPU or whole GPUs"),
    ],
)
def test_a_pool_is_not_started_with_keys_that_no_drafter_takes(arguments, reason):
    with fake_cluster():
        done = run("pool", "up", "chat", "--model", "m", *arguments)
    assert done.exit_code == 1 and reason in done.output, done.output
