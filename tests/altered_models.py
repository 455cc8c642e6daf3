"""Copies of models with other keys in config.json, and other weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"


def altered(
    source: str | Path,
    folder: Path,
    weights: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    **changes: Any,
) -> Path:
    """A copy of the model in `source` as a new `folder`, whose config.json has these `changes`.

    weights: from the tensors of the model, by name, to those of the copy, which has none without it
    """
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    if weights is not None:
        save_file(weights(load_file(Path(source) / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})
    return folder
