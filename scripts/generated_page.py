"""Pages of the documentation that hold what a script writes, between markers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import indent


def fill(text: str, begin: str, end: str, content: str) -> str:
    """`text` with `content` between its first `begin` and the `end` after it, indented as `begin` is.

    ValueError where one is missing.
    """
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"the page has no {begin} … {end}")
    margin = before[before.rfind("\n") + 1 :]
    return f"{before}{begin}\n\n{indent(content, margin)}\n\n{margin}{end}{after}"


def write_or_check(pages: Mapping[Path, Callable[[str], str]], description: str | None) -> int:
    """Write the files at their paths as `pages` has them, or with --check return whether any is another."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    texts = {path: path.read_text() for path in pages}
    wanted = {path: page(texts[path]) for path, page in pages.items()}
    if check:
        return int(texts != wanted)
    for path, text in wanted.items():
        path.write_text(text)
    return 0
