"""What a drafter launches on a GPU while it serves: nothing that compiles or captures, no more than there is to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_ssd.kernels.tree_attention import MAX_SPLITS, PROGRAMS_PER_PROCESSOR, live_tiles, splits

SCRIPT = Path(__file__).with_name("record_launches.py")


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    """What `record_launches.py` counts, in a process of its own: there, Triton compiles for a GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_each_kernel_is_compiled_once(recorded):
    """Whatever the numbers of requests, of splits and of branches are; but tiles of the trunk come in four sizes."""
    variants = recorded["variants"]
    assert variants.pop("_trunk_kernel") == 4
    assert len(variants) == 8 and set(variants.values()) == {1}, variants


def test_nothing_is_compiled_after_warming_up(recorded):
    """1 to 17 requests, contexts of 2 to 32k tokens, 4 to 48 branches; prompts, hits, misses, ends."""
    assert set(recorded["compiled while serving"]) == {"1", "2", "16", "17"}
    assert not any(recorded["compiled while serving"].values()), recorded["compiled while serving"]


def test_nothing_is_captured_after_warming_up(recorded):
    assert recorded["buckets"] > 20 and recorded["replayed while serving"] > 200
    assert recorded["captured while serving"] == 0


def test_only_prompts_are_not_replayed(recorded):
    assert recorded["eager while serving"] == 0


@pytest.mark.parametrize("context", ["64", "5000"])
def test_a_miss_costs_one_replayed_step_more_than_a_hit(recorded, context):
    """Its bonus token, and drafts that nobody predicted, are forwarded before its tree can start."""
    steps = recorded["steps"][context]
    assert set(steps["hit"]) == {6}
    assert set(steps["miss"]) == set(steps["miss with drafts"]) == {7}


@pytest.mark.parametrize("kind", ["hit", "miss"])
def test_programs_follow_branches_not_slots(recorded, kind):
    """One request's round in an engine of 4 slots and in one of 1024."""
    few, many = (recorded["programs"][slots][kind] for slots in ("4", "1024"))
    assert few == many and few["branches"] > 8
    assert few["_expand_kernel"] <= 2 and few["_commit_kernel"] == 1
    assert few["_copy_pages_kernel"] <= few["branches"] * 32 * 2, "16 layers, keys and values, a page in two runs"


SLOTS = PROGRAMS_PER_PROCESSOR * 132
"""Programs that an H100 runs at a time."""


@pytest.mark.parametrize("requests", [1, 2, 4, 8, 16, 32, 64])
def test_the_trunk_keeps_every_processor_busy(requests):
    """24 branches a request of Llama-3.2-1B, 16k tokens: at most a tenth of a wave of programs is idle."""
    rows_per_tile, kv_heads, num_blocks = 32, 8, 16_384 // 64
    live = live_tiles(24 * requests, requests, rows_per_tile) * kv_heads
    programs = live * splits(live, num_blocks, 132)
    waves = -(-programs // SLOTS)
    assert programs >= 0.9 * min(SLOTS, live * MAX_SPLITS) or waves > 1, (programs, waves)
