"""What `scripts/check_vllm.py` finds in a release; its tables hold all that `compat` reaches, and nothing else."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import vllm
from compat_uses import product, uses
from engines import HAS_V2
from script_modules import load_script

from vllm_ssd.compat import patch, symbols
from vllm_ssd.compat.symbols import Symbol
from vllm_ssd.compat.target import runner_v1
from vllm_ssd.compat.version import SUPPORTED, minor_of
from vllm_ssd.plugin import register

ROOT = Path(__file__).parents[2]
MINOR = minor_of(vllm.__version__)
SITE = Path(vllm.__file__).parents[1]
NGRAM = "vllm.v1.worker.gpu.spec_decode.ngram"


check_vllm = load_script("check_vllm")
TABLE = {symbol.name: symbol for symbol in symbols.symbols(SUPPORTED[1])}

TREE = {
    "__init__.py": "if TYPE_CHECKING:\n    from vllm.old import Runner\n__version__ = '0.40.0'",
    "old.py": """
class Runner:
    size: int = 1
    def __init__(self, config, *, device=None):
        self.batch, self.extra = 1, 2
        for _ in ():
            self.deep: int = 3
    def run(self, a, b=1): ...
    async def later(self, a, **more): ...
    @staticmethod
    def free(a): ...
    @property
    def length(self): ...
""",
    "derived.py": "from .old import Runner as Base\nfrom vllm.fields import *\nclass Derived(Base[int]):\n    y = 1",
    "fields.py": """
try:
    from fast import function
except ImportError:
    def function(x, y, /, z, *, w=1): ...
@dataclass
class Fields(Parent):
    c: int
    d: int = 2
class Parent:
    a: int
    b: str = ""
""",
    "new/place.py": "class Moved:\n    def method(self): ...\ndef moved(): ...",
    "new/__init__.py": "from .place import moved as renamed",
    "abstract.py": """
class Base:
    @abstractmethod
    def wanted(self): ...
    @staticmethod
    @abc.abstractmethod
    def another(): ...
    @abstractmethod
    def done(self): ...
class Inner(Base):
    def done(self): ...
""",
    "circle.py": "from vllm.circle import nothing",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in TREE.items():
        file = tmp_path / "vllm" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "vllm/new/__init__.py").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "status", "detail"),
    [
        ("vllm.old", "present", ""),
        ("vllm.new", "present", ""),
        ("vllm.gone", "missing", ""),
        ("vllm:__version__", "present", ""),
        ("vllm:Runner.run", "present", ""),
        ("vllm.old:Runner.size", "present", ""),
        ("vllm.old:Runner.extra", "present", ""),
        ("vllm.old:Runner.deep", "present", ""),
        ("vllm.old:Runner.length", "present", ""),
        ("vllm.old:Runner.absent", "missing", ""),
        ("vllm.derived:Derived.y", "present", ""),
        ("vllm.derived:Derived.batch", "present", ""),
        ("vllm.derived:Base.run", "present", ""),
        ("vllm.derived:function", "present", ""),
        ("vllm.fields:Fields.b", "present", ""),
        ("vllm.new:renamed", "present", ""),
        ("vllm.circle:nothing", "missing", ""),
        ("vllm.old:moved", "moved", "to vllm.new.place"),
        ("vllm.gone:Moved.method", "moved", "to vllm.new.place"),
        ("vllm.gone:Moved.other", "missing", ""),
        ("vllm.gone:Runner", "moved", "to vllm.old"),
    ],
)
def test_where_a_symbol_is(root: Path, name: str, status: str, detail: str) -> None:
    found = check_vllm.Release(root).check(Symbol(name))
    assert (found.status, found.detail) == (status, detail)


@pytest.mark.parametrize(
    ("name", "parameters", "exact", "problem"),
    [
        ("vllm.old:Runner.run", "a", False, ""),
        ("vllm.old:Runner.run", "a b", True, ""),
        ("vllm.old:Runner.run", "b a", True, "has another order: a, b"),
        ("vllm.old:Runner.run", "a", True, "gained b"),
        ("vllm.old:Runner.run", "b", False, "gained a"),
        ("vllm.old:Runner.run", "a b c", False, "lost c"),
        ("vllm.old:Runner.run", "c", True, "lost c; gained a; gained b"),
        ("vllm.old:Runner.later", "a c", False, ""),
        ("vllm.old:Runner.later", "a c", True, "lost c"),
        ("vllm.old:Runner.free", "a", True, ""),
        ("vllm.old:Runner.length", "", True, ""),
        ("vllm.old:Runner", "config device", False, ""),
        ("vllm.derived:Derived", "device", False, "gained config"),
        ("vllm.fields:function", "x y z w", True, ""),
        ("vllm.fields:function", "x y", False, "gained z"),
        ("vllm.fields:Fields", "a c", False, ""),
        ("vllm.fields:Fields", "c d", False, "gained a"),
        ("vllm.fields:Fields", "a b c d", True, ""),
        ("vllm.old:Runner.size", "", True, "is no function"),
    ],
)
def test_signatures(root: Path, name: str, parameters: str, exact: bool, problem: str) -> None:
    found = check_vllm.Release(root).check(Symbol(name, tuple(parameters.split()), exact))
    assert (found.status, found.detail) == ("signature changed" if problem else "present", problem)


@pytest.mark.parametrize(
    ("name", "implemented", "problem"),
    [
        ("vllm.abstract:Base", "wanted another done", ""),
        ("vllm.abstract:Base", "done", "wants another; wants wanted"),
        ("vllm.abstract:Inner", "wanted another", ""),
        ("vllm.abstract:Inner", "another", "wants wanted"),
        ("vllm.old:Runner", "", ""),
    ],
)
def test_abstract_methods(root: Path, name: str, implemented: str, problem: str) -> None:
    """Python would refuse to make an object of a subclass that lacks one."""
    found = check_vllm.Release(root).check(Symbol(name, implemented=tuple(implemented.split())))
    assert (found.status, sorted(found.detail.split("; "))) == (
        "signature changed" if problem else "present",
        problem.split("; "),
    )


def run(monkeypatch: pytest.MonkeyPatch, wanted: list[Symbol], *arguments: str) -> int:
    monkeypatch.setattr(check_vllm, "symbols", lambda minor: wanted)
    return check_vllm.main(["0.40.0", *arguments])


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "wheel"])
def test_the_report(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], packed: bool
) -> None:
    source = root
    if packed:
        source = root / "vllm-0.40.0-py3-none-any.whl"
        with ZipFile(source, "w") as wheel:
            for file in (root / "vllm").rglob("*.py"):
                wheel.write(file, file.relative_to(root))
    good, bad = Symbol("vllm.old:Runner"), Symbol("vllm.gone:Runner")
    assert run(monkeypatch, [good], "--source", str(source)) == 0
    assert capsys.readouterr().out == "vLLM 0.40.0: 1 of 1 symbols present\n"
    assert run(monkeypatch, [good, bad], "--source", str(source)) == 1
    assert capsys.readouterr().out.splitlines() == [
        "moved  vllm.gone:Runner: to vllm.old",
        "vLLM 0.40.0: 1 of 2 symbols present",
    ]
    assert run(monkeypatch, [good, bad], "--source", str(source), "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["vllm"], found["ok"]) == ("0.40.0", False)
    assert found["symbols"][1] == {"symbol": "vllm.gone:Runner", "status": "moved", "detail": "to vllm.old"}


def test_a_release_is_downloaded_by_name(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And unpacked without its compiled files; nothing is installed."""
    commands = []

    def pip(command: list[str], **options: Any) -> Any:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with ZipFile(folder / "vllm-0.40.0-cp38-abi3-manylinux_2_28_x86_64.whl", "w") as wheel:
            wheel.writestr("vllm/old.py", "class Runner: ...")
            wheel.writestr("vllm/_C.abi3.so", "")
        return check_vllm.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(check_vllm.subprocess, "run", pip)
    assert run(monkeypatch, [Symbol("vllm.old:Runner")]) == 0
    ((_, *command),) = commands
    assert command[:2] == ["-m", "pip"] and {"download", "vllm==0.40.0", "--no-deps"} <= set(command)


def test_a_release_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    done = check_vllm.subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(check_vllm.subprocess, "run", lambda *args, **kwargs: done)
    with pytest.raises(SystemExit, match="could not download vllm 0.40.0"):
        run(monkeypatch, [])


def test_the_newest_release_is_the_index_first(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "vllm (0.40.0)\nAvailable versions: 0.40.0, 0.39.1\n"
    done = check_vllm.subprocess.CompletedProcess([], 0, stdout=listed, stderr="")
    monkeypatch.setattr(check_vllm.subprocess, "run", lambda *args, **kwargs: done)
    assert check_vllm.newest() == "0.40.0"
    done.stdout = ""
    with pytest.raises(SystemExit, match="pip lists no versions of vllm"):
        check_vllm.newest()


@pytest.mark.compat
def test_the_installed_vllm_has_all_of_it() -> None:
    findings = check_vllm.check(vllm.__version__, SITE)
    assert not [finding for finding in findings if finding.status != "present"]
    assert len(findings) >= (200 if HAS_V2 else 170)


@pytest.mark.compat
def test_reading_agrees_with_importing() -> None:
    """On the parameters of every function in the tables, wherever Python can tell."""
    release, compared = check_vllm.Release(SITE), 0
    for symbol in symbols.symbols(MINOR):
        if symbol.parameters is not None:
            module, _, path = symbol.name.partition(":")
            importlib.import_module(module)
            read = release.parameters(*release.find(module, path))
            function = patch.original(symbol.name)
            found = inspect.signature(getattr(function, "__func__", function)).parameters.values()
            names = [p.name for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            assert list(read.names) == [name for name in names if name not in ("self", "cls")], symbol.name
            compared += 1
    assert compared >= 20


@pytest.fixture(scope="module")
def patches() -> Iterator[dict[str, patch.Patch]]:
    """All that a process with ssd patches."""
    before = list(patch._patches)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if HAS_V2:  # as if its runner had been imported before the plugin was loaded
            copied = patch.original("vllm.v1.worker.gpu.spec_decode:init_speculator")
            monkeypatch.setattr(importlib.import_module("vllm.v1.worker.gpu.model_runner"), "init_speculator", copied)
        yield from installed(before)


def installed(before: list[patch.Patch]) -> Iterator[dict[str, patch.Patch]]:
    register()
    runner_v1.install(type("Proposer", (), {}))
    importlib.import_module("vllm_ssd.compat.target.pipeline").install()
    importlib.import_module("vllm_ssd.compat.target.worker").install()
    if HAS_V2:
        importlib.import_module("vllm_ssd.compat.target.runner_v2").install()
    found = patch.patched()
    yield {symbol: p for symbol, p in found.items() if not symbol.endswith(".kernel")}
    for made in reversed([p for p in patch._patches if p not in before]):
        patch.undo(made)


@pytest.mark.compat
def test_every_patch_is_in_the_tables(patches: dict[str, patch.Patch]) -> None:
    known = {symbol.name: symbol for symbol in symbols.symbols(MINOR)}
    for symbol, found in patches.items():
        assert symbol in known
        if found.parameters:
            declared = TABLE[symbol].parameters
            assert declared and set(found.parameters) <= set(declared), symbol


def stand_ins() -> dict[str, Callable[..., Any]]:
    """Methods of ours that vLLM calls in place of a base class's of its own, by the base's symbol."""
    modules = ["drafter.cpu_norms", "drafter.tree_backend", "target.thinking_budget"]
    if HAS_V2:
        modules += ["target.runner_v2", "target.scheduler"]
    found = {}
    for name in modules:
        module = importlib.import_module(f"vllm_ssd.compat.{name}")
        for owner in vars(module).values():
            if inspect.isclass(owner) and owner.__module__ == module.__name__:
                for attribute, value in vars(owner).items():
                    function = getattr(value, "__func__", value)
                    base = next((b for b in owner.__mro__[1:] if attribute in vars(b)), None)
                    if inspect.isfunction(function) and base is not None and base.__module__.startswith("vllm."):
                        found[attribute, base] = function
    return {f"{base.__module__}:{base.__name__}.{name}": function for (name, base), function in found.items()}


IMITATED = {"vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update"}
"""What a backend of vLLM's has that no base class declares, and ours has too."""
ELSEWHERE = {"vllm.model_executor.custom_op:CustomOp.": "vllm.model_executor.layers.layernorm:RMSNorm."}
"""Base classes that the tables name by the class that is used."""


def named(symbol: str) -> str:
    for base, used in ELSEWHERE.items():
        symbol = symbol.replace(base, used)
    return symbol


@pytest.mark.skipif(not HAS_V2, reason="the tables are those of a vLLM with both runners")
def test_the_tables_hold_what_is_reached_and_nothing_else(patches: dict[str, patch.Patch]) -> None:
    reached = set(uses(product(ROOT)))
    modules = {name.partition(":")[0] for name in TABLE}
    unknown = {name for name in reached - TABLE.keys() if name not in modules}
    assert not unknown, "add to vllm_ssd/compat/symbols.py"
    overridden = {named(symbol) for symbol in stand_ins()}
    constructors = {name for name in overridden if name.endswith(".__init__")}  # those of our own objects
    assert not overridden - constructors - TABLE.keys(), "add to vllm_ssd/compat/symbols.py"
    stale = TABLE.keys() - reached - patches.keys() - overridden - IMITATED
    assert not stale, "take out of vllm_ssd/compat/symbols.py"


def test_calls_give_only_what_the_tables_say() -> None:
    for name, keywords in uses(product(ROOT)).items():
        if keywords:
            assert set(keywords) <= set(TABLE[name].parameters or ()), name


def test_all_subclasses_are_declared() -> None:
    """With the abstract methods that they have."""
    methods: dict[str, set[str]] = {}
    for symbol in stand_ins():
        owner, _, name = symbol.rpartition(".")
        methods.setdefault(owner, set()).add(name)
    for owner, declared in symbols.SUBCLASSED.items():
        if owner in methods:
            assert set(declared.split()) <= methods[owner], owner
    release = check_vllm.Release(SITE)
    wants_something = {
        owner for owner in methods if release.check(Symbol(owner, implemented=())).status == "signature changed"
    }
    assert wants_something == symbols.SUBCLASSED.keys() & methods.keys()
    assert len(methods.keys() & symbols.SUBCLASSED.keys()) == (4 if HAS_V2 else 3)


@pytest.mark.compat
def test_stand_ins_take_what_vllm_gives() -> None:
    compared = 0
    for symbol, function in stand_ins().items():
        declared = TABLE[named(symbol)].parameters if named(symbol) in TABLE else None
        if declared is not None:
            ours = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
            assert [p.name for p in ours][: len(declared)] == list(declared), symbol
            assert all(p.default is not p.empty for p in ours[len(declared) :]), symbol
            compared += 1
    assert compared >= 4


def test_a_use_that_is_not_declared_is_found(tmp_path: Path) -> None:
    code = """
import vllm.v1.new_module as new
from vllm.v1.other import Thing
RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
def f(runner, scheduler_output):
    new.function(1, key=2)
    runner.input_batch.invented
    getattr(runner, "spelled", None)
    scheduler_output.scheduled_cached_reqs.fresh
    return f"{RUNNER}.patched"
"""
    folder = tmp_path / "vllm_ssd/compat/target"
    folder.mkdir(parents=True)
    (folder / "pipeline.py").write_text(code)
    found = uses(product(tmp_path))
    assert {
        "vllm.v1.new_module:function",
        "vllm.v1.other:Thing",
        "vllm.v1.worker.gpu_input_batch:InputBatch.invented",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.spelled",
        "vllm.v1.core.sched.output:CachedRequestData.fresh",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.patched",
    } <= found.keys()
    assert found["vllm.v1.new_module:function"] == {"key"}


def test_older_minors_need_less() -> None:
    old, new = ({s.name: s for s in symbols.symbols(minor)} for minor in ((0, 31), (0, 32)))
    assert old.keys() < new.keys() == TABLE.keys()
    assert NGRAM in new and NGRAM not in old
    init = "vllm.v1.worker.gpu.spec_decode:init_speculator"
    assert old[init].parameters == ("vllm_config", "device") and new[init].parameters[2:] == ("req_states",)
    assert functools.reduce(lambda a, b: a and b, (name in new for name in symbols.UP_TO_0_31))
