"""The workers' metrics on the server's own page."""

from __future__ import annotations

import logging
import os
import socket
import threading

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from vllm_ssd.config import METRICS_ENV
from vllm_ssd.link import metrics_socket
from vllm_ssd.link.metrics_socket import MetricsListener, WorkersCollector, address, ask, show_workers
from vllm_ssd.target.metrics import Metrics

LOGGER = logging.getLogger("test_metrics_socket")


@pytest.fixture
def name() -> str:
    return os.urandom(8).hex()


def page(name: str, replicas: int) -> list[str]:
    registry = CollectorRegistry()
    registry.register(WorkersCollector(name, range(replicas)))
    return generate_latest(registry).decode().splitlines()


def test_replicas_are_on_one_page(name):
    workers = [Metrics(3, LOGGER) for _ in range(2)]
    for replica, metrics in enumerate(workers):
        metrics.listen(name, replica)
        metrics.outcome(hit=True, block=True)
    workers[1].outcome(hit=True, block=True)
    workers[1].accepted([3, 3], [2, 0])
    lines = page(name, 3)
    assert 'vllm_ssd:hits_total{engine="0"} 1.0' in lines and 'vllm_ssd:hits_total{engine="1"} 2.0' in lines
    assert 'vllm_ssd:accepted_tokens_at_total{engine="1",position="1"} 1.0' in lines
    assert 'vllm_ssd:batch_draft_tokens_total{batch="2",engine="1"} 6.0' in lines
    assert lines.count("# TYPE vllm_ssd:hits_total counter") == 1
    workers[0].close()
    workers[0].close()
    lines = page(name, 2)
    assert not [line for line in lines if 'engine="0"' in line] and 'vllm_ssd:hits_total{engine="1"} 2.0' in lines
    workers[1].close()


def test_a_worker_that_does_not_answer_costs_a_bounded_time_and_keeps_its_numbers(name, monkeypatch):
    hangs, over = threading.Event(), threading.Event()
    answers = [b"# TYPE vllm_ssd:hits_total counter\nvllm_ssd:hits_total 5.0\n"]

    def render() -> bytes:
        if hangs.is_set():
            over.wait(60.0)
        return answers[0]

    listener = MetricsListener(name, 0, render)
    registry = CollectorRegistry()
    registry.register(WorkersCollector(name, [0]))
    assert "5.0" in generate_latest(registry).decode()
    hangs.set()
    assert 'vllm_ssd:hits_total{engine="0"} 5.0' in generate_latest(registry).decode(), "while the worker hangs"
    assert not over.is_set()
    over.set()
    listener.close()


def test_nobody_is_asked_twice_for_long(name):
    assert ask(name, 0) == "" and page(name, 1) == []


def test_another_user_gets_nothing(name, monkeypatch):
    listener = MetricsListener(name, 0, lambda: b"vllm_ssd:hits_total 5.0\n")
    monkeypatch.setattr(metrics_socket.os, "geteuid", lambda: os.getuid() + 1)
    assert ask(name, 0) == ""
    listener.close()


def test_a_name_that_is_taken_costs_the_page_and_nothing_else(name):
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(address(name, 0))
        metrics = Metrics(3, LOGGER)
        metrics.listen(name, 0)
        metrics.close()


def test_a_process_that_inherits_the_name_shows_the_same_workers(name, monkeypatch):
    monkeypatch.delenv(METRICS_ENV, raising=False)
    first, second = CollectorRegistry(), CollectorRegistry()
    found = show_workers([0], first)
    monkeypatch.setenv(METRICS_ENV, found)
    assert show_workers([0], second) == found != name
    metrics = Metrics(3, LOGGER)
    metrics.listen(found, 0)
    assert b"vllm_ssd:hits_total" in generate_latest(first) and generate_latest(second) == b""
    metrics.close()
