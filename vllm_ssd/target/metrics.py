"""Counters of the target's side: a log line every ten seconds, and Prometheus on a loopback port."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from vllm_ssd.link.protocol import DrafterStats

LOG_INTERVAL_S = 10.0

COUNTERS = {
    "hits": "Rounds of a request whose outcome had a speculation waiting.",
    "misses": "Rounds of a request whose outcome was not in its speculation block.",
    "late": "Rounds of a request whose speculation block had not arrived.",
    "stale_blocks": "Blocks that answered a committed length that had passed.",
    "waits": "Rounds that waited for just-in-time drafts.",
    "evictions": "Requests that the drafter dropped for lack of KV pages.",
    "too_long": "Requests that outgrew the drafter's context.",
    "restarts": "Drafter processes started after the first.",
    "draft_tokens": "Draft tokens verified by the target.",
    "accepted_tokens": "Draft tokens accepted by the target.",
}
SECONDS = {
    "waited_seconds": "Time spent waiting for just-in-time drafts.",
    "handover_seconds": "Host time from an outcome to its drafts, in rounds that waited for none.",
}


class Metrics:
    """Plain integers on the hot path, rendered only when somebody looks."""

    def __init__(self, num_speculative_tokens: int, logger: logging.Logger) -> None:
        self.counts = dict.fromkeys(COUNTERS, 0)
        self.seconds = dict.fromkeys(SECONDS, 0.0)
        self.handovers = 0
        self.accepted_at = [0] * num_speculative_tokens
        self.drafter_stats: DrafterStats | None = None
        self._logger = logger
        self._logged_at = time.monotonic()
        self._logged = dict(self.counts)

    def outcome(self, *, hit: bool, block: bool) -> None:
        """One request's outcome: found in its block, not in it, or no block there yet."""
        self.counts["hits" if hit else "misses" if block else "late"] += 1

    def accepted(self, offered: Sequence[int], accepted: Sequence[int]) -> None:
        """Drafts verified and accepted, per row of one round."""
        self.counts["draft_tokens"] += sum(offered)
        self.counts["accepted_tokens"] += sum(accepted)
        for k in accepted:
            for position in range(k):
                self.accepted_at[position] += 1

    def stale_block(self) -> None:
        """A block came too late for the round it answered."""
        self.counts["stale_blocks"] += 1

    def too_long(self, request_id: str) -> None:
        """A request outgrew the drafter's context and goes on without its drafts."""
        self.counts["too_long"] += 1
        self._logger.info("SSD: request %s is longer than the drafter allows; it goes on without drafts", request_id)

    def waited(self, seconds: float) -> None:
        """One bounded wait for just-in-time drafts."""
        self.counts["waits"] += 1
        self.seconds["waited_seconds"] += seconds

    def handed_over(self, seconds: float) -> None:
        """Host time of one round without a wait; logs when ten seconds have passed."""
        self.handovers += 1
        self.seconds["handover_seconds"] += seconds

    def drafter(self, stats: DrafterStats, generation: int) -> None:
        """The drafter's own counters, and how often it was started."""
        self.drafter_stats = stats
        self.counts["evictions"] = stats.evictions
        self.counts["restarts"] = generation - 1

    def log(self) -> None:
        """One line about the last ten seconds, if there was anything to tell."""
        now = time.monotonic()
        if now - self._logged_at < LOG_INTERVAL_S:
            return
        new = {name: value - self._logged[name] for name, value in self.counts.items()}
        self._logged_at, self._logged = now, dict(self.counts)
        outcomes = new["hits"] + new["misses"] + new["late"]
        if not outcomes:
            return
        stats = self.drafter_stats
        self._logger.info(
            "SSD: hit rate %.1f%%, late %.1f%%, accepted %.2f of %.2f drafts a round, %d waits, "
            "block built in %.1f ms, drafter pages %s in use, %d evictions, %d restarts",
            100 * new["hits"] / outcomes,
            100 * new["late"] / outcomes,
            new["accepted_tokens"] / outcomes,
            new["draft_tokens"] / outcomes,
            new["waits"],
            stats.build_ms if stats else 0.0,
            f"{stats.pages_total - stats.pages_free}/{stats.pages_total}" if stats else "-",
            self.counts["evictions"],
            self.counts["restarts"],
        )

    def serve(self, port: int) -> None:
        """Answer Prometheus on 127.0.0.1:`port`; raises OSError when the port is taken."""
        registry = CollectorRegistry()
        registry.register(self)
        try:
            start_http_server(port, addr="127.0.0.1", registry=registry)
        except OSError as error:
            raise OSError(f"ssd: metrics_port {port} cannot be served: {error.strerror}") from None

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
        if (stats := self.drafter_stats) is not None:
            yield GaugeMetricFamily(
                "vllm_ssd:drafter_pages_in_use",
                "KV pages in use on the drafter.",
                value=stats.pages_total - stats.pages_free,
            )
            yield GaugeMetricFamily("vllm_ssd:drafter_pages", "KV pages of the drafter.", value=stats.pages_total)
            yield GaugeMetricFamily(
                "vllm_ssd:build_seconds", "Time the drafter took for its last whole tree.", value=stats.build_ms / 1e3
            )
            yield CounterMetricFamily("vllm_ssd:drafter_steps", "Forwards of the draft model.", value=stats.steps)
