"""Compare SSD with the target alone on random requests, for as long as wanted.

    python scripts/fuzz_requests.py --requests 10000 --seed 1
    python scripts/fuzz_requests.py --requests 10000 --seed 1 --start 4200 --seconds 500

Requests are those of `tests/random_requests.py`; request number n depends on the seed and n only. The run goes through
the variants in turn and prints each difference with the request that shows it. It exits with 1 when there was one, or
when nothing was drafted or accepted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from engines import ON_V2, PAIR, Engine, assert_conclusive, assert_counts_agree  # noqa: E402
from random_requests import (  # noqa: E402
    VARIANTS,
    TieBreaker,
    differences,
    engine_arguments,
    random_requests,
    reference_arguments,
    reference_requests,
)

CORPUS = ("argparse", "ast", "collections", "configparser", "csv", "dataclasses", "decimal", "difflib")


def tokens() -> tuple[list[int], tuple[int, int]]:
    """Token ids of a part of the standard library, and those of the reasoning markers."""
    import inspect

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(PAIR / "target" / "tokenizer.json"))
    text = "".join(inspect.getsource(__import__(name)) for name in CORPUS)
    (start,), (end,) = tokenizer.encode("def").ids, tokenizer.encode("return").ids
    return tokenizer.encode(text).ids, (start, end)


def check(
    target: Engine, engine: Engine, requests: list[dict[str, Any]], first: int, min_seconds: float
) -> tuple[list[str], dict[str, int]]:
    """Run one chunk on both engines -> the differences, with their requests, and the counts."""
    target.send("generate", requests=reference_requests(requests))
    run = engine.generate(requests, min_seconds=min_seconds)
    expected = target.receive()
    found = differences(requests, run, expected, TieBreaker(target, requests))
    try:
        assert_conclusive(run, accepted=10)
        assert_counts_agree(run)
    except AssertionError as error:
        found.append(f"chunk at {first}: {error}")
    return found, run.counts


def main() -> int:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=int, default=0, help="number of the first request")
    parser.add_argument("--chunk", type=int, default=100, help="requests that are run together")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after the chunk that ends later")
    parser.add_argument("--round-ms", type=float, default=6.0, help="shortest round")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--v2", action="store_true", help="run SSD on vLLM's V2 model runner, interpreted")
    options = parser.parse_args()
    started, (corpus, markers) = time.monotonic(), tokens()
    engines: dict[str, tuple[Engine, Engine]] = {}
    end, faults, accepted = options.start + options.requests, 0, 0
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    number = options.start
    try:
        while number < end and time.monotonic() - started < options.seconds:
            variant = options.variants[number // options.chunk % len(options.variants)]
            if variant not in engines:
                arguments = engine_arguments(variant)
                environment = ON_V2 if options.v2 else None
                engines[variant] = (
                    Engine(folder / f"{variant}-target.log", **reference_arguments(variant)),
                    Engine(
                        folder / f"{variant}-ssd.log",
                        speculative={"branch_budget": 12, "on_miss": "skip"},
                        environment=environment,
                        **arguments,
                    ),
                )
            numbers = range(number, min(number + options.chunk, end))
            requests = random_requests(options.seed, numbers, corpus, variant, markers)
            found, counts = check(*engines[variant], requests, number, options.round_ms / 1e3)
            accepted += counts["vllm:spec_decode_num_accepted_tokens"]
            for fault in found:
                print(f"{variant}, chunk at {number}: {fault}")
                if fault.startswith("request "):
                    print(f"    {requests[int(fault.split()[1].rstrip(':'))]}")
            faults += len(found)
            number = numbers.stop
            print(f"{number} requests, {accepted} drafts accepted, {faults} differences", flush=True)
    finally:
        for pair in engines.values():
            for engine in pair:
                engine.close()
    print(f"next: --start {number}" if number < end else "done")
    return int(faults > 0 or not accepted)


if __name__ == "__main__":
    sys.exit(main())
