"""Kernels run on the GPU where there is one, elsewhere under Triton's interpreter."""

from __future__ import annotations

import re
import sys

import pytest
import torch

INTERPRETED = not torch.cuda.is_available()

if INTERPRETED:
    # Triton's own library is compiled or interpreted for good when it is imported. Should another test module have
    # imported it already, a second copy is made here; only its C extension, which knows no modes, is shared.
    for name in list(sys.modules):
        if re.match(r"(triton(?!\._C)|vllm_ssd\.kernels)(\.|$)", name):
            del sys.modules[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import quick_interpreter  # noqa: F401

        import vllm_ssd.kernels  # noqa: F401


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops take the Triton path for the length of a test."""
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
