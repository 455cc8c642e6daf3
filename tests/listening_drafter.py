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
from vllm_ssd.link.protocol import PROTOCOL_VERSION, Hello, Open, Step, Welcome, pack_ids
from vllm_ssd.policy import FanOut

MODEL = fake_model.FakePagedModel
VOCAB_SIZE = MODEL.vocab_size
K, SLOTS = 3, 8
OPTIONS = DrafterOptions(
    {"model": "fake"}, K, 3, None, max_num_seqs=SLOTS, max_branches=3 * (K + 1), top_m=5, cpus=[], parent_pid=0
)
"""Of a drafter that serves `HELLO`."""
HELLO = Hello(
    PROTOCOL_VERSION, VOCAB_SIZE, K, "f", max_num_seqs=SLOTS, max_branches=OPTIONS.max_branches, max_support=64
)
WELCOME = Welcome(PROTOCOL_VERSION, VOCAB_SIZE, "f", 200, 400, MODEL.page_size)
BROKEN = "a model that cannot be loaded"
"""Name of a draft model whose start fails."""


def opening(*names: str, length: int = 5, epoch: int = 1) -> Step:
    """What opens these requests with prompts of `length` tokens."""
    prompt = pack_ids([i % VOCAB_SIZE for i in range(length)])
    return Step([Open(name, epoch, prompt, 0.0) for name in names], K)


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
