"""Make a Llama checkpoint slower to run without changing the function it computes.

    python scripts/resize_model.py widen SOURCE DESTINATION --to 4096
    python scripts/resize_model.py deepen SOURCE DESTINATION --to 24

Widening adds MLP columns whose `down_proj` weights are zero; deepening adds layers whose `o_proj` and
`down_proj` are zero. Every other new weight is random, so no kernel can profit from the padding.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

STD = 0.02
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LAYER = re.compile(r"^(.*\blayers\.)(\d+)(\..*)$")
Weights = dict[str, Tensor]


def widen(src: str | Path, dst: str | Path, intermediate_size: int, dtype: str | None = None, seed: int = 0) -> None:
    """Write `src` to `dst` with its MLPs padded to `intermediate_size`."""
    config, weights = read_model(src)
    extra = intermediate_size - config["intermediate_size"]
    if extra < 0:
        raise ValueError(f"intermediate_size is already {config['intermediate_size']}")
    generator = torch.Generator().manual_seed(seed)
    for name, weight in weights.items():
        if name.endswith((".gate_proj.weight", ".up_proj.weight")):
            weights[name] = torch.cat((weight, noise((extra, weight.shape[1]), weight, generator)))
        elif name.endswith(".down_proj.weight"):
            weights[name] = torch.cat((weight, weight.new_zeros(weight.shape[0], extra)), dim=1)
    config["intermediate_size"] = intermediate_size
    write_model(src, dst, config, weights, dtype)


def deepen(src: str | Path, dst: str | Path, num_hidden_layers: int, dtype: str | None = None, seed: int = 0) -> None:
    """Write `src` to `dst` with idle layers appended until there are `num_hidden_layers`."""
    config, weights = read_model(src)
    depth = config["num_hidden_layers"]
    if num_hidden_layers < depth:
        raise ValueError(f"num_hidden_layers is already {depth}")
    generator = torch.Generator().manual_seed(seed)
    pattern = [(found, weight) for name, weight in weights.items() if (found := LAYER.match(name)) and found[2] == "0"]
    for index in range(depth, num_hidden_layers):
        for found, weight in pattern:
            weights[f"{found[1]}{index}{found[3]}"] = idle(found[3], weight, generator)
    config["num_hidden_layers"] = num_hidden_layers
    write_model(src, dst, config, weights, dtype)


def idle(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Return a weight for a layer that leaves the residual stream as it is."""
    if name.endswith((".o_proj.weight", ".down_proj.weight")) or name.endswith(".bias"):
        return torch.zeros_like(like)
    return torch.ones_like(like) if like.ndim == 1 else noise(like.shape, like, generator)


def noise(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Return small random weights of the same dtype as `like`."""
    return (torch.randn(shape, generator=generator) * STD).to(like.dtype)


def read_model(folder: str | Path) -> tuple[dict, Weights]:
    """Return a checkpoint's configuration and all its weights."""
    config = json.loads((Path(folder) / "config.json").read_text())
    weights: Weights = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        weights.update(load_file(path))
    if not weights:
        raise FileNotFoundError(f"no safetensors files in {folder}")
    return config, weights


def write_model(src: str | Path, dst: str | Path, config: dict, weights: Weights, dtype: str | None) -> None:
    """Write a checkpoint, in one weight file, beside copies of the source's other files."""
    src, dst = Path(src), Path(dst)
    if src.resolve() == dst.resolve():
        raise ValueError("source and destination are the same folder")
    dst.mkdir(parents=True, exist_ok=True)
    for path in src.iterdir():
        if path.is_file() and path.name != "config.json" and ".safetensors" not in path.name:
            shutil.copy(path, dst)
    if dtype:
        weights = {name: weight.to(DTYPES[dtype]) for name, weight in weights.items()}
        config = {**config, **{key: dtype for key in ("dtype", "torch_dtype") if key in config}}
    (dst / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()}, dst / "model.safetensors", {"format": "pt"}
    )


def main() -> None:
    """Run one of the two tools."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tool", choices=("widen", "deepen"))
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--to", type=int, required=True, help="the new intermediate size or layer count")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tool = {"widen": widen, "deepen": deepen}[args.tool]
    tool(args.source, args.destination, args.to, args.dtype, args.seed)


if __name__ == "__main__":
    main()
