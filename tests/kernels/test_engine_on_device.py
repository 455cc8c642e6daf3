"""The engine, its pages and its steps over the Triton kernels themselves, not their references."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = Path(__file__).with_name("drive_engine.py")


def test_the_engine_over_the_kernels():
    """On a GPU from captured graphs; elsewhere interpreted, with the same step called."""
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    run = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["steps"] > 60 and result["captured"] > 2 and result["eager"] < result["steps"] / 3
