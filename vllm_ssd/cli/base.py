"""The application and the console, shared by all commands."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def say(text: str) -> None:
    """Print a message; outside a terminal without line breaks, so that it can be searched for."""
    console.print(text, markup=False, soft_wrap=not console.is_terminal)


def json_object(option: str, text: str) -> dict[str, Any]:
    """Parse the JSON object given for `option`; raises ValueError for anything else."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"ssd: {option} must be a JSON object")
    return value


@app.callback()
def main() -> None:
    """Speculative speculative decoding for vLLM: check a machine, plan a configuration, and look at a server."""
