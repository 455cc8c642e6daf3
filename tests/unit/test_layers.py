"""The walls of docs/architecture.md: who may import whom, and who may touch vLLM's insides.

Imports under `TYPE_CHECKING`, in functions and by a string count too. `test_a_planted_fault_is_found` shows that each
wall holds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from source_tree import Reference, SourceTree, reachable

REPOSITORY = Path(__file__).parents[2]
EVERY_WAY = ("import", "late", "typing", "attribute", "string", "assignment")

ALLOWED = {
    # leaves
    "kernels": set(),
    "config": set(),
    "policy": set(),
    # vLLM's insides; `compat` itself is what its two halves share
    "compat": set(),
    "compat.target": {"compat", "link", "policy"},
    "compat.drafter": {"compat", "kernels"},
    # between the processes
    "link": {"config", "policy"},
    # the drafter's process
    "drafter": {"compat.drafter", "drafter.pages", "kernels", "link", "policy"},
    "drafter.pages": {"compat.drafter", "drafter", "kernels"},
    # vLLM's worker
    "target": {"compat", "compat.target", "config", "link", "policy"},
    "target.v1": {"compat", "compat.target", "config", "link", "policy", "target"},
    "target.v2": {"compat", "compat.target", "config", "kernels", "link", "policy", "target"},
    # off the serving path
    "planning": {
        "compat",
        "compat.drafter",
        "compat.target",
        "config",
        "drafter",
        "drafter.pages",
        "kernels",
        "link",
        "policy",
    },
    # on top
    "doctor": {
        "compat",
        "compat.drafter",
        "compat.target",
        "config",
        "drafter",
        "link",
        "planning",
        "target",
    },
    "plugin": {"compat", "compat.target", "config", "link", "target.v1", "target.v2"},
    "monitor": {"link"},
    "pool": {"config", "link"},
    "cli": {"compat", "compat.target", "config", "doctor", "link", "monitor", "planning", "pool"},
}
"""The rooms that each room refers to; a room is a folder, or a file that stands alone."""

APART = [
    ({"target.v1"}, {"target.v2"}),
    ({"target.v2"}, {"target.v1"}),
    ({"target", "target.v1", "target.v2", "compat.target"}, {"drafter", "drafter.pages", "compat.drafter"}),
    ({"drafter", "drafter.pages", "compat.drafter"}, {"target", "target.v1", "target.v2", "compat.target"}),
    ({"target", "target.v1", "target.v2", "link", "drafter"}, {"pool"}),
    ({"link"}, {"target", "target.v1", "target.v2", "drafter", "drafter.pages", "compat.target", "compat.drafter"}),
]
"""Rooms that reach none of the others, through no third one either."""

BY_NAME = {
    ("vllm_ssd.link.process", "vllm_ssd.drafter"): "starts `python -m vllm_ssd.drafter`",
    ("vllm_ssd.link.placed", "vllm_ssd.pool"): "starts `python -m vllm_ssd.pool`",
}
"""Modules named by a string that is no import: (module, name) and why."""

WITHOUT_VLLM = {"kernels", "config", "policy", "drafter", "drafter.pages"}
"""Rooms that run, and are tested, without vLLM."""

TALKS_TO_RAY = "vllm_ssd.pool.cluster"

LOGGER = "vllm.vllm_ssd"
"""The name of our logger, below vLLM's."""

PUBLIC_VLLM = {
    "vllm.AsyncEngineArgs",
    "vllm.EngineArgs",
    "vllm.LLM",
    "vllm.LLMEngine",
    "vllm.SamplingParams",
    "vllm.__version__",
    "vllm.config.SpeculativeConfig",
    "vllm.config.VllmConfig",
    "vllm.distributed.parallel_state.get_pp_group",
    "vllm.distributed.parallel_state.get_tp_group",
    "vllm.engine.arg_utils.AsyncEngineArgs",
    "vllm.engine.arg_utils.EngineArgs",
    "vllm.envs",
    "vllm.logger.init_logger",
    "vllm.platforms.current_platform",
    "vllm.sampling_params",
    "vllm.tokenizers.get_tokenizer",
    LOGGER,
}
"""What users of vLLM and models outside its tree are shown; everything else of vLLM is private to it."""

CIRCLES: dict[frozenset[str], str] = {}
"""Sets of modules that import each other once imports in functions count, and why."""


def load(folder: Path) -> SourceTree:
    """The product's modules below a checkout's folder."""
    return SourceTree({"vllm_ssd": folder / "vllm_ssd", "vllm_ssd.kernels": folder / "kernels"})


@pytest.fixture(scope="module")
def tree() -> SourceTree:
    return load(REPOSITORY)


def room(name: str) -> str:
    """The longest key of ALLOWED that a dotted name lies in, else its first part; "" for the package itself."""
    inner = name.removeprefix("vllm_ssd").removeprefix(".")
    inside = [room for room in ALLOWED if inner == room or inner.startswith(f"{room}.")]
    return max(inside, key=len, default=inner.split(".")[0])


def is_vllm(reference: Reference) -> bool:
    return reference.name.split(".")[0] == "vllm"


def unplaced_modules(tree: SourceTree) -> list[str]:
    return [module for module in tree.modules if room(module) not in ALLOWED | {"": set()}]


def upward_references(tree: SourceTree) -> list[str]:
    """References from one room to another that ALLOWED does not list, and relative imports, which hide theirs."""
    found = []
    for reference in tree.all_references():
        ours, theirs = room(reference.module), room(reference.name)
        if reference.name.startswith("."):
            found.append(f"{reference}: relative")
        elif reference.name.startswith("vllm_ssd.") and theirs not in {ours, ""} | ALLOWED.get(ours, set()):
            if (reference.module, reference.name) not in BY_NAME or reference.how != "string":
                found.append(f"{reference}: {ours} may not use {theirs}")
    return found


def broken_walls(tree: SourceTree) -> list[str]:
    """Rooms of APART that reach each other after all."""
    edges = tree.edges(*EVERY_WAY)
    for module, name in BY_NAME:
        if not any(r.name == name and r.how != "string" for r in tree.references.get(module, [])):
            edges.get(module, set()).discard(name)
    found = []
    for from_rooms, to_rooms in APART:
        starts = [module for module in tree.modules if room(module) in from_rooms]
        for start in starts:
            met = sorted(module for module in reachable(edges, [start]) if room(module) in to_rooms)
            found += [f"{start} reaches {module}" for module in met]
    return found


def private_vllm(tree: SourceTree) -> list[str]:
    """What only compat may touch, touched elsewhere."""
    return [
        str(reference)
        for reference in tree.all_references()
        if is_vllm(reference) and room(reference.module).split(".")[0] != "compat" and not is_public(reference.name)
    ]


def is_public(name: str) -> bool:
    if name == "vllm":
        return True  # what is reached on it counts
    for public in PUBLIC_VLLM:
        if name == public:
            return True
        if name.startswith(f"{public}."):
            return not any(part.startswith("_") for part in name.removeprefix(public).split("."))
    return False


def unmarked_patches(tree: SourceTree) -> list[str]:
    """Stores into vLLM that `compat.patch` does not know of."""
    return [str(r) for r in tree.all_references() if r.how == "assignment" and is_vllm(r)]


def uses_of_vllm(tree: SourceTree) -> list[str]:
    """vLLM in rooms that work without it."""
    return [str(r) for r in tree.all_references() if is_vllm(r) and room(r.module) in WITHOUT_VLLM and r.name != LOGGER]


def needs_of_kernels(tree: SourceTree) -> list[str]:
    """Packages beside numpy, torch and triton that kernels import."""
    allowed = sys.stdlib_module_names | {"numpy", "torch", "triton", "vllm_ssd"}
    return [
        str(r)
        for r in tree.all_references()
        if room(r.module) == "kernels" and r.how in ("import", "late", "typing") and r.name.split(".")[0] not in allowed
    ]


def uses_of_ray(tree: SourceTree) -> list[str]:
    """Ray elsewhere than in the one module that talks to it: a process that joins Ray ends with it."""
    return [str(r) for r in tree.all_references() if r.name.split(".")[0] == "ray" and r.module != TALKS_TO_RAY]


def circles(tree: SourceTree) -> list[str]:
    """Files that import each other; imports in functions count, those under TYPE_CHECKING, which never run, do not."""
    strict = [f"at import: {sorted(circle)}" for circle in tree.circles("import")]
    late = [circle for circle in tree.circles("import", "late") if frozenset(circle) not in CIRCLES]
    return strict + [f"with imports in functions: {sorted(circle)}" for circle in late]


CHECKS = [
    unplaced_modules,
    upward_references,
    broken_walls,
    private_vllm,
    unmarked_patches,
    uses_of_vllm,
    needs_of_kernels,
    uses_of_ray,
    circles,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_walls(tree: SourceTree, check: Callable[[SourceTree], list[str]]) -> None:
    assert not check(tree)


def test_tables_are_up_to_date(tree: SourceTree) -> None:
    """A room, or an exception, that nothing needs any more is taken out."""
    assert {room(module) for module in tree.modules} == ALLOWED.keys() | {""}
    for module, name in BY_NAME:
        assert any(r.name == name and r.how == "string" for r in tree.references[module]), (module, name)
    assert CIRCLES.keys() <= {frozenset(circle) for circle in tree.circles("import", "late")}


PLANTED = [
    (upward_references, "policy/budget.py", "from vllm_ssd.config import SSDConfig"),
    (upward_references, "policy/budget.py", "import vllm_ssd.link.protocol"),
    (upward_references, "config.py", "def late():\n    from vllm_ssd.drafter import engine"),
    (upward_references, "config.py", "if typing.TYPE_CHECKING:\n    from vllm_ssd.drafter.engine import DraftEngine"),
    (upward_references, "config.py", "importlib.import_module('vllm_ssd.drafter.engine')"),
    (upward_references, "config.py", "PATH = 'vllm_ssd.drafter.engine.DraftEngine'"),
    (upward_references, "config.py", "from . import plugin"),
    (upward_references, "kernels.py", "from vllm_ssd.policy import budget"),
    (upward_references, "link/process.py", "from vllm_ssd.drafter import engine"),
    (upward_references, "target/v1/round.py", "from vllm_ssd.target.v2.courier import Courier"),
    (upward_references, "target/v2/courier.py", "if TYPE_CHECKING:\n    from vllm_ssd.target.v1.round import Round"),
    (upward_references, "drafter/engine.py", "from vllm_ssd.target.requests import Session"),
    (upward_references, "target/requests.py", "from vllm_ssd.compat.drafter import paged"),
    (unplaced_modules, "stray/module.py", "x = 1"),
    (broken_walls, "link/process.py", "import vllm_ssd.drafter"),
    (broken_walls, "compat/version.py", "import vllm_ssd.drafter.engine"),
    (broken_walls, "target/requests.py", "def late():\n    import vllm_ssd.target.v2.courier"),
    (private_vllm, "plugin.py", "import vllm.v1.worker.gpu_model_runner"),
    (private_vllm, "plugin.py", "from vllm.v1.engine.core import EngineCore"),
    (private_vllm, "plugin.py", "from vllm import *"),
    (private_vllm, "plugin.py", "import vllm\nvllm.v1.worker"),
    (private_vllm, "plugin.py", "from vllm import v1 as x\nx.sample"),
    (private_vllm, "plugin.py", "import vllm.envs as envs\nenvs._private"),
    (private_vllm, "plugin.py", "from vllm import EngineArgs\nEngineArgs._set_default()"),
    (private_vllm, "plugin.py", "from vllm import EngineArgs\ngetattr(EngineArgs, '_set_default')"),
    (private_vllm, "plugin.py", "def f(name):\n    import vllm\n    return getattr(vllm, name)"),
    (private_vllm, "plugin.py", "import importlib\nimportlib.import_module('vllm.v1.sample')"),
    (private_vllm, "plugin.py", "def f(x):\n    return __import__(f'vllm.v1.{x}')"),
    (private_vllm, "plugin.py", "CLASS = 'vllm.v1.core.sched.scheduler.Scheduler'"),
    (private_vllm, "plugin.py", "CLASS = 'vllm.config.vllm:VllmConfig.compute_hash'"),
    (
        private_vllm,
        "target/requests.py",
        "if TYPE_CHECKING:\n    from vllm.v1.worker.gpu_input_batch import InputBatch",
    ),
    (unmarked_patches, "plugin.py", "from vllm import EngineArgs\nEngineArgs.create_engine_config = None"),
    (unmarked_patches, "compat/version.py", "import vllm.v1.sample as s\ns.rejection_sampler.x = 1"),
    (unmarked_patches, "compat/version.py", "from vllm.v1 import sample\nsetattr(sample, 'x', 1)"),
    (unmarked_patches, "compat/version.py", "from vllm.v1 import sample\ndel sample.x"),
    (uses_of_vllm, "policy/budget.py", "from vllm.logger import init_logger"),
    (uses_of_vllm, "drafter/engine.py", "def late():\n    import vllm"),
    (needs_of_kernels, "kernels.py", "import scipy"),
    (uses_of_ray, "target/requests.py", "def late():\n    import ray"),
    (uses_of_ray, "policy/budget.py", "from ray.util import queue"),
    (circles, "policy/budget.py", "import vllm_ssd.policy.other"),
    (circles, "policy/budget.py", "def late():\n    from vllm_ssd.policy.other import x"),
    (circles, "config.py", "def late():\n    from vllm_ssd.plugin import x"),
]
CLEAN = {
    "kernels.py": "import torch\nimport triton",
    "config.py": "",
    "policy/budget.py": '"""A docstring may say vllm.v1.worker."""\n',
    "policy/other.py": "from vllm_ssd.policy import budget\nx = 1",
    "compat/version.py": "import vllm.v1.worker\nfrom vllm.v1 import sample\nsample.x()",
    "compat/drafter/paged.py": "",
    "compat/target/runner.py": "from vllm_ssd.compat import version",
    "link/process.py": "START = ['-m', 'vllm_ssd.drafter']",
    "drafter/engine.py": "import logging\nlogging.getLogger('vllm.vllm_ssd')\nfrom vllm_ssd.link import process",
    "target/requests.py": "from vllm_ssd.link import process\nfrom vllm_ssd.compat import version",
    "target/v1/round.py": "from vllm_ssd.target import requests",
    "target/v2/courier.py": "from vllm_ssd.target import requests",
    "plugin.py": "from vllm_ssd import config\nfrom vllm import EngineArgs\nimport vllm\nvllm.__version__\nx = 1",
}


def plant(folder: Path, file: str = "", code: str = "") -> SourceTree:
    """A small tree without faults but for `code` at the end of `file`."""
    for name, text in CLEAN.items() if file in CLEAN or not file else [*CLEAN.items(), (file, "")]:
        path = folder / "kernels/__init__.py" if name == "kernels.py" else folder / "vllm_ssd" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for parent in path.parents:
            if parent.is_relative_to(folder / "vllm_ssd"):
                (parent / "__init__.py").touch()
        path.write_text(f"{text}\n{code if name == file else ''}\n")
    return load(folder)


def test_a_clean_tree_has_no_faults(tmp_path: Path) -> None:
    tree = plant(tmp_path)
    assert {check.__name__: check(tree) for check in CHECKS} == {check.__name__: [] for check in CHECKS}
    assert room("vllm_ssd.drafter.pages.host") == "drafter.pages" and room("vllm_ssd") == ""


@pytest.mark.parametrize(("check", "file", "code"), PLANTED, ids=lambda value: getattr(value, "__name__", None))
def test_a_planted_fault_is_found(
    tmp_path: Path, check: Callable[[SourceTree], list[str]], file: str, code: str
) -> None:
    assert check(plant(tmp_path, file, code))


def test_typing_circles_are_no_circles(tmp_path: Path) -> None:
    assert not circles(plant(tmp_path, "policy/budget.py", "if TYPE_CHECKING:\n    import vllm_ssd.policy.other"))
