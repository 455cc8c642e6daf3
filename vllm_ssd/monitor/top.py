"""One frame of `vllm-ssd top`: a table of engines, from two snapshots of each page."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from vllm_ssd.monitor.scrape import GENERATED, Engine, Snapshot

COLUMNS = ("hit", "late", "accepted", "drafts", "tok/s", "block", "pages", "evictions", "restarts")
NOTHING = "–"


def frame(now: Sequence[Snapshot], before: Sequence[Snapshot | None]) -> Table:
    """Shares and rates since the snapshots `before`, or since the server's start without one.

    `evictions` and `restarts` are totals; `pages` and `block` are the drafters' latest reports.
    """
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    table.add_column("engine")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    table.add_column("K by batch size")
    for snapshot, earlier in zip(now, before):
        if snapshot.error:
            table.add_row(_name(snapshot, ""), *[NOTHING] * len(COLUMNS), snapshot.error.replace("[", r"\["))
            continue
        ours = {name: engine for name, engine in snapshot.engines.items() if "hits_total" in engine.values}
        if not ours:
            table.add_row(_name(snapshot, ""), *[NOTHING] * len(COLUMNS), "no SSD metrics")
        for name, engine in sorted(ours.items()):
            last = earlier.engines.get(name) if earlier is not None else None
            seconds = snapshot.at_s - earlier.at_s if earlier is not None and last is not None else None
            table.add_row(_name(snapshot, name), *_row(engine, engine.since(last), seconds))
    return table


def _name(snapshot: Snapshot, engine: str) -> str:
    host = snapshot.url.partition("://")[2].removesuffix("/metrics").removeprefix("127.0.0.1")
    return f"{host} {engine}".strip()


def _row(engine: Engine, new: Engine, seconds: float | None) -> list[str]:
    outcomes = sum(new.get(f"{name}_total") for name in ("hits", "misses", "late"))
    rounds = new.get("drafted_rounds_total")
    generated = new.values.get(GENERATED)
    connected = engine.get("drafter_connected") > 0
    pages, in_use = engine.values.get("drafter_pages"), engine.get("drafter_pages_in_use")
    return [
        f"{new.get('hits_total') / outcomes:.0%}" if outcomes else NOTHING,
        f"{new.get('late_total') / outcomes:.0%}" if outcomes else NOTHING,
        f"{new.get('accepted_tokens_total') / rounds:.2f}" if rounds else NOTHING,
        f"{new.get('draft_tokens_total') / rounds:.2f}" if rounds else NOTHING,
        f"{generated / seconds:.0f}" if generated is not None and seconds else NOTHING,
        f"{1e3 * engine.get('build_seconds'):.1f} ms" if "build_seconds" in engine.values else NOTHING,
        "no drafter" if not connected else f"{in_use:.0f}/{pages:.0f}" if pages else NOTHING,
        f"{engine.get('evictions_total'):.0f}",
        f"{engine.get('restarts_total'):.0f}",
        _drafts_by_batch(new),
    ]


def _drafts_by_batch(new: Engine) -> str:
    """Mean number of drafts per row by batch size, such as "1: 5.0, ≤4: 2.3"."""
    rows, drafts = new.by_batch.get("batch_rows_total", {}), new.by_batch.get("batch_draft_tokens_total", {})
    found = [
        f"{'≤' * (batch > 2)}{batch}: {drafts.get(batch, 0.0) / count:.1f}"
        for batch, count in sorted(rows.items())
        if count
    ]
    return ", ".join(found) or NOTHING
