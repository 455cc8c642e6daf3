"""The commands `vllm-ssd pool up`, `status`, `add`, `remove` and `down`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.table import Table

from vllm_ssd.cli.base import app, console, json_object, say
from vllm_ssd.config import SSDConfig, check_resources, is_pool_name
from vllm_ssd.link.drafter_args import check_names

if TYPE_CHECKING:
    from vllm_ssd.pool.pool import Pool, PoolReport

pool_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(pool_app, name="pool", help="Manage drafters on Ray for any number of targets.")

Name = Annotated[str, typer.Argument(metavar="POOL", help='targets use it with "drafters": "ray:POOL"')]
Unauthenticated = Annotated[
    bool, typer.Option("--ray-unauthenticated", help="allow a cluster where anyone who reaches its ports may run code")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
Wait = Annotated[float, typer.Option(min=0, help="seconds to wait until all drafters are ready")]


@pool_app.command("up")
def up_command(
    name: Name,
    model: Annotated[str, typer.Option(help="name or path of the draft model, the same on each node")],
    num: Annotated[int, typer.Option(min=1, max=64, help="number of drafters")] = 1,
    resources: Annotated[str, typer.Option(metavar="JSON", help="Ray resources of each drafter")] = '{"GPU": 1}',
    max_num_seqs: Annotated[int, typer.Option(min=1, max=4096, help="most concurrent requests per drafter")] = 64,
    config: Annotated[
        str, typer.Option(metavar="JSON", help="other keys of speculative_config; sizes must match the targets'")
    ] = "{}",
    wait: Wait = 300.0,
    unauthenticated: Unauthenticated = False,
) -> None:
    """Start a pool of drafters, which runs until `down`."""
    with _pool(name, unauthenticated) as pool:
        from vllm_ssd.pool.spec import DrafterSpec

        keys = {**json_object("--config", config), "model": model}
        given = SSDConfig.from_user(keys)
        check_names(given.drafter_args or {}, known=None)
        amounts = json_object("--resources", resources)
        check_resources(amounts, given)
        if given.drafter_device is not None or given.drafters != "local":
            raise ValueError("ssd: Ray places the drafters of a pool; take drafters and drafter_device out of --config")
        pool.up(num, DrafterSpec(given.drafter_keys(), max_num_seqs, amounts, ""))
        _show(pool.wait(wait), as_json=False)


@pool_app.command("status")
def status_command(name: Name, as_json: Json = False, unauthenticated: Unauthenticated = False) -> None:
    """Show the drafters of a pool; the exit status is 1 if one is not ready."""
    with _pool(name, unauthenticated) as pool:
        _show(pool.report(), as_json)


@pool_app.command("add")
def add_command(
    name: Name,
    num: Annotated[int, typer.Argument(min=1, max=64, help="number of drafters")] = 1,
    wait: Wait = 300.0,
    unauthenticated: Unauthenticated = False,
) -> None:
    """Add drafters with the pool's settings; targets use them within seconds."""
    with _pool(name, unauthenticated) as pool:
        pool.add(num)
        _show(pool.wait(wait), as_json=False)


@pool_app.command("remove")
def remove_command(
    name: Name,
    drafters: Annotated[list[str] | None, typer.Argument(help="names of drafters, as in `status`")] = None,
    num: Annotated[int, typer.Option(min=0, max=64, help="remove this many of the least busy instead")] = 0,
    unauthenticated: Unauthenticated = False,
) -> None:
    """Remove drafters: they take no new requests, and end once theirs are done, after 30 s at the latest."""
    with _pool(name, unauthenticated) as pool:
        if bool(drafters) == bool(num):
            raise ValueError("name the drafters, or say how many with --num")
        say(f"leaving: {', '.join(pool.remove(drafters or [], num))}")


@pool_app.command("down")
def down_command(name: Name, unauthenticated: Unauthenticated = False) -> None:
    """End all drafters of a pool at once; its targets continue without drafts."""
    with _pool(name, unauthenticated) as pool:
        say(f"ended {pool.down()} drafters of {name}")


@contextlib.contextmanager
def _pool(name: str, unauthenticated: bool) -> Iterator[Pool]:
    """Join the cluster and yield the pool; errors are printed in one sentence, with exit status 1."""
    try:
        if not is_pool_name(name):
            raise ValueError(f"{name!r} is not a valid pool name: use letters, digits, dots, dashes and underscores")
        try:
            from vllm_ssd.pool import cluster
            from vllm_ssd.pool.pool import Pool
        except ImportError:
            raise ValueError("pools need Ray: pip install 'vllm-ssd[ray]'") from None
        cluster.join(unauthenticated)
        try:
            yield Pool(name)
        finally:
            cluster.quit()
    except typer.Exit:  # is a RuntimeError
        raise
    except (ValueError, RuntimeError) as error:
        say(str(error))
        raise typer.Exit(1) from None


def _show(report: PoolReport, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        table = Table(
            "drafter", "node", "address", "state", "targets", "requests", "starts", title=f"pool {report.pool}"
        )
        for one in report.drafters:
            counts = (one.targets, one.requests, one.starts) if one.node else ("", "", "")
            table.add_row(one.name, one.node, one.address, one.state, *map(str, counts))
        console.print(table)
        if report.problem:
            say(report.problem)
    if report.problem:
        raise typer.Exit(1)
