"""Every kernel compiles ahead of time for Ampere and Hopper, on a machine without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vllm_ssd.kernels

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""Shared memory that one program can have (CUDA C programming guide, compute capabilities)."""
STACK_BYTES = {80: 96, 90: 16}
"""Local memory of a thread at most: a few of the trunk's 255 registers spill where its tile is largest."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `compile_all.py` says of all kernels and capabilities."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_all.py")), *map(str, SHARED_BYTES)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_every_kernel_compiles(compiled: list[dict[str, Any]], capability: int) -> None:
    kernels = [kernel for kernel in compiled if kernel["capability"] == capability]
    sources = "".join(path.read_text() for path in Path(vllm_ssd.kernels.__file__).parent.glob("*.py"))
    assert {kernel["kernel"] for kernel in kernels} == set(re.findall(r"def (_\w+_kernel)\(", sources))
    for kernel in kernels:
        assert kernel["cubin"] > 1000 and kernel["shared"] <= SHARED_BYTES[capability], kernel
        assert kernel["stack"] <= STACK_BYTES[capability], kernel
