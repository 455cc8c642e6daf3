"""What a server's metrics page says of each of its engines."""

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
    """One data-parallel replica's numbers, by metric without prefix.

    values: counters and gauges; by_batch: rows and drafts of rounds, by batch size up to a power of two
    """

    values: dict[str, float] = field(default_factory=dict)
    by_batch: dict[str, dict[int, float]] = field(default_factory=dict)

    def since(self, before: Engine | None) -> Engine:
        """What has been counted since `before`; gauges as they are now. Everything where a counter has fallen."""
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
        """A value, 0 where the page has none."""
        return self.values.get(name, 0.0)


@dataclass(slots=True)
class Snapshot:
    """A page at one moment. engines: by the label `engine`, "" on a port of ours; error: why there is no page."""

    url: str
    at_s: float
    engines: dict[str, Engine] = field(default_factory=dict)
    error: str = ""


def url_of(source: str) -> str:
    """The page that a port on this machine, a host with port, or an address names."""
    if source.isdigit():
        source = f"127.0.0.1:{source}"
    if "://" not in source:
        source = f"http://{source}"
    return source if source.rstrip("/").endswith("/metrics") else f"{source.rstrip('/')}/metrics"


def scrape(url: str, timeout_s: float = 5.0) -> Snapshot:
    """The page as it is now; never raises."""
    try:
        if not url.startswith(("http://", "https://")):
            raise ValueError("only http and https are read")
        with urlopen(url, timeout=timeout_s) as answer:
            text = answer.read(MAX_BYTES).decode()
        return Snapshot(url, time.monotonic(), parse(text))
    except (OSError, ValueError) as error:  # no answer, or what is no metrics page
        return Snapshot(url, time.monotonic(), error=str(error) or type(error).__name__)


def parse(text: str) -> dict[str, Engine]:
    """Engines by name of a page in Prometheus' text format; raises ValueError for anything else."""
    engines: dict[str, Engine] = {}

    def add_drafter(values: dict[str, float], name: str, value: float) -> None:
        """A fleet has the pages of all its drafters, and is as slow and as silent as the worst of them."""
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
