"""Greedy token ids of an engine with stock speculation: `stock_texts.py SPECULATIVE_CONFIG_JSON PROMPTS_JSON`.

Prints a line of JSON without plugins and one with all that are installed, each of a fork of its own: the patches of
vllm-ssd in effect, the token ids by prompt, and the drafts accepted.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    import interpreted_v2  # noqa: F401
from engines import PAIR
from vllm import LLM, SamplingParams


def main(speculative: dict[str, Any], prompts: list[list[int]]) -> None:
    """Generate, and print what came of it."""
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
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    ours = sys.modules.get("vllm_ssd.compat.patch")
    answer = {
        "patched": [] if ours is None else list(ours.patched()),
        "texts": [list(output.outputs[0].token_ids) for output in outputs],
        "accepted": metrics["vllm:spec_decode_num_accepted_tokens"].value,
    }
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    for plugins in ({"VLLM_PLUGINS": "none"}, {}):
        if (child := os.fork()) == 0:
            os.environ.update(plugins)
            main(json.loads(sys.argv[1]), json.loads(sys.argv[2]))
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(1)
