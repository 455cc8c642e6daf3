"""Two vLLM processes on one GPU, by vLLM's own arithmetic over a ledger of who holds what."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.utils import mem_utils
from vllm.utils.mem_utils import MemorySnapshot
from vllm.v1.worker import gpu_worker
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.utils import request_memory

from vllm_ssd.compat.drafter.memory import MAX_LOGIT_BYTES, bytes_a_row, executor_with_reserve, max_rows
from vllm_ssd.compat.target import worker as seam
from vllm_ssd.config import SSDConfig
from vllm_ssd.link.gpus import Gpus
from vllm_ssd.link.placement import place_drafter
from vllm_ssd.target.start import load_before_target, sleep_hooks

GIB = 1 << 30
CONTEXT = GIB // 2
"""What CUDA takes in each process that uses the GPU."""


@dataclass
class Process:
    """What one process holds of the GPU, in bytes."""

    other: int = 0  # not by PyTorch
    torch: int = 0
    peak: int = 0


@dataclass
class Ledger:
    """A GPU, the processes on it, and which of them is running."""

    total: int = 80 * GIB
    processes: dict[str, Process] = field(default_factory=lambda: {"target": Process(), "drafter": Process()})
    running: str = "target"

    @property
    def current(self) -> Process:
        return self.processes[self.running]

    @property
    def free(self) -> int:
        return self.total - sum(process.other + process.torch for process in self.processes.values())

    def allocate(self, size: float, kept: float | None = None) -> None:
        """PyTorch allocates `size` bytes and gives back all but `kept`; raises MemoryError where they are not there."""
        size = int(size)
        if size > self.free:
            raise MemoryError(f"{self.running} wants {size / GIB:.2f} GiB of {self.free / GIB:.2f}")
        self.current.torch += size
        self.current.peak = max(self.current.peak, self.current.torch)
        self.current.torch -= 0 if kept is None else size - int(kept)

    @contextmanager
    def process(self, name: str) -> Iterator[None]:
        before, self.running = self.running, name
        yield
        self.running = before


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """A ledger that PyTorch and vLLM's functions read instead of a GPU."""
    ledger = Ledger()

    def stats(device: object = None) -> dict[str, int]:
        return {"allocated_bytes.all.peak": ledger.current.peak, "allocated_bytes.all.current": ledger.current.torch}

    def reset_peak(device: object = None) -> None:
        ledger.current.peak = ledger.current.torch

    platform = SimpleNamespace(is_integrated_gpu=lambda index: False, current_device=lambda: 0, device_name="gpu")
    monkeypatch.setattr(mem_utils, "current_platform", platform)
    monkeypatch.setattr(gpu_worker, "set_current_vllm_config", lambda config: nullcontext())
    accelerator: dict[str, Callable[..., Any]] = {
        "get_memory_info": lambda device=None: (ledger.free, ledger.total),
        "memory_stats": stats,
        "memory_reserved": lambda device=None: ledger.current.torch,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": reset_peak,
    }
    for name, function in accelerator.items():
        monkeypatch.setattr(torch.accelerator, name, function)
    return ledger


@dataclass
class Engine:
    """One vLLM process as its worker starts: what it is told, and what its model takes."""

    ledger: Ledger
    utilization: float
    kv_bytes: int | None
    weights: float
    activations: float
    worker: Any = None

    def take_snapshot(self) -> None:
        self.ledger.current.other += CONTEXT
        cache = SimpleNamespace(gpu_memory_utilization=self.utilization, kv_cache_memory_bytes=self.kv_bytes)
        snapshot = MemorySnapshot(device=torch.device("cuda:0"))
        self.worker = Config(
            vllm_config=Config(
                cache_config=cache, compilation_config=SimpleNamespace(cudagraph_mode=gpu_worker.CUDAGraphMode.NONE)
            ),
            cache_config=cache,
            model_config=SimpleNamespace(multimodal_config=None),
            parallel_config=SimpleNamespace(),
            model_runner=SimpleNamespace(
                model_memory_usage=0, profile_run=lambda **_: self.ledger.allocate(self.activations, kept=0)
            ),
            randomize_dummy_inputs=False,
            _scoped_allocator_max_split=lambda max_split_size_mb: nullcontext(),
            init_snapshot=snapshot,
            requested_memory=request_memory(snapshot, cache),
        )

    def load(self) -> int:
        """Load the model and allocate KV pages; returns their bytes."""
        self.ledger.allocate(self.weights)
        available = Worker.determine_available_memory(self.worker)
        self.ledger.allocate(available)
        return available


class Config(SimpleNamespace):
    """Compared by value as vLLM's, hence not hashed."""

    __hash__ = None


def options_of(**user: Any) -> dict[str, Any]:
    """vLLM's arguments of a drafter that shares the only GPU with its target."""
    parallel = SimpleNamespace(
        distributed_executor_backend="uni",
        data_parallel_rank_local=None,
        nnodes_within_dp=1,
        local_world_size=1,
        assigned_physical_gpu_ids=None,
        use_ray=False,
    )
    vllm_config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=64),
        parallel_config=parallel,
        model_config=SimpleNamespace(max_model_len=4096),
        cache_config=SimpleNamespace(gpu_memory_utilization=0.8),
    )
    config = SSDConfig.from_user({"model": "x", "drafter_device": "cuda:0", **user})
    return place_drafter(config, vllm_config, Gpus(["0"], 0)).options.engine_args


class Drafter:
    """The link to a drafter of 1B parameters, which takes its memory when it is waited for."""

    def __init__(self, ledger: Ledger, engine_args: dict[str, Any]) -> None:
        self.ledger, self.engine_args = ledger, dict(engine_args)
        self.kv_bytes = 0

    def wait_until_ready(self) -> None:
        with self.ledger.process("drafter"):
            engine = Engine(
                self.ledger,
                self.engine_args.get("gpu_memory_utilization", 0.92),
                self.engine_args.get("kv_cache_memory_bytes"),
                weights=2.5 * GIB,
                activations=0.5 * GIB,
            )
            engine.take_snapshot()
            self.kv_bytes = engine.load()
            self.ledger.allocate(MAX_LOGIT_BYTES)

    def keep_size(self) -> None:
        self.engine_args |= {"kv_cache_memory_bytes": self.kv_bytes, "gpu_memory_utilization": 0.01}

    def rest(self) -> None:
        self.ledger.processes["drafter"] = Process()

    close = rest

    def wake(self) -> None:
        self.wait_until_ready()


@dataclass
class Pair:
    """A target of 8B parameters and its drafter, started as `start_drafters` does."""

    target: Engine
    drafter: Drafter
    target_kv_bytes: int


def start(ledger: Ledger, engine_args: dict[str, Any], utilization: float = 0.8, attach: bool = True) -> Pair:
    target = Engine(ledger, utilization, None, weights=16 * GIB, activations=1.5 * GIB)
    target.take_snapshot()
    ledger.allocate(GIB / 2)  # what the runner holds before it drafts
    free = ledger.free
    drafter = Drafter(ledger, engine_args)
    if attach:
        taken = load_before_target(drafter, target.worker.vllm_config, free)
        seam.attach(target.worker.vllm_config, sleep_hooks(drafter, True, taken))
    else:
        drafter.wait_until_ready()
    return Pair(target, drafter, target.load())


def share_alone(ledger: Ledger, utilization: float = 0.8) -> int:
    """The target's KV bytes with the GPU to itself."""
    alone = Ledger(ledger.total)
    ledger.processes, ledger.running = alone.processes, "target"
    engine = Engine(ledger, utilization, None, weights=16 * GIB, activations=1.5 * GIB)
    engine.take_snapshot()
    ledger.allocate(GIB / 2)
    size = engine.load()
    ledger.processes = {"target": Process(), "drafter": Process()}
    return size


SIZES = pytest.mark.parametrize(
    "user", [{"kv_cache_memory": "2GiB"}, {"gpu_memory_utilization": 0.12}], ids=["bytes", "share"]
)


@SIZES
def test_the_targets_share_does_not_contain_the_drafter(ledger: Ledger, user: dict[str, Any]) -> None:
    alone = share_alone(ledger)
    pair = start(ledger, options_of(**user))
    assert pair.target_kv_bytes == alone
    assert pair.drafter.kv_bytes > GIB
    assert ledger.free > 0


@SIZES
def test_vllm_alone_would_count_the_drafter_as_the_targets(ledger: Ledger, user: dict[str, Any]) -> None:
    """When this fails, `compat/target/worker.py` has less to correct."""
    alone = share_alone(ledger)
    held = start(ledger, options_of(**user), attach=False)
    drafter = ledger.processes["drafter"]
    assert held.target_kv_bytes == alone - drafter.other - drafter.torch


def test_a_drafter_of_given_pages_needs_no_share(ledger: Ledger) -> None:
    """vLLM wants its default share free although it does not use it."""
    engine_args = options_of(kv_cache_memory="2GiB")
    assert start(ledger, engine_args).drafter.kv_bytes == 2 * GIB
    ledger.processes = {"target": Process(torch=20 * GIB), "drafter": Process()}
    with pytest.raises(ValueError, match="less than desired GPU memory utilization"):
        Drafter(ledger, engine_args | {"gpu_memory_utilization": 0.92}).wait_until_ready()


def test_shares_that_do_not_fit_are_refused_before_the_target_loads(ledger: Ledger) -> None:
    with pytest.raises(
        ValueError, match=r"takes 30.0 GiB .* leaves 49.\d of 80.0 GiB: .*utilization to 0.6\d? or less"
    ):
        start(ledger, options_of(kv_cache_memory="26GiB"))
    assert ledger.processes["drafter"].torch == 0


def test_a_drafter_gets_its_first_size_again(ledger: Ledger) -> None:
    """Later, vLLM would count what the target allocates meanwhile as the drafter's."""
    pair = start(ledger, options_of(gpu_memory_utilization=0.12))
    first, free = pair.drafter.kv_bytes, ledger.free
    pair.drafter.rest()
    pair.drafter.wait_until_ready()
    assert (pair.drafter.kv_bytes, ledger.free) == (first, free)


def test_sleep_frees_a_drafter_on_the_targets_gpu(ledger: Ledger) -> None:
    pair = start(ledger, options_of(kv_cache_memory="2GiB"))
    free = ledger.free
    slept: list[int] = []
    pair.target.worker.sleep_mode_backend = SimpleNamespace(suspend=slept.append)
    hooks = seam._hooks_of(pair.target.worker)
    hooks.on_sleep()
    assert ledger.processes["drafter"].torch == 0 and ledger.free > free + 5 * GIB
    hooks.on_wake()
    assert ledger.free == free


def test_the_logits_of_a_step_are_bounded_and_kept_out_of_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    for vocab_size in (2048, 32_000, 152_064):
        for dtype in (torch.bfloat16, torch.float32):
            assert max_rows(vocab_size, dtype) * bytes_a_row(vocab_size, dtype) <= MAX_LOGIT_BYTES
    assert max_rows(152_064, torch.bfloat16) >= 32 * 24  # of many branches for a batch of 32
    executor = executor_with_reserve(GIB)
    monkeypatch.setattr(executor.__base__, "determine_available_memory", lambda self: [10 * GIB])
    found = {}
    for given in (None, 4 * GIB):
        process = object.__new__(executor)
        process.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(kv_cache_memory_bytes=given))
        (found[given],) = process.determine_available_memory()
    assert found == {None: 9 * GIB, 4 * GIB: 10 * GIB}
    assert math.isclose(bytes_a_row(100, torch.bfloat16), 800)
