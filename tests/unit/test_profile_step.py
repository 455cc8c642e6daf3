"""The gap between two forwards of the target, out of a trace; and a clear word where no trace can be made."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from script_modules import load_script

SCRIPT = Path(__file__).parents[2] / "scripts" / "profile_step.py"
profile_step = load_script("profile_step")


def graph(launch, start_us, us):
    """Kernels of one launch of a CUDA graph, without a break."""
    n = profile_step.GRAPH_KERNELS
    return [profile_step.Work(start_us + i * us / n, start_us + (i + 1) * us / n, launch) for i in range(n)]


def test_gaps_between_forwards_of_the_target():
    """A sampler, an overlapping copy on another stream and a drafter's graph lie between; a prompt's kernels before."""
    work = [profile_step.Work(0, 900, 1)]  # long, but no graph
    work += graph(2, 1000, 400) + graph(3, 1500, 400) + graph(5, 2200, 400)
    work += [profile_step.Work(1410, 1430, 10), profile_step.Work(1420, 1450, 11)]
    work += graph(4, 1950, 160)
    first, second = profile_step.gaps(work[::-1])
    assert first == pytest.approx((100, 60))
    assert second == pytest.approx((300, 140))


def test_a_trace_without_graphs_is_refused():
    with pytest.raises(ValueError, match="fewer than two"):
        profile_step.gaps([profile_step.Work(i, i + 1, i) for i in range(100)])


def test_reading_a_trace(tmp_path):
    kernel = {"ph": "X", "cat": "kernel", "ts": 5.0, "dur": 2.0, "args": {"correlation": 7}}
    others = [{"ph": "X", "cat": "cuda_runtime", "ts": 1.0, "dur": 1.0, "args": {"correlation": 7}}, {"ph": "M"}]
    with gzip.open(tmp_path / "t.json.gz", "wt") as file:
        json.dump({"traceEvents": [*others, kernel]}, file)
    assert profile_step.read_trace(tmp_path / "t.json.gz") == [(5.0, 7.0, 7)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run on")
def test_it_refuses_without_a_gpu():
    arguments = [sys.executable, str(SCRIPT), "--target", "x", "--drafter", "y"]
    refused = subprocess.run(arguments, capture_output=True, text=True)
    assert refused.returncode == 2 and not refused.stdout
    assert refused.stderr == ("profile_step: no CUDA device is visible; there is no host gap to measure without one\n")
