"""Start the drafters of one vLLM worker, on either model runner."""

from __future__ import annotations

import functools
import os
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_ssd.compat.target import worker
from vllm_ssd.compat.vocabulary import read_vocabulary
from vllm_ssd.config import METRICS_ENV, SERVER_PID_ENV, SSDConfig
from vllm_ssd.link.credential import tls_context
from vllm_ssd.link.fleet import Fleet
from vllm_ssd.link.placed import PlacedFleet
from vllm_ssd.link.placement import bound_cpus, place_drafter, target_limits
from vllm_ssd.link.process import DrafterProcess
from vllm_ssd.link.protocol import PROTOCOL_VERSION, Hello, fingerprint
from vllm_ssd.link.remote import RemoteDrafter
from vllm_ssd.link.roster import Wanted, default_resources
from vllm_ssd.link.seat import Seat
from vllm_ssd.link.timeline import TRACE_ENV, Timeline
from vllm_ssd.target.metrics import Metrics

logger = init_logger("vllm.vllm_ssd")

GIB = 1 << 30
Link = TypeVar("Link", bound=RemoteDrafter)


def user_config(vllm_config: VllmConfig) -> SSDConfig:
    """The user's configuration, as passed on to this worker."""
    ours = vllm_config.additional_config
    assert isinstance(ours, dict)  # see `has_ssd`
    return SSDConfig.from_json(ours["ssd"])


def start_drafters(config: SSDConfig, vllm_config: VllmConfig) -> tuple[Metrics, Fleet]:
    """Start this worker's drafters, which load in parallel with the target, and their metrics.

    A drafter on this worker's own GPU is loaded before the target, so that each measures only its own memory. The
    metrics port is released when a drafter is closed or the server has ended.
    """
    if config.drafters != "local":
        return _connect_drafters(config, vllm_config)
    gpus = worker.visible_gpus()
    placements = [place_drafter(config, vllm_config, gpus, index) for index in range(config.num_drafters)]
    metrics = _metrics(config, vllm_config)
    trace = os.environ.get(TRACE_ENV)
    starts: list[Callable[..., DrafterProcess]] = [DrafterProcess] * config.num_drafters
    if trace:
        from vllm_ssd.target.trace import TracedDrafterProcess

        traced = functools.partial(TracedDrafterProcess, timeline=Timeline(trace, "target"))
        starts = [functools.partial(traced, index=index) for index in range(config.num_drafters)]
    hello = _hello(config, vllm_config)
    if gpus is None:
        warn_of_crowded_cores({core for placement in placements for core in placement.options.cpus})
    drafters, hooks = [], []
    for index, (start, (options, environment, beside_target)) in enumerate(zip(starts, placements)):
        free_before = torch.accelerator.get_memory_info()[0] if beside_target else 0
        drafter = start(
            options,
            hello,
            environment=environment,
            startup_timeout_s=config.startup_timeout_s,
            logger=logger,
            server_pid=int(os.environ.get(SERVER_PID_ENV, "0")),
            on_stats=functools.partial(metrics.drafter, index=index),
            on_end=metrics.close,
        )
        taken = load_before_target(drafter, vllm_config, free_before) if beside_target else 0
        drafters.append(drafter)
        hooks.append(sleep_hooks(drafter, beside_target, taken))
    metrics.watch(*drafters)
    worker.attach(vllm_config, _all_of(hooks))
    return metrics, Fleet(drafters)


def _connect_drafters(config: SSDConfig, vllm_config: VllmConfig) -> tuple[Metrics, Fleet]:
    """Connect to drafters that are started elsewhere."""
    max_num_seqs = vllm_config.scheduler_config.max_num_seqs
    limits = target_limits(config, max_num_seqs)
    hello = msgspec.structs.replace(
        _hello(config, vllm_config),
        max_num_seqs=limits.max_num_seqs,
        max_branches=limits.max_branches,
        max_support=limits.max_support,
    )
    metrics = _metrics(config, vllm_config)
    server_pid = int(os.environ.get(SERVER_PID_ENV, "0"))
    timeout_s = config.startup_timeout_s

    def connect(link: type[Link], index: int, address: str, context: ssl.SSLContext) -> Link:
        return link(
            address,
            context,
            limits,
            hello,
            startup_timeout_s=timeout_s,
            logger=logger,
            server_pid=server_pid,
            on_stats=functools.partial(metrics.drafter, index=index),
            on_end=metrics.close,
        )

    if config.pool is not None:
        wanted = _wanted(config, config.pool, max_num_seqs, server_pid)
        seat = functools.partial(connect, Seat)
        fleet = PlacedFleet(
            wanted,
            seat,
            min_ready=config.num_awaited,
            startup_timeout_s=timeout_s,
            logger=logger,
            on_join=metrics.watch,
        )
        return metrics, fleet
    assert config.drafter_key is not None and not isinstance(config.drafters, str)  # `SSDConfig` says so
    context = tls_context(Path(config.drafter_key), is_server=False)
    drafters = [connect(RemoteDrafter, index, address, context) for index, address in enumerate(config.drafters)]
    metrics.watch(*drafters)
    return metrics, Fleet(drafters, min_ready=config.num_awaited)


def _wanted(config: SSDConfig, pool: str, max_num_seqs: int, server_pid: int) -> Wanted:
    return Wanted(
        pool=pool,
        num_drafters=config.num_drafters,
        resources={} if pool else config.drafter_resources or default_resources(worker.visible_gpus() is None),
        keys=config.drafter_keys(),
        max_num_seqs=max_num_seqs,
        unauthenticated=config.ray_unauthenticated,
        parent_pid=os.getpid(),
        server_pid=server_pid,
    )


def _metrics(config: SSDConfig, vllm_config: VllmConfig) -> Metrics:
    """Create the metrics and serve them as configured."""
    metrics = Metrics(config.num_speculative_tokens, logger)
    if config.metrics_port is not None:
        metrics.serve(config.metrics_port + vllm_config.parallel_config.data_parallel_index)
    if METRICS_ENV in os.environ:
        metrics.listen(os.environ[METRICS_ENV], vllm_config.parallel_config.data_parallel_index)
    return metrics


def _all_of(hooks: Sequence[worker.WorkerHooks]) -> worker.WorkerHooks:
    """Combine the hooks of several drafters."""

    def on_sleep() -> None:
        for hook in hooks:
            hook.on_sleep()

    def on_wake() -> None:
        for hook in hooks:
            hook.on_wake()

    return worker.WorkerHooks(sum(hook.drafter_bytes for hook in hooks), on_sleep, on_wake)


def load_before_target(drafter: DrafterProcess, vllm_config: VllmConfig, free_before: int) -> int:
    """Wait for a drafter on this worker's GPU and return the bytes that it took; free_before: free bytes before it.

    Raises ValueError if less than the target's share is left, in place of vLLM's own error, which would not name the
    drafter.
    """
    drafter.wait_until_ready()
    free, total = torch.accelerator.get_memory_info()
    taken = max(free_before - free, 0)
    cache = vllm_config.cache_config
    left = free + torch.accelerator.memory_reserved()  # memory that the target already holds is part of its share
    wanted = total * cache.gpu_memory_utilization
    if cache.kv_cache_memory_bytes is None and wanted > left:
        drafter.close()
        raise ValueError(
            f"ssd: the drafter takes {taken / GIB:.1f} GiB of the GPU that it shares with the target, which leaves "
            f"{left / GIB:.1f} of {total / GIB:.1f} GiB: set --gpu-memory-utilization to "
            f"{int(100 * left / total) / 100:g} or less, or make kv_cache_memory smaller"
        )
    drafter.keep_size()
    logger.info(
        "SSD: drafter and target share a GPU of %.1f GiB: %.1f GiB for the drafter, %.1f GiB for the target",
        total / GIB,
        taken / GIB,
        min(wanted, left) / GIB,
    )
    return taken


def warn_of_crowded_cores(drafter_cpus: set[int]) -> None:
    """Warn if vLLM's own threads are bound to cores of drafters."""
    if crowded := sorted(bound_cpus() & drafter_cpus):
        logger.warning(
            "SSD: vLLM's threads are bound to the drafter's core %s, too, and each slows the other: name the other "
            "cores in VLLM_CPU_OMP_THREADS_BIND",
            ", ".join(map(str, crowded)),
        )


def sleep_hooks(drafter: DrafterProcess, beside_target: bool, taken: int) -> worker.WorkerHooks:
    """Hooks for `/sleep` and `/wake_up`: a drafter on the target's GPU stops and restarts, any other keeps running.

    Other drafters are idle meanwhile, as no outcomes arrive. The draft logits stay allocated, because they contain the
    proposals of drafts in flight.
    """
    told = False

    def on_sleep() -> None:
        nonlocal told
        if beside_target:
            drafter.rest()
        elif not told:
            told = True
            logger.info("SSD: the drafter keeps its memory while the target sleeps, as it has its own device")

    return worker.WorkerHooks(taken, on_sleep, drafter.wake)


def _hello(config: SSDConfig, vllm_config: VllmConfig) -> Hello:
    model = vllm_config.model_config
    tokens, _ = read_vocabulary(model)
    return Hello(
        PROTOCOL_VERSION,
        model.get_vocab_size(),
        config.num_speculative_tokens,
        fingerprint(tokens),
        tokens,
        config.heterogeneous_vocab,
    )
