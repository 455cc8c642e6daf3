"""The command `vllm-ssd trace`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vllm_ssd.cli.base import app, say
from vllm_ssd.monitor.page import page
from vllm_ssd.monitor.timeline import chrome_trace, read, rounds


@app.command("trace")
def trace_command(
    trace: Annotated[Path, typer.Argument(help="value of VLLM_SSD_TRACE when the server ran")],
    out: Annotated[Path | None, typer.Option(help="write Chrome trace events, for ui.perfetto.dev")] = None,
    html: Annotated[Path | None, typer.Option(help="write a self-contained HTML page")] = None,
) -> None:
    """Convert a recorded timeline of target and drafter for viewing."""
    if out is None and html is None:
        raise typer.BadParameter("give --out, --html or both")
    try:
        events = read(trace)
    except (OSError, ValueError) as error:
        say(str(error))
        raise typer.Exit(1) from None
    if out:
        out.write_text(json.dumps(chrome_trace(events)))
    if html:
        html.write_text(page(events, f"SSD, {trace.name}"))
    say(f"{len(events)} events of {len({e.pid for e in events})} processes, {len(rounds(events))} requests")
