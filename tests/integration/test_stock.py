"""Stock speculation of each method gives the same text whether the plugin is installed or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engines import ON_V2, PAIR, Engine, request, texts
from marks import needs_v2

NGRAM = {"prompt_lookup_min": 1, "prompt_lookup_max": 3, "num_speculative_tokens": 3}
DRAFT_MODEL = {"method": "draft_model", "model": str(PAIR / "drafter"), "num_speculative_tokens": 3}


@pytest.mark.parametrize(
    ("speculative", "environment"),
    [
        pytest.param({"method": "ngram"} | NGRAM, {}, id="ngram-V1", marks=pytest.mark.compat),
        pytest.param(DRAFT_MODEL, {}, id="draft_model-V1", marks=pytest.mark.compat),
        pytest.param(
            {"method": "ngram_gpu"} | NGRAM,
            ON_V2,
            id="ngram_gpu-V2",
            marks=needs_v2,
        ),
    ],
)
def test_text_is_the_same_with_the_plugin(
    start_engine: Callable[..., Engine],
    prompts: Callable[..., list[list[int]]],
    speculative: dict[str, Any],
    environment: dict[str, str],
) -> None:
    engines = [
        start_engine(speculative_config=speculative, max_model_len=256, environment=environment | plugins)
        for plugins in ({"VLLM_PLUGINS": "none"}, {})
    ]
    requests = [request(prompt, max_tokens=16) for prompt in prompts(4, 20, 60, seed=7)]
    try:
        for engine in engines:
            engine.send("generate", requests=requests)
        plain, patched = (engine.receive() for engine in engines)
        replaced = [engine.call("patched") for engine in engines]
    finally:
        for engine in engines:
            engine.close()
    assert not replaced[0] and len(replaced[1]) >= 4, "inconclusive: the plugin was in both, or in neither"
    accepted = [run.counts["vllm:spec_decode_num_accepted_tokens"] for run in (plain, patched)]
    assert accepted[0] > 0, "inconclusive: nothing was accepted"
    assert texts(patched) == texts(plain) and accepted[1] == accepted[0]
