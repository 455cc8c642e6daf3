"""Imports point downwards: docs/architecture.md's picture, enforced."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "vllm_ssd"
KERNELS = ROOT.parent / "kernels"

ALLOWED = {
    "kernels": set(),
    "config": set(),
    "protocol": set(),
    "policy": set(),
    "planner": {"policy"},
    "transport": {"protocol"},
    "metrics": {"protocol"},
    "compat": {"kernels", "policy"},
    "drafter": {"kernels", "policy", "protocol", "compat", "transport"},
    "sessions": {"config", "protocol", "metrics"},
    "verifier": {"config", "protocol", "policy", "metrics", "sessions"},
    "cache": {"kernels", "protocol"},
    "courier": {"cache", "config", "kernels", "metrics", "policy", "protocol", "sessions"},
    "launch": {"drafter", "protocol", "transport"},
    "placement": {"config", "drafter"},
    "proposer": {"compat", "config", "launch", "metrics", "placement", "protocol", "sessions", "verifier"},
    "speculator": {"cache", "compat", "courier", "kernels", "proposer"},
    "plugin": {"compat", "config", "speculator"},
    "profiler": {"compat", "config", "drafter", "placement", "planner", "policy"},
    "cli": {"config", "planner", "profiler"},
}
NO_VLLM = {
    "kernels",
    "config",
    "protocol",
    "policy",
    "planner",
    "transport",
    "metrics",
    "sessions",
    "verifier",
    "cache",
    "courier",
    "launch",
}


def modules() -> dict[str, list[Path]]:
    found = {"kernels": list(KERNELS.glob("*.py"))}
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if name not in ("__init__", "pair"):
            found.setdefault(name, []).append(path)
    return found


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_is_placed():
    assert set(modules()) == set(ALLOWED)


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_imports_point_downwards(module):
    used = {n.split(".")[1] for p in modules()[module] for n in imported(p) if n.startswith("vllm_ssd.")}
    assert used - {module} <= ALLOWED[module]


@pytest.mark.parametrize("module", sorted(NO_VLLM))
def test_leaves_do_not_know_vllm(module):
    assert not [n for p in modules()[module] for n in imported(p) if n.split(".")[0] == "vllm"]


def test_kernels_need_torch_and_triton_only():
    used = {n.split(".")[0] for p in modules()["kernels"] for n in imported(p)}
    assert used - sys.stdlib_module_names == {"torch", "triton", "vllm_ssd"}


def test_private_vllm_symbols_live_in_compat():
    for module, paths in modules().items():
        if module == "compat":
            continue
        for path in paths:
            for name in imported(path):
                if name.split(".")[0] == "vllm":
                    assert ".worker" not in name and ".engine.core" not in name and ".sample" not in name, (path, name)
