"""Monitor servers: `vllm-ssd top` reads their metrics, `vllm-ssd trace` draws their timelines. Does not import vLLM."""

from vllm_ssd.monitor.scrape import Engine, Snapshot, scrape, url_of
from vllm_ssd.monitor.top import frame

__all__ = ["Engine", "Snapshot", "frame", "scrape", "url_of"]
