"""Write the tables of docs/compatibility.md from `vllm_ssd.compat.features`, between its markers.

    python scripts/compatibility_table.py [--check]

With --check nothing is written, and the exit status says whether the page is as the code has it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from generated_page import fill, write_or_check

from vllm_ssd.compat.features import FEATURES, Feature, runners
from vllm_ssd.compat.version import SUPPORTED

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
BEGIN = "<!-- written by scripts/compatibility_table.py -->"
END = "<!-- end -->"


def table() -> str:
    """Feature by vLLM and runner, in Markdown."""
    minors = [(0, number) for number in range(SUPPORTED[0][1], SUPPORTED[1][1] + 1)]
    on_v2 = [minor for minor in minors if runners(minor)[1]]
    on_v1 = [minor for minor in minors if runners(minor)[0]]
    lines = [
        f"| feature | V1, vLLM {_span(on_v1)} | V2, vLLM {_span(on_v2)} | shown by (`tests/`) |",
        "|---|---|---|---|",
    ]
    lines += [f"| {f.name} | {f.v1} | {f.v2} | {_shown(f)} |" for f in FEATURES]
    return "\n".join(lines)


def page(text: str) -> str:
    """`text` with the table between the markers; raises ValueError without them."""
    return fill(text, BEGIN, END, table())


def _span(minors: list[tuple[int, int]]) -> str:
    first, last = minors[0], minors[-1]
    return f"{first[0]}.{first[1]} to {last[0]}.{last[1]}"


def _shown(feature: Feature) -> str:
    return "; ".join(f"{runner} " + ", ".join(f"`{t}`" for t in tests) for runner, tests in feature.shown_by.items())


def main() -> int:
    """Write the page, or compare it."""
    return write_or_check({PAGE: page}, __doc__)


if __name__ == "__main__":
    sys.exit(main())
