"""Run the checks of `vllm-ssd doctor`."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import vllm
from vllm.config import VllmConfig

from vllm_ssd.compat.drafter.draft_model import draft_config
from vllm_ssd.compat.drafter.memory import bytes_a_token
from vllm_ssd.compat.drafter.tree_backend import unsupported_by_config
from vllm_ssd.compat.features import FEATURES
from vllm_ssd.compat.target import refused, runner, serve_flags
from vllm_ssd.compat.version import UnsupportedVLLM, check_vllm_version, supported_range
from vllm_ssd.config import SSDConfig
from vllm_ssd.doctor.findings import Findings
from vllm_ssd.doctor.handshake import shake_hands
from vllm_ssd.doctor.machine import Machine, gib
from vllm_ssd.doctor.memory import weight_bytes
from vllm_ssd.doctor.placed import place, targets
from vllm_ssd.link.credential import BadCredential, tls_context
from vllm_ssd.link.placement import Placement


def examine(target: str, drafter: str, flags: list[str], machine: Machine) -> Findings:
    """Report what `vllm serve TARGET flags` with this drafter would do on this machine, up to loading weights."""
    found = Findings()
    _vllm(found)
    found.ok("machine", str(machine))
    try:
        engine_args, others = serve_flags.parse(["--model", target, *flags])
        keys = engine_args.speculative_config or {}
        engine_args.speculative_config = {**keys, "method": "ssd", "model": drafter}
        asked = copy.copy(engine_args)  # the plugin rewrites `engine_args`
        vllm_config = engine_args.create_engine_config()
        if not runner.has_ssd(vllm_config):
            raise ValueError("vLLM has not loaded the plugin: VLLM_PLUGINS must be unset or name `ssd`")
        config = SSDConfig.from_json(vllm_config.additional_config["ssd"])  # type: ignore[call-overload,index]
    except (ValueError, OSError, RuntimeError, ImportError, UnsupportedVLLM) as error:
        found.fails("configuration", *_advised(error))
        return found
    if others:
        found.note("flags", f"not engine flags, so not checked: {' '.join(others)}")
    found.ok("configuration", f"K = {config.num_speculative_tokens}, {_branches(config)}, on_miss {config.on_miss}")
    _runner(found, vllm_config)
    _defaults(found, vllm_config)
    _adaptive(found, config, asked, vllm_config)
    _attention_of_target(found, vllm_config, machine)
    placed = _places(found, config, vllm_config, machine)
    if placed is not None:
        _drafter(found, config, vllm_config, placed, machine)
    _features(found, config)
    return found


def _vllm(found: Findings) -> None:
    try:
        check_vllm_version(vllm.__version__)
    except UnsupportedVLLM:
        found.fails("vLLM", f"{vllm.__version__}; supported are {supported_range()}", "install a supported vLLM")
    else:
        found.ok("vLLM", f"{vllm.__version__}, in the supported range of {supported_range()}")


def _runner(found: Findings, config: VllmConfig) -> None:
    is_v2, why = runner.choose_runner()
    found.ok("runner", f"{'V2' if is_v2 else 'V1'}: {why}")
    asynchronous = config.scheduler_config.async_scheduling
    found.ok("scheduling", "asynchronous" if asynchronous else "synchronous, as vLLM does with V1's `custom_class`")
    caching = config.cache_config.enable_prefix_caching
    found.ok("target's prefix cache", "on" if caching else "off")


def _defaults(found: Findings, config: VllmConfig) -> None:
    """Check the target's default sampling parameters for values with which requests fail."""
    min_p = 0.0 if runner.is_v2() else refused.default_min_p(config.model_config)
    if min_p:
        found.note("generation config", f"min_p is {min_p:g}, {refused.CONSEQUENCE}", refused.REMEDY)


def _adaptive(found: Findings, config: SSDConfig, engine_args: Any, vllm_config: VllmConfig) -> None:
    if not config.adaptive:
        found.ok("adaptive", "off, as asked: every round carries K drafts at any load")
        return
    obstacle = runner.why_not_adaptive(engine_args, vllm_config.parallel_config) if runner.is_v2() else None
    if obstacle:
        found.note("adaptive", f"no effect, every round carries K drafts at any load: {obstacle}")
    else:
        found.ok("adaptive", "the number of drafts follows the load")


def _attention_of_target(found: Findings, config: VllmConfig, machine: Machine) -> None:
    try:
        name = serve_flags.attention_backend(config)
    except Exception as error:  # vLLM's selection raises various types
        found.fails("target's attention", *_advised(error))
        return
    build = " as far as this build of vLLM knows" if machine.assumed else ""
    found.ok("target's attention", name + build)


def _places(found: Findings, config: SSDConfig, target: VllmConfig, machine: Machine) -> Placement | None:
    """Report where target and drafters run; returns the first drafter's placement, None if one cannot be placed."""
    parallel = target.parallel_config
    replicas = parallel.data_parallel_size_local
    ray = parallel.distributed_executor_backend == "ray"
    if not machine.num_gpus:
        found.ok("target's devices", "CPU cores as VLLM_CPU_OMP_THREADS_BIND says")
    else:
        ids = targets(target, machine)
        shape = f"TP {parallel.tensor_parallel_size}, PP {parallel.pipeline_parallel_size}, DP {replicas} on this node"
        text = f"GPU {', '.join(map(str, ids))} ({shape}{', by Ray' if ray else ''})"
        if max(ids) >= machine.num_gpus and not ray:
            found.fails("target's devices", f"{text}; the machine has {machine.num_gpus}", "add GPUs, or use fewer")
        else:
            found.ok("target's devices", text)
    if config.drafters != "local":
        _elsewhere(found, config)
        return None
    places: list[Placement] = []
    for replica, drafter in itertools.product(range(max(replicas, 1)), range(config.num_drafters)):
        subject = "drafter's device" if config.num_drafters == 1 else f"device of drafter {drafter}"
        subject += "" if replicas == 1 else f", replica {replica}"
        try:
            placed = place(config, target, replica, machine, drafter)
        except ValueError as error:
            found.fails(subject, *_advised(error))
            return None
        places.append(placed)
        _place(found, subject, placed, config, machine)
    return places[0]


def _elsewhere(found: Findings, config: SSDConfig) -> None:
    """Report drafters that the server only connects to, which have to be checked on their own hosts."""
    if config.pool is not None:
        if config.pool:
            found.note("drafters", f"the pool {config.pool} on Ray", f"see `vllm-ssd pool status {config.pool}`")
        else:
            found.note("drafters", f"Ray places {config.num_drafters} when the server starts", "see `ray status`")
        return
    assert config.drafter_key is not None and not isinstance(config.drafters, str)  # `SSDConfig` says so
    try:
        tls_context(Path(config.drafter_key), is_server=False)
    except BadCredential as error:
        found.fails("drafters", *_advised(error))
    else:
        found.note(
            "drafters", f"not started here: {', '.join(config.drafters)}", "see `vllm-ssd drafter` on their hosts"
        )


def _place(found: Findings, subject: str, placed: Placement, config: SSDConfig, machine: Machine) -> None:
    if machine.num_gpus:
        device = placed.environment["CUDA_VISIBLE_DEVICES"]
        if placed.beside_target:
            found.note(subject, f"GPU {device}, the target's own: drafting takes its time, and it loads first")
        else:
            found.ok(subject, f"GPU {device}")
        return
    cores = ", ".join(map(str, placed.options.cpus))
    left = "" if config.drafter_cpus else ", or what vLLM's workers leave free"
    beyond = [core for core in placed.options.cpus if core not in os.sched_getaffinity(0)]
    if beyond:
        found.fails(subject, f"core {cores}, of which this process may not use {beyond}", "set drafter_cpus")
    elif machine.num_cores < 2:
        found.note(subject, f"core {cores}, the only one: the drafter takes time from the target", "add a core")
    else:
        found.ok(subject, f"core {cores}{left}")


def _drafter(found: Findings, config: SSDConfig, target: VllmConfig, placed: Placement, machine: Machine) -> None:
    """Check the draft model, and whether it matches the target."""
    options = placed.options
    try:
        with _environment(placed.environment):
            drafter = _draft_config(options.tree_attention, options.engine_args)
    except (ValueError, OSError, RuntimeError, ImportError, NotImplementedError) as error:
        found.fails("draft model", *_advised(error))
        return
    model, target_len = drafter.model_config, target.model_config.max_model_len
    found.ok("draft model", f"{model.architecture}, {str(model.dtype).removeprefix('torch.')}")
    most = model.max_model_len - 2 * config.num_speculative_tokens - 2
    if model.max_model_len < target_len:
        found.note(
            "context",
            f"the drafter takes {model.max_model_len} tokens, the target {target_len}: requests over {most} tokens run "
            "without its drafts",
            "choose a draft model with a longer context if requests are that long",
        )
    else:
        found.ok("context", f"{target_len} tokens; the drafter takes requests up to {most}")
    try:
        fits, said = shake_hands(config, target, drafter)
    except (ValueError, OSError) as error:
        found.fails("vocabulary", *_advised(error))
    else:
        if not fits:
            found.fails("vocabulary", said, "choose a draft model of the target's family, or heterogeneous_vocab")
        elif said:
            found.note("vocabulary", said)
        else:
            found.ok("vocabulary", f"{model.get_vocab_size()} tokens, the same tokenizer")
    _attention_of_drafter(found, options.tree_attention, drafter)
    found.ok("drafter's prefix cache", "on, whatever the target's is: idle KV pages are kept until they are needed")
    _memory(found, config, target, drafter, placed, machine)


def _attention_of_drafter(found: Findings, tree_attention: bool, drafter: VllmConfig) -> None:
    lacking = unsupported_by_config(drafter) if tree_attention else []
    if lacking:
        found.note("drafter's attention", f"vLLM's: the drafter's own does not support {', '.join(lacking)}")
    else:
        found.ok("drafter's attention", "tree attention, checked at start" if tree_attention else "vLLM's")


def _draft_config(tree_attention: bool, engine_args: dict[str, Any]) -> VllmConfig:
    arguments = {key: value for key, value in engine_args.items() if key != "num_branches"}
    return draft_config(tree_attention, arguments.pop("target_max_model_len", None), arguments)


def _memory(
    found: Findings, config: SSDConfig, target: VllmConfig, drafter: VllmConfig, placed: Placement, machine: Machine
) -> None:
    """Compare the memory for weights and KV of both sides with the available memory."""
    target_weights, how = weight_bytes(target.model_config)
    draft_weights, draft_how = weight_bytes(drafter.model_config)
    if not machine.num_gpus:
        kv_bytes = placed.options.engine_args["kv_cache_memory_bytes"]
        needed = target_weights + draft_weights + kv_bytes
        text = (
            f"weights {gib(target_weights)} ({how}) and {gib(draft_weights)} ({draft_how}), {gib(kv_bytes)} for the "
            f"drafter's KV: {kv_bytes // bytes_a_token(drafter)} tokens; beside the target's own KV"
        )
        if needed > machine.ram_bytes:
            found.fails("memory", text, f"{gib(machine.ram_bytes)} are available: use smaller models, or add memory")
        else:
            found.ok("memory", text)
        return
    if not machine.gpu_bytes:
        found.note("memory", "unknown: vLLM does not report a GPU's memory", "see --gpu-memory")
        return
    share = target_weights / target.parallel_config.world_size
    sides = ("target's memory", share, how, target), ("drafter's memory", draft_weights, draft_how, drafter)
    for subject, weights, source, side in sides:
        cache, token_bytes = side.cache_config, bytes_a_token(side)
        kv_bytes = cache.kv_cache_memory_bytes or 0
        _on_gpu(found, subject, weights, source, cache.gpu_memory_utilization, kv_bytes, token_bytes, machine)
    cache, kv_bytes = target.cache_config, drafter.cache_config.kv_cache_memory_bytes
    if placed.beside_target and kv_bytes and not cache.kv_cache_memory_bytes:
        _on_shared_gpu(found, draft_weights + kv_bytes, cache.gpu_memory_utilization, machine.gpu_bytes)


def _on_shared_gpu(found: Findings, drafter_bytes: int, utilization: float, gpu_bytes: int) -> None:
    """Check that the target's share is left beside a drafter, as `target.start.load_before_target` does."""
    left = gpu_bytes - drafter_bytes
    if left < utilization * gpu_bytes:
        found.fails(
            "shared GPU",
            f"the drafter takes at least {gib(drafter_bytes)}, which leaves less than the target's share of "
            f"{gib(utilization * gpu_bytes)}",
            f"set --gpu-memory-utilization below {max(left, 0) / gpu_bytes:.2f}, or make kv_cache_memory smaller",
        )


def _on_gpu(
    found: Findings,
    subject: str,
    weights: float,
    how: str,
    utilization: float,
    kv_bytes: int,
    token_bytes: int,
    machine: Machine,
) -> None:
    """Check one side's weights and KV on one GPU; kv_bytes: 0 for whatever `utilization` leaves."""
    left = kv_bytes or utilization * machine.gpu_bytes - weights
    of = gib(machine.gpu_bytes)
    if left <= 0 or weights + left > machine.gpu_bytes:
        found.fails(
            subject,
            f"{gib(weights)} of weights a GPU ({how}) and {gib(max(left, 0))} of KV do not fit into {of}",
            "use more GPUs, a smaller or quantized model, or less KV memory",
        )
    else:
        found.ok(
            subject,
            f"{gib(weights)} of weights a GPU ({how}), at most {gib(left)} of {of} for KV: "
            f"{int(left // token_bytes)} tokens",
        )


def _features(found: Findings, config: SSDConfig) -> None:
    """Report the features that work differently on this runner, from the compatibility table."""
    column = "v2" if runner.is_v2() else "v1"
    for feature in FEATURES:
        asked = feature.asked is None or getattr(config, feature.asked[0]) == feature.asked[1]
        if column in feature.why and asked:
            has = getattr(feature, column).partition(" (")[0]  # without a link
            found.note(feature.name.replace("`", ""), has, feature.why[column])


def _branches(config: SSDConfig) -> str:
    return f"up to {config.max_branches} branches a request"


def _advised(error: BaseException) -> tuple[str, str]:
    """An error's message in one line, without a separate fix, since our messages contain their own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(line for line in lines if not line.startswith(("For further information", "1 validation error")))
    text = text.removeprefix("Value error, ").partition(" [type=value_error")[0]
    return text[:600] or type(error).__name__, ""


@contextmanager
def _environment(changes: dict[str, str | None]) -> Iterator[None]:
    """Apply the drafter's environment, except for the visible GPUs, all of which this process must still see."""
    before = dict(os.environ)
    for name, value in changes.items():
        if name == "CUDA_VISIBLE_DEVICES":
            continue
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
