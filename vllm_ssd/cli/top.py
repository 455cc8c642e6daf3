"""The command `vllm-ssd top`."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.live import Live

from vllm_ssd.cli.base import app, console
from vllm_ssd.monitor import Snapshot, frame, scrape, url_of


@app.command("top")
def top_command(
    sources: Annotated[
        list[str] | None,
        typer.Argument(help="ports on this machine, or addresses, of servers or of their metrics_port (default: 8000)"),
    ] = None,
    interval: Annotated[float, typer.Option(min=0.1, help="seconds between updates")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="print totals since the server's start and exit")] = False,
) -> None:
    """Show hit rates, accepted drafts, tokens per second and drafters of running servers, live."""
    urls = [url_of(source) for source in sources or ["8000"]]
    before: list[Snapshot | None] = [None] * len(urls)
    now = [scrape(url) for url in urls]
    if once:
        console.print(frame(now, before))
        raise typer.Exit(1 if all(snapshot.error for snapshot in now) else 0)
    try:
        with Live(frame(now, before), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                # A server that did not answer is compared with its last answer.
                before = [last if new.error else new for new, last in zip(now, before)]
                now = [scrape(url) for url in urls]
                live.update(frame(now, before), refresh=True)
    except KeyboardInterrupt:
        pass
