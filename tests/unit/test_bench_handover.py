"""The benchmark of the host's time on a hit: every row hits, and the parts are those of a round."""

from __future__ import annotations

import pytest
from script_modules import load_script

script = load_script("bench_handover")


@pytest.mark.parametrize("num_rows", [1, 3])
def test_every_row_hits_and_every_part_is_timed(num_rows):
    found = script.measure(num_rows, rounds=4, evict_mib=0)
    parts = found["parts_us"]
    assert found["us"] > 0 and {"check", "look up", "adaptation", "encode, send"} <= parts.keys()
    assert all(us > 0 for us in parts.values())


def test_rounds_that_miss_are_not_measured(monkeypatch):
    monkeypatch.setattr(script, "BRANCHES", 3)  # of accept lengths 0 to 2, and three drafts are accepted
    with pytest.raises(RuntimeError, match="not every row hit"):
        script.measure(1, rounds=4, evict_mib=0)
