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
    "policy": set(),
    "link": {"config", "policy"},
    "planning": {
        "compat.drafter",
        "compat",
        "compat.target",
        "drafter.pages",
        "config",
        "drafter",
        "kernels",
        "link",
        "policy",
    },
    "compat": set(),
    "compat.drafter": {"compat", "kernels"},
    "compat.target": {"compat", "link", "policy"},
    "drafter": {"kernels", "policy", "link", "compat.drafter", "drafter.pages"},
    "drafter.pages": {"kernels", "compat.drafter", "drafter"},
    "target": {"compat", "config", "link", "policy"},
    "target.v1": {"compat.target", "config", "link", "policy", "target"},
    "target.v2": {"compat.target", "config", "kernels", "link", "policy", "target"},
    "plugin": {"compat", "compat.target", "config", "target.v2"},
    "cli": {"config", "planning"},
}
NO_VLLM = {"kernels", "config", "policy", "drafter", "drafter.pages"}


def modules() -> dict[str, list[Path]]:
    found = {"kernels": list(KERNELS.glob("*.py"))}
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        if name != "__init__":
            found.setdefault(room(name), []).append(path)
    return found


def room(module: str) -> str:
    """The longest key of ALLOWED that `module` lies in, else its first part."""
    inside = [name for name in ALLOWED if module == name or module.startswith(f"{name}.")]
    return max(inside, key=len, default=module.split(".")[0])


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
    used = {
        room(n.removeprefix("vllm_ssd.")) for p in modules()[module] for n in imported(p) if n.startswith("vllm_ssd.")
    }
    assert used - {module} <= ALLOWED[module]


@pytest.mark.parametrize("module", sorted(NO_VLLM))
def test_leaves_do_not_know_vllm(module):
    assert not [n for p in modules()[module] for n in imported(p) if n.split(".")[0] == "vllm"]


def test_kernels_need_torch_and_triton_only():
    used = {n.split(".")[0] for p in modules()["kernels"] for n in imported(p)}
    assert used - sys.stdlib_module_names == {"torch", "triton", "vllm_ssd"}


def test_private_vllm_symbols_live_in_compat():
    for module, paths in modules().items():
        if module.split(".")[0] == "compat":
            continue
        for path in paths:
            for name in imported(path):
                if name.split(".")[0] == "vllm":
                    assert ".worker" not in name and ".engine.core" not in name and ".sample" not in name, (path, name)
