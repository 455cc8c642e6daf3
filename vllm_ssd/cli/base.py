"""What all commands share: the application and the console."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


@app.callback()
def main() -> None:
    """Speculative speculative decoding for vLLM: check a machine, plan a configuration, and look at a server."""
