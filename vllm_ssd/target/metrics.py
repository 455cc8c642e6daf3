"""Metrics of the target's side: a log line every ten seconds, and Prometheus."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from vllm_ssd.link.metrics_socket import MetricsListener
from vllm_ssd.link.protocol import DrafterStats

LOG_INTERVAL_S = 10.0

COUNTERS = {
    "hits": "Rounds of a request whose outcome had a speculation waiting.",
    "misses": "Rounds of a request whose outcome was not in its speculation block.",
    "late": "Rounds of a request whose speculation block had not arrived.",
    "stale_blocks": "Blocks that answered a committed length that had passed.",
    "waits": "Rounds that waited for just-in-time drafts.",
    "evictions": "Requests that the drafter dropped for lack of KV pages.",
    "restarts": "Drafter processes started after the first.",
    "draft_tokens": "Draft tokens verified by the target.",
    "accepted_tokens": "Draft tokens accepted by the target.",
    "drafted_rounds": "Rounds of a request that verified draft tokens.",
    "filler_tokens": "Padding in draft rows on the V2 runner, never accepted, which vLLM counts as draft tokens.",
    "too_long": "Requests that the drafter did not take for their length.",
    "drafter_steps": "Forwards of the draft model.",
    "drafter_prompt_tokens": "Tokens of the requests that were opened on the drafter.",
    "drafter_cached_tokens": "Those of them that the drafter did not read again, having their KV.",
}
DRAFTER_COUNTERS = {
    "evictions": "evictions",
    "drafter_steps": "steps",
    "drafter_prompt_tokens": "prompt_tokens",
    "drafter_cached_tokens": "cached_tokens",
}
"""Counters that drafters report, and their fields of `DrafterStats`."""
SECONDS = {
    "waited_seconds": "Time spent waiting for just-in-time drafts.",
    "handover_seconds": "Host time from an outcome to its drafts, in rounds that waited for none.",
}


class DrafterStatus(Protocol):
    """The part of a drafter's link that metrics show."""

    connected: bool
    max_model_len: int


class Report(NamedTuple):
    """A drafter's latest statistics, with the generation of its process and the time of arrival."""

    stats: DrafterStats
    generation: int
    at: float


DRAFTER_GAUGES: dict[str, tuple[str, Callable[[Report, float], float]]] = {
    "drafter_pages_in_use": (
        "KV pages in use on a drafter.",
        lambda report, _: report.stats.pages_total - report.stats.pages_free,
    ),
    "drafter_pages": ("KV pages of a drafter.", lambda report, _: report.stats.pages_total),
    "build_seconds": ("Time a drafter took for its last whole tree.", lambda report, _: report.stats.build_ms / 1e3),
    "drafter_stats_age_seconds": (
        "Time since a drafter reported its gauges, which it does every second while it has work.",
        lambda report, now: now - report.at,
    ),
}
"""Gauges of a connected drafter: help text, and value from its latest report and the current time."""


class Metrics:
    """Counters that are plain integers on the hot path and are rendered only on request.

    Drafters' counters are accumulated over all their processes, so no counter falls when a drafter is replaced.
    """

    def __init__(self, num_speculative_tokens: int, logger: logging.Logger) -> None:
        self.counts = dict.fromkeys(COUNTERS, 0)
        self.seconds = dict.fromkeys(SECONDS, 0.0)
        self.handovers = 0
        self.accepted_at = [0] * num_speculative_tokens
        self.rows_at_batch: dict[int, int] = {}  # rows verified, by batch size rounded up to a power of two
        self.drafts_at_batch: dict[int, int] = {}
        self.drafter_outcomes: Counter[tuple[int, str]] = Counter()  # by drafter index and "hits", "misses" or "late"
        self._reports: dict[int, Report] = {}  # by the drafter's index
        self._report_lock = threading.Lock()  # while the target is idle, each drafter's supervisor thread reports
        self._drafters: list[weakref.ref[DrafterStatus]] | None = None
        self._logger = logger
        self._logged_at = time.monotonic()
        self._logged = dict(self.counts)
        self._server: tuple[WSGIServer, threading.Thread] | None = None
        self._listener: MetricsListener | None = None

    def watch(self, *drafters: DrafterStatus) -> None:
        """Show gauges only of drafters that are connected; without this call, of all that have reported."""
        self._drafters = [weakref.ref(drafter) for drafter in drafters]

    @property
    def num_drafters(self) -> int:
        """Number of connected drafters; without `watch`, of drafters that have reported."""
        indices = self._reports if self._drafters is None else range(len(self._drafters))
        return sum(map(self._is_connected, indices))

    def drafter_stats(self, index: int = 0) -> DrafterStats | None:
        """A drafter's latest statistics; None before the first."""
        report = self._reports.get(index)
        return None if report is None else report.stats

    def _is_connected(self, index: int) -> bool:
        if self._drafters is None:
            return True
        drafter = self._drafters[index]()
        return drafter is not None and drafter.connected

    def _shown(self) -> list[tuple[int, Report]]:
        """Latest reports of connected drafters, by index."""
        return [(index, report) for index, report in sorted(self._reports.copy().items()) if self._is_connected(index)]

    def outcome(self, *, hit: bool, block: bool, index: int = 0) -> None:
        """Count one outcome: a hit, a miss (in no branch of its block), or late (no block had arrived)."""
        found = "hits" if hit else "misses" if block else "late"
        self.counts[found] += 1
        self.drafter_outcomes[index, found] += 1

    def accepted(self, offered: Sequence[int], accepted: Sequence[int], num_filler: int = 0) -> None:
        """Count the drafts verified and accepted per row of one round, and the filler in all its rows."""
        num_drafts = sum(offered)
        self.counts["filler_tokens"] += num_filler
        self.counts["draft_tokens"] += num_drafts
        if offered:
            batch = 1 << (len(offered) - 1).bit_length()
            self.rows_at_batch[batch] = self.rows_at_batch.get(batch, 0) + len(offered)
            self.drafts_at_batch[batch] = self.drafts_at_batch.get(batch, 0) + num_drafts
        self.counts["accepted_tokens"] += sum(accepted)
        self.counts["drafted_rounds"] += len(offered) - offered.count(0)
        for k in accepted:
            for position in range(k):
                self.accepted_at[position] += 1

    def stale_block(self) -> None:
        """Count a block that arrived too late for its round."""
        self.counts["stale_blocks"] += 1

    def too_long(self, request_id: str) -> None:
        """Count a request that is too long for the drafter, once per request; logs a warning only the first time."""
        self.counts["too_long"] += 1
        if self.counts["too_long"] > 1:
            return
        drafter = self._drafters[0]() if self._drafters else None
        self._logger.warning(
            "SSD: request %s has no room on the drafter and runs without its drafts: max_model_len=%s in "
            "speculative_config, of which 2 * num_speculative_tokens + 2 = %d are kept for drafts; more such requests "
            "are only counted, as too_long",
            request_id,
            drafter.max_model_len if drafter is not None else "(none given)",
            2 * len(self.accepted_at) + 2,
        )

    def waited(self, seconds: float) -> None:
        """Count one wait for just-in-time drafts."""
        self.counts["waits"] += 1
        self.seconds["waited_seconds"] += seconds

    def handed_over(self, seconds: float) -> None:
        """Count the host time of one round without a wait."""
        self.handovers += 1
        self.seconds["handover_seconds"] += seconds

    def drafter(self, stats: DrafterStats, generation: int, index: int = 0) -> None:
        """Record the statistics of a drafter's process number `generation`; counters run from that process's start."""
        with self._report_lock:
            report = self._reports.get(index)
            last = report.stats if report is not None and generation == report.generation else None
            for name, field in DRAFTER_COUNTERS.items():
                self.counts[name] += max(getattr(stats, field) - (getattr(last, field) if last else 0), 0)
            self.counts["restarts"] += max(generation - (report.generation if report else 1), 0)
            self._reports[index] = Report(stats, generation, time.monotonic())

    def log(self) -> None:
        """Log one line about the last ten seconds, if there was any activity; call at any time."""
        now = time.monotonic()
        if now - self._logged_at < LOG_INTERVAL_S:
            return
        new = {name: value - self._logged[name] for name, value in self.counts.items()}
        self._logged_at, self._logged = now, dict(self.counts)
        outcomes = new["hits"] + new["misses"] + new["late"]
        rounds = new["drafted_rounds"]
        if not outcomes and not rounds:
            return
        told = []
        if outcomes:
            told.append(f"hit rate {100 * new['hits'] / outcomes:.1f}%, late {100 * new['late'] / outcomes:.1f}%")
        if rounds:
            accepted, offered = new["accepted_tokens"] / rounds, new["draft_tokens"] / rounds
            told.append(f"accepted {accepted:.2f} of {offered:.2f} drafts a round with drafts")
        told.append(f"{new['waits']} waits")
        num_connected = self.num_drafters
        if not num_connected:
            told.append("no drafter is connected")
        elif self._drafters and num_connected < len(self._drafters):
            told.append(f"{num_connected} of {len(self._drafters)} drafters are connected")
        if shown := [report.stats for _, report in self._shown()]:
            free, total = (sum(getattr(stats, name) for stats in shown) for name in ("pages_free", "pages_total"))
            told.append(f"block built in {max(stats.build_ms for stats in shown):.1f} ms")
            told.append(f"drafter pages {total - free}/{total} in use")
        told.append(f"{self.counts['evictions']} evictions, {self.counts['restarts']} restarts")
        self._logger.info("SSD: %s", ", ".join(told))

    def serve(self, port: int) -> None:
        """Serve Prometheus on 127.0.0.1:`port` until `close`; raises OSError if the port is taken."""
        try:
            self._server = start_http_server(port, addr="127.0.0.1", registry=self._registry())
        except OSError as error:
            raise OSError(f"ssd: metrics_port {port} cannot be served: {error.strerror}") from None

    def listen(self, name: str, replica: int) -> None:
        """Serve the server's own metrics page (`link.metrics_socket`) until `close`; does nothing if that fails."""
        registry = self._registry()
        try:
            self._listener = MetricsListener(name, replica, lambda: generate_latest(registry))
        except OSError as error:
            self._logger.debug("SSD: metrics are not on the server's page: %s", error)

    def _registry(self) -> CollectorRegistry:
        registry = CollectorRegistry()
        registry.register(self)
        return registry

    def close(self) -> None:
        """Free the port and the socket; idempotent."""
        if self._listener is not None:
            self._listener.close()
        served, self._server = self._server, None
        if served is not None:
            server, thread = served
            server.shutdown()
            server.server_close()
            thread.join()

    def collect(self) -> Iterator[Metric]:
        """All metrics, for `prometheus_client`."""
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"vllm_ssd:{name}", text, value=self.counts[name])
        for name, text in SECONDS.items():
            yield CounterMetricFamily(f"vllm_ssd:{name}", text, value=self.seconds[name])
        yield CounterMetricFamily("vllm_ssd:handovers", "Rounds handed over without a wait.", value=self.handovers)
        accepted = CounterMetricFamily(
            "vllm_ssd:accepted_tokens_at", "Drafts accepted, by position.", labels=["position"]
        )
        for position, value in enumerate(self.accepted_at):
            accepted.add_metric([str(position)], value)
        yield accepted
        rows = CounterMetricFamily(
            "vllm_ssd:batch_rows", "Rows verified, by batch size up to a power of two.", labels=["batch"]
        )
        drafts = CounterMetricFamily(
            "vllm_ssd:batch_draft_tokens", "Drafts verified, by batch size up to a power of two.", labels=["batch"]
        )
        for batch in sorted(self.rows_at_batch.copy()):
            rows.add_metric([str(batch)], self.rows_at_batch[batch])
            drafts.add_metric([str(batch)], self.drafts_at_batch.get(batch, 0))
        yield rows
        yield drafts
        yield from self._collect_drafters()

    def _collect_drafters(self) -> Iterator[Metric]:
        outcomes = CounterMetricFamily(
            "vllm_ssd:drafter_outcomes",
            "Rounds of a request by its drafter, and whether the outcome was a hit, a miss or came late.",
            labels=["drafter", "outcome"],
        )
        indices = sorted(self._reports.copy()) if self._drafters is None else range(len(self._drafters))
        for index in indices:
            for found, outcome in (("hits", "hit"), ("misses", "miss"), ("late", "late")):
                outcomes.add_metric([str(index), outcome], self.drafter_outcomes[index, found])
        yield outcomes
        connected = GaugeMetricFamily("vllm_ssd:drafter_connected", "Whether a drafter is there.", labels=["drafter"])
        for index in indices:
            connected.add_metric([str(index)], self._is_connected(index))
        yield connected
        shown, now = self._shown(), time.monotonic()
        for name, (text, value) in DRAFTER_GAUGES.items():
            gauge = GaugeMetricFamily(f"vllm_ssd:{name}", text, labels=["drafter"])
            for index, report in shown:
                gauge.add_metric([str(index)], value(report, now))
            yield gauge
