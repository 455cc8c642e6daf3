"""The command `vllm-ssd doctor`."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vllm_ssd.cli.base import app, console
from vllm_ssd.config import parse_size
from vllm_ssd.doctor import Findings, Machine, Status

STYLES = {Status.OK: "green", Status.NOTE: "yellow", Status.FAILS: "bold red"}


@app.command("doctor", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def doctor_command(
    context: typer.Context,
    target: Annotated[str, typer.Argument(help="name or path of the model to serve")],
    drafter: Annotated[str, typer.Argument(help="name or path of the draft model")],
    assume_gpus: Annotated[int, typer.Option(min=0, help="assume a machine with this many CUDA devices")] = 0,
    gpu_memory: Annotated[str, typer.Option(help="memory of each assumed device")] = "80GiB",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Report what `vllm serve TARGET` with DRAFTER would do here, without loading weights.

    All other options are those of `vllm serve`, including `--speculative-config`. The exit status is 1 if the server
    would not start.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    try:
        gpu_bytes = parse_size(gpu_memory)
    except ValueError as error:
        raise typer.BadParameter(f"--gpu-memory: {error}") from None
    if assume_gpus:
        from vllm_ssd.compat.target.assumed import assume_gpus as assume

        assume(assume_gpus, gpu_bytes)
    from vllm_ssd.compat.target.serve_flags import devices
    from vllm_ssd.doctor.examine import examine

    machine = Machine.here(*devices(), assumed=assume_gpus > 0)
    found = examine(target, drafter, context.args, machine)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=1))
    else:
        _print(found)
    raise typer.Exit(0 if found.starts else 1)


def _print(found: Findings) -> None:
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for name in ("", "", "found"):
        table.add_column(name)
    for finding in found:
        text = finding.text + (f"\n→ {finding.fix}" if finding.fix else "")
        table.add_row(f"[{STYLES[finding.status]}]{finding.status.value}[/]", finding.subject, _plain(text))
    console.print(table)
    console.print("The server would start." if found.starts else "The server would not start.")


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
