"""The benchmark of the kernels says what it is, and where it cannot run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_kernels.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


def test_help():
    shown = run("--help")
    assert shown.returncode == 0 and "--contexts" in shown.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run on")
def test_it_refuses_without_a_gpu():
    refused = run("--quick")
    assert refused.returncode == 2 and not refused.stdout
    assert refused.stderr == "bench_kernels: no CUDA device is visible; the kernels can only be timed on a GPU\n"
