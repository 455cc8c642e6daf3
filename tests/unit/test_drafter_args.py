"""Engine arguments for the draft model: which a user may give, and what it takes from the target."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_placement import place
from transformers import LlamaConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_ssd.compat.target.configuration import engine_argument_names
from vllm_ssd.config import SSDConfig
from vllm_ssd.link.drafter_args import (
    BESIDE,
    REFUSED,
    TOKENIZER_FILES,
    check_names,
    inherited_scaling,
    overridden_positions,
)
from vllm_ssd.plugin import settle_drafter

TARGET = SimpleNamespace(tokenizer="org/target")


def settled(engine_args: Any = None, **user: Any) -> SSDConfig:
    """The configuration as `plugin.translate` settles it beside the target's `engine_args`."""
    return settle_drafter(SSDConfig.from_user({"model": "org/draft", **user}), engine_args or SimpleNamespace(), TARGET)


@pytest.mark.compat
def test_the_refused_are_arguments_of_this_vllm() -> None:
    assert set(REFUSED) | set(BESIDE) <= engine_argument_names()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kv_cache_dtyp", "unknown key 'kv_cache_dtyp' in drafter_args; did you mean 'kv_cache_dtype'"),
        ("zzzzzz", "unknown key 'zzzzzz' in drafter_args; valid names are those of vLLM's EngineArgs"),
        ("dtype", "dtype is not allowed in drafter_args: give dtype in speculative_config"),
        ("kv_cache_memory_bytes", "give kv_cache_memory in speculative_config"),
        ("block_size", "block_size is not allowed in drafter_args: ssd assigns a drafter's KV pages"),
        ("tensor_parallel_size", "a drafter is one process on one device"),
        ("data_parallel_rank", "a drafter is one process on one device"),
        ("speculative_config", "a drafter does not speculate itself"),
        ("hf_token", "set HF_TOKEN in the environment"),
    ],
)
def test_a_name_that_is_not_the_user_s_is_refused_with_the_reason(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^ssd: .*{message}"):
        settled(drafter_args={name: 1})


def test_arguments_reach_the_drafter(monkeypatch: pytest.MonkeyPatch) -> None:
    user = {
        "drafter_args": {"kv-cache-dtype": "fp8", "max_num_batched_tokens": 4096},
        "hf_overrides": {"rope_theta": 1e6},
        "load_format": "safetensors",
        "tokenizer": "org/tokenizer",
    }
    check_names(SSDConfig.from_user({"model": "x", **user}).drafter_args or {}, engine_argument_names())
    options = place(monkeypatch, **user)
    found = options.engine_args
    assert found["kv_cache_dtype"] == "fp8" and found["max_num_batched_tokens"] == 4096
    assert found["hf_overrides"] == {"rope_theta": 1e6} and found["load_format"] == "safetensors"
    assert found["tokenizer"] == "org/tokenizer" and "download_dir" not in found
    assert found.keys() - {"target_max_model_len", "num_branches"} <= {field.name for field in fields(EngineArgs)}


def test_an_attention_backend_replaces_tree_attention() -> None:
    assert not settled(drafter_args={"attention_backend": "FLASH_ATTN"}).tree_attention
    assert settled(drafter_args={"kv_cache_dtype": "fp8"}).tree_attention


def test_a_folder_without_a_tokenizer_has_the_target_s(tmp_path: Path) -> None:
    assert settled(model=str(tmp_path)).tokenizer == "org/target"
    assert settled(model=str(tmp_path), tokenizer="org/mine").tokenizer == "org/mine"
    (tmp_path / TOKENIZER_FILES[0]).touch()
    assert settled(model=str(tmp_path)).tokenizer is None
    assert settled().tokenizer is None


def test_a_single_file_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "draft-q4.gguf").touch()
    assert settled(model=str(tmp_path / "draft-q4.gguf")).model.endswith("draft-q4.gguf")


def test_the_target_s_download_folder_is_the_drafter_s() -> None:
    engine_args = SimpleNamespace(download_dir="/cache")
    assert settled(engine_args).download_dir == "/cache"
    assert settled(engine_args, download_dir="/other").download_dir == "/other"


@pytest.mark.parametrize(
    ("hf_overrides", "names"),
    [
        (None, ""),
        ({}, ""),
        ({"architectures": ["A"]}, ""),
        ({"rope_parameters": {"rope_type": "yarn"}, "max_position_embeddings": 9}, "rope_parameters, max_position"),
        ({"text_config": {"rope_scaling": {}}}, "rope_scaling"),
        (replace, "a function"),
    ],
)
def test_overrides_that_the_drafter_may_need_are_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, hf_overrides: Any, names: str
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    assert overridden_positions(hf_overrides).startswith(names) and bool(names) == bool(
        overridden_positions(hf_overrides)
    )
    settled(SimpleNamespace(hf_overrides=hf_overrides))
    settled(SimpleNamespace(hf_overrides=hf_overrides), hf_overrides={"rope_theta": 1e6})
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == bool(names) and all(names in warning for warning in warnings)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 5e5}


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_a_draft_model_of_the_same_length_has_the_target_s_rope_scaling(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, name: str
) -> None:
    """With frequencies of its own, it takes contexts as long as the target's; vLLM says so, too."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    LlamaConfig(max_position_embeddings=256, rope_parameters=rope, architectures=["LlamaForCausalLM"]).save_pretrained(
        tmp_path
    )
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    hf_overrides = {name: YARN, "max_position_embeddings": 1024, "num_labels": 2}
    found = settled(SimpleNamespace(hf_overrides=hf_overrides), model=str(tmp_path)).hf_overrides
    assert found == {name: {**YARN, "rope_theta": 1e6}, "max_position_embeddings": 1024}
    assert "WARNING" not in {record.levelname for record in caplog.records}
    config = EngineArgs(model=str(tmp_path), skip_tokenizer_init=True, hf_overrides=found).create_model_config()
    assert config.max_model_len == 1024 and config.hf_text_config.rope_parameters["rope_theta"] == 1e6


@pytest.mark.parametrize(
    ("hf_overrides", "rope", "max_positions"),
    [
        ({"rope_parameters": YARN}, {}, 512),  # another length
        ({"rope_parameters": YARN}, {"rope_type": "llama3"}, 256),  # scales itself
        ({"rope_parameters": YARN}, {"full_attention": {"rope_theta": 1e4}}, 256),
        ({"rope_parameters": {"full_attention": YARN}}, {}, 256),
        ({"max_position_embeddings": 1024}, {}, 256),
        ({"text_config": {"rope_parameters": YARN}}, {}, 256),
        ({"rope_theta": 1e6}, {}, 256),
        (replace, {}, 256),
        ({"rope_parameters": YARN}, {}, 0),  # nothing is known of the draft model
    ],
)
def test_rope_scaling_that_may_not_fit_is_not_inherited(hf_overrides: Any, rope: dict, max_positions: int) -> None:
    assert inherited_scaling(hf_overrides, lambda: (rope, max_positions)) is None
