"""The check for a machine with a GPU, run on the CPU at toy size: greedy identity on the V2 runner."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from marks import needs_v2

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"


@needs_v2
def test_the_dry_run_of_its_engines(tmp_path):
    """The other parts take longer here than on a GPU; `tests/unit/test_gpu_check.py` runs what they are made of."""
    command = [sys.executable, str(SCRIPT), "--dry-run", "--out", str(tmp_path), "--parts", "end_to_end", "--time", "2"]
    run = subprocess.run(command, capture_output=True, text=True)
    log = (tmp_path / "end_to_end.log").read_text()
    assert run.returncode == 0, f"{run.stdout}\n{log[-4000:]}"
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    results = {verdict["goal"]: verdict["result"] for verdict in report["goals"]}
    assert results["greedy requests with the text of plain decoding, up to ties"] == "pass"
    assert results["drafts accepted in the run that compares texts"] == "pass"
