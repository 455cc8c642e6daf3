"""Random requests over vLLM's sampling parameters, and how their greedy texts are compared with the target alone.

A request is made from a seed and its number only, so that any part of a long run can be repeated. Combinations that
vLLM refuses or answers differently with stock speculation are not made; `docs/limits.md` lists them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from engines import request

MAX_MODEL_LEN = 512
LOGPROB_TOLERANCE = 2e-3
NO_PROBABILITY = -80.0
"""Logprobs from here on are those of probabilities that float32 does not hold."""
TIE = 1e-4
"""Two tokens this close in logprob may be told apart by how a batch is composed, in float32, with or without drafts."""

WITH_REASONING = {"reasoning_parser": "pair", "patches": {"reasoning_parser.REGISTERED": True}}
VARIANTS: dict[str, dict[str, Any]] = {
    "raw_logprobs": {},
    "processed_logprobs": WITH_REASONING,
    "raw_logits": {**WITH_REASONING, "max_num_batched_tokens": 128},
    "processed_logits": {"max_num_batched_tokens": 64, "block_size": 32, "num_gpu_blocks_override": 24},
}
"""Engine arguments for each `logprobs_mode`: with and without reasoning, prompts in pieces, preemption."""

STOP_STRINGS = ["\n\n", "return", ")", "self.", "    ", "the"]
BAD_WORDS = ["self", " the", "return", "(", ".", " =", "import"]
STRUCTURED: list[dict[str, Any]] = [
    {"regex": r"def [a-z_]{3,12}\((self|cls), [a-z]{1,8}\):\n    return [a-z]{1,8}\n"},
    {"regex": r"[0-9]{3}-[0-9]{4}"},
    {"choice": ["self", "return None", "raise ValueError", "import os"]},
    {"grammar": 'root ::= word (" + " word)*\nword ::= [a-z]+ | [0-9]+\n'},
    {
        "json": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 12}, "lines": {"type": "integer", "maximum": 9999}},
            "required": ["name", "lines"],
            "additionalProperties": False,
        }
    },
]


def engine_arguments(variant: str) -> dict[str, Any]:
    """Arguments of `engines.Engine`, with or without SSD, that requests of `variant` are run with."""
    return {"logprobs_mode": variant, "max_model_len": MAX_MODEL_LEN, **VARIANTS[variant]}


def reference_arguments(variant: str) -> dict[str, Any]:
    """The same for the target alone, with vLLM's faults that show without speculation repaired."""
    arguments = engine_arguments(variant)
    return arguments | {"patches": arguments.get("patches", {}) | {"stock_repairs.REPAIRED": True}}


def reference_requests(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`requests` without aborts: an abort after n tokens comes after more where a round emits several."""
    return [asked | {"abort_after": None} for asked in requests]


def random_requests(
    seed: int, numbers: Iterable[int], corpus: list[int], variant: str, markers: tuple[int, int]
) -> list[dict[str, Any]]:
    """Requests `numbers` of a run with `seed`; `corpus` and `markers` (start and end of reasoning) are token ids."""
    reasons, pieces = (key in VARIANTS[variant] for key in ("reasoning_parser", "max_num_batched_tokens"))
    requests = []
    for position, number in enumerate(numbers):
        made = random_request(random.Random(f"{seed}/{number}"), corpus, markers if reasons else None, pieces)
        # By turns one after another and eight at once, whose first round has no drafts.
        made["join_step"] = 2 * (position if position // 16 % 2 else position // 8 * 8)
        requests.append(made)
    return requests


def random_request(
    rng: random.Random, corpus: list[int], markers: tuple[int, int] | None, pieces: bool
) -> dict[str, Any]:
    """One request; with `markers` it may have a thinking budget.

    Where prompts are prefilled in `pieces` it has no seed: vLLM's CPU runner then fails, with or without speculation.
    """
    maybe = lambda share: rng.random() < share  # noqa: E731
    params: dict[str, Any] = {"max_tokens": rng.randint(1, 3) if maybe(0.15) else rng.randint(4, 48)}
    length = rng.randint(2, 120)
    if maybe(0.04):
        length = MAX_MODEL_LEN - rng.randint(2, 13)  # a marker may follow
        params["max_tokens"] = min(params["max_tokens"], MAX_MODEL_LEN - 1 - length)
    start = rng.randrange(len(corpus) - length)
    prompt = corpus[start : start + length]

    if maybe(0.3):
        params["structured_outputs"] = rng.choice(STRUCTURED)
    else:  # a grammar and a mask may leave no token at all
        if maybe(0.15):
            params["bad_words"] = rng.sample(BAD_WORDS, rng.randint(1, 3))
        if maybe(0.12):
            params["allowed_token_ids"] = sorted(rng.sample(range(2048), rng.randint(60, 1500)))
    if maybe(0.3):
        params["presence_penalty"] = rng.randint(-20, 20) / 10
    if maybe(0.3):
        params["frequency_penalty"] = rng.randint(-20, 20) / 10
    if maybe(0.3):
        params["repetition_penalty"] = rng.randint(7, 18) / 10
    if maybe(0.25):
        params["stop"] = rng.sample(STOP_STRINGS, rng.randint(1, 2))
        params["include_stop_str_in_output"] = maybe(0.5)
    if maybe(0.25):
        params["stop_token_ids"] = rng.sample(sorted(set(corpus[:400])), rng.randint(1, 8))
    if maybe(0.3):
        params["min_tokens"] = rng.randint(0, params["max_tokens"])
    if maybe(0.35):
        params["logprobs"] = rng.choice([0, 1, 4])
    if maybe(0.1):
        params["prompt_logprobs"] = rng.choice([0, 2])
    if maybe(0.2) and not pieces:
        params["seed"] = rng.randrange(1 << 30)
    if markers is not None and maybe(0.5):
        params["thinking_token_budget"] = rng.randint(0, 12)
        at = len(prompt) if maybe(0.6) else rng.randint(0, len(prompt))
        prompt[at : at + 1] = [markers[0]]
    temperature = 0.0
    if maybe(0.12):
        temperature = rng.choice([0.7, 1.0])
        params |= rng.choice([{}, {"top_k": 20}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.8}])
        params["n"] = rng.randint(1, 3)
    abort_after = rng.randint(1, params["max_tokens"]) if maybe(0.04) and params.get("n", 1) == 1 else None
    return request(prompt, temperature=temperature, ignore_eos=maybe(0.5), abort_after=abort_after, **params)


def differences(
    requests: list[dict[str, Any]], run: SimpleNamespace, expected: SimpleNamespace, is_tie: Callable[[int, int], bool]
) -> list[str]:
    """What of `run` is not as `expected`; `is_tie(i, position)` says whether request i's text may part there."""
    found = []
    for i, asked in enumerate(requests):
        ours, theirs = run.outputs[i], expected.outputs[i]
        if asked["params"]["temperature"]:
            found += [f"request {i}: {fault}" for fault in sampled_faults(asked, ours)]
            continue
        (sample,), (plain,) = ours.samples, theirs.samples
        length = min(len(sample.token_ids), len(plain.token_ids))
        parts = next((j for j in range(length) if sample.token_ids[j] != plain.token_ids[j]), length)
        whole = parts == len(sample.token_ids) == len(plain.token_ids)
        if asked["abort_after"]:
            whole = parts == len(sample.token_ids) >= min(asked["abort_after"], len(plain.token_ids))
        elif whole:
            for field in ("text", "finish_reason", "stop_reason"):
                if getattr(sample, field) != getattr(plain, field):
                    found.append(f"request {i}: {field} {getattr(sample, field)!r}, not {getattr(plain, field)!r}")
        if not whole and not is_tie(i, parts):
            found.append(f"request {i}: at {parts} of {sample.token_ids}, not {plain.token_ids}")
        pairs = [("prompt logprobs", list(zip(ours.prompt_logprobs, theirs.prompt_logprobs)))]
        if not (asked["abort_after"] and not whole):
            pairs.append(("logprobs", list(zip(sample.logprobs[:parts], plain.logprobs[:parts]))))
        if not asked["abort_after"] and len(ours.prompt_logprobs) != len(theirs.prompt_logprobs):
            found.append(f"request {i}: {len(ours.prompt_logprobs)} prompt logprobs")
        if sample.logprobs and len(sample.logprobs) != len(sample.token_ids):
            found.append(f"request {i}: {len(sample.logprobs)} logprobs for {len(sample.token_ids)} tokens")
        for what, steps in pairs:
            wrong = [j for j, (a, b) in enumerate(steps) if not same_logprobs(a, b)]
            if wrong:
                a, b = steps[wrong[0]]
                found.append(f"request {i}: {what} at {wrong} of {len(steps)}: {a}, not {b}")
    return found


def same_logprobs(found: dict[int, float], wanted: dict[int, float]) -> bool:
    """Equal values, likeliest first; which of two equally likely tokens is named may differ.

    Beside a row with top_p, vLLM masks what has no probability in float32, in rows without top_p too.
    """
    pairs = list(zip(sorted(found.values()), sorted(wanted.values())))
    pairs += [(found[token], wanted[token]) for token in found.keys() & wanted.keys()]
    floored = ((max(a, NO_PROBABILITY), max(b, NO_PROBABILITY)) for a, b in pairs)
    return len(found) == len(wanted) and all(math.isclose(a, b, abs_tol=LOGPROB_TOLERANCE) for a, b in floored)


def sampled_faults(asked: dict[str, Any], output: SimpleNamespace) -> list[str]:
    """What cannot be in a sampled answer, whatever was drawn."""
    params, faults = asked["params"], []
    if asked["abort_after"]:
        return faults
    if len(output.samples) != params["n"]:
        faults.append(f"{len(output.samples)} samples of {params['n']}")
    for sample in output.samples:
        length = len(sample.token_ids)
        if length > params["max_tokens"] or (sample.finish_reason == "length") != (length == params["max_tokens"]):
            if not (sample.finish_reason == "stop" and length == params["max_tokens"]):
                faults.append(f"{length} tokens, {sample.finish_reason}")
        if length < params.get("min_tokens", 0) and not params.get("structured_outputs"):
            faults.append(f"{length} tokens of at least {params['min_tokens']}")
        allowed = params.get("allowed_token_ids")
        if allowed and "thinking_token_budget" not in params and not set(sample.token_ids) <= set(allowed):
            faults.append("a token that is not allowed")
    return faults


class TieBreaker:
    """Whether the target itself is undecided where two texts part: its two best logits are within `TIE`.

    `target` answers with processed logprobs or logits; with raw ones the tie is only seen where nothing processes them.
    """

    def __init__(self, target: Any, requests: list[dict[str, Any]]) -> None:
        self._target = target
        self._requests = requests

    def __call__(self, i: int, position: int) -> bool:
        asked = self._requests[i]
        params = asked["params"] | {"logprobs": 2}
        again = self._target.generate([asked | {"params": params, "join_step": 0, "abort_after": None}])
        logprobs = again.outputs[0].samples[0].logprobs
        if position >= len(logprobs):
            return False
        best, second, *_ = sorted(logprobs[position].values(), reverse=True)
        return best - second < TIE
