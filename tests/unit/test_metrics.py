"""What an operator sees."""

from __future__ import annotations

import logging
import socket
import urllib.request

import pytest

from vllm_ssd.link.protocol import DrafterStats
from vllm_ssd.target.metrics import Metrics


def make() -> Metrics:
    metrics = Metrics(3, logging.getLogger("test_metrics"))
    for hit, block in ((True, True), (True, True), (False, True), (False, False)):
        metrics.outcome(hit=hit, block=block)
    metrics.accepted([3, 3, 0], [2, 0, 0])
    metrics.drafter(DrafterStats(10, 30, 4.0, 100, 2), generation=2)
    return metrics


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"metrics_port {port} cannot be served: Address already in use"):
            make().serve(port)


def test_prometheus_answers_on_loopback_only():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    make().serve(port)
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    for line in (
        "vllm_ssd:hits_total 2.0",
        "vllm_ssd:misses_total 1.0",
        "vllm_ssd:late_total 1.0",
        "vllm_ssd:accepted_tokens_total 2.0",
        'vllm_ssd:accepted_tokens_at_total{position="1"} 1.0',
        'vllm_ssd:drafter_pages_in_use{drafter="0"} 20.0',
        "vllm_ssd:restarts_total 1.0",
    ):
        assert line in text.splitlines()


class FakeLink:
    connected, max_model_len = True, 100


def shown(metrics: Metrics) -> dict[str, float]:
    return {sample.name: sample.value for family in metrics.collect() for sample in family.samples}


def test_counters_add_up_over_drafters():
    metrics = Metrics(3, logging.getLogger("test_metrics"))
    counters = []
    for generation, steps, evictions in [(1, 50, 2), (1, 100, 2), (2, 5, 0), (2, 30, 1), (2, 30, 1), (4, 7, 3)]:
        metrics.drafter(DrafterStats(10, 30, 4.0, steps, evictions), generation)
        seen = shown(metrics)
        counters.append([seen[f"vllm_ssd:{name}_total"] for name in ("drafter_steps", "evictions", "restarts")])
    assert counters == [[50, 2, 0], [100, 2, 0], [105, 2, 1], [130, 3, 1], [130, 3, 1], [137, 6, 3]]


def test_a_drafter_s_counters_that_fall_do_not_lower_ours():
    metrics = Metrics(3, logging.getLogger("test_metrics"))
    for steps in (50, 10, 20):
        metrics.drafter(DrafterStats(10, 30, 4.0, steps, 0), 1)
    assert shown(metrics)["vllm_ssd:drafter_steps_total"] == 60


def test_gauges_have_an_age_and_go_with_the_drafter(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("vllm_ssd.target.metrics.time.monotonic", lambda: now[0])
    metrics, link = make(), FakeLink()
    metrics.watch(link)
    now[0] += 7
    seen = shown(metrics)
    assert seen["vllm_ssd:drafter_stats_age_seconds"] == 7 and seen["vllm_ssd:drafter_pages_in_use"] == 20
    assert seen["vllm_ssd:drafter_connected"] == 1
    link.connected = False
    seen = shown(metrics)
    assert seen["vllm_ssd:drafter_connected"] == 0 and seen["vllm_ssd:drafter_steps_total"] == 100
    assert not {
        "vllm_ssd:drafter_stats_age_seconds",
        "vllm_ssd:drafter_pages_in_use",
        "vllm_ssd:drafter_pages",
        "vllm_ssd:build_seconds",
    } & set(seen)


def test_each_drafter_of_a_fleet_has_its_own_gauges_and_outcomes(caplog, monkeypatch):
    monkeypatch.setattr("vllm_ssd.target.metrics.LOG_INTERVAL_S", 0.0)
    metrics, links = Metrics(3, logging.getLogger("test_metrics")), [FakeLink(), FakeLink()]
    metrics.watch(*links)
    for index, hit in [(0, True), (1, True), (1, False), (1, False)]:
        metrics.outcome(hit=hit, block=True, index=index)
        metrics.drafter(DrafterStats(10, 30, 4.0 + index, 100 * (index + 1), 2), 1 + index, index)

    def by_labels() -> dict[tuple[str, ...], float]:
        return {
            (sample.name.removeprefix("vllm_ssd:"), *sample.labels.values()): sample.value
            for family in metrics.collect()
            for sample in family.samples
        }

    seen = by_labels()
    assert seen["hits_total",] == 2 and seen["drafter_outcomes_total", "0", "hit"] == 1
    assert seen["drafter_outcomes_total", "1", "miss"] == 2 and seen["drafter_outcomes_total", "0", "late"] == 0
    assert seen["drafter_steps_total",] == 300 and seen["restarts_total",] == 1
    assert seen["build_seconds", "0"] == 4e-3 and seen["build_seconds", "1"] == 5e-3
    with caplog.at_level(logging.INFO, "test_metrics"):
        metrics.log()
        links[0].connected = False
        metrics.outcome(hit=True, block=True)
        metrics.log()
    lines = [record.getMessage() for record in caplog.records]
    assert "drafter pages 40/60 in use" in lines[0] and "connected" not in lines[0]
    assert "1 of 2 drafters are connected" in lines[1] and "drafter pages 20/30 in use" in lines[1]
    seen = by_labels()
    assert (seen["drafter_connected", "0"], seen["drafter_connected", "1"]) == (0, 1)
    assert ("build_seconds", "0") not in seen and seen["drafter_outcomes_total", "0", "hit"] == 2


def test_a_line_without_a_drafter_says_so(caplog, monkeypatch):
    monkeypatch.setattr("vllm_ssd.target.metrics.LOG_INTERVAL_S", 0.0)
    metrics, link = make(), FakeLink()
    metrics.watch(link)
    metrics.log()
    link.connected = False
    metrics.accepted([4, 0, 0], [3, 0, 0])  # drafted by n-gram
    with caplog.at_level(logging.INFO, "test_metrics"):
        metrics.log()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "accepted 3.00 of 4.00 drafts a round" in line and "no drafter is connected" in line
    assert "hit rate" not in line and "pages" not in line


def test_requests_beyond_the_drafter_s_length_are_counted_and_warned_of_once(caplog):
    metrics, link = make(), FakeLink()
    metrics.watch(link)
    for request_id in ("a", "b", "c"):
        metrics.too_long(request_id)
    assert shown(metrics)["vllm_ssd:too_long_total"] == 3 and metrics.counts["evictions"] == 2
    (warning,) = caplog.records
    assert warning.levelname == "WARNING" and "max_model_len=100" in warning.getMessage()


def test_the_port_is_free_again_when_metrics_are_closed():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for _ in range(2):
        metrics = make()
        metrics.serve(port)
        metrics.close()
        metrics.close()
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", port)) != 0


def test_a_line_every_ten_seconds(caplog, monkeypatch):
    metrics = make()
    with caplog.at_level(logging.INFO, "test_metrics"):
        metrics.log()
        assert not caplog.records
        monkeypatch.setattr("vllm_ssd.target.metrics.LOG_INTERVAL_S", 0.0)
        metrics.log()
        metrics.log()
    (record,) = caplog.records
    assert "hit rate 50.0%, late 25.0%, accepted 1.00 of 3.00 drafts a round" in record.getMessage()
