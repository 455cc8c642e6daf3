"""Paced models: vLLM finds them as a plugin, and their forwards take as long as asked for."""

import json
import os
import subprocess
import sys

import pytest
from script_modules import load_script
from vllm.model_executor.models.llama import LlamaForCausalLM

paced_models = load_script("paced_models")

LOAD = """
from vllm import ModelRegistry
from vllm.plugins import load_general_plugins
load_general_plugins()
print([name for name in ModelRegistry.get_supported_archs() if name.startswith("Paced")])
"""


def test_vllm_loads_the_plugin(tmp_path):
    environment = {**os.environ, **paced_models.install_plugin(tmp_path / "plugin"), "VLLM_PLUGINS": "paced"}
    found = subprocess.run(
        [sys.executable, "-c", LOAD], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout.splitlines()[-1] == "['PacedLlamaForCausalLM']"


def test_pace_changes_nothing_else_in_the_config(tmp_path):
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    paced_models.pace(tmp_path, 2.5)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == config | {"architectures": ["PacedLlamaForCausalLM"], "pace_ms": 2.5}


@pytest.mark.parametrize(("takes_s", "total_s"), [(0.001, 0.02), (0.03, 0.03)], ids=["waits", "is late already"])
def test_a_forward_takes_as_long_as_asked_for(monkeypatch, takes_s, total_s):
    clock = Clock()

    def forward(self, token_ids, scale=1):
        clock.sleep(takes_s)
        return token_ids * scale

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    monkeypatch.setattr(paced_models, "time", clock)
    model = object.__new__(paced_models.PacedLlamaForCausalLM)
    object.__setattr__(model, "_pace_s", 0.02)
    assert model.forward(3, scale=2) == 6
    assert clock.now == pytest.approx(total_s, abs=1e-4)


class Clock:
    """A clock that moves when somebody sleeps, and a little when somebody looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
