"""Kernels run on the GPU where there is one, elsewhere under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

INTERPRETED = not torch.cuda.is_available()

if INTERPRETED:
    # Triton's own library is compiled or interpreted for good when it is first imported, so this must come first.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton

        import vllm_ssd.kernels  # noqa: F401

        if isinstance(triton.language.cdiv, triton.JITFunction):
            raise RuntimeError("something imported Triton before tests/kernels/conftest.py; run tests/kernels alone")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops take the Triton path for the length of a test."""
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
