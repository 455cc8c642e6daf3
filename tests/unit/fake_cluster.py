"""`vllm_ssd.pool` without Ray, which tests never import in their own process: it reads its environment once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

NAME = "vllm_ssd.pool.cluster"
USERS = ("vllm_ssd.pool.actor", "vllm_ssd.pool.pool")
"""Modules that import it, and are imported anew."""


@contextmanager
def fake_cluster(**attributes: Any) -> Iterator[None]:
    """A module in the place of `vllm_ssd.pool.cluster` that has these attributes, and is joined at once."""
    cluster = ModuleType(NAME)
    cluster.__dict__.update(
        Handle=object, Watch=object, join=lambda unauthenticated: None, quit=lambda: None, **attributes
    )
    before = {name: sys.modules.pop(name) for name in (NAME, *USERS) if name in sys.modules}
    sys.modules[NAME] = cluster
    try:
        yield
    finally:
        for name in (NAME, *USERS):
            sys.modules.pop(name, None)
        sys.modules.update(before)
