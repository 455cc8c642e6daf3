"""A server's metrics of which every series has a sample."""

from __future__ import annotations

import logging

from vllm_ssd.link.protocol import DrafterStats
from vllm_ssd.target.metrics import Metrics


def filled_metrics() -> Metrics:
    """Metrics of a server that has decoded a round and heard of its drafter."""
    metrics = Metrics(3, logging.getLogger(__name__))
    metrics.accepted([1], [1])
    metrics.drafter(DrafterStats(10, 30, 4.0, 100, 2), generation=1)
    return metrics
