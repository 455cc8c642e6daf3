"""A short soak: a real server under load, and five kinds of fault done to its drafter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "scripts" / "soak.py"
FAULTS = ("kill", "hang", "slow", "socket", "memory")


@pytest.mark.timed
@pytest.mark.skipif(sys.platform != "linux", reason="the faults are done by Linux's means")
def test_faults_harm_nobody(tmp_path: Path) -> None:
    """`python scripts/soak.py --minutes 3` does all of them, and longer."""
    out = tmp_path / "soak.json"
    command = [sys.executable, str(SOAK), "--minutes", "0.5", "--faults", ",".join(FAULTS), "--longest-hang", "3"]
    done = subprocess.run(
        [*command, "--seed", "2", "--json", str(out), "--logs", str(tmp_path), "--verbose"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    found = json.loads(out.read_text())
    assert set(found["faults_hit"]) == set(FAULTS) and all(found["faults_hit"].values())
    assert not found["wrong"] and not found["failed"] and found["deaths"]
