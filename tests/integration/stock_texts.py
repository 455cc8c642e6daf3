"""Greedy token ids of stock speculation, one engine after the other: `stock_texts.py CONFIGS_JSON PROMPTS_JSON`.

Prints a line of JSON: the patches of vllm-ssd in effect, the token ids by configuration, and the drafts accepted.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    import interpreted_v2  # noqa: F401
from engines import PAIR
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def generate(speculative: dict[str, Any], prompts: list[list[int]]) -> tuple[list[list[int]], int]:
    """Token ids by prompt, and how many drafts were accepted."""
    llm = LLM(
        model=str(PAIR / "target"),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        kv_cache_memory_bytes=64 << 20,
        disable_log_stats=False,
        seed=0,
        speculative_config=speculative,
    )
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    accepted = sum(
        metric.value for metric in llm.get_metrics() if metric.name == "vllm:spec_decode_num_accepted_tokens"
    )
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return [list(output.outputs[0].token_ids) for output in outputs], int(accepted)


def main(configs: dict[str, dict[str, Any]], prompts: list[list[int]]) -> None:
    """Generate with each configuration and print what came of it."""
    found = {name: generate(speculative, prompts) for name, speculative in configs.items()}
    patched = []
    if "vllm_ssd.compat.patch" in sys.modules:
        patched = list(sys.modules["vllm_ssd.compat.patch"].patched())
    texts, accepted = ({name: pair[i] for name, pair in found.items()} for i in (0, 1))
    print(json.dumps({"patched": patched, "texts": texts, "accepted": accepted}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), json.loads(sys.argv[2]))
