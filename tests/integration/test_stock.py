"""Stock speculation of each method gives the same text whether the plugin is installed or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import ENVIRONMENT, HAS_V2, ON_V2, PAIR

SCRIPT = Path(__file__).with_name("stock_texts.py")
NGRAM = {"prompt_lookup_min": 1, "prompt_lookup_max": 3, "num_speculative_tokens": 3}
DRAFT_MODEL = {"method": "draft_model", "model": str(PAIR / "drafter"), "num_speculative_tokens": 3}
ON_V1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}


def run(speculative: dict[str, Any], prompts: list[list[int]], environment: dict[str, str]) -> list[dict[str, Any]]:
    """What `stock_texts.py` prints."""
    path = os.pathsep.join(filter(None, [str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH")]))
    ours = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(speculative), json.dumps(prompts)],
        env=os.environ | ENVIRONMENT | ours | environment,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=SCRIPT.parent,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"patched"')]


@pytest.mark.parametrize(
    ("speculative", "environment"),
    [
        pytest.param({"method": "ngram"} | NGRAM, ON_V1, id="ngram-V1", marks=pytest.mark.compat),
        pytest.param(DRAFT_MODEL, ON_V1, id="draft_model-V1", marks=pytest.mark.compat),
        pytest.param(
            {"method": "ngram_gpu"} | NGRAM,
            ON_V2,
            id="ngram_gpu-V2",
            marks=pytest.mark.skipif(not HAS_V2, reason="this vLLM has no V2 method that runs on a CPU"),
        ),
    ],
)
def test_text_is_the_same_with_the_plugin(
    prompts: Callable[..., list[list[int]]], speculative: dict[str, Any], environment: dict[str, str]
) -> None:
    pieces = prompts(4, 20, 60, seed=7)
    plain, patched = run(speculative, pieces, environment)
    assert not plain["patched"] and len(patched["patched"]) >= 4, "inconclusive: the plugin was in both, or in neither"
    assert plain["accepted"] > 0, "inconclusive: nothing was accepted"
    assert patched["texts"] == plain["texts"] and patched["accepted"] == plain["accepted"]
