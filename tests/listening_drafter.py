"""`python -m vllm_ssd.drafter HOST:PORT OPTIONS_JSON` with the model of `fake_model` in place of vLLM's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import fake_model
import msgspec

from vllm_ssd.drafter import __main__, standalone
from vllm_ssd.drafter.engine import DraftEngine
from vllm_ssd.drafter.server import build_engine
from vllm_ssd.link.options import DrafterOptions
from vllm_ssd.link.protocol import PROTOCOL_VERSION, Hello, Welcome
from vllm_ssd.policy import FanOut

MODEL = fake_model.FakePagedModel
WELCOME = Welcome(PROTOCOL_VERSION, MODEL.vocab_size, "f", 200, 400, MODEL.page_size)
BROKEN = "a model that cannot be loaded"
"""Name of a draft model whose start fails."""


def engine_with(options: DrafterOptions, model: fake_model.FakePagedModel) -> DraftEngine:
    """The engine of a drafter with these options."""
    return build_engine(
        model,
        FanOut(options.num_speculative_tokens, options.fan_out, options.branch_budget),
        num_speculative_tokens=options.num_speculative_tokens,
        max_num_seqs=options.max_num_seqs,
        max_branches=options.max_branches,
        max_fan_out=options.max_fan_out,
        top_m=options.top_m,
        seed=0,
    )


def boot(place: str, options: DrafterOptions, refuse: Callable[[Exception], None]) -> Any:
    """In place of `vllm_ssd.drafter.server.boot`."""
    if options.engine_args["model"] == BROKEN:
        error = OSError(f"{BROKEN}: no such folder")
        refuse(error)
        raise error

    def engine(_: Any) -> DraftEngine:
        return engine_with(options, MODEL(400))

    def greet(_: Hello) -> Any:
        return SimpleNamespace(notice="")

    return SimpleNamespace(welcome=WELCOME, greet=greet, engine=engine, max_step_bytes=1 << 20)


if __name__ == "__main__":
    standalone.boot = boot
    sys.exit(__main__.main(sys.argv[1], msgspec.json.decode(sys.argv[2], type=DrafterOptions)))
