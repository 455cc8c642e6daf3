"""What vLLM refuses with any speculation is allowed where its runner can do it, and said at start where not."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_ssd.compat.target import configuration, refused

PARAMETERS = [{"min_p": 0.1}, {"logit_bias": {1: 2.0}}]


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_only_an_allowed_configuration_takes_them(parameters: dict) -> None:
    ours, others = SimpleNamespace(), SimpleNamespace()
    refused.allow(ours)
    SamplingParams(**parameters)._validate_spec_decode(ours)
    SamplingParams(**parameters)._validate_spec_decode(None)
    with pytest.raises(VLLMValidationError, match="not yet supported with speculative decoding"):
        SamplingParams(**parameters)._validate_spec_decode(others)


@pytest.mark.parametrize(("defaults", "is_said"), [({"min_p": 0.1}, True), ({"min_p": 0.0}, False), ({}, False)])
def test_min_p_among_the_targets_defaults_is_said_at_start(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, defaults: dict, is_said: bool
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    refused.warn(SimpleNamespace(get_diff_sampling_param=lambda: defaults))
    assert ("generation config sets min_p 0.1" in caplog.text) == is_said


@pytest.mark.parametrize(("method", "allowed"), [("custom_class", False), ("ngram_gpu", True)], ids=["V1", "V2"])
def test_a_configuration_is_warned_of_or_allowed_by_its_runner(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, method: str, allowed: bool
) -> None:
    wrapped: dict[str, Any] = {}
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr(configuration.patch, "wrap", lambda symbol, guard, ours, **_: wrapped.update({symbol: ours}))
    monkeypatch.setattr(configuration.cache_salt, "carry", lambda: None)
    configuration.install(lambda *args: None)
    create = wrapped[configuration.SPECULATIVE_CONFIG]
    target = SimpleNamespace(get_diff_sampling_param=lambda: {"min_p": 0.1})
    config = create(lambda *args: SimpleNamespace(method=method), SimpleNamespace(), target, SimpleNamespace())
    assert getattr(config, refused.ALLOWED, False) == allowed == (refused.VALIDATE in wrapped)
    assert ("generation config sets min_p 0.1" in caplog.text) != allowed
