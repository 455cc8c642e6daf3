"""Break vLLM, then register as vLLM would, twice: each line of standard input is code that breaks it, as JSON.

Answers a line of JSON for each, from a child process.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
from typing import Any

from vllm.config.vllm import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.worker.gpu import spec_decode

SYMBOLS = [
    (EngineArgs, "create_speculative_config"),
    (EngineArgs, "create_engine_config"),
    (VllmConfig, "max_concurrent_batches"),
    (spec_decode, "init_speculator"),
]


def answer(break_vllm: str) -> dict[str, Any]:
    """What two calls of `register()` replaced and logged, and what vLLM answers to who asks for ssd or ngram."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("vllm.vllm_ssd").addHandler(handler)
    exec(break_vllm)
    before = found()

    from vllm_ssd.plugin import register

    register()
    once = found()
    register()
    twice = found()

    from vllm_ssd.compat import patch

    return {
        "replaced": [name for name in before if before[name] is not once[name]],
        "replaced twice": [name for name in once if once[name] is not twice[name]],
        "guarded": [symbol.split(".")[-1].split(":")[-1] for symbol, p in patch.patched().items() if p.ours],
        "logged": [record.getMessage() for record in records],
        "tracebacks": [str(record.exc_info[1]) for record in records if record.exc_info],
        "imported": [name for name in sys.modules if name.startswith("vllm_ssd.")],
        "ssd": ask("ssd"),
        "ngram": ask("ngram"),
    }


def found() -> dict[str, Any]:
    return {name: inspect.getattr_static(owner, name, None) for owner, name in SYMBOLS}


def ask(method: str) -> str:
    """The error that ends a request for the method; without a model, there is always one."""
    engine_args = object.__new__(EngineArgs)
    engine_args.speculative_config = {"method": method, "model": "m"}
    engine_args.spec_method = engine_args.additional_config = None
    EngineArgs.create_model_config = None  # what would look a model up
    error = "no way to ask"
    for call, arguments in (("create_speculative_config", (None, None)), ("create_engine_config", ())):
        if hasattr(EngineArgs, call):
            try:
                getattr(EngineArgs, call)(engine_args, *arguments)
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"
                break
    return error


if __name__ == "__main__":
    for line in sys.stdin:
        child = os.fork()
        if not child:
            print(json.dumps(answer(json.loads(line))), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit("a child failed")
