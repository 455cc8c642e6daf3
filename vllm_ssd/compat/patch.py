"""How this package patches vLLM.

A patch names its symbol as "package.module:Class.attribute", and the parameters that it relies on. `wrap` adds a guard:
calls that the guard does not claim go to vLLM's function unchanged. `replace` fixes a function for the whole process.
Both mark what they install, are idempotent, and raise `UnsupportedVLLM` if vLLM lacks the symbol.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from vllm_ssd.compat.version import unsupported

MARK = "_vllm_ssd_patch"
"""Attribute of a replacement that holds its `Patch`."""


@dataclass(frozen=True, eq=False)
class Patch:
    """A replaced attribute of vLLM.

    original: vLLM's function, or a property's getter; ours: the guard, None for a replacement that serves the whole
    process; parameters: those of the original that we rely on.
    """

    symbol: str
    original: Callable[..., Any]
    ours: Callable[..., Any] | None
    parameters: tuple[str, ...]
    _owner: Any
    _found: Any  # previous value in the owner's own namespace, None if it was inherited
    _installed: Any

    def is_active(self) -> bool:
        """Whether calls of the symbol still go through this patch."""
        current = inspect.getattr_static(self._owner, _name(self.symbol), None)
        return current is self._installed or _mark(current) is self


_patches: list[Patch] = []


def wrap(
    symbol: str, ours: Callable[..., Any], wrapper: Callable[..., Any], *, parameters: tuple[str, ...] = ()
) -> None:
    """Route calls for which `ours(*args, **kwargs)` is true to `wrapper(original, *args, **kwargs)`.

    All other calls go to vLLM's function. For methods and property getters the first argument is the object.
    """
    owner, found = _resolve(symbol)
    if _mark(found) is not None:
        return
    original = _function(found)
    _check(symbol, original, parameters)

    @functools.wraps(original)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if ours(*args, **kwargs):
            return wrapper(original, *args, **kwargs)
        return original(*args, **kwargs)

    replacement = property(guarded, found.fset, found.fdel, found.__doc__) if isinstance(found, property) else guarded
    _install(Patch(symbol, original, ours, parameters, owner, vars(owner).get(_name(symbol)), replacement))


def replace(symbol: str, replacement: Callable[..., Any], *, parameters: tuple[str, ...] = ()) -> None:
    """Replace the symbol for every caller in this process; only for fixes that are safe for all of them."""
    owner, found = _resolve(symbol)
    if _mark(found) is not None or found is replacement:
        return
    _check(symbol, found, parameters)
    _install(Patch(symbol, found, None, parameters, owner, vars(owner).get(_name(symbol)), replacement))


def assume(symbol: str, value: Any) -> None:
    """Set a module's constant in a process that runs no engine; not marked, and never undone."""
    owner, _ = _resolve(symbol)
    setattr(owner, _name(symbol), value)


def original(symbol: str) -> Callable[..., Any]:
    """vLLM's own function behind the symbol, patched or not."""
    _, found = _resolve(symbol)
    for patch in patched().values():
        if patch.symbol == symbol:
            return patch.original
    return _function(found)


def patched() -> dict[str, Patch]:
    """The patches in effect in this process, by symbol."""
    return {patch.symbol: patch for patch in _patches if patch.is_active()}


def undo(patch: Patch) -> None:
    """Restore the original, unless someone else has replaced the patch since."""
    if inspect.getattr_static(patch._owner, _name(patch.symbol), None) is patch._installed:
        if patch._found is None:
            delattr(patch._owner, _name(patch.symbol))
        else:
            setattr(patch._owner, _name(patch.symbol), patch._found)
    _patches.remove(patch)


@contextmanager
def all_or_nothing() -> Iterator[None]:
    """Undo the patches made inside if one of them fails."""
    before = len(_patches)
    try:
        yield
    except BaseException:
        for patch in reversed(_patches[before:]):
            undo(patch)
        raise


def _resolve(symbol: str) -> tuple[Any, Any]:
    """The object whose namespace is patched, and the unbound attribute found there."""
    module, _, path = symbol.partition(":")
    try:
        owner = importlib.import_module(module)
        *outer, name = path.split(".")
        for attribute in outer:
            owner = getattr(owner, attribute)
        return owner, inspect.getattr_static(owner, name)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            raise unsupported(symbol, "is missing") from error
        raise unsupported(symbol, f"cannot be imported ({error})") from error
    except ImportError as error:
        raise unsupported(symbol, f"cannot be imported ({error})") from error
    except AttributeError as error:
        raise unsupported(symbol, "is missing") from error


def _name(symbol: str) -> str:
    return symbol.rpartition(":")[2].rpartition(".")[2]


def _function(found: Any) -> Any:
    """`found` itself, or its getter if it is a property."""
    return found.fget if isinstance(found, property) else found


def _mark(found: Any) -> Patch | None:
    return getattr(_function(found), MARK, None)


def _check(symbol: str, function: Any, parameters: tuple[str, ...]) -> None:
    """Raise unless `function` can be patched and accepts `parameters`."""
    if not callable(function) or isinstance(function, (staticmethod, classmethod)):
        raise unsupported(symbol, f"is a {type(function).__name__}, not a plain function")
    if not parameters:
        return
    found = inspect.signature(function).parameters
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in found.values()):
        return
    missing = [name for name in parameters if name not in found]
    if missing:
        raise unsupported(symbol, f"has no parameter {', '.join(missing)}")


def _install(patch: Patch) -> None:
    installed = patch._installed
    with suppress(AttributeError, TypeError):  # builtins have no writable attributes
        setattr(_function(installed), MARK, patch)
    setattr(patch._owner, _name(patch.symbol), installed)
    _patches.append(patch)
