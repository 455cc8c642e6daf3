"""Models of the bundled pair whose forwards take as long as those of a given device, for any number of tokens.

On a CPU a draft step over many branches costs more than one over a single token. On a GPU both mostly read the weights,
and take the same time. `pace` makes a model like that: each forward waits until a given time has passed since it began.
Only this is emulated. The models compute, engines, drafter and messages are real, and all host work comes on top.

vLLM loads the model class as it loads those of any plugin: by an entry point, here of a folder on PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm.model_executor.models.llama import LlamaForCausalLM

ARCHITECTURE = "PacedLlamaForCausalLM"
PLUGIN = "paced"
"""Name for VLLM_PLUGINS."""
SPIN_S = 2e-4
"""Last part of a wait, which does not sleep: a sleep may end that much late."""


class PacedLlamaForCausalLM(LlamaForCausalLM):
    """A Llama whose forwards take at least `pace_ms` of its config.json."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        self._pace_s = self.config.pace_ms / 1e3

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As of `LlamaForCausalLM`, after a wait."""
        until = time.perf_counter() + self._pace_s
        hidden_states = super().forward(*args, **kwargs)
        time.sleep(max(until - SPIN_S - time.perf_counter(), 0.0))
        while time.perf_counter() < until:
            pass
        return hidden_states


def register() -> None:
    """The plugin's entry point."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}:{ARCHITECTURE}")


def pace(model: Path, milliseconds: float) -> None:
    """Let forwards of the model in a folder take at least so long."""
    path = model / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"architectures": [ARCHITECTURE], "pace_ms": milliseconds}))


def pace_pair(target: Path, drafter: Path, milliseconds: Sequence[float], plugin: Path) -> dict[str, str]:
    """`pace` both models, and describe the plugin in an empty folder. -> environment in which vLLM finds it."""
    for model, of_model in zip((target, drafter), milliseconds):
        pace(model, of_model)
    return install_plugin(plugin)


def install_plugin(folder: Path) -> dict[str, str]:
    """Describe the plugin in an empty `folder`. -> environment in which vLLM finds it."""
    metadata = folder / f"{PLUGIN}-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PLUGIN}\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{PLUGIN} = {__name__}:register\n")
    paths = [str(Path(__file__).parent), str(folder), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
