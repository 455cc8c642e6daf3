"""A real drafter says the same, token for token, whatever its attention and whether vLLM compiles it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engines import PAIR, run_program

SCRIPT = Path(__file__).with_name("grow_trees.py")


@pytest.fixture(scope="module")
def grow_trees(tmp_path_factory: pytest.TempPathFactory):
    """What a drafter of some kind says: `grow_trees(kind)`, or with a mask token `grow_trees(kind, mask)`."""
    cache = {"VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("cache"))}  # what is compiled is compiled here
    results: dict[tuple[str, ...], dict[str, Any]] = {}

    def grow(*kind: str) -> dict[str, Any]:
        if kind not in results:
            printed = run_program(SCRIPT, str(PAIR / "drafter"), *kind, environment=cache)
            results[kind] = json.loads(printed.splitlines()[-1])
        return results[kind]

    return grow


@pytest.mark.compat
def test_trees_on_the_device_equal_sequences_on_the_host(grow_trees):
    """The kernels' references, pages and slots from `expand`, one trunk a request; against one page table a branch."""
    tree, plain = grow_trees("tree"), grow_trees("vllm")
    assert tree["backend"] == "vllm_ssd.compat.drafter.tree_backend" and plain["backend"].startswith("vllm.")
    assert tree["grown"] == plain["grown"] and tree["steps"] == plain["steps"]
    assert "standard deviations" in tree["fault"]
    drafts = [drafts for blocks in tree["grown"] for block in blocks.values() for _, drafts in block]
    assert len(drafts) > 200 and all(len(branch) == 4 for branch in drafts)


def test_trees_of_parallel_drafts_are_the_same_with_every_attention(grow_trees):
    """Twelve rounds of two steps each; with tree attention the check at start compares them with the model, too."""
    tree, plain, captured = (grow_trees(kind, "188") for kind in ("tree", "vllm", "captured"))
    assert tree["grown"] == plain["grown"] == captured["grown"] != grow_trees("vllm")["grown"]
    assert tree["steps"] == plain["steps"] == captured["steps"] < 0.6 * grow_trees("vllm")["steps"]
    assert captured["replays"] > 15 and "standard deviations" in tree["fault"]
    branches = [branch for blocks in tree["grown"] for block in blocks.values() for branch in block]
    assert len(branches) > 200 and all(len(drafts) == 4 for _, drafts in branches)


@pytest.mark.compat
def test_captured_steps_with_vllms_attention_equal_others(grow_trees):
    """What a drafter falls back to on a GPU: padded batches in which every token is a sequence of its own."""
    captured, plain = grow_trees("captured"), grow_trees("vllm")
    assert captured["grown"] == plain["grown"] and captured["steps"] == plain["steps"]
    assert captured["captured"] == 6 and captured["replays"] > 60
    assert captured["steps"] - captured["replays"] < 5, "prompts alone are not replayed"


@pytest.mark.compat
def test_a_compiled_drafter_equals_an_eager_one(grow_trees):
    """`enforce_eager: false`: compiled for every number of tokens up to a bound, beyond which it runs eagerly."""
    compiled, plain = grow_trees("compiled"), grow_trees("vllm")
    assert compiled["grown"] == plain["grown"] and compiled["steps"] == plain["steps"]
    assert 0 < compiled["eager_forwards"] < 10 < plain["eager_forwards"] == plain["steps"]
