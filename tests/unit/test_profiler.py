"""How measurements become a profile, with engines that only pretend."""

import json
from pathlib import Path

import numpy as np
import pytest
from fake_model import FakePagedModel

from vllm_ssd.compat.target.measure import ConstantDrafts
from vllm_ssd.drafter.trace import TRACE_ENV, TracedFanOut
from vllm_ssd.planning import Profile, engine_host, measure
from vllm_ssd.planning.measure import EngineFailed, Profiler, Subject
from vllm_ssd.planning.worker import STEP_TREES, Decode, DrafterEngine, Steps, Task
from vllm_ssd.policy import FanOut


class FakeEngine:
    """A machine that takes 10 ms a round and 1 ms a token, and 2 ms + 50 µs a branch for a draft step."""

    started: list[Task] = []
    running = 0
    is_parallel = False

    def __init__(self, task: Task, log: Path, idle_stop: bool) -> None:
        self.task, self.placement = task, None
        FakeEngine.started.append(task)
        FakeEngine.running += 1
        if task.method == "ssd":
            self.placement = {"engine_args": {"model": "drafter"}, "cpus": (1,), "environment": {"OMP": "1"}}
        if task.method == "steps":
            self.placement = {"parallel": FakeEngine.is_parallel}

    def ask(self, request: Decode | Steps) -> list[float]:
        if isinstance(request, Steps):
            return [2e-3 + 5e-5 * request.rows * request.branches] * 5
        if self.task.method == "ssd":
            with open(self.task.environment[TRACE_ENV], "a") as file:
                for i in range(40):
                    print(json.dumps([3, 3, 1, True] if i % 2 else [0, 0, 0, False]), file=file)
            return [0.0156] * 9
        drafts = int(request.prompts[0][0]) if self.task.method == "verify" else measure.STOCK_DRAFTS
        seconds = 0.010 + 0.001 * len(request.prompts) * (1 + drafts)
        return [seconds + (2 * 0.003 if self.task.method == "stock" else 0.0)] * 9

    def close(self) -> None:
        FakeEngine.running -= 1


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(measure, "Engine", FakeEngine)
    monkeypatch.setattr(FakeEngine, "started", [])
    monkeypatch.setattr(FakeEngine, "running", 0)
    return FakeEngine


SUBJECT = Subject(
    "target", "drafter", [[5, 6]], batch_sizes=(1, 4), max_drafts=3, temperatures=(0.0, 0.8), target_cpus=(0,)
)


@pytest.mark.parametrize("together", [True, False])
def test_measurements_become_a_profile(fake, tmp_path, together):
    with Profiler(SUBJECT, tmp_path, together) as profiler:
        profiler.run(2)
        profile = profiler.profile()
    assert fake.running == 0 and [task.method for task in fake.started] == ["ssd", "steps", "verify", "stock"]
    costs = profile.costs
    assert costs.verify_s(4, 2) == pytest.approx(0.018) and costs.verify_s(1, 4) == pytest.approx(0.014)
    assert costs.draft_step_s(24) == pytest.approx(0.0032) and costs.sync_step_s(4) == pytest.approx(0.003)
    # Rounds of no and of three drafts in turn take 12.5 ms alone, and took 15.6 ms with a hand-over of 0.2 ms.
    assert costs.slowdown == pytest.approx(15.4 / 12.5)
    assert [a.temperature for a in profile.acceptance] == [0.0, 0.8]
    assert profile.acceptance[0].rounds == 80 * SUBJECT.prompts_a_turn and profile.acceptance[0].accepted[:2] == (
        0.0,
        1.0,
    )
    assert profile.acceptance[0].undrafted[0] == 1.0 and profile.acceptance[0].after_hit[0] > 0.9
    profiler.write_trace(tmp_path / "copy.jsonl")
    assert len((tmp_path / "copy.jsonl").read_text().splitlines()) == 160 * SUBJECT.prompts_a_turn


def test_a_parallel_drafter_is_profiled_as_one(fake, tmp_path, monkeypatch):
    """Its steps were measured with four drafts a branch: one of eight takes as long as one over twice the branches."""
    monkeypatch.setattr(fake, "is_parallel", True)
    with Profiler(SUBJECT, tmp_path, False) as profiler:
        profiler.run(2)
    costs = Profile.from_json(profiler.profile().to_json()).costs
    assert costs.parallel == 4 and [costs.steps(k) for k in (0, 1, 8)] == [0, 1, 1]
    assert costs.draft_step_s(24) == costs.draft_step_s(24, 4) == costs.draft_step_s(12, 8) == pytest.approx(0.0032)


def test_engines_get_what_they_need(fake, tmp_path):
    with Profiler(SUBJECT, tmp_path, True) as profiler:
        profiler.run(2)
    ssd, steps, verify, stock = fake.started
    assert ssd.engine_args["speculative_config"]["method"] == "ssd" and ssd.environment["VLLM_PLUGINS"] == "ssd"
    assert verify.engine_args["speculative_config"]["model"].endswith("measure.ConstantDrafts")
    assert stock.engine_args["speculative_config"]["num_speculative_tokens"] == measure.STOCK_DRAFTS
    assert steps.cpus == (1,) and steps.environment == {"OMP": "1"} and steps.engine_args["model"] == "drafter"
    assert all(task.cpus == (0,) for task in (ssd, verify, stock))
    assert all(TRACE_ENV not in task.environment for task in (steps, verify, stock))


def test_an_engine_that_does_not_start_is_reported_with_its_log(tmp_path, monkeypatch):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no module named vllm\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(engine_host.sys, "executable", str(broken))
    with pytest.raises(EngineFailed, match="(?s)measures 'verify' ended.*no module named vllm"):
        measure.Engine(Task("verify", {}), tmp_path / "verify.log", idle_stop=True)


def test_an_engine_that_is_measured_has_a_process_of_its_own(tmp_path):
    engine = engine_host.EngineProcess(["-m", "vllm_ssd.planning"], tmp_path / "log")
    try:
        with pytest.raises(EngineFailed, match="'Worker' object has no attribute '_engine'"):
            engine.call("run", request=Steps(1, 1, 1))
    finally:
        engine.close()


def test_every_tree_of_a_drafter_gives_a_time():
    drafter = DrafterEngine.__new__(DrafterEngine)
    drafter._model = FakePagedModel(num_pages=4096)
    for rows, branches in ((1, 1), (6, 4)):  # six prompts are not read in one step
        seconds = drafter.run(Steps(rows, branches, num_drafts=5))
        assert len(seconds) == STEP_TREES - 1 and min(seconds) > 0


def test_constant_drafts_follow_the_first_token_of_the_prompt():
    proposer = ConstantDrafts.__new__(ConstantDrafts)
    proposer._most = 4
    token_ids = np.array([[0, 9], [3, 9], [7, 9], [2, 9]], np.int32)
    assert proposer.propose([[5], [5], [5], []], np.array([2] * 4), token_ids) == [[], [1] * 3, [1] * 4, []]


def test_a_trace_holds_what_the_fan_out_learned(tmp_path):
    path = tmp_path / "trace.jsonl"
    traced, plain = TracedFanOut(str(path), 3, None, 12), FanOut(3, None, 12)
    outcomes = [(3, 1, 0, True), (3, 3, None, False), (0, 0, 4, False)] * 20
    for m, k, rank, after_hit in outcomes:
        traced.observe(m, k, rank, after_hit, 16)
        plain.observe(m, k, rank, after_hit, 16)
    assert [tuple(json.loads(line)) for line in path.read_text().splitlines()] == outcomes
    assert traced.counts(3, True) == plain.counts(3, True)
