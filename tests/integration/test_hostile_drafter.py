"""A server whose drafters are hostile decodes on, text unchanged, until a real one comes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import hostile_drafters
import pytest
from engines import ON_V2, Engine, assert_conclusive, request, texts

ROUND_S = 0.05
RESTART_S = 90.0
FOLDERS = [Path(__file__).parents[1], Path(__file__).parents[1] / "unit"]


@pytest.mark.parametrize(
    ("environment", "ways"),
    [
        pytest.param({}, hostile_drafters.WAYS, id="v1"),
        pytest.param(ON_V2, hostile_drafters.WAYS[::3], id="v2"),
    ],
)
def test_text_is_the_targets(
    start_engine: Callable[..., Engine],
    target_alone: Engine,
    prompts: Callable[..., list[list[int]]],
    tmp_path: Path,
    environment: dict[str, str],
    ways: list[str],
) -> None:
    left = tmp_path / "ways"
    left.write_text("\n".join(ways))
    engine = start_engine(
        speculative={"on_miss": "wait", "branch_budget": 12},
        patches={
            "vllm_ssd.link.process.DRAFTER_MODULE": "hostile_drafters",
            "vllm_ssd.link.process.HANG_S": 1.0,
            "vllm_ssd.link.process.BACKOFF_S": (0.01, 0.05),
        },
        environment=environment
        | {"PYTHONPATH": os.pathsep.join(map(str, FOLDERS)), "VLLM_SSD_HOSTILE": str(left), "PYTHONSAFEPATH": "1"},
    )
    some = prompts(3, 10, 60, seed=90)
    greedy = [request(prompt, max_tokens=20) for prompt in some]
    sampled = [request(prompt, max_tokens=20, temperature=0.8, seed=i) for i, prompt in enumerate(some)]
    expected = texts(target_alone.generate(greedy))

    for generation in range(1, len(ways) + 1):
        assert engine.call("wait_for_drafter", generation=generation, timeout_s=RESTART_S)
        while engine.call("drafter").generation == generation and engine.call("drafter").connected:
            run = engine.generate([*greedy, *sampled], min_seconds=ROUND_S)
            assert texts(run)[: len(greedy)] == expected, ways[generation - 1]
            assert all(len(ids) == 20 for (ids,) in texts(run))
    assert left.read_text() == ""
    assert engine.call("wait_for_drafter", generation=len(ways) + 1, timeout_s=RESTART_S)
    run = engine.generate(greedy, min_seconds=ROUND_S)
    assert texts(run) == expected
    assert_conclusive(run, hits=3)
    log = engine.log.read_text()
    assert log.count("SSD drafter lost") == len(ways), "one warning each"
    engine.close()
