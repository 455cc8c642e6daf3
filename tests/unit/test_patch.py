"""How vLLM is patched: guarded, marked once, undone as a whole, refused where a symbol is not what we rely on."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from vllm_ssd.compat import patch
from vllm_ssd.compat.version import UnsupportedVLLM, supported_range


class Owner:
    def method(self, a: int, b: int = 2) -> tuple[Any, ...]:
        return "vLLM's", a, b

    @property
    def size(self) -> int:
        return 3

    @staticmethod
    def static() -> None: ...


class Child(Owner): ...


def function(a: int, *, key: int = 0) -> tuple[Any, ...]:
    return "vLLM's", a, key


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module to patch; afterwards only the patches of before are left."""
    before = list(patch._patches)
    module = ModuleType("victim")
    module.Owner, module.Child, module.function = Owner, Child, function
    module.callable = functools.partial(function, 1)
    monkeypatch.setitem(sys.modules, "victim", module)
    yield module
    for found in reversed(patch._patches[len(before) :]):
        patch.undo(found)


def is_odd(value: Any, *args: Any, **kwargs: Any) -> bool:
    return isinstance(value, int) and value % 2 == 1


def ours(original: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return "ours", original(*args, **kwargs)


def test_a_guard_decides_who_answers(module: ModuleType) -> None:
    patch.wrap("victim:function", is_odd, ours, parameters=("a", "key"))
    assert module.function(2, key=5) == ("vLLM's", 2, 5)
    assert module.function(3, key=5) == ("ours", ("vLLM's", 3, 5))
    with pytest.raises(TypeError, match="unexpected keyword argument 'absent'"):
        module.function(2, absent=1)
    assert module.function.__name__ == "function"


def test_methods_and_properties(module: ModuleType) -> None:
    patch.wrap("victim:Owner.method", lambda self, *args, **kwargs: hasattr(self, "mine"), ours)
    patch.wrap("victim:Owner.size", lambda self: hasattr(self, "mine"), lambda original, self: -original(self))
    stock, mine = Owner(), Child()
    mine.mine = True
    assert stock.method(1, b=4) == ("vLLM's", 1, 4) and stock.size == 3
    assert mine.method(1) == ("ours", ("vLLM's", 1, 2)) and mine.size == -3


def test_an_inherited_method_is_patched_where_it_was_named() -> None:
    patch.wrap("victim:Child.method", lambda *args: True, ours)
    assert Child().method(1)[0] == "ours" and Owner().method(1)[0] == "vLLM's"
    patch.undo(patch.patched()["victim:Child.method"])
    assert "method" not in vars(Child) and Child().method(1)[0] == "vLLM's"


def test_the_second_time_does_nothing(module: ModuleType) -> None:
    for _ in range(2):
        patch.wrap("victim:function", lambda *args, **kwargs: True, ours)
        patch.replace("victim:Owner.method", lambda self: "repaired")
    assert module.function(1) == ("ours", ("vLLM's", 1, 0)) and Owner().method() == "repaired"
    assert {"victim:function", "victim:Owner.method"} <= set(patch.patched())


def test_it_is_found_below_another_plugins_wrapper(module: ModuleType) -> None:
    patch.wrap("victim:function", is_odd, ours)
    of_ours = module.function
    module.function = functools.wraps(of_ours)(lambda *args, **kwargs: of_ours(*args, **kwargs))
    patch.wrap("victim:function", is_odd, ours)
    assert module.function(3) == ("ours", ("vLLM's", 3, 0)), "wrapped twice"
    assert patch.patched()["victim:function"].original is function


def test_the_original_is_reachable() -> None:
    assert patch.original("victim:function") is function
    patch.wrap("victim:function", is_odd, ours)
    patch.wrap("victim:Owner.size", is_odd, ours)
    assert patch.original("victim:function") is function
    assert patch.original("victim:Owner.size")(Owner()) == 3


def test_what_a_builtin_repairs_is_listed_too(module: ModuleType) -> None:
    for _ in range(2):
        patch.replace("victim:function", len)
    assert module.function is len and patch.patched()["victim:function"].ours is None
    assert patch.original("victim:function") is function


def test_what_was_put_back_by_others_is_not_listed(module: ModuleType) -> None:
    patch.wrap("victim:function", is_odd, ours)
    module.function = function
    assert "victim:function" not in patch.patched()
    patch.wrap("victim:function", is_odd, ours)
    assert module.function(1)[0] == "ours"


def test_all_or_nothing(module: ModuleType) -> None:
    with pytest.raises(UnsupportedVLLM), patch.all_or_nothing():
        patch.wrap("victim:function", is_odd, ours)
        patch.wrap("victim:Owner.size", is_odd, ours)
        patch.wrap("victim:absent", is_odd, ours)
    assert module.function is function and Owner().size == 3
    assert not [symbol for symbol in patch.patched() if symbol.startswith("victim")]


@pytest.mark.parametrize(
    ("symbol", "parameters", "problem"),
    [
        ("victim:absent", (), "is missing"),
        ("victim:Absent.method", (), "is missing"),
        ("vllm.absent.module:function", (), "is missing"),
        ("victim:function", ("a", "c", "d"), "has no parameter c, d"),
        ("victim:Owner.size", ("absent",), "has no parameter absent"),
        ("victim:Owner.static", (), "is a staticmethod, not a plain function"),
        ("victim:__name__", (), "is a str, not a plain function"),
    ],
)
def test_a_vllm_without_the_symbol_is_refused(symbol: str, parameters: tuple[str, ...], problem: str) -> None:
    with pytest.raises(UnsupportedVLLM) as raised:
        patch.wrap(symbol, is_odd, ours, parameters=parameters)
    assert str(raised.value).startswith(f"{symbol} {problem} in vLLM 0.")
    assert f"vllm-ssd supports vLLM {supported_range()}: " in str(raised.value)


@pytest.mark.parametrize(
    ("symbol", "problem"),
    [
        ("victim:absent", "is missing"),
        ("victim:function", "has no parameter b"),
        ("victim:Owner.size", "is a property, not a plain function"),
    ],
)
def test_a_repair_is_as_strict(symbol: str, problem: str) -> None:
    with pytest.raises(UnsupportedVLLM, match=f"{symbol} {problem}"):
        patch.replace(symbol, ours, parameters=("b",))


def test_a_module_that_fails_to_import_is_not_called_missing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_victim.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UnsupportedVLLM, match="cannot be imported .No module named 'no_such_dependency'"):
        patch.wrap("broken_victim:function", is_odd, ours)


def test_a_wrapper_that_takes_anything_is_trusted(module: ModuleType) -> None:
    module.function = lambda *args: args
    patch.wrap("victim:function", is_odd, ours, parameters=("a", "key"))
    assert module.function(2, 3) == (2, 3)
