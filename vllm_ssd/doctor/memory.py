"""Memory of a model's weights, from its files if they are on this machine, else from its shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vllm_ssd.planning import Shape

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
"""Patterns of weight files; the first that matches any file in a folder is used."""
INDEX = "model.safetensors.index.json"


def weight_bytes(model_config: Any) -> tuple[int, str]:
    """Bytes of a model's weights, and how they were determined; 0 if unknown.

    model_config: vLLM's `ModelConfig`
    """
    folder = _folder(model_config.model, model_config.revision)
    if folder and (sizes := [path.stat().st_size for path in _weight_files(folder)]):
        return sum(sizes), "by file size"
    try:
        shape = Shape.from_config(model_config.hf_config.to_dict())
    except (ValueError, TypeError, ZeroDivisionError):
        return 0, "unknown"
    item = torch.empty(0, dtype=model_config.dtype).element_size()
    quantized = " before quantization" if model_config.quantization else ""
    return round(shape.weights * item), f"by its shape{quantized}"


def _weight_files(folder: Path) -> list[Path]:
    """The files that vLLM loads: those in the index if there is one, as a folder may also hold unsharded weights."""
    if (index := folder / INDEX).is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
        return [path for name in sorted(names) if (path := folder / name).is_file()]
    return next((files for pattern in WEIGHTS if (files := list(folder.glob(pattern)))), [])


def _folder(model: str, revision: str | None) -> Path | None:
    """The folder with the model's files on this machine; downloads nothing."""
    if Path(model).is_dir():
        return Path(model)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except Exception:  # not in the cache, or not a valid name
        return None
