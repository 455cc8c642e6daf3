"""The compiled norm of an eager drafter on the CPU against PyTorch's operations that it replaces."""

from __future__ import annotations

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm

from vllm_ssd.compat.drafter.cpu_norms import use_compiled_norms

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def norm() -> RMSNorm:
    use_compiled_norms()
    use_compiled_norms()
    with set_current_vllm_config(VllmConfig()):
        norm = RMSNorm(96, eps=1e-5)
    norm.weight.data = torch.linspace(-1, 2, 96, dtype=torch.bfloat16)
    return norm


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_same_numbers(norm: RMSNorm, with_residual: bool, strided: bool) -> None:
    rows = torch.randn(7, 2 * 96, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x = rows[:, :96] if strided else rows[:, :96].contiguous()
    residual = rows[:, 96:].contiguous() if with_residual else None
    expected = norm.forward_native(x.clone(), None if residual is None else residual.clone())
    given = norm.forward_cpu(x.clone(memory_format=torch.preserve_format), residual)
    for tensor, other in zip(expected, given):
        torch.testing.assert_close(tensor, other, atol=0.02, rtol=0.02)  # bfloat16 keeps 8 bits


def test_it_is_the_kernel_that_runs(norm: RMSNorm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "forward_native", lambda *tensors: pytest.fail("fell back to PyTorch's operations"))
    norm.forward_cpu(torch.ones(2, 96, dtype=torch.bfloat16), torch.ones(2, 96, dtype=torch.bfloat16))
