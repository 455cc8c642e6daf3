"""Prompts of a benchmark: files that the bundled pair was not trained on, or the user's own."""

import json
import random
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

from bench_systems import PAIR, PROMPT_TOKENS, UserError, console
from tokenizers import Tokenizer


def held_out_prompts(seed: int) -> Iterator[list[int]]:
    """Windows of the files that the bundled pair was not trained on, each of another place."""
    from pair_corpus import read_sources

    _, texts = read_sources(0)
    yield from prompt_windows(texts, seed)


def prompt_windows(texts: Sequence[str], seed: int) -> Iterator[list[int]]:
    """Prompts of PROMPT_TOKENS tokens cut from `texts`, each of another place, shuffled."""
    tokenizer = Tokenizer.from_file(str(PAIR / "target" / "tokenizer.json"))
    tokens = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    places = [(i, start) for i, ids in enumerate(tokens) for start in range(0, len(ids) - PROMPT_TOKENS, PROMPT_TOKENS)]
    random.Random(seed).shuffle(places)
    for i, start in places:
        yield tokens[i][start : start + PROMPT_TOKENS]


def read_prompts(path: Path) -> list[str | list[int]]:
    """The prompts of a file of JSON lines with a `prompt` (text) or `prompt_token_ids` each; UserError names the line
    that has neither."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts: {path} cannot be read: {error}") from None
    prompts = [_prompt(line, f"--prompts: {path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UserError(f"--prompts: {path} is empty; write one JSON object a line with prompt or prompt_token_ids")
    return prompts


def _prompt(line: str, where: str) -> str | list[int]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    given = [row[key] for key in ("prompt", "prompt_token_ids") if key in row] if isinstance(row, dict) else []
    if len(given) != 1:
        raise UserError(f"{where} must be an object with either prompt or prompt_token_ids")
    (prompt,) = given
    if "prompt" in row and not (isinstance(prompt, str) and prompt):
        raise UserError(f"{where}: prompt must be a text that is not empty")
    is_ids = isinstance(prompt, list) and all(type(token) is int and token >= 0 for token in prompt)
    if "prompt_token_ids" in row and not (is_ids and prompt):
        raise UserError(f"{where}: prompt_token_ids must be a list of token ids that is not empty")
    return prompt


def encode_prompts(prompts: Sequence[str | list[int]], target: str, engine_args: dict) -> list[list[int]]:
    """Token ids of all prompts, texts as the target's tokenizer encodes them."""
    ids = [prompt for prompt in prompts if isinstance(prompt, list)]
    if len(ids) == len(prompts):
        return ids
    from vllm.tokenizers import get_tokenizer

    options = {key: engine_args[key] for key in ("trust_remote_code", "revision") if key in engine_args}
    try:
        tokenizer = get_tokenizer(engine_args.get("tokenizer") or target, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts: the tokenizer of {target} cannot be loaded: {error}") from None
    return [prompt if isinstance(prompt, list) else tokenizer.encode(prompt) for prompt in prompts]


def repeated(prompts: Sequence[list[int]], seed: int, wanted: int) -> Iterator[list[int]]:
    """The prompts, shuffled, again and again where more than there are will be `wanted`."""
    if len(prompts) < wanted:
        console.print(f"{len(prompts)} prompts for up to {wanted} requests: they are repeated")
    shuffled = list(prompts)
    random.Random(seed).shuffle(shuffled)
    return cycle(shuffled)
