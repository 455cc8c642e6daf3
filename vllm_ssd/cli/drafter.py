"""The commands `vllm-ssd key` and `vllm-ssd drafter`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from vllm_ssd.cli.base import app, json_object, say
from vllm_ssd.config import SSDConfig, parse_address
from vllm_ssd.link.credential import BadCredential, make_credential, tls_context


@app.command("key")
def key_command(
    file: Annotated[Path, typer.Argument(help="file to write; copy it to each host")],
) -> None:
    """Create the credential that a drafter and its targets share; whoever has the file may connect."""
    try:
        make_credential(file)
    except OSError as error:
        say(f"{file}: {error.strerror}")
        raise typer.Exit(1) from None
    say(f"{file}: a new key, which only you can read")


@app.command("drafter")
def drafter_command(
    model: Annotated[str, typer.Option(help="the name or path of the draft model")],
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="address that targets connect to")],
    key: Annotated[Path, typer.Option(help="credential file from `vllm-ssd key`")],
    max_num_seqs: Annotated[int, typer.Option(min=1, max=4096, help="most concurrent requests of all targets")] = 64,
    config: Annotated[
        str, typer.Option(metavar="JSON", help="other keys of speculative_config; sizes must match the targets'")
    ] = "{}",
) -> None:
    """Run a drafter for targets on this or other hosts until SIGTERM; they set `drafters` and `drafter_key`."""
    try:
        parse_address(listen)
        wanted = SSDConfig.from_user({**json_object("--config", config), "model": model})
        tls_context(key, is_server=True)
    except (ValueError, BadCredential) as error:
        say(str(error))
        raise typer.Exit(1) from None
    from vllm_ssd.compat.target.configuration import engine_argument_names  # vLLM is imported only now
    from vllm_ssd.compat.target.worker import visible_gpus
    from vllm_ssd.link.drafter_args import check_names
    from vllm_ssd.link.environment import drafter_environment
    from vllm_ssd.link.placement import place_standalone, run_on
    from vllm_ssd.link.process import DRAFTER_MODULE

    try:
        check_names(wanted.drafter_args or {}, engine_argument_names())
        options, environment, _ = place_standalone(wanted, max_num_seqs, on_cpu=visible_gpus() is None)
        if missing := run_on(options.cpus):
            raise ValueError(f"drafter_cpus: the drafter may not run on CPU {', '.join(map(str, missing))}")
    except ValueError as error:
        say(str(error))
        raise typer.Exit(1) from None
    options = msgspec.structs.replace(options, key=str(key.absolute()), parent_pid=0)
    arguments = ["-m", DRAFTER_MODULE, listen, msgspec.json.encode(options).decode()]
    os.execve(sys.executable, [sys.executable, *arguments], drafter_environment(os.environ, environment))
