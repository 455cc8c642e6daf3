"""The engine with an expensive drafter of docs/benchmarks.md: the bundled pair resized, on a core each."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from paced_models import PLUGIN, pace_pair
from resize_model import deepen, widen

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from engines import PAIR, Engine, assert_conclusive, request  # noqa: E402

__all__ = ["Engine", "add_sizes", "assert_conclusive", "request", "started"]


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The sizes of the pair, and K."""
    parser.add_argument("--intermediate-size", type=int, default=24576, help="of the target")
    parser.add_argument("--layers", type=int, default=8, help="of the drafter")
    parser.add_argument("--num-speculative-tokens", type=int, default=3)


@contextlib.contextmanager
def started(
    args: argparse.Namespace, speculative: dict[str, Any], milliseconds: Sequence[float] = (), **arguments: Any
) -> Iterator[Engine]:
    """An engine of that pair with `speculative` beside it; arguments: of `Engine`.

    milliseconds: how long forwards of target and drafter take (`paced_models`); default: as long as they do
    """
    *target_cores, drafter_core = sorted(os.sched_getaffinity(0))
    if not target_cores:
        raise SystemExit("target and drafter need a core each")
    with tempfile.TemporaryDirectory(prefix="expensive-") as name:
        folder = Path(name)
        widen(PAIR / "target", folder / "target", args.intermediate_size, "bfloat16")
        deepen(PAIR / "drafter", folder / "drafter", args.layers, "bfloat16")
        if milliseconds:
            environment = pace_pair(folder / "target", folder / "drafter", milliseconds, folder / "plugin")
            arguments["environment"] = environment | {"VLLM_PLUGINS": f"ssd,{PLUGIN}"}
        own = {
            "model": str(folder / "drafter"),
            "dtype": "bfloat16",
            "num_speculative_tokens": args.num_speculative_tokens,
            "drafter_cpus": str(drafter_core),
        }
        model = str(folder / "target")
        engine = Engine(folder / "log", model=model, dtype="bfloat16", speculative=own | speculative, **arguments)
        try:
            engine.receive()
            yield engine
        finally:
            engine.close()
