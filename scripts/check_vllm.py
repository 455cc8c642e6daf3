"""Look up everything that `vllm_ssd.compat` uses of vLLM in a release, without installing it.

    python scripts/check_vllm.py VERSION [--source WHEEL_OR_FOLDER] [--json]

VERSION is such as 0.33.0, or "newest" for the newest release on the package index. pip downloads its wheel unless
`--source` names one, or a folder that has `vllm/`. Nothing of it runs: its Python is parsed. Each symbol of
`vllm_ssd/compat/symbols.py` is `present`, `moved` (elsewhere), `missing`, or has its `signature changed`. Exit status 1
where any is not present. Needs pip, and this checkout on Python's path.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from zipfile import ZipFile

from vllm_ssd.compat.symbols import Symbol, symbols
from vllm_ssd.compat.version import SUPPORTED, minor_of

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.stmt | ast.Module


@dataclass(frozen=True)
class Finding:
    """What became of one symbol. status: "present", "moved", "missing" or "signature changed"."""

    symbol: str
    status: str
    detail: str = ""


@dataclass(frozen=True)
class Parameters:
    """The parameters of a function but `self`; `anything`: it takes `**keywords` besides."""

    names: tuple[str, ...]
    required: tuple[str, ...]
    anything: bool = False


class Release:
    """The Python of a vLLM release. root: the folder that has `vllm/`."""

    def __init__(self, root: Path) -> None:
        if not (root / "vllm").is_dir():
            raise ValueError(f"{root} has no folder vllm")
        self._root = root
        self._modules: dict[str, ast.Module | None] = {}

    def check(self, symbol: Symbol) -> Finding:
        """Look one symbol up."""
        module, _, path = symbol.name.partition(":")
        if not path:
            there = self.module(module) is not None
            return Finding(symbol.name, "present" if there else "missing")
        found = self.find(module, path)
        if found is None:
            moved = self._elsewhere(path)
            return Finding(symbol.name, "moved", f"to {', '.join(moved)}") if moved else Finding(symbol.name, "missing")
        problem = self._signature_problem(symbol, *found) or self._abstract_problem(symbol, *found)
        return Finding(symbol.name, "signature changed" if problem else "present", problem)

    def module(self, name: str) -> ast.Module | None:
        """A module's syntax tree; None where there is no such module."""
        if name not in self._modules:
            path = self._root.joinpath(*name.split("."))
            files = [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
            self._modules[name] = ast.parse(files[0].read_text(), str(files[0])) if files else None
        return self._modules[name]

    def find(self, module: str, path: str) -> tuple[str, Definition] | None:
        """The definition of `path` in a module, and the module that it really stands in."""
        name, _, attribute = path.partition(".")
        found = self._top_level(module, name, frozenset())
        if found is None or not attribute:
            return found
        place, owner = found
        return self._attribute(place, owner, attribute) if isinstance(owner, ast.ClassDef) else None

    def parameters(self, module: str, definition: Definition) -> Parameters | None:
        """Those of a function, or of a class's `__init__`; None for anything else."""
        if isinstance(definition, Function):
            return _parameters(definition)
        if not isinstance(definition, ast.ClassDef):
            return None
        init = self._attribute(module, definition, "__init__")
        if init is not None and isinstance(init[1], Function):
            return _parameters(init[1])
        fields = [
            (item.target.id, item.value is None)
            for _, owner in reversed(list(self._lineage(module, definition)))
            for item in owner.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        ]
        required = dict(fields)
        return Parameters(tuple(required), tuple(name for name in required if required[name]))

    def _signature_problem(self, symbol: Symbol, module: str, definition: Definition) -> str:
        """How the parameters differ from what the symbol says; empty where they do as we need."""
        found = None if symbol.parameters is None else self.parameters(module, definition)
        if symbol.parameters is None or found is None:
            return "" if symbol.parameters is None else "is no function"
        lost = [] if found.anything and not symbol.exact else [p for p in symbol.parameters if p not in found.names]
        more = found.names if symbol.exact else found.required
        problems = [f"lost {name}" for name in lost] + [f"gained {p}" for p in more if p not in symbol.parameters]
        if not problems and symbol.exact and found.names != symbol.parameters:
            problems = [f"has another order: {', '.join(found.names)}"]
        return "; ".join(problems)

    def _abstract_problem(self, symbol: Symbol, module: str, definition: Definition) -> str:
        """The abstract methods that a subclass of ours lacks; empty where there are none."""
        if symbol.implemented is None or not isinstance(definition, ast.ClassDef):
            return ""
        named = [
            (node.name, any("abstractmethod" in ast.unparse(decorator) for decorator in node.decorator_list))
            for _, owner in self._lineage(module, definition)
            for node in _statements(owner.body)
            if isinstance(node, Function)
        ]
        nearest = dict(reversed(named))
        return "; ".join(f"wants {n}" for n, abstract in nearest.items() if abstract and n not in symbol.implemented)

    def _top_level(self, module: str, name: str, asked: frozenset[tuple[str, str]]) -> tuple[str, Definition] | None:
        """A name of a module, followed through imports."""
        tree = self.module(module)
        if tree is None or (module, name) in asked:
            return None
        asked |= {(module, name)}
        imported: list[tuple[str, str]] = []
        for node in _statements(tree.body):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == name:
                return module, node
            if name in _assigned(node):
                return module, node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if alias.name == "*" or name == (alias.asname or alias.name):
                        original = name if alias.name == "*" else alias.name
                        imported.append((_absolute(module, node, self._is_package(module)), original))
        for source, original in imported:
            submodule = self.module(f"{source}.{original}")
            if submodule is not None:
                return f"{source}.{original}", submodule
            found = self._top_level(source, original, asked)
            if found is not None:
                return found
        return None

    def _attribute(self, module: str, owner: ast.ClassDef, name: str) -> tuple[str, Definition] | None:
        """An attribute of a class: defined or assigned there, set on `self` in a method, or a base's."""
        for place, definition in self._lineage(module, owner):
            for node in _statements(definition.body):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == name:
                    return place, node
                if name in _assigned(node):
                    return place, node
            for method in _statements(definition.body):
                if isinstance(method, Function):
                    for node in ast.walk(method):
                        if _stores_on_self(node, name):
                            return place, method
        return None

    def _lineage(self, module: str, owner: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        """The class and its bases in vLLM, nearest first."""
        waiting, seen = [(module, owner)], set()
        while waiting:
            place, definition = waiting.pop(0)
            if id(definition) in seen:
                continue
            seen.add(id(definition))
            yield place, definition
            for base in definition.bases:
                plain = base.value if isinstance(base, ast.Subscript) else base
                if isinstance(plain, ast.Name):
                    found = self._top_level(place, plain.id, frozenset())
                    if found is not None and isinstance(found[1], ast.ClassDef):
                        waiting.append((found[0], found[1]))

    def _elsewhere(self, path: str) -> list[str]:
        """Other modules that define `path`."""
        name, found = path.partition(".")[0], []
        for file in sorted((self._root / "vllm").rglob("*.py")):
            text = file.read_text(errors="replace")
            if f"class {name}" not in text and f"def {name}" not in text:
                continue
            module = ".".join(file.relative_to(self._root).with_suffix("").parts).removesuffix(".__init__")
            defined = self.find(module, path)
            if defined is not None and defined[0] == module:
                found.append(module)
        return found

    def _is_package(self, module: str) -> bool:
        return self._root.joinpath(*module.split("."), "__init__.py").is_file()


@cache
def _parameters(function: Function) -> Parameters:
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    optional = len(arguments.defaults)
    required = [a.arg for a in (positional[:-optional] if optional else positional)]
    required += [a.arg for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults) if default is None]
    names = [a.arg for a in [*positional, *arguments.kwonlyargs]]
    bound = ("self", "cls")
    return Parameters(
        tuple(name for name in names if name not in bound),
        tuple(name for name in required if name not in bound),
        arguments.kwarg is not None,
    )


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, and of the branches in it."""
    for node in body:
        yield node
        for inner in ("body", "orelse", "finalbody"):
            if isinstance(node, (ast.If, ast.Try, ast.With)):
                yield from _statements(getattr(node, inner, []))
        for handler in getattr(node, "handlers", []):
            yield from _statements(handler.body)


def _targets(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        targets = list(node.targets)
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        targets = [node.target]
    else:
        return []
    return [leaf for target in targets for leaf in ast.walk(target) if isinstance(leaf, (ast.Name, ast.Attribute))]


def _assigned(node: ast.AST) -> set[str]:
    return {target.id for target in _targets(node) if isinstance(target, ast.Name)}


def _stores_on_self(node: ast.AST, name: str) -> bool:
    return any(
        isinstance(target, ast.Attribute)
        and target.attr == name
        and isinstance(target.value, ast.Name)
        and target.value.id == "self"
        for target in _targets(node)
    )


def _absolute(module: str, node: ast.ImportFrom, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    kept = parts[: len(parts) - node.level + is_package]
    return ".".join([*kept, *([node.module] if node.module else [])])


def newest() -> str:
    """The newest release of vLLM on the package index."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "index", "versions", "vllm"]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("Available versions: "):
            return line.removeprefix("Available versions: ").split(", ")[0]
    raise SystemExit(f"pip lists no versions of vllm:\n{done.stdout}{done.stderr}")


def download(version: str, folder: Path) -> Path:
    """PyPI's wheel of a release."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", f"vllm=={version}"]
    options = ["--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    if subprocess.run([*command, *options], stdout=sys.stderr).returncode:
        raise SystemExit(f"pip could not download vllm {version}")
    (wheel,) = folder.glob("vllm-*.whl")
    return wheel


def unpack(wheel: Path, folder: Path) -> Path:
    """The wheel's Python below `folder`."""
    with ZipFile(wheel) as archive:
        archive.extractall(folder, [n for n in archive.namelist() if n.startswith("vllm/") and n.endswith(".py")])
    return folder


def check(version: str, root: Path) -> list[Finding]:
    """What became of every symbol that is used with this version, in the folder that has its `vllm/`."""
    release = Release(root)
    return [release.check(symbol) for symbol in symbols(minor_of(version) or SUPPORTED[1])]


def report(version: str, findings: list[Finding]) -> str:
    """The findings as a table: trouble first, then one line on the rest."""
    trouble = [finding for finding in findings if finding.status != "present"]
    width = max((len(finding.status) for finding in trouble), default=0)
    lines = [f"{f.status:{width}}  {f.symbol}{': ' if f.detail else ''}{f.detail}" for f in trouble]
    return "\n".join([*lines, f"vLLM {version}: {len(findings) - len(trouble)} of {len(findings)} symbols present"])


def main(arguments: list[str] | None = None) -> int:
    """Check one release; the exit status."""
    parser = argparse.ArgumentParser(description="Look up what vllm-ssd uses of vLLM in a release of it.")
    parser.add_argument("version", help='such as 0.33.0, or "newest"')
    parser.add_argument("--source", type=Path, help="a wheel, or a folder that has vllm/, instead of pip's download")
    parser.add_argument("--json", action="store_true", help="print all findings as JSON")
    parser.add_argument("--all", action="store_true", help="list what is present, too")
    options = parser.parse_args(arguments)
    version = newest() if options.version == "newest" else options.version
    with tempfile.TemporaryDirectory(prefix="check-vllm-") as name:
        folder = Path(name)
        source = options.source or download(version, folder)
        findings = check(version, source if source.is_dir() else unpack(source, folder))
    ok = all(finding.status == "present" for finding in findings)
    if options.json:
        print(json.dumps({"vllm": version, "ok": ok, "symbols": [asdict(finding) for finding in findings]}, indent=1))
    else:
        if options.all:
            print("\n".join(f"present  {f.symbol}" for f in findings if f.status == "present"))
        print(report(version, findings))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
