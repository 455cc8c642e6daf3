"""Marks that several test files use."""

import pytest
from engines import HAS_V2

needs_v2 = pytest.mark.skipif(not HAS_V2, reason="this vLLM's V2 runner has no method that SSD can pass for on a CPU")
