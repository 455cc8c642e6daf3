"""New weights of a target with ssd are told; workers without ssd reload as before."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from vllm.v1.worker.gpu_worker import Worker

from vllm_ssd.compat import patch
from vllm_ssd.compat.target.weights import warn_of_new_weights


@pytest.mark.parametrize("name", ["reload_weights", "finish_weight_update"])
@pytest.mark.parametrize("config", [{"ssd": {}}, {}])
def test_new_weights_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, config: dict[str, object]
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    calls: list[object] = []
    monkeypatch.setattr(Worker, name, lambda worker: calls.append(worker))
    before = list(patch._patches)
    warn_of_new_weights()
    worker = SimpleNamespace(vllm_config=SimpleNamespace(additional_config=config))
    getattr(Worker, name)(worker)
    for made in [made for made in patch._patches if made not in before]:
        patch.undo(made)
    assert calls == [worker]
    assert ("the drafter keeps the weights it started with" in caplog.text) == bool(config)
