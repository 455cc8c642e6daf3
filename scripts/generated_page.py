"""Pages of the documentation that hold what a script writes, between markers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def fill(text: str, begin: str, end: str, content: str) -> str:
    """`text` with `content` between its first `begin` and the `end` after it; ValueError where one is missing."""
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"the page has no {begin} … {end}")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


def write_or_check(path: Path, page: Callable[[str], str], description: str | None) -> int:
    """Write the file at `path` as `page` has it, or with --check return whether it is another."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = path.read_text()
    wanted = page(text)
    if parser.parse_args().check:
        return int(text != wanted)
    path.write_text(wanted)
    return 0
