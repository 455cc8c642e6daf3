"""What vLLM is left with when a user asks for ssd, on either of its model runners."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import SpeculativeConfig

from vllm_ssd.compat.target import runner
from vllm_ssd.compat.version import UnsupportedVLLM
from vllm_ssd.config import WORKER_ENVS, SSDConfig
from vllm_ssd.plugin import translate

ON_V2 = {
    "method": "ngram_gpu",
    "prompt_lookup_min": 3,
    "prompt_lookup_max": 4,
    "num_speculative_tokens": 5,
}
newest = pytest.mark.skipif(
    not hasattr(SpeculativeConfig, "uses_dynamic_speculative_decoding"), reason="vLLM 0.30: ssd uses the V1 runner"
)


def translated(
    monkeypatch: pytest.MonkeyPatch,
    *,
    v2: bool = False,
    runner_type: str = "generate",
    stages: int = 1,
    model: str = "org/draft",
    extension: str = "",
    replicas: int = 1,
    adaptive: bool = True,
    architecture: str = "LlamaForCausalLM",
    keys: dict[str, Any] | None = None,
    **fields: Any,
) -> Any:
    monkeypatch.setattr(runner, "is_v2", lambda: v2)
    for name in WORKER_ENVS:
        monkeypatch.setenv(name, "")  # put back afterwards, whatever `translate` makes of it
    user = {"method": "ssd", "model": model, "ngram-min": 3, "adaptive": adaptive, **(keys or {})}
    defaults = {"additional_config": {"mine": 1}, "scheduler_cls": None, "max_num_seqs": None}
    engine_args = SimpleNamespace(speculative_config=user, **(defaults | fields))
    parallel_config = SimpleNamespace(
        pipeline_parallel_size=stages,
        data_parallel_size=replicas,
        data_parallel_size_local=replicas,
        data_parallel_external_lb=False,
        data_parallel_rank_local=None,
        data_parallel_backend="mp",
        assigned_physical_gpu_ids=None,
        worker_extension_cls=extension,
    )
    model_config = SimpleNamespace(
        runner_type=runner_type,
        tokenizer="org/target",
        architecture=architecture,
        is_attention_free="Mamba" in architecture,
        is_hybrid="Jamba" in architecture or "Next" in architecture,
    )
    translate(engine_args, model_config, parallel_config)
    return SimpleNamespace(**vars(engine_args), worker_extension_cls=parallel_config.worker_extension_cls)


def test_v1(monkeypatch: pytest.MonkeyPatch) -> None:
    found = translated(monkeypatch, v2=False, stages=2)
    assert found.speculative_config == {
        "method": "custom_class",
        "model": "vllm_ssd.target.v1.proposer.SSDProposer",
        "num_speculative_tokens": 5,
    }
    assert found.additional_config == {"mine": 1, "ssd": {"num_speculative_tokens": 5}}
    assert SSDConfig.from_json(found.additional_config["ssd"]).model == "org/draft"
    assert found.worker_extension_cls == "vllm_ssd.compat.target.pipeline.WorkerExtension"


def test_v2(monkeypatch: pytest.MonkeyPatch) -> None:
    found = translated(monkeypatch, v2=True, stages=2, adaptive=False)
    assert found.speculative_config == ON_V2
    assert SSDConfig.from_json(found.additional_config["ssd"]).ngram_min == 3
    assert found.worker_extension_cls == "" and found.scheduler_cls is None


@newest
def test_the_number_of_drafts_adapts_on_v2(monkeypatch: pytest.MonkeyPatch) -> None:
    found = translated(monkeypatch, v2=True)
    table = [[1, 1, 0], [2, 2, 1], [3, 3, 2], [4, 4, 4], [5, 5, 5]]
    assert found.speculative_config == ON_V2 | {"num_speculative_tokens_per_batch_size": table}
    assert found.scheduler_cls == "vllm_ssd.compat.target.scheduler.scheduler"
    few = translated(monkeypatch, v2=True, max_num_seqs=2)
    assert few.speculative_config["num_speculative_tokens_per_batch_size"] == [[1, 1, 0], [2, 2, 5]]


@newest
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"replicas": 2}, "data-parallel"),
        ({"scheduler_cls": "mine.Scheduler"}, "scheduler_cls is set already"),
        ({"max_num_seqs": 1}, "max_num_seqs is 1"),
    ],
)
def test_it_is_said_when_it_cannot(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fields: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    found = translated(monkeypatch, v2=True, **fields)
    assert found.speculative_config == ON_V2 and found.scheduler_cls == fields.get("scheduler_cls")
    assert "every round carries 5 drafts" in caplog.text and reason in caplog.text


def test_a_draft_model_at_home_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "draft").mkdir()
    found = translated(monkeypatch, model="~/draft")
    assert SSDConfig.from_json(found.additional_config["ssd"]).model == str(tmp_path / "draft")
    with pytest.raises(ValueError, match="absent' is neither a folder nor the name of a model on the Hub"):
        translated(monkeypatch, model="~/absent")


def test_keys_may_come_as_fields_but_not_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    found = translated(monkeypatch, spec_tokens=2)
    assert found.spec_tokens is None and found.speculative_config["num_speculative_tokens"] == 2
    with pytest.raises(ValueError, match="model is given twice, in speculative_config and as spec_model"):
        translated(monkeypatch, spec_model="m")


def test_no_other_worker_extension_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="needs worker_extension_cls, which is set already"):
        translated(monkeypatch, stages=2, extension="mine.Extension")


@pytest.mark.parametrize("v2", [False, True])
def test_pooling_models_are_refused(monkeypatch: pytest.MonkeyPatch, v2: bool) -> None:
    with pytest.raises(ValueError, match="pooling"):
        translated(monkeypatch, v2=v2, runner_type="pooling")


@pytest.mark.parametrize(
    ("architecture", "version", "v2", "on_gpu"),
    [
        ("Qwen3NextForCausalLM", "0.32.1", False, True),
        ("Qwen3NextForCausalLM", "0.31.0", False, False),
        ("Qwen3NextForCausalLM", "0.31.0", True, False),
        ("Mamba2ForCausalLM", "0.33.0", True, True),
        ("Mamba2ForCausalLM", "0.33.0", False, False),
        ("JambaForCausalLM", "0.33.0", True, False),
        ("FalconMambaForCausalLM", "0.33.0", True, False),
    ],
)
def test_states_that_are_not_rolled_back_are_refused(
    monkeypatch: pytest.MonkeyPatch, architecture: str, version: str, v2: bool, on_gpu: bool
) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    for is_cpu, is_served in ((True, False), (False, on_gpu)):
        monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cpu=lambda is_cpu=is_cpu: is_cpu))
        if is_served:
            translated(monkeypatch, v2=v2, architecture=architecture)
            continue
        with pytest.raises(ValueError, match=f"recurrent state of {architecture} .* with any speculative method"):
            translated(monkeypatch, v2=v2, architecture=architecture)


def test_a_prefix_lm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="HrmTextForCausalLM is a prefix LM, .* with any speculative method"):
        translated(monkeypatch, architecture="HrmTextForCausalLM")


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
