"""Importing this makes Triton's values and types, of which its interpreter makes several an operation, cheap to make.

What is rarely asked for is computed when it is; types are compared by their names; operands of one type and shape are
taken as they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from triton.language import core, semantic

PLAIN = {int, float, bool, str, type(None), core.tensor, core.dtype, core.pointer_type, core.block_type}
"""Types of what is never a compile-time constant, nor contains one."""
_blocks: dict[tuple, tuple] = {}
_computed: dict[tuple, Any] = {}


def lazily(owner: type, **attributes: Callable[[Any], Any]) -> None:
    """Compute attributes of `owner` when they are first asked for."""
    for name, function in attributes.items():
        attribute = functools.cached_property(function)
        attribute.__set_name__(owner, name)
        setattr(owner, name, attribute)


def sizes(tensor: Any) -> list[int]:
    """Of a tensor's dimensions; empty for a scalar."""
    return tensor.type.shape.values if tensor.type.is_block() else []


def init_tensor(self: Any, handle: Any, type: Any) -> None:
    """As `tensor.__init__`, but for `shape` and `numel`."""
    self.handle, self.type, self.dtype = handle, type, type.scalar


def init_constexpr(self: Any, value: Any) -> None:
    """As `constexpr.__init__`, but for `type`."""
    while isinstance(value, core.constexpr):
        value = value.value
    self.value = value


def init_tuple(self: Any, args: Any, type: Any = None) -> None:
    """As `tuple.__init__`, but for a `type` that is not given."""
    self.values = list(args)
    if type is not None:
        self.type = type if isinstance(type, core.tuple_type) else core.tuple_type(type)


def init_block(self: Any, element_ty: Any, shape: Any) -> None:
    """As `block_type.__init__`, which checks the shape, once for each."""
    values = shape.values if isinstance(shape, core.tuple) else shape
    key = (getattr(element_ty, "name", None), *values)
    if key not in _blocks or key[0] is None:
        block_type_init(self, element_ty, shape)
        _blocks[key] = self.shape, self.numel, self.name
    self.element_ty = element_ty
    self.shape, self.numel, self.name = _blocks[key]


def unwrap(value: Any) -> Any:
    """As `_unwrap_if_constexpr`."""
    return value if type(value) in PLAIN else unwrap_if_constexpr(value)


def equals(self: Any, other: Any) -> bool:
    """As `dtype.__eq__`."""
    return self is other or dtype_eq(self, other)


def broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
    """As `broadcast_impl_value`."""
    if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape.values == rhs.type.shape.values:
        return lhs, rhs
    return broadcast_impl_value(self, lhs, rhs)


def check_types(
    self: Any,
    lhs: Any,
    rhs: Any,
    allow_lhs_ptr: bool = False,
    allow_rhs_ptr: bool = False,
    arithmetic_check: bool = True,
    div_or_mod: bool = False,
) -> Any:
    """As `binary_op_type_checking_impl`; a division may want wider types than its operands have."""
    if type(lhs) is type(rhs) is core.tensor and not div_or_mod:
        if lhs.type.name == rhs.type.name and not lhs.dtype.is_ptr():
            return lhs, rhs
    return binary_op_type_checking_impl(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)


def computation_type(self: Any, *types: Any) -> Any:
    """As `computation_type_impl`, once for each."""
    if types not in _computed:
        _computed[types] = computation_type_impl(self, *types)
    return _computed[types]


core.tensor.__init__ = init_tensor
lazily(
    core.tensor,
    shape=lambda self: core.tuple(map(core.constexpr, sizes(self))),
    numel=lambda self: core.constexpr(math.prod(sizes(self))),
)
core.constexpr.__init__ = init_constexpr
lazily(core.constexpr, type=lambda self: core.constexpr_type(self.value))
core.tuple.__init__ = init_tuple
lazily(core.tuple, type=lambda self: core._type_for_tuple_values(self.values))
block_type_init = core.block_type.__init__
core.block_type.__init__ = init_block
unwrap_if_constexpr = core._unwrap_if_constexpr
core._unwrap_if_constexpr = unwrap
dtype_eq = core.dtype.__eq__
core.dtype.__eq__ = equals
checks = semantic.TritonSemantic
broadcast_impl_value = checks.broadcast_impl_value
checks.broadcast_impl_value = broadcast
binary_op_type_checking_impl = checks.binary_op_type_checking_impl
checks.binary_op_type_checking_impl = check_types
computation_type_impl = checks.computation_type_impl
checks.computation_type_impl = computation_type
