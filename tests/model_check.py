"""One architecture under test: a tiny model as the target and as its own drafter, compared with the target alone."""

from __future__ import annotations

import functools
import gc
import random
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_zoo
from forked_drafter import ForkedDrafter
from model_zoo import MAX_MODEL_LEN, VOCAB_SIZE, ZOO, Entry

NUM_DRAFTS = 4
MAX_TOKENS = 32
PROMPT_LENGTHS = (3, 20, 50, 90)
"""Within and beyond `model_zoo.WINDOW`, and over several KV pages of the drafter."""
FEW_WORDS = 16
"""Vocabulary where another model drafts: small enough that some of its drafts are accepted."""
MIN_SHARE = 0.9
"""Of its own drafts a model accepts at least this share: all but where two logits are as good as equal."""
MIN_ACCEPTED = 3

PAGE_SIZE = 32
"""Of the target where chunks of attention must be whole pages."""

Result = dict[str, Any]
Run = tuple[list[list[int]], dict[str, int]]


def check(name: str, *, with_trees: bool = True) -> Result:
    """What a check of `ZOO[name]` in this process found, as JSON types.

    target, drafter, trees: "ok" or what is wrong with it as the target, as its own drafter, and `with_trees` as such
    with the drafter's own attention; architecture; accepted, share: of its own drafts.
    """
    entry = ZOO[name]
    plain, trees = ForkedDrafter(), ForkedDrafter(tree_attention=True) if with_trees else None
    result: Result = {"attention": entry.attention, "target": "not run", "drafter": "not run", "trees": "not run"}
    with tempfile.TemporaryDirectory(prefix="vllm-ssd-models-") as folder:
        target, other = Path(folder, "target"), Path(folder, "other")
        vocab_size = FEW_WORDS if entry.is_recurrent else VOCAB_SIZE
        try:
            model_zoo.write(name, target, vocab_size=vocab_size)
        except Exception as error:
            return result | {"target": f"transformers cannot make it: {_first_line(error)}"}
        generate = functools.partial(_generate, target, vocab_size, entry)
        try:
            result["architecture"], refusal = _as_drafter(target)
            expected, _ = generate()
        except Exception as error:
            return result | {"target": f"vLLM alone fails: {_first_line(error)}"}
        if len({token for text in expected for token in text}) < 5:
            return result | {"target": "inconclusive: the text is always the same"}
        if refusal:
            model_zoo.write("llama", other, vocab_size=vocab_size, seed=2)
            found = _with_drafts(generate, expected, plain, other)
            return result | {"target": found.pop("text"), "drafter": refusal, "trees": refusal, **found}
        found = _with_drafts(generate, expected, plain, target)
        result |= {"target": found.pop("text"), "drafter": _agrees(found), **found}
        if result["target"] == "ok" and trees is not None:
            found = _with_drafts(generate, expected, trees, target)
            result["trees"] = _agrees(found) if found["text"] == "ok" else found["text"]
    return result


def _with_drafts(
    generate: Callable[..., Run], expected: list[list[int]], drafter: ForkedDrafter, model: Path
) -> Result:
    """text: "ok", or how it is not `expected`; drafted, accepted: numbers; stock: where not ok, of n-gram drafts."""
    drafter.install()
    try:
        texts, counts = generate({"method": "ssd", "model": str(model), **SSD})
    except Exception as error:
        return {"text": f"ssd fails: {_first_line(error)}", "stock": _stock(generate, expected)}
    drafted, accepted = counts["num_draft_tokens"], counts["num_accepted_tokens"]
    found: Result = {"text": "ok", "drafted": drafted, "accepted": accepted}
    if accepted < MIN_ACCEPTED:
        found["text"] = f"inconclusive: {accepted} of {drafted} drafts accepted"
    if texts != expected:
        first = next(i for i, (a, b) in enumerate(zip(texts, expected)) if a != b)
        found |= {"text": f"another text in request {first}", "stock": _stock(generate, expected)}
    return found


def _agrees(found: Result) -> str:
    """Whether a model accepted nearly all of its own drafts."""
    drafted, accepted = found.get("drafted", 0), found.get("accepted", 0)
    enough = accepted >= max(MIN_ACCEPTED, MIN_SHARE * drafted)
    return "ok" if enough else f"accepts {accepted} of its own {drafted} drafts"


SSD: dict[str, Any] = {
    "num_speculative_tokens": NUM_DRAFTS,
    "dtype": "float32",
    "kv_cache_memory": "32MiB",
    "branch_budget": 10,
    "on_miss": "wait",  # however slow the machine, there are drafts
    "wait_ms": 10_000,
    "adaptive": False,
}


def _as_drafter(folder: Path) -> tuple[str, str]:
    """The model's architecture as vLLM names it, and why it cannot draft, if so."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_ssd.compat.drafter.draft_model import UnsupportedDraftModel, refuse_state

    config = EngineArgs(model=str(folder), dtype="float32", max_model_len=MAX_MODEL_LEN).create_model_config()
    try:
        refuse_state(config)
    except UnsupportedDraftModel as error:
        return config.architecture, str(error).replace(str(folder), "MODEL")
    return config.architecture, ""


def _generate(folder: Path, vocab_size: int, entry: Entry, speculative: dict[str, Any] | None = None) -> Run:
    """Greedy token ids of a few prompts, together and one after another, and vLLM's counts of drafts."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(folder),
        dtype=entry.dtype,
        enforce_eager=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=4,
        kv_cache_memory_bytes=64 << 20,
        enable_prefix_caching=False,
        block_size=PAGE_SIZE if "chunked" in entry.attention else None,
        disable_log_stats=False,
        seed=0,
        **({"speculative_config": speculative} if speculative else {}),
    )
    rng = random.Random(3)
    prompts = [{"prompt_token_ids": [rng.randrange(4, vocab_size) for _ in range(n)]} for n in PROMPT_LENGTHS]
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    outputs = [*llm.generate(prompts, params, use_tqdm=False), *llm.generate(prompts[2:3], params, use_tqdm=False)]
    prefix = "vllm:spec_decode_"
    counts = {
        metric.name.removeprefix(prefix): int(metric.value)
        for metric in llm.get_metrics()
        if metric.name.startswith(prefix) and hasattr(metric, "value")
    }
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return [list(output.outputs[0].token_ids) for output in outputs], counts


def _stock(generate: Callable[..., Run], expected: list[list[int]]) -> str:
    """Whether vLLM's own n-gram speculation does better with this target."""
    stock = {"method": "ngram", "num_speculative_tokens": NUM_DRAFTS, "prompt_lookup_min": 1, "prompt_lookup_max": 2}
    try:
        texts, counts = generate(stock)
    except Exception as error:
        return f"stock n-gram speculation fails: {_first_line(error)}"
    if not counts.get("num_draft_tokens"):
        return "stock n-gram speculation drafted nothing"
    return "stock n-gram speculation has the target's text" if texts == expected else "another text with stock n-gram"


def _first_line(error: Exception) -> str:
    """The error's type and the first line that says something; without a text, the line of code that raised it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and "validation error" in lines[0]:  # a heading
        del lines[0]
    lines = lines or [frame.line or "" for frame in traceback.extract_tb(error.__traceback__)[-1:]] or [""]
    return f"{type(error).__name__}: {lines[0].partition(' [type=')[0][:160]}"
