"""Read the metrics of a server's engines from its metrics page."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

PREFIX = "vllm_ssd:"
GENERATED = "vllm:generation_tokens_total"
MAX_BYTES = 32 << 20


@dataclass(slots=True)
class Engine:
    """Metrics of one data-parallel replica, by name without prefix.

    values: counters and gauges; by_batch: rows and drafts, by batch size rounded up to a power of two
    """

    values: dict[str, float] = field(default_factory=dict)
    by_batch: dict[str, dict[int, float]] = field(default_factory=dict)

    def since(self, before: Engine | None) -> Engine:
        """Counters since `before` and current gauges; all counts if a counter has fallen, as after a restart."""
        if before is None or any(
            value < before.values.get(name, 0.0) for name, value in self.values.items() if name.endswith("_total")
        ):
            return self
        values = {
            name: value - before.values.get(name, 0.0) if name.endswith("_total") else value
            for name, value in self.values.items()
        }
        by_batch = {
            name: {batch: value - before.by_batch.get(name, {}).get(batch, 0.0) for batch, value in found.items()}
            for name, found in self.by_batch.items()
        }
        return Engine(values, by_batch)

    def get(self, name: str) -> float:
        """A value, 0 if the page does not have it."""
        return self.values.get(name, 0.0)


@dataclass(slots=True)
class Snapshot:
    """A page at one time. engines: by label `engine`, "" on a metrics_port; error: why the page could not be read."""

    url: str
    at_s: float
    engines: dict[str, Engine] = field(default_factory=dict)
    error: str = ""


def url_of(source: str) -> str:
    """URL of the metrics page for a port on this machine, a host with port, or an address."""
    if source.isdigit():
        source = f"127.0.0.1:{source}"
    if "://" not in source:
        source = f"http://{source}"
    return source if source.rstrip("/").endswith("/metrics") else f"{source.rstrip('/')}/metrics"


def scrape(url: str, timeout_s: float = 5.0) -> Snapshot:
    """Read the page; never raises."""
    try:
        if not url.startswith(("http://", "https://")):
            raise ValueError("only http and https are read")
        with urlopen(url, timeout=timeout_s) as answer:
            text = answer.read(MAX_BYTES).decode()
        return Snapshot(url, time.monotonic(), parse(text))
    except (OSError, ValueError) as error:  # no answer, or not a metrics page
        return Snapshot(url, time.monotonic(), error=str(error) or type(error).__name__)


def parse(text: str) -> dict[str, Engine]:
    """Parse a page in Prometheus' text format into engines by name; raises ValueError for anything else."""
    engines: dict[str, Engine] = {}

    def add_drafter(values: dict[str, float], name: str, value: float) -> None:
        """Aggregate over a fleet's drafters: the maximum of durations, the sum of everything else."""
        before = values.get(name, 0.0)
        values[name] = max(before, value) if name.endswith("_seconds") else before + value

    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.startswith(PREFIX) and sample.name != GENERATED:
                continue
            engine = engines.setdefault(sample.labels.get("engine", ""), Engine())
            name = sample.name.removeprefix(PREFIX)
            if "batch" in sample.labels:
                engine.by_batch.setdefault(name, {})[int(sample.labels["batch"])] = sample.value
            elif "drafter" in sample.labels and "outcome" not in sample.labels:
                add_drafter(engine.values, name, sample.value)
            elif not sample.labels.keys() & {"position", "outcome"}:
                engine.values[name] = sample.value
    return engines
