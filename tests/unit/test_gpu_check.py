"""The check for a machine with a GPU: its parts, what it keeps of them, and what it says of the numbers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

import gpu_check  # noqa: E402
import gpu_check_drafter  # noqa: E402
import gpu_check_models  # noqa: E402
import gpu_check_v2  # noqa: E402
from gpu_check_goals import GOALS, predictions, verdicts  # noqa: E402

TRACE = [json.loads(line) for line in (SCRIPTS / "gpu_check_trace.jsonl").read_text().splitlines()]
FAKE_PARTS = """
import json, os, sys, time
part, folder = sys.argv[1], sys.argv[3]

def report(value):
    row = {"kind": "failed_tests", "what": part, "value": value, "unit": ""}
    with open(folder + "/rows.jsonl", "a") as file:
        file.write(json.dumps(row) + "\\n")

report(0)
if part == "costs":
    print("ValueError: no such device")
    os.abort()
if part == "drafter":
    os.fork()
    time.sleep(600)
"""


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The check with parts that end well, crash ("costs") or hang ("drafter")."""
    for name in ("gpu_check.py", "gpu_check_goals.py"):
        shutil.copy(SCRIPTS / name, tmp_path)
    (tmp_path / "gpu_check_parts.py").write_text(FAKE_PARTS)
    return tmp_path


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(folder / "gpu_check.py"), "--dry-run", "--out", str(folder / "out"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def report_of(folder: Path) -> dict:
    return json.loads((folder / "out" / "gpu_check.json").read_text())


def in_session_of(pid: int) -> list[str]:
    """Processes of the session that a part leads."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == pid and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


def test_all_parts_take_eight_minutes_at_most():
    assert sum(gpu_check.LIMITS_S.values()) <= 8 * 60


def test_a_crash_and_a_hang_cost_one_part_each(copied):
    process = start(copied, "--time", "0.08")
    output, _ = process.communicate(timeout=60)
    report = report_of(copied)
    status = {part["name"]: part["status"] for part in report["parts"]}
    assert status == {
        "kernels": "done",
        "costs": "failed",
        "drafter": "cut off",
        "end_to_end": "done",
        "benchmarks": "done",
    }
    assert all(len(part["rows"]) == 1 for part in report["parts"]), "what was reported before the end is lost"
    assert "ValueError: no such device" in report["parts"][1]["error"]
    assert len((copied / "out" / "rows.jsonl").read_text().splitlines()) == 5
    assert process.returncode == 1 and "5 parts, 2 not done" in output


def test_an_interrupted_check_keeps_what_it_has_and_leaves_no_process(copied):
    process = start(copied, "--parts", "kernels", "drafter")
    assert process.stdout is not None
    for line in process.stdout:
        if line.split()[:1] == ["drafter"]:
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children and in_session_of(int(children[0]))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert [(part["status"], len(part["rows"])) for part in report_of(copied)["parts"]] == [("done", 1), ("cut off", 1)]
    assert not in_session_of(int(children[0]))


def test_it_refuses_without_a_gpu(tmp_path):
    environment = os.environ | {"PATH": str(tmp_path)}
    refused = subprocess.run(
        [sys.executable, str(SCRIPTS / "gpu_check.py")], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert refused.returncode == 2 and refused.stderr == "gpu_check: nvidia-smi finds no GPU; --dry-run needs none\n"
    assert not list(tmp_path.iterdir())


def test_rows_are_taken_whole(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a"')
    part = gpu_check.Part("kernels", 1)
    with path.open() as news:
        assert part.take(news) == [{"a": 1}]
        with path.open("a") as file:
            file.write(": 2}\n")
        assert part.take(news) == [{"a": 2}]
    assert len(part.rows) == 2


def row(kind: str, value: float, **sizes: object) -> dict:
    return {"kind": kind, "what": kind, "value": value, "unit": "", **sizes}


GOOD = [
    row("failed_tests", 0),
    row("eager_steps", 0, graphs=True),
    row("late_captures", 0, graphs=True),
    row("identity", 1.0, system="ssd"),
    row("accepted", 40, system="ssd"),
    row("gap", 100.0, system="plain", batch=1),
    row("gap", 140.0, system="ssd", batch=1),
    row("tree_attention", 50.0, way="ours", model="m", requests=8, context=8192, branches=24, of_copy_bandwidth=0.8),
    row("tree_attention", 200.0, way="vllm flash attention", model="m", requests=8, context=8192, branches=24),
    row("pages", 25.0, requests=8),
    row("pages", 90.0, requests=32),
    row("lookup", 9.0, requests=32),
]
BAD = {
    "failed_tests": {"value": 2},
    "eager_steps": {"value": 3},
    "late_captures": {"value": 1},
    "identity": {"value": 0.875},
    "accepted": {"value": 0},
    "tree_attention": {"value": 100.0, "of_copy_bandwidth": 0.5},
    "pages": {"value": 31.0},
    "lookup": {"value": 11.0},
}


def test_goals_are_judged_by_their_numbers():
    assert {verdict.result for verdict in verdicts(GOOD)} == {"pass"}
    assert {verdict.result for verdict in verdicts([])} == {"not measured"}
    bad = [found | BAD.get(found["kind"], {}) for found in GOOD]
    results = {verdict.goal: verdict.result for verdict in verdicts(bad)}
    assert [goal for goal, result in results.items() if result != "fail"] == [
        next(g.text for g in GOALS if g.bound_only)
    ]


def test_a_gap_on_one_gpu_can_only_pass():
    slow = [
        found | {"value": 300.0} if found.get("system") == "ssd" and found["kind"] == "gap" else found for found in GOOD
    ]
    (verdict,) = (v for v, goal in zip(verdicts(slow), GOALS) if goal.bound_only)
    assert verdict.result == "not measured" and verdict.measured.startswith("at most 200 µs")


def test_a_dry_run_does_not_judge_graphs():
    assert verdicts([row("eager_steps", 9, graphs=False)])[1].result == "not measured"


def test_the_kernels_goals_stand_in_the_benchmarks():
    stated = (ROOT / "docs" / "benchmarks.md").read_text()
    assert all(goal.text in stated for goal in GOALS if "`" in goal.text or goal.text.startswith("V2"))
    assert sum("`" in goal.text for goal in GOALS) == 4


def test_two_devices_are_predicted_from_the_measured_times():
    rows = [row("verify", 8.0 + tokens / 10, batch=1, tokens=tokens) for tokens in (1, 3, 6)]
    rows += [row("draft_step", ms, model="1B", branches=n) for n, ms in ((1, 1.0), (24, 1.2))]
    assert predictions(rows) == []
    (predicted,) = predictions([*rows, row("trace", len(TRACE), trace=TRACE)])
    speed = predicted["tokens_per_s"]
    assert speed["plain"] == pytest.approx(1e3 / 8.1, rel=0.05)
    assert speed["plain"] < speed["sd"] < speed["ssd"] < 6 * speed["plain"]
    assert "simulated, not measured" in predicted["text"]


def test_texts_may_differ_after_a_tie_only():
    agree = gpu_check_v2.agree
    assert agree([1, 2, 3], [1, 2, 3], [1.0, 1.0, 1.0])
    assert agree([1, 9, 8], [1, 2, 3], [1.0, gpu_check_v2.TIE / 2, 1.0])
    assert not agree([1, 9, 8], [1, 2, 3], [1.0, 2 * gpu_check_v2.TIE, 1.0])
    assert not agree([1, 2], [1, 2, 3], [1.0, 1.0, 1.0])


def test_the_model_without_vllm_is_a_llama():
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    from vllm_ssd.compat.drafter.paged import TreeBatch

    folder = gpu_check_models.PAIR / "drafter"
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    model = gpu_check_models.Llama(config, 8, torch.device("cpu"), torch.float32, weights)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(2048, size=50))
    lengths = torch.arange(1, 51, dtype=torch.int32)
    batch = TreeBatch(
        token_ids=tokens.int(),
        positions=torch.arange(50),
        slots=torch.arange(32, 82),
        page_tables=torch.tensor([[1, 2]], dtype=torch.int32),
        query_start_loc=torch.tensor([0, 50], dtype=torch.int32),
        shared_lens=lengths,
        own_pages=torch.zeros(50, 1, dtype=torch.int32),
        own_lens=torch.zeros(50, dtype=torch.int32),
        max_shared_len=50,
        max_rows=50,
        logit_indices=None,
    )
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        wanted = reference(tokens[None]).logits[0]
    assert torch.allclose(model.forward(batch), wanted, atol=1e-3)


class Recorder:
    """A part that keeps what is reported."""

    dry_run = True

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def report(self, kind: str, what: str, value: float, unit: str = "", **sizes: object) -> None:
        self.rows.append(row(kind, value, **sizes))


def test_the_engine_follows_the_trace():
    part, counters = Recorder(), gpu_check_drafter.Counters()
    model = gpu_check_drafter.own_model("0.6B", dry_run=True)
    gpu_check_drafter.one_size(part, model, counters, TRACE, 2, 80)
    (hits,) = (found["value"] for found in part.rows if found["kind"] == "trace_hits")
    steps = [found for found in part.rows if found["kind"] == "traced_step"]
    assert hits > 0 and steps and all(found["value"] > 0 for found in steps)
    assert max(found["branches"] for found in steps) > 10


def test_times_of_steps_without_vllm():
    began = time.perf_counter()
    steps_s = gpu_check_drafter.step_times("1B", True, 2, 4, 3)
    assert len(steps_s) > 2 and 0 < sum(steps_s) < time.perf_counter() - began
