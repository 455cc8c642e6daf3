"""What several test modules of the drafter share."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_target import Target
from fake_model import FakePagedModel

from vllm_ssd.link.credential import make_credential


@pytest.fixture(autouse=True)
def vllm_logging() -> Iterator[None]:
    """Let vLLM's records reach `caplog` once, whatever configured its logger before, and put its level back.

    vLLM sets its logger anew for a configuration that asks for other settings than the last one.
    """
    logger = logging.getLogger("vllm")
    logger.propagate = True  # before pytest looks: it listens to loggers that do not propagate themselves
    level, before = logger.level, _configured()
    yield
    after = _configured()
    if after != before:
        sys.modules["vllm.logger"]._last_configured_logging_config = before or type(after)()
        logger.setLevel(level)


def _configured() -> Any:
    return getattr(sys.modules.get("vllm.logger"), "_last_configured_logging_config", None)


@pytest.fixture(scope="session", params=[False, True], ids=["host pages", "device pages"])
def make_target(request: pytest.FixtureRequest) -> Callable[..., Target]:
    """Targets of a drafter whose pages are kept on the host, then by the references of the kernels."""

    def make(num_pages: int = 400, max_model_len: int = 200, **options) -> Target:
        return Target(FakePagedModel(num_pages, max_model_len, tree_attention=request.param), **options)

    return make


@pytest.fixture(scope="module")
def credential(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A credential that targets and drafters of a test module share."""
    path = tmp_path_factory.mktemp("keys") / "ssd.pem"
    make_credential(path)
    return path
