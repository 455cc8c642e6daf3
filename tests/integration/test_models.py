"""Architectures of each kind, each as the target and as its own drafter; `scripts/check_models.py` has all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engines import run_program

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_models.py"
NO_TREES = {"gpt_oss": "attention sinks"}
"""What the drafter's own attention does not know, so that vLLM's is taken."""
RECURRENT = ["mamba2"]
WITH_TREES = ["gemma2", "gemma3", *NO_TREES]
DRAFTERS = [*WITH_TREES, "cohere2", "llama4", "deepseek_v3", "bloom", "llama_yarn", "gpt2", "falcon", "qwen3_moe"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the script found, by the name of the model."""
    out = tmp_path_factory.mktemp("models") / "models.json"
    only = ["--only", *DRAFTERS, *RECURRENT, "--trees", *WITH_TREES]
    run_program(SCRIPT, "--out", str(out), "--jobs", "2", *only)
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_decoder_drafts_for_itself(results: dict[str, dict[str, Any]], name: str) -> None:
    """The text is that of the target alone, and nearly all of its own drafts are accepted, whatever its windows."""
    result = results[name]
    assert (result["target"], result["drafter"]) == ("ok", "ok"), result
    if name in NO_TREES:
        assert NO_TREES[name] in result["trees"]
    elif name in WITH_TREES:
        assert result["trees"] == "ok", result


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_model_does_not_draft(results: dict[str, dict[str, Any]], name: str) -> None:
    """Nor is it a target on the CPU, where stock speculation changes its text."""
    result = results[name]
    assert "recurrent or linear-attention layers" in result["drafter"]
    assert "a draft model is a decoder with attention in every layer" in result["drafter"]
    assert "does not take the recurrent state" in result["target"] and "another text" in result["stock"], result
