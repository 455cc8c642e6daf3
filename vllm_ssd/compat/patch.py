"""The one way in which this package patches vLLM.

A patch names its symbol as "package.module:Class.attribute" and the parameters it relies on. `wrap` puts a guard in
front of a function: a call that the guard does not claim reaches vLLM's function with the same arguments. `replace`
repairs a function for the whole process. Both mark what they install, do nothing the second time, and raise
`UnsupportedVLLM` for a vLLM that lacks the symbol.
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
    """One attribute of vLLM that was replaced.

    original: the function vLLM had there, a property's getter included; ours: the guard, None for a repair that serves
    the whole process; parameters: those of the original that we rely on.
    """

    symbol: str
    original: Callable[..., Any]
    ours: Callable[..., Any] | None
    parameters: tuple[str, ...]
    _owner: Any
    _found: Any  # what stood in the owner's namespace, if anything did
    _installed: Any

    def is_active(self) -> bool:
        """Whether a call of the symbol still goes through this patch."""
        current = inspect.getattr_static(self._owner, _name(self.symbol), None)
        return current is self._installed or _mark(current) is self


_patches: list[Patch] = []


def wrap(
    symbol: str, ours: Callable[..., Any], wrapper: Callable[..., Any], *, parameters: tuple[str, ...] = ()
) -> None:
    """Let calls for which `ours(*args, **kwargs)` is true return `wrapper(original, *args, **kwargs)`.

    All other calls are vLLM's. For a method, and for a property's getter, the first argument is the object.
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
    """Put `replacement` in the symbol's place for every caller in this process: for repairs that all may have."""
    owner, found = _resolve(symbol)
    if _mark(found) is not None or found is replacement:
        return
    _check(symbol, found, parameters)
    _install(Patch(symbol, found, None, parameters, owner, vars(owner).get(_name(symbol)), replacement))


def assume(symbol: str, value: Any) -> None:
    """Set a module's constant, in a process that runs no engine: it is neither marked nor undone."""
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
    """Restore what the patch replaced, unless someone else has replaced the patch since."""
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
    """The object whose namespace is patched, and what is found there without binding it."""
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
    """What was found, or the getter of a property."""
    return found.fget if isinstance(found, property) else found


def _mark(found: Any) -> Patch | None:
    return getattr(_function(found), MARK, None)


def _check(symbol: str, function: Any, parameters: tuple[str, ...]) -> None:
    """Raise unless `function` can be patched and has `parameters`; one that takes any arguments may have them."""
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
    with suppress(AttributeError, TypeError):  # a builtin takes no attributes
        setattr(_function(installed), MARK, patch)
    setattr(patch._owner, _name(patch.symbol), installed)
    _patches.append(patch)
