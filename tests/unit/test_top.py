"""`vllm-ssd top` shows what the pages say."""

from __future__ import annotations

import io
import logging
import socket

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console
from typer.testing import CliRunner

from vllm_ssd.cli import app
from vllm_ssd.link.protocol import DrafterStats
from vllm_ssd.monitor import Snapshot, frame, scrape, url_of
from vllm_ssd.monitor.scrape import parse
from vllm_ssd.target.metrics import Metrics


def make() -> Metrics:
    metrics = Metrics(3, logging.getLogger("test_top"))
    for hit, block in ((True, True), (True, True), (False, True), (False, False)):
        metrics.outcome(hit=hit, block=block)
    metrics.accepted([3], [2])
    metrics.accepted([2, 2, 0], [1, 0, 0])
    metrics.drafter(DrafterStats(10, 30, 4.0, 100, 2), generation=2)
    return metrics


def text(metrics: Metrics) -> str:
    registry = CollectorRegistry()
    registry.register(metrics)
    return generate_latest(registry).decode()


def shown(now: list[Snapshot], before: list[Snapshot | None]) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))
    console.print(frame(now, before))
    return console.export_text()


def serve(metrics: Metrics) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    metrics.serve(port)
    return port


def test_sources():
    assert url_of("8000") == "http://127.0.0.1:8000/metrics"
    assert url_of("gpu1:9100") == "http://gpu1:9100/metrics"
    assert url_of("https://host/metrics") == "https://host/metrics"
    assert scrape("file:///etc/passwd").error == "only http and https are read"


def test_one_frame_of_several_ports():
    ports = [serve(make()), serve(make())]
    done = CliRunner().invoke(app, ["top", *map(str, ports), "--once"], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines() if line.strip().startswith(":")]
    assert [row[0] for row in rows] == [f":{port}" for port in ports]
    for row in rows:
        assert row[1:5] == ["50%", "25%", "1.00", "2.33"]  # 3 of 7 drafts in three rounds that had any
        assert row[5:] == ["–", "4.0", "ms", "20/30", "2", "1", "1:", "3.0,", "≤4:", "1.3"]


def test_a_fleet_has_the_pages_of_all_drafters_and_the_time_of_the_slowest():
    metrics = make()
    metrics.drafter(DrafterStats(5, 10, 7.0, 100, 0), 1, index=1)
    found = shown([Snapshot("http://127.0.0.1:1/metrics", 1.0, parse(text(metrics)))], [None])
    assert "25/40" in found and "7.0 ms" in found


def test_nobody_there_is_an_error():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = CliRunner().invoke(app, ["top", str(port), "--once"], env={"COLUMNS": "160"})
    assert done.exit_code == 1 and "Connection refused" in done.output


def test_rates_are_those_since_the_last_look():
    metrics = make()
    page = 'vllm:generation_tokens_total{engine="0"} %d\n'
    before = Snapshot("http://127.0.0.1:1/metrics", 100.0, parse(text(metrics) + page % 1000))
    for _ in range(8):
        metrics.outcome(hit=True, block=True)
    metrics.accepted([1, 1], [1, 1])
    engines = parse(text(metrics) + page % 1500)
    # the server's page labels engines, a port of ours has one without a name
    for snapshot in (before.engines, engines):
        snapshot["0"].values |= snapshot.pop("").values
    now = Snapshot(before.url, 102.0, engines)
    found = shown([now], [before])
    (row,) = [line.split() for line in found.splitlines() if line.strip().startswith(":1")]
    assert row[:7] == [":1", "0", "100%", "0%", "1.00", "1.00", "250"]


def test_a_server_that_started_again_is_shown_since_its_start():
    old, new = make(), Metrics(3, logging.getLogger("test_top"))
    new.outcome(hit=True, block=True)
    url = "http://127.0.0.1:1/metrics"
    found = shown([Snapshot(url, 2.0, parse(text(new)))], [Snapshot(url, 1.0, parse(text(old)))])
    assert "100%" in found and "-" not in found.replace("-" * 3, "")


@pytest.mark.parametrize("page", ["<html>", "vllm:generation_tokens_total 5\n"])
def test_pages_of_others(page: str):
    try:
        engines, error = parse(page), ""
    except ValueError as failure:
        engines, error = {}, str(failure)
    found = shown([Snapshot("http://127.0.0.1:1/metrics", 1.0, engines, error)], [None])
    assert ("no SSD metrics" in found) == (not error)


def server_page(hits: int, misses: int, tokens: int) -> str:
    metrics = Metrics(3, logging.getLogger("test_top"))
    for hit in [True] * hits + [False] * misses:
        metrics.outcome(hit=hit, block=True)
    metrics.drafter(DrafterStats(10, 30, 4.0, 100, 0), generation=1)
    return text(metrics) + f"vllm:generation_tokens_total {tokens}\n"


def looks(monkeypatch: pytest.MonkeyPatch, *options: str, **pages: list[str | None]) -> list[list[str]]:
    """The rows that `vllm-ssd top` draws at each of its looks. pages: of a port at each look, None: nobody answers."""
    screen, drawn, slept = io.StringIO(), [], []
    monkeypatch.setattr(
        "vllm_ssd.cli.top.console", Console(file=screen, width=160, force_terminal=True, color_system=None)
    )

    def look(url: str) -> Snapshot:
        page, at_s = pages[f"port{url.split(':')[2].split('/')[0]}"][len(slept)], 100.0 + sum(slept)
        return Snapshot(url, at_s, error="gone") if page is None else Snapshot(url, at_s, parse(page))

    def sleep(seconds: float) -> None:
        drawn.append([line.strip() for line in screen.getvalue().splitlines() if line.strip().startswith(":")])
        screen.truncate(screen.seek(0))
        slept.append(seconds)
        if len(slept) == max(map(len, pages.values())):
            raise KeyboardInterrupt

    monkeypatch.setattr("vllm_ssd.cli.top.scrape", look)
    monkeypatch.setattr("vllm_ssd.cli.top.time.sleep", sleep)
    done = CliRunner().invoke(app, ["top", *(name.removeprefix("port") for name in pages), *options])
    assert done.exit_code == 0, done.output
    return drawn


def test_each_look_shows_what_is_new_since_the_last(monkeypatch):
    first, second, third = looks(
        monkeypatch,
        "--interval=4",
        port8000=[server_page(1, 3, 1000), server_page(7, 5, 1600), server_page(7, 15, 1640)],
        port8001=[server_page(1, 0, 0)] * 3,
    )
    assert [row.split()[0] for row in first] == [":8000", ":8001"]
    assert [look[0].split()[1] for look in (first, second, third)] == ["25%", "75%", "0%"]
    assert [look[0].split()[5] for look in (first, second, third)] == ["–", "150", "10"]
    assert second[1].split()[1:6] == ["–", "–", "–", "–", "0"]  # nothing new


def test_a_server_that_vanishes_and_comes_back_is_shown_since_it_was_last_seen(monkeypatch):
    _, gone, back = looks(monkeypatch, port8000=[server_page(1, 3, 1000), None, server_page(4, 4, 1800)])
    assert gone[0].split() == [":8000", *"–––––––––", "gone"]
    assert back[0].split()[1] == "75%" and back[0].split()[5] == "200"  # 4 s since it answered


def test_a_server_that_was_not_there_is_shown_since_its_start(monkeypatch):
    none, first, second = looks(monkeypatch, port8000=[None, server_page(1, 3, 1000), server_page(2, 3, 1100)])
    assert none[0].endswith("gone")
    assert first[0].split()[1] == "25%" and first[0].split()[5] == "–"
    assert second[0].split()[1] == "100%" and second[0].split()[5] == "50"


def test_counters_that_start_again_are_shown_since_their_start(monkeypatch):
    _, again, after = looks(
        monkeypatch, port8000=[server_page(9, 1, 1000), server_page(1, 1, 80), server_page(1, 2, 180)]
    )
    assert again[0].split()[1] == "50%" and again[0].split()[5] == "40"
    assert after[0].split()[1] == "0%" and after[0].split()[5] == "50"
