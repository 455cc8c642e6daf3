"""A chat that grows, turn by turn, on a pair: late rounds at the start of each turn, and the time to its first hit.

    python scripts/bench_chat.py --tokens 3000 --turns 10

Every turn's prompt is all that was said before and a new message. Rounds are stretched to `--round-ms`, as those of a
target that takes so long. The bundled pair was trained on 2,048 positions; beyond them a copy of it is used whose
configuration allows more.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_prompts import held_out_prompts
from bench_systems import PAIR, console, run_script
from rich.table import Table

FIRST_ROUNDS = 20
LATE_GOAL = 2
OUTCOMES = ("hits", "misses", "late")
COLUMNS = ("prompt_tokens", "drafter_read", "rounds", "late", "hits")


def longer_pair(folder: Path, max_model_len: int) -> dict[str, str]:
    """Copies of the bundled target and drafter that take so many positions."""
    for name in ("target", "drafter"):
        shutil.copytree(PAIR / name, folder / name)
        path = folder / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": max_model_len}))
    return {name: str(folder / name) for name in ("target", "drafter")}


def chat_texts(num_tokens: int, turns: int, turn_tokens: int) -> tuple[list[int], list[list[int]]]:
    """What is said before the first turn, and the message of each turn, as token ids."""
    pieces = held_out_prompts(seed=0)
    said: list[int] = []
    while len(said) < num_tokens:
        said += next(pieces)
    return said[:num_tokens], [next(pieces)[:turn_tokens] for _ in range(turns)]


def run_turn(engine: Any, counts: dict[str, int], name: str, prompt: list[int], args: argparse.Namespace) -> dict:
    """Generate the answer to `prompt`: its tokens, outcomes of its first rounds, milliseconds to token and hit.

    drafter_read: tokens of the prompt that were not in the drafter's prefix cache.
    """
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=args.answer_tokens, ignore_eos=True)
    num_read, before, seen, started = tokens_read(counts), dict(counts), [], time.perf_counter()
    engine.add_request(name, {"prompt_token_ids": prompt}, params)
    first_token_s = first_hit_s = None
    token_ids: list[int] = []
    while engine.has_unfinished_requests():
        began = time.perf_counter()
        for output in engine.step():
            token_ids = list(output.outputs[0].token_ids)
        now = time.perf_counter()
        if token_ids and first_token_s is None:
            first_token_s = now - started
        for outcome in OUTCOMES:
            if counts[outcome] > before[outcome]:
                seen.append(outcome)
        if "hits" in seen and first_hit_s is None:
            first_hit_s = now - started
        before = dict(counts)
        time.sleep(max(0.0, args.round_ms / 1e3 - (now - began)))
    return {
        "prompt_tokens": len(prompt),
        "drafter_read": tokens_read(counts) - num_read,
        "token_ids": token_ids,
        "rounds": len(seen),
        "outcomes": "".join(outcome[0] for outcome in seen),
        "late": seen[:FIRST_ROUNDS].count("late"),
        "hits": seen[:FIRST_ROUNDS].count("hits"),
        "first_token_ms": None if first_token_s is None else 1e3 * first_token_s,
        "first_hit_ms": None if first_hit_s is None else 1e3 * first_hit_s,
    }


def tokens_read(counts: dict[str, int]) -> int:
    """Tokens of prompts that the drafter had to compute so far."""
    return counts["drafter_prompt_tokens"] - counts["drafter_cached_tokens"]


def main() -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description="a chat that grows, on a pair")
    parser.add_argument("--tokens", type=int, default=3000, help="said before the first turn")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--turn-tokens", type=int, default=40, help="of each new message, at most 64")
    parser.add_argument("--answer-tokens", type=int, default=80)
    parser.add_argument("--round-ms", type=float, default=8.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads of the target would run on the drafter's core
    from vllm import EngineArgs, LLMEngine

    from vllm_ssd.compat.target import measure

    chat, messages = chat_texts(args.tokens, args.turns, args.turn_tokens)
    max_model_len = args.tokens + args.turns * (args.turn_tokens + args.answer_tokens) + 64
    with tempfile.TemporaryDirectory() as folder:
        pair = longer_pair(Path(folder), max_model_len)
        speculative = {"method": "ssd", "model": pair["drafter"], "num_speculative_tokens": 5, "dtype": args.dtype}
        engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=pair["target"],
                dtype=args.dtype,
                enforce_eager=True,
                max_model_len=max_model_len,
                max_num_seqs=4,
                kv_cache_memory_bytes=256 << 20,
                speculative_config=speculative | {"on_miss": "skip", "adaptive": False, "kv_cache_memory": "256MiB"},
            )
        )
        counts = measure.proposer(engine)._metrics.counts
        run_turn(engine, counts, "warm-up", messages[0], args)
        turns = []
        for i, message in enumerate(messages):
            chat = chat + message
            turns.append(run_turn(engine, counts, f"turn {i}", chat, args))
            chat = chat + turns[-1].pop("token_ids")
    table = Table(
        "turn",
        "prompt",
        "read by the drafter",
        "rounds",
        "late of the first 20",
        "hits of the first 20",
        "first token",
        "first hit",
    )
    for i, turn in enumerate(turns, 1):
        times = [f"{turn[name]:.0f} ms" if turn[name] else "none" for name in ("first_token_ms", "first_hit_ms")]
        table.add_row(*map(str, (i, *(turn[name] for name in COLUMNS))), *times)
    console.print(table)
    num_good = sum(turn["late"] <= LATE_GOAL for turn in turns)
    console.print(f"{num_good} of {len(turns)} turns with at most {LATE_GOAL} late")
    if args.out:
        args.out.write_text(json.dumps({"args": {k: str(v) for k, v in vars(args).items()}, "turns": turns}, indent=1))


if __name__ == "__main__":
    run_script(main)
