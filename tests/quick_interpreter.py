"""Importing this makes Triton's interpreter, which `TRITON_INTERPRET=1` must have asked for, twice as fast.

It stays in its place between launches, looks dtypes up instead of listing them, and does not compute integers once more
for an overflow check that only `debug` makes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def patch_once(fn: Callable[..., Any]) -> interpreter._LangPatchScope:
    """What `triton.language` needs for `fn`, for good."""
    patch_lang(fn)
    return interpreter._LangPatchScope()  # with nothing to restore


def np_dtype(dtype: tl.dtype) -> np.dtype:
    """NumPy's dtype of a Triton type, blocks and pointers included."""
    scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else np_dtype_of_scalar(scalar)


patch_lang = interpreter._patch_lang
interpreter._patch_lang = patch_once
np_dtype_of_scalar = functools.cache(interpreter._get_np_dtype)
interpreter._get_np_dtype = np_dtype
builder = interpreter.interpreter_builder
builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
