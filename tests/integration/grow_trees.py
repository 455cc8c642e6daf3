"""`python grow_trees.py FOLDER KIND [MASK]`: what a real drafter speculates through a script of outcomes, as JSON.

KIND: `tree` (our attention), `vllm` (vLLM's), `compiled` (vLLM's, in a model that vLLM compiles) or `captured` (vLLM's,
in steps as a GPU captures them, called). With `tree`, also what the check at start says of the drafter as it is, and
once attention misses own pages. MASK: the token with which the drafter drafts in parallel.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable

import numpy as np
import torch
from vllm.v1.attention.backend import AttentionCGSupport

from vllm_ssd.compat.drafter import tree_backend
from vllm_ssd.compat.drafter.draft_model import DraftModel
from vllm_ssd.drafter.buckets import row_sizes
from vllm_ssd.drafter.engine import DraftEngine
from vllm_ssd.drafter.self_check import WrongTrees, check_trees
from vllm_ssd.drafter.server import build_engine
from vllm_ssd.policy import FanOut

K = 4
MOST_CAPTURED = {False: 64, True: 192}
"""Tokens of the largest captured step, by whether drafts are drawn in parallel."""
ROUNDS = 12
PROMPT_LENGTHS = (1, 31, 32, 90)
"""One token; up to, and on, the boundary of a page; several pages."""


def main(folder: str, kind: str, mask: str = "") -> None:
    model = DraftModel(
        model=folder,
        hf_overrides={"pard_token": int(mask)} if mask else {},
        tree_attention=kind == "tree",
        dtype="float32",
        enforce_eager=kind != "compiled",
        max_model_len=256,
        max_num_seqs=4,
        kv_cache_memory_bytes=32 << 20,
        max_num_batched_tokens=64,  # the prompts together are more: no compiled model takes so many
    )
    graphs = CountedSteps()
    if kind == "captured":  # on a CPU vLLM has no graphs
        type(model._attention_groups[0][1])._cudagraph_support = AttentionCGSupport.ALWAYS
    captured = model.warm_up(row_sizes(MOST_CAPTURED[bool(mask)]), graphs) if kind == "captured" else 0
    eager_forwards = count_eager_forwards(model)
    engine = build_engine(
        model,
        FanOut(K, [3, 2, 2, 1, 3]),
        num_speculative_tokens=K,
        max_num_seqs=4,
        max_branches=11,
        max_fan_out=3,
        top_m=8,
        seed=0,
    )
    engine._budget.observe_window = lambda seconds: None  # what time allows must not decide what is compared
    rng = random.Random(0)
    tokens = {str(n): [rng.randrange(model.vocab_size) for _ in range(n)] for n in PROMPT_LENGTHS}
    drafts: dict[str, list[int]] = {name: [] for name in tokens}
    for name, prompt in tokens.items():
        engine.open(name, 0, np.array(prompt, np.int32), 0.0, K)
        if len(prompt) == 1:
            engine.speculate()  # one token alone
    grown = []
    for _ in range(ROUNDS):
        blocks: dict[str, dict[tuple[int, int], list[int]]] = {name: {} for name in tokens}
        while engine.has_work:
            push = engine.speculate()
            for block in push.blocks if push else []:
                for i, outcome in enumerate(np.frombuffer(block.outcomes, "<i4").reshape(-1, 2).tolist()):
                    blocks[block.request_id].setdefault(tuple(outcome), []).extend(block.drafts(i))
            assert not (push and push.evicted)
        grown.append({name: sorted(block.items()) for name, block in blocks.items()})
        for name, block in blocks.items():
            named, event = drafts[name], rng.choice(["hit", "hit", "hit", "miss", "trim"])
            if event == "hit":
                accept_length, bonus = rng.choice(sorted(block))
                emitted, drafts[name] = named[:accept_length] + [bonus], block[accept_length, bonus]
            elif event == "trim" and named:
                n = rng.randint(1, len(named))
                emitted, drafts[name] = named[:n], named[n:]
            else:
                emitted, drafts[name] = named[:1] + [rng.randrange(model.vocab_size)], []
            tokens[name] = tokens[name] + emitted
            engine.advance(name, 0, len(tokens[name]), emitted, drafts[name], num_drafts=K)
    result = {
        "backend": type(model._attention_groups[0][1]).__module__,
        "steps": engine.num_steps,
        "eager_forwards": len(eager_forwards),
        "captured": captured,
        "replays": graphs.replays,
        "grown": grown,
    }
    if kind == "tree":
        for name in tokens:
            engine.close(name)
        check_trees(engine, model, K)
        result["fault"] = fault_without_own_pages(engine, model)
    print(json.dumps(result))


class CountedSteps:
    """Captures that call the step, and count how often."""

    def __init__(self) -> None:
        self.replays = 0

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """As `Graphs.capture`."""
        step()

        def replay() -> None:
            self.replays += 1
            step()

        return replay


def count_eager_forwards(model: DraftModel) -> list[int]:
    """Tokens of every forward that runs the decoder's own Python, which a compiled one passes by; grows from now on."""
    decoder, num_tokens = model._model.model, []
    forward = decoder.forward

    def counted(input_ids: torch.Tensor, *arguments, **options) -> torch.Tensor:
        num_tokens.append(len(input_ids))
        return forward(input_ids, *arguments, **options)

    decoder.forward = counted
    return num_tokens


def fault_without_own_pages(engine: DraftEngine, model: DraftModel) -> str | None:
    """What is noticed when no branch sees its own tokens; prompts have none, so that they are read as ever."""
    attend = tree_backend.tree_attention

    def broken(*arguments, **options) -> torch.Tensor:
        return attend(*arguments[:-1], torch.zeros_like(arguments[-1]), **options)

    tree_backend.tree_attention = broken
    try:
        check_trees(engine, model, K)
    except WrongTrees as error:
        return str(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
