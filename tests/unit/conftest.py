"""What several test modules of the drafter share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engine_target import Target
from fake_model import FakePagedModel


@pytest.fixture(scope="session", params=[False, True], ids=["host pages", "device pages"])
def make_target(request: pytest.FixtureRequest) -> Callable[..., Target]:
    """Targets of a drafter whose pages are kept on the host, then by the references of the kernels."""

    def make(num_pages: int = 400, max_model_len: int = 200, **options) -> Target:
        return Target(FakePagedModel(num_pages, max_model_len, tree_attention=request.param), **options)

    return make
