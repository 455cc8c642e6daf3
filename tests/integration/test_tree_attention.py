"""A real drafter says the same, token for token, through our attention backend and through vLLM's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engines import ENVIRONMENT, PAIR

SCRIPT = Path(__file__).with_name("grow_trees.py")


@pytest.mark.compat
def test_trees_on_the_device_equal_sequences_on_the_host(tmp_path):
    """The kernels' references, pages and slots from `expand`, one trunk a request; against one page table a branch."""
    environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    results = {}
    for attention in ("tree", "vllm"):
        run = subprocess.run(
            [sys.executable, str(SCRIPT), str(PAIR / "drafter"), attention],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr[-4000:]
        results[attention] = json.loads(run.stdout.splitlines()[-1])
    tree, plain = results["tree"], results["vllm"]
    assert tree["backend"] == "vllm_ssd.compat.drafter.tree_backend" and plain["backend"].startswith("vllm.")
    assert tree["grown"] == plain["grown"] and tree["steps"] == plain["steps"]
    assert "standard deviations" in tree["fault"]
    drafts = [drafts for blocks in tree["grown"] for block in blocks.values() for _, drafts in block]
    assert len(drafts) > 200 and all(len(branch) == 4 for branch in drafts)
