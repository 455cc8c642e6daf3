"""What vLLM is left with when a user asks for ssd, on either of its model runners."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ssd.compat import runner
from vllm_ssd.compat.version import UnsupportedVLLM
from vllm_ssd.plugin import translate


def translated(monkeypatch: pytest.MonkeyPatch, *, v2: bool, runner_type: str = "generate", stages: int = 1) -> Any:
    monkeypatch.setattr(runner, "is_v2", lambda: v2)
    engine_args = SimpleNamespace(
        speculative_config={"method": "ssd", "model": "org/draft", "ngram-min": 3}, additional_config={"mine": 1}
    )
    parallel_config = SimpleNamespace(pipeline_parallel_size=stages, worker_extension_cls="")
    translate(engine_args, SimpleNamespace(runner_type=runner_type), parallel_config)
    return SimpleNamespace(**vars(engine_args), worker_extension_cls=parallel_config.worker_extension_cls)


def test_v1(monkeypatch: pytest.MonkeyPatch) -> None:
    found = translated(monkeypatch, v2=False, stages=2)
    assert found.speculative_config == {
        "method": "custom_class",
        "model": "vllm_ssd.proposer.SSDProposer",
        "num_speculative_tokens": 5,
    }
    assert found.additional_config["mine"] == 1 and found.additional_config["ssd"]["model"] == "org/draft"
    assert found.worker_extension_cls == "vllm_ssd.compat.pipeline.WorkerExtension"


def test_v2(monkeypatch: pytest.MonkeyPatch) -> None:
    found = translated(monkeypatch, v2=True, stages=2)
    assert found.speculative_config == {
        "method": "ngram_gpu",
        "prompt_lookup_min": 3,
        "prompt_lookup_max": 4,
        "num_speculative_tokens": 5,
    }
    assert found.additional_config["ssd"]["ngram_min"] == 3
    assert found.worker_extension_cls == ""


@pytest.mark.parametrize("v2", [False, True])
def test_pooling_models_are_refused(monkeypatch: pytest.MonkeyPatch, v2: bool) -> None:
    with pytest.raises(ValueError, match="pooling"):
        translated(monkeypatch, v2=v2, runner_type="pooling")


@pytest.mark.parametrize("is_v2", [False, True])
@pytest.mark.parametrize("method", ["custom_class", "ngram_gpu"])
def test_a_runner_that_was_not_foreseen_is_refused(method: str, is_v2: bool) -> None:
    config = SimpleNamespace(
        additional_config={"ssd": {}},
        speculative_config=SimpleNamespace(method=method),
        use_v2_model_runner=is_v2,
    )
    if is_v2 == (method == "ngram_gpu"):
        runner.check_runner(config)
    else:
        with pytest.raises(UnsupportedVLLM, match=f"VLLM_USE_V2_MODEL_RUNNER={int(is_v2)}"):
            runner.check_runner(config)


@pytest.mark.parametrize("additional_config", [{}, None, object()])
def test_who_did_not_ask_for_ssd_is_left_alone(additional_config: Any) -> None:
    runner.check_runner(SimpleNamespace(additional_config=additional_config, speculative_config=None))
