"""Stock speculation of each method gives the same text whether the plugin is installed or not."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import ENVIRONMENT, ON_V2, PAIR

SCRIPT = Path(__file__).with_name("stock_texts.py")
NGRAM = {"prompt_lookup_min": 1, "prompt_lookup_max": 3, "num_speculative_tokens": 3}
V1 = {
    "ngram": {"method": "ngram"} | NGRAM,
    "draft_model": {"method": "draft_model", "model": str(PAIR / "drafter"), "num_speculative_tokens": 3},
}
V2 = {"ngram_gpu": {"method": "ngram_gpu"} | NGRAM}
has_v2 = importlib.util.find_spec("vllm.v1.worker.gpu.spec_decode.ngram") is not None


def run(
    configs: dict[str, dict[str, Any]], prompts: list[list[int]], environment: dict[str, str], plugins: str | None
) -> dict[str, Any]:
    """What `stock_texts.py` prints, with vLLM's general plugins limited to `plugins`."""
    limited = {} if plugins is None else {"VLLM_PLUGINS": plugins}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(configs), json.dumps(prompts)],
        env=os.environ
        | ENVIRONMENT
        | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        | environment
        | limited
        | {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=240,
        cwd=SCRIPT.parent,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("configs", "environment"),
    [
        pytest.param(V1, {"VLLM_USE_V2_MODEL_RUNNER": "0"}, id="V1", marks=pytest.mark.compat),
        pytest.param(
            V2, ON_V2, id="V2", marks=pytest.mark.skipif(not has_v2, reason="this vLLM has no V2 method for a CPU")
        ),
    ],
)
def test_text_is_the_same_with_the_plugin(
    prompts: Callable[..., list[list[int]]], configs: dict[str, dict[str, Any]], environment: dict[str, str]
) -> None:
    pieces = prompts(4, 20, 60, seed=7)
    plain, with_plugin = (run(configs, pieces, environment, plugins) for plugins in ("no_such_plugin", None))
    assert not plain["patched"] and len(with_plugin["patched"]) >= 4, "inconclusive: the plugin was in both, or neither"
    assert with_plugin["texts"] == plain["texts"]
    assert with_plugin["accepted"] == plain["accepted"]
    assert all(accepted > 0 for accepted in plain["accepted"].values()), f"inconclusive: {plain['accepted']}"
