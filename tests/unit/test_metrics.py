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
        "vllm_ssd:drafter_pages_in_use 20.0",
        "vllm_ssd:restarts_total 1.0",
    ):
        assert line in text.splitlines()


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
