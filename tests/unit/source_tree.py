"""What the modules of a source tree import and reach, read from their syntax trees without running them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

DOTTED = re.compile(r"(vllm|vllm_ssd)(\.\w+)+\.?(:[\w.]+)?")
"""A string that names a module or something in one."""
IMPORTERS = {"importlib.import_module", "importlib.util.find_spec", "__import__"}


@dataclass(frozen=True)
class Reference:
    """One use of a dotted name. how: "import" at module level, "late" in a function, "typing" under TYPE_CHECKING,
    "attribute" for what is reached on something imported, "string" for a name spelled in one, "assignment" for a store.
    """

    module: str
    line: int
    name: str
    how: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line}: {self.how} {self.name}"


class SourceTree:
    """The modules below some folders, each of which is a package: `{"vllm_ssd": Path("vllm_ssd")}`."""

    def __init__(self, packages: dict[str, Path]) -> None:
        self.modules: dict[str, ast.Module] = {}
        for package, folder in packages.items():
            nested = [other for other in packages.values() if other != folder and folder in other.parents]
            for path in sorted(folder.rglob("*.py")):
                if any(other in path.parents for other in nested):
                    continue
                parts = (package, *path.relative_to(folder).with_suffix("").parts)
                self.modules[".".join(parts).removesuffix(".__init__")] = ast.parse(path.read_text(), str(path))
        self.references = {module: list(_Reader(module, tree).references()) for module, tree in self.modules.items()}

    def all_references(self) -> Iterator[Reference]:
        """Every reference of every module."""
        for found in self.references.values():
            yield from found

    def module_of(self, name: str) -> str | None:
        """The module that a dotted name lies in; None if it is none of ours."""
        name = name.replace(":", ".").rstrip(".")
        while name and name not in self.modules:
            name = name.rpartition(".")[0]
        return name or None

    def edges(self, *hows: str) -> dict[str, set[str]]:
        """The modules that each module refers to in one of these ways."""
        edges: dict[str, set[str]] = {module: set() for module in self.modules}
        for reference in self.all_references():
            used = self.module_of(reference.name)
            if reference.how in hows and used is not None and used != reference.module:
                edges[reference.module].add(used)
        return edges

    def circles(self, *hows: str) -> list[set[str]]:
        """The largest sets of modules that all refer to each other, directly or not."""
        return strongly_connected(self.edges(*hows))


class _Reader:
    def __init__(self, module: str, tree: ast.Module) -> None:
        self._module = module
        self._tree = tree
        self._names: dict[str, str] = {}  # what an import bound to a local name
        self._ignored: set[int] = set()  # nodes that are docstrings, or parts of a longer attribute chain

    def references(self) -> Iterator[Reference]:
        yield from self._imports(self._tree, "import")
        for node in ast.walk(self._tree):
            yield from self._reached(node)

    def _imports(self, node: ast.AST, how: str) -> Iterator[Reference]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    bound = alias.asname or alias.name.partition(".")[0]
                    self._names[bound] = alias.name if alias.asname else bound
                    yield Reference(self._module, child.lineno, alias.name, how)
            elif isinstance(child, ast.ImportFrom):
                source = "." * child.level + (child.module or "")
                for alias in child.names:
                    self._names[alias.asname or alias.name] = f"{source}.{alias.name}"
                    yield Reference(self._module, child.lineno, f"{source}.{alias.name}", how)
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                yield from self._imports(child, "typing" if how == "typing" else "late")
            elif isinstance(child, ast.If) and _is_type_checking(child.test):
                for statement in child.body:
                    yield from self._imports(ast.Module([statement], []), "typing")
                for statement in child.orelse:
                    yield from self._imports(ast.Module([statement], []), how)
            else:
                yield from self._imports(child, how)

    def _reached(self, node: ast.AST) -> Iterator[Reference]:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                self._ignored.add(id(first.value))
        if isinstance(node, ast.Attribute):
            name = self._resolve(node)
            if name is not None and id(node) not in self._ignored:
                stored = isinstance(node.ctx, (ast.Store, ast.Del))
                yield Reference(self._module, node.lineno, name, "assignment" if stored else "attribute")
            self._ignored.add(id(node.value))
        elif isinstance(node, ast.Call):
            yield from self._called(node)
        elif isinstance(node, ast.JoinedStr):
            for part in node.values[:1]:
                yield from self._string(part)
        elif isinstance(node, ast.Constant):
            yield from self._string(node)

    def _called(self, node: ast.Call) -> Iterator[Reference]:
        """`getattr` and `setattr` with a name that is spelled out, of something imported."""
        function = self._resolve(node.func)
        if function in ("getattr", "hasattr", "setattr", "delattr") and len(node.args) >= 2:
            owner, name = self._resolve(node.args[0]), node.args[1]
            if owner in self._names.values() or (owner and "." in owner):
                spelled = name.value if isinstance(name, ast.Constant) else "?"
                how = "assignment" if function in ("setattr", "delattr") else "attribute"
                yield Reference(self._module, node.lineno, f"{owner}.{spelled}", how)

    def _string(self, node: ast.AST) -> Iterator[Reference]:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in self._ignored:
            self._ignored.add(id(node))
            if DOTTED.fullmatch(node.value):
                yield Reference(self._module, node.lineno, node.value.replace(":", ".").rstrip("."), "string")

    def _resolve(self, node: ast.AST) -> str | None:
        """The dotted name of an expression, as far as imports tell; builtins stand for themselves."""
        if isinstance(node, ast.Name):
            if node.id in self._names:
                return self._names[node.id]
            return node.id if node.id in ("getattr", "hasattr", "setattr", "delattr", "__import__") else None
        if isinstance(node, ast.Attribute):
            owner = self._resolve(node.value)
            return f"{owner}.{node.attr}" if owner else None
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            if self._resolve(node.func) in IMPORTERS and isinstance(node.args[0].value, str):
                return node.args[0].value
        return None


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def strongly_connected(edges: dict[str, set[str]]) -> list[set[str]]:
    """Sets of two and more nodes of which each reaches all others."""
    reached = {node: reachable(edges, [node]) for node in edges}
    found: list[set[str]] = []
    for node in sorted(edges):
        circle = {other for other in reached[node] if node in reached[other]} | {node}
        if len(circle) > 1 and circle not in found:
            found.append(circle)
    return found


def reachable(edges: dict[str, set[str]], starts: Iterable[str]) -> set[str]:
    """All nodes at the end of a path of one edge or more from one of `starts`."""
    found: set[str] = set()
    waiting = [other for start in starts for other in edges.get(start, ())]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += edges.get(node, ())
    return found
