"""What is wrong, or missing, in the vLLM that is installed, and repaired in compat: a test that fails says what can go.

Each checks vLLM's own code, not ours.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import textwrap
import types
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm
from marks import needs_v2
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_ssd.compat import patch
from vllm_ssd.compat.target import batches, runner_v1
from vllm_ssd.compat.version import SUPPORTED

pytestmark = pytest.mark.compat
on_cpu = pytest.mark.skipif(not current_platform.is_cpu(), reason="a fault of vLLM for CPUs")
FOUND = tuple(int(part) for part in vllm.__version__.split("+")[0].split(".")[:2])


def syntax(function: Any) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))


def conditions_around(tree: ast.AST, is_meant: Any) -> list[str]:
    """For each node that is meant, the conditions of all `if`s around it, joined."""
    found = []

    def visit(node: ast.AST, conditions: tuple[str, ...]) -> None:
        if is_meant(node):
            found.append(" and ".join(conditions))
        inner = (*conditions, ast.unparse(node.test)) if isinstance(node, ast.If) else conditions
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(tree, ())
    return found


@on_cpu
def test_the_cpu_sampler_reads_uninitialised_memory() -> None:
    """`runner_v1.repair_cpu_sampling` and `expand_batch_to_tokens` can go when this fails."""
    assert not runner_v1.expand_is_correct(patch.original(runner_v1.EXPAND))
    assert runner_v1.expand_is_correct(runner_v1.expand_batch_to_tokens)


@on_cpu
def test_cpu_kernels_are_not_connected_in_one_vllm() -> None:
    """`runner_v1._connect_cpu_kernels` can go with vLLM 0.30: 0.29 has no dispatchers, 0.31 connects them."""
    if FOUND != (0, 30):
        pytest.skip("only vLLM 0.30 needs it")
    if "vllm.v1.sample.rejection_sampler:_expand.kernel" not in patch.patched():
        assert isinstance(rejection_sampler._expand.kernel, types.FunctionType)


@on_cpu
def test_top_k_alone_crashes_without_drafts() -> None:
    """That reason of `runner_v1._sample` can go when this fails; that it is quicker remains."""
    with pytest.raises((RuntimeError, IndexError)):
        apply_top_k_top_p(torch.empty(0, 8), torch.empty(0, dtype=torch.int32), None)


def test_batches_overlap_under_pipeline_parallelism() -> None:
    """`batches.run_one_batch_at_a_time` can go when this fails: vLLM no longer overlaps batches of V1 speculation."""
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=2),
        scheduler_config=SimpleNamespace(async_scheduling=False),
        speculative_config=SimpleNamespace(method="custom_class"),
        use_v2_model_runner=False,
    )
    assert patch.original(batches.MAX_CONCURRENT_BATCHES)(config) == 2


def test_early_pipeline_ranks_have_no_drafter() -> None:
    """`pipeline._name_missing_proposer` can go when this fails."""
    around = conditions_around(
        syntax(GPUModelRunner.__init__),
        lambda node: isinstance(node, ast.Attribute) and node.attr == "drafter" and isinstance(node.ctx, ast.Store),
    )
    assert around and all("is_last_rank" in conditions for conditions in around)


def test_early_pipeline_ranks_do_not_learn_accepted_drafts() -> None:
    """`pipeline._learn_accepted_drafts` can go when this fails."""
    around = conditions_around(
        syntax(patch.original("vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states")),
        lambda node: isinstance(node, ast.Attribute) and node.attr == "all_token_ids",
    )
    assert around and all("use_async_scheduling" in conditions for conditions in around)


def test_stop_tokens_are_censored_by_where_a_round_starts() -> None:
    """`min_length` in `target.requests` can go when this fails."""
    config = SimpleNamespace()
    processor = MinTokensLogitsProcessor(config, torch.device("cpu"), False)
    outputs = [5, 6]
    params = SamplingParams(min_tokens=4, stop_token_ids=[3], ignore_eos=True)
    added = [(0, params, [1], outputs)]
    processor.update_state(SimpleNamespace(batch_size=1, removed=[], added=added, moved=[]))
    bonus = processor.apply(torch.zeros(1, 8))  # the token after three accepted drafts, which is the sixth
    assert bonus[0, 3] == -torch.inf
    source = inspect.getsource(Sampler.apply_logits_processors)
    assert "num_draft_tokens" not in source, "vLLM may know now how far the round of a bonus token reached"


def test_the_eager_norm_is_pytorch_on_a_cpu() -> None:
    """`compat.drafter.cpu_norms` can go when this fails."""
    assert "forward_cpu" not in vars(RMSNorm), "vLLM may call its kernel now"


def test_the_oldest_vllm_has_no_ngram_gpu() -> None:
    """The check in `runner.is_v2` can go when every supported vLLM has the method."""
    if FOUND == SUPPORTED[0]:
        assert importlib.util.find_spec("vllm.v1.worker.gpu.spec_decode.ngram") is None


@needs_v2
def test_v2_names_an_adapter_for_each_request_alone() -> None:
    """`lora.repair_lora_rows` can go when this fails: vLLM names one for every row of logits."""
    from vllm.lora.request import LoRARequest
    from vllm.v1.worker.gpu.lora_utils import LoraState

    from vllm_ssd.compat.target import lora

    state, original = LoraState(2), patch.original(lora.MAKE_INPUTS)
    state.add_request("a", 0, LoRARequest("seven", 7, "nowhere"))
    state.add_request("b", 1, None)
    step = ["a", "b"], np.array([0, 1]), np.array([4, 1])
    assert original(state, *step)[0] == (7, 0)
    drafts = {"a": [1, 2, 3]}
    lora.note_drafts(SimpleNamespace(lora_state=state), SimpleNamespace(scheduled_spec_decode_tokens=drafts))
    assert lora._make_lora_inputs(original, state, *step)[0] == (7, 7, 7, 7, 0)
