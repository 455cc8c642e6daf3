"""The features that work on each of vLLM's model runners, and the tests that show it.

`scripts/compatibility_table.py` writes the table of `docs/compatibility.md` from this, and `vllm-ssd doctor` reports
the differences of the runner in use. Does not import vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_ssd.compat.version import SUPPORTED

V2_SINCE = (0, 32)
"""First vLLM minor whose V2 runner ssd supports."""


@dataclass(frozen=True, slots=True)
class Feature:
    """A row of the table.

    v1, v2: support on each runner
    shown_by: tests by runner, relative to tests/
    why: explanation of a difference, by runner
    asked: configuration key and value that use the feature, None if every server does
    """

    name: str
    v1: str
    v2: str
    shown_by: Mapping[str, tuple[str, ...]]
    why: Mapping[str, str] = field(default_factory=dict)
    asked: tuple[str, str] | None = None


_V1 = "integration/test_requests.py"
_V2 = "integration/test_v2_requests.py"
_ASKED = "integration/test_features.py"

FEATURES = (
    Feature(
        "greedy text is the target's", "yes", "yes", {"V1": ("integration/test_greedy_identity.py",), "V2": (_V2,)}
    ),
    Feature(
        "samples have the target's distribution",
        "yes",
        "yes",
        {"V1": ("integration/test_distribution.py",), "V2": ("integration/test_v2_distribution.py",)},
    ),
    Feature(
        "the drafter dies, hangs, returns",
        "yes",
        "yes",
        {"V1": ("integration/test_failures.py",), "V2": (f"{_V2}::test_drafter_dies",)},
    ),
    Feature(
        "asynchronous scheduling",
        "no",
        "yes",
        {"V2": (_V2,)},
        {"v1": "vLLM switches it off for a `custom_class`; VLLM_USE_V2_MODEL_RUNNER=1 from vLLM 0.32 on has it"},
    ),
    Feature(
        "`on_miss: wait` (just-in-time drafts)",
        "yes",
        "acts like `skip`",
        {"V1": ("integration/test_greedy_identity.py[wait]",)},
        {"v2": "nothing waits for the drafter there"},
        asked=("on_miss", "wait"),
    ),
    Feature(
        "`on_miss: ngram`",
        "on the host",
        "on the device",
        {
            "V1": ("integration/test_greedy_identity.py[ngram]",),
            "V2": (f"{_V2}::test_chunked_prefill_preemption_and_ngram",),
        },
    ),
    Feature(
        "`on_miss: auto`",
        "yes",
        "`ngram` or `skip`",
        {"V1": ("unit/test_fallback.py",), "V2": (f"{_V2}::test_chunked_prefill_preemption_and_ngram",)},
    ),
    Feature(
        "a number of drafts per row",
        "yes",
        "no: filler",
        {"V1": (_V1,), "V2": ("unit/test_runner_v2.py",)},
        {"v2": "all rows of a round carry the same number, so a miss costs the verification of filler"},
    ),
    Feature(
        "`adaptive`",
        "per batch",
        "per batch, 0, 1, 2, 4, … K",
        {"V1": ("unit/test_adaptation.py",), "V2": (f"{_V2}::test_the_number_of_drafts_changes",)},
    ),
    Feature(
        "stop strings, penalties, structured output, `n`, abort",
        "yes",
        "yes",
        {
            "V1": (f"{_V1}::test_sampling_parameters",),
            "V2": (f"{_V2}::test_sampling_parameters_and_greedy_rows_beside_sampled_ones",),
        },
    ),
    Feature(
        "`thinking_token_budget`, `min_tokens`, `logprob_token_ids` as without speculation",
        "yes",
        "as vLLM's ([Limits](limits.md))",
        {"V1": ("unit/test_thinking_budget_state.py", "integration/test_random_requests.py")},
        {"v2": "what vLLM does otherwise with speculation stays there: docs/limits.md"},
    ),
    Feature(
        "logprobs, in each `logprobs_mode`",
        "yes",
        "yes",
        {
            "V1": (f"{_V1}::test_logprobs", "integration/test_random_requests.py::test_random_requests"),
            "V2": (
                f"{_ASKED}::test_prompt_logprobs_of_prompts_in_pieces",
                "integration/test_random_requests.py::test_logits_on_v2",
            ),
        },
    ),
    Feature(
        "chunked prefill, prefix caching, preemption",
        "yes",
        "yes",
        {"V1": (_V1,), "V2": (f"{_V2}::test_chunked_prefill_preemption_and_ngram",)},
    ),
    Feature(
        "prompt logprobs in pieces, prompt embeddings, priorities, a KV pool for one request, reasoning before "
        "structured output",
        "yes",
        "yes",
        {"V1": (f"{_ASKED}[V1]",), "V2": (f"{_ASKED}[V2]",)},
    ),
    Feature(
        "beam search, sleep, `reset_prefix_cache`, `reload_weights`",
        "yes",
        "yes",
        {"V1": (f"{_ASKED}[V1]",), "V2": (f"{_ASKED}[V2]",)},
    ),
    Feature(
        "a KV connector",
        "yes",
        "yes",
        {
            "V1": (f"{_ASKED}::test_kv_from_a_connector",),
            "V2": (f"{_ASKED}::test_kv_from_a_connector",),
        },
    ),
    Feature(
        "requests with images",
        "without drafts, beside others with",
        "without drafts, beside others with",
        {"V1": ("integration/test_images.py[V1]",), "V2": ("integration/test_images.py[V2]",)},
    ),
    Feature("tool calls, streamed", "yes", "untested", {"V1": ("e2e/test_serve.py",)}),
    Feature("architectures", "[Models](models.md)", "untested", {"V1": ("integration/test_models.py",)}),
    Feature(
        "tensor parallelism",
        "yes",
        "yes",
        {
            "V1": ("integration/test_parallel.py[tensor]",),
            "V2": (f"{_V2}::test_two_workers[tensor_parallel_size]",),
        },
    ),
    Feature(
        "pipeline parallelism",
        "one batch at a time",
        "yes",
        {
            "V1": ("integration/test_parallel.py[pipeline]",),
            "V2": (f"{_V2}::test_two_workers[pipeline_parallel_size]",),
        },
    ),
    Feature(
        "several drafters: `num_drafters`",
        "yes",
        "yes",
        {
            "V1": ("integration/test_fleet.py[v1]", "unit/test_fleet.py"),
            "V2": ("integration/test_fleet.py[v2]", "unit/test_fleet.py"),
        },
    ),
    Feature(
        "drafters on other hosts: `drafters`",
        "yes",
        "yes",
        {
            "V1": ("integration/test_standalone.py", "unit/test_tenants.py"),
            "V2": ("integration/test_standalone.py::test_two_targets_share_it_until_one_is_killed",),
        },
    ),
    Feature(
        "drafters that Ray places: `drafters: ray`",
        "yes",
        "yes",
        {
            "V1": ("integration/test_pool.py", "integration/test_pool_chaos.py", "unit/test_placed.py"),
            "V2": ("integration/test_pool_chaos.py::test_a_pool_drafts_for_the_v2_runner",),
        },
    ),
    Feature(
        "LoRA on the target",
        "yes",
        "yes",
        {"V1": ("integration/test_lora.py[V1]",), "V2": ("integration/test_lora.py[V2]",)},
    ),
    Feature(
        "tree attention in the drafter",
        "same drafter",
        "same drafter",
        {"V1": ("integration/test_tree_attention.py",)},
    ),
    Feature("`vllm serve`, metrics", "yes", "yes", {"V1": ("e2e/test_serve.py",)}),
    Feature(
        "stock speculation with the plugin installed",
        "unchanged",
        "unchanged",
        {"V1": ("integration/test_stock.py", "unit/test_unnoticed.py")},
    ),
    Feature(
        "verification: `rejection_sample_method`",
        "`standard` only",
        "`standard` only",
        {"V1": ("unit/test_version.py",)},
    ),
)


def runners(minor: tuple[int, ...]) -> tuple[bool, bool]:
    """Whether ssd works on V1 and on V2 of this vLLM minor."""
    supported = SUPPORTED[0] <= minor <= SUPPORTED[1]
    return supported, supported and minor >= V2_SINCE
