"""A stand-in for `torch.cuda` on a CPU, strict where a real device is only sometimes.

    with FakeCuda(num_devices=2) as cuda:
        ...  # torch.zeros(3, device="cuda:1"), torch.cuda.Stream(), tensor.pin_memory() and so on

Work on a device is deferred until something waits for it: a stream, an event, or a host that reads a tensor. Until then
its results hold poison, so a missing wait reads poison. `advance` lets a device get some way by itself. Each thread has
a current device, 0 at first, and a current stream of each device. Copies from pinned memory read it when they run,
those from pageable memory at once. Not modelled: `record_stream` and the allocators; freed memory stays as it was.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

POISON = {torch.float32: float("nan"), torch.float64: float("nan"), torch.bool: True}
"""What memory holds before a device has written to it; integers hold `POISON_INT`."""
POISON_INT = -77
READS = {"tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__", "nonzero"}
FACTORIES = {"zeros", "ones", "empty", "full", "tensor", "arange", "as_tensor"}


class CudaError(RuntimeError):
    """What a real device would refuse."""


class Stream:
    """A queue of work of one device, in order."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.cuda = _cuda()
        self.index = self.cuda.index(device)
        self.priority = priority
        self.queue: list[Callable[[], None]] = []
        self.done = 0  # of all that was ever queued
        self.cuda.touch(self.index)
        self.cuda.streams.append(self)

    @property
    def queued(self) -> int:
        """Items that were ever queued."""
        return self.done + len(self.queue)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.index)

    def add(self, work: Callable[[], None]) -> None:
        with self.cuda.lock:
            self.queue.append(work)

    def run_to(self, position: int) -> None:
        """Run all work before `position`."""
        with self.cuda.lock:
            while self.done < position:
                work = self.queue.pop(0)
                self.done += 1
                work()

    def synchronize(self) -> None:
        self.cuda.fail("synchronize")
        self.run_to(self.queued)

    def wait_event(self, event: Event) -> None:
        mark = event.mark
        if mark is not None:
            self.add(lambda: mark[0].run_to(mark[1]))

    def wait_stream(self, stream: Stream) -> None:
        position = stream.queued
        self.add(lambda: stream.run_to(position))

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event


class Event:
    """A place in a stream."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.mark: tuple[Stream, int] | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or _cuda().current_stream()
        self.mark = stream, stream.queued

    def query(self) -> bool:
        return self.mark is None or self.mark[0].done >= self.mark[1]

    def synchronize(self) -> None:
        _cuda().fail("synchronize")
        if self.mark is not None:
            self.mark[0].run_to(self.mark[1])

    def wait(self, stream: Stream | None = None) -> None:
        (stream or _cuda().current_stream()).wait_event(self)


class DeviceTensor(torch.Tensor):
    """A tensor of the stand-in: `host` is its memory."""

    host: torch.Tensor
    _index: int

    @staticmethod
    def __new__(cls, host: torch.Tensor, index: int) -> DeviceTensor:
        with torch.inference_mode(False):
            tensor = torch.Tensor._make_wrapper_subclass(
                cls,
                host.shape,
                strides=host.stride(),
                storage_offset=host.storage_offset(),
                dtype=host.dtype,
                device="cpu",  # to C++, which would refuse a CUDA device here
            )
        tensor.host, tensor._index = host, index
        return tensor

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self._index)

    @property
    def is_cuda(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype}, cuda:{self._index})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        cuda, name = _cuda(), getattr(func, "__name__", "")
        if name in READS and isinstance(args[0], DeviceTensor):
            return func(cuda.read(args[0], name), *args[1:], **kwargs)
        if name in ("to", "cuda") and (moved := cuda.move(*args, **kwargs)) is not None:
            return moved
        if name in ("is_pinned", "pin_memory"):
            raise CudaError("only memory of the host can be pinned")
        if name in ("__getitem__", "__setitem__"):
            cuda.check_index(args[1])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _cuda().run(func, args, kwargs or {})


class _Mode(TorchFunctionMode):
    """What creates or moves tensors, in one thread."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        cuda, name = _cuda(), getattr(func, "__name__", "")
        if name in FACTORIES:
            device = kwargs.get("device")
            pinned = kwargs.pop("pin_memory", False)
            if device is not None and torch.device(device).type == "cuda":
                index = cuda.index(device)
                cuda.touch(index)
                cuda.fail("allocate")
                data = func(*tree_map(_host, args), **kwargs | {"device": "cpu"})
                if name in ("tensor", "as_tensor"):
                    cuda.pageable_copies.append(data.nbytes)
                tensor = DeviceTensor(poisoned(data), index)
                cuda.allocated[index] += data.nbytes
                if name != "empty":
                    cuda.current_stream(index).add(functools.partial(tensor.host.copy_, data))
                return tensor
            return cuda.pin(func(*args, **kwargs)) if pinned else func(*args, **kwargs)
        if args and isinstance(args[0], torch.Tensor) and not isinstance(args[0], DeviceTensor):
            if name == "pin_memory":
                cuda.fail("pin_memory")
                return cuda.pin(args[0].clone())
            if name == "is_pinned":
                return cuda.is_pinned(args[0])
            if name in ("to", "cuda") and (moved := cuda.move(*args, **kwargs)) is not None:
                return moved
        return func(*args, **kwargs)


class FakeCuda:
    """The devices, and what happened on them; a context manager, one at a time.

    host_reads, pageable_copies: what made the host wait for a device, and copies that cannot be asynchronous, by name
    touched [thread name, device index]: devices on which each thread made a context
    failures [call, thread name]: raised by synchronize, allocate, pin_memory and copy
    """

    def __init__(self, num_devices: int = 1) -> None:
        self.num_devices = num_devices
        self.lock = threading.RLock()
        self.streams: list[Stream] = []
        self.host_reads: list[str] = []
        self.pageable_copies: list[int] = []
        self.touched: set[tuple[str, int]] = set()
        self.allocated: Counter[int] = Counter()
        self.launched: list[str] = []
        self.failures: dict[tuple[str, str], BaseException] = {}
        self._pinned: set[int] = set()
        self._kept: list[Any] = []  # so that no other memory takes the place of what was pinned
        self._thread = threading.local()

    # ---- the context -----------------------------------------------------------------------------------

    def __enter__(self) -> FakeCuda:
        global _active
        _active = self
        self.defaults = [Stream(i) for i in range(self.num_devices)]
        self.touched.clear()
        run = threading.Thread.run

        def run_with_mode(thread: threading.Thread) -> None:
            with _Mode():
                run(thread)

        self._patches = [
            mock.patch.object(torch.cuda, name, value, create=True)
            for name, value in {
                "Stream": Stream,
                "Event": Event,
                "stream": self.stream,
                "device": self.on_device,
                "current_stream": self.current_stream,
                "current_device": self.current_device,
                "set_device": self.set_device,
                "device_count": lambda: self.num_devices,
                "is_available": lambda: True,
                "synchronize": self.synchronize,
            }.items()
        ] + [mock.patch.object(threading.Thread, "run", run_with_mode), _Mode()]
        for patch in self._patches:
            patch.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        global _active
        for patch in reversed(self._patches):
            patch.__exit__(*exception)
        _active = None

    # ---- what `torch.cuda` has -------------------------------------------------------------------------

    def index(self, device: Any) -> int:
        """The device's number; the current one where it has none."""
        index = device if isinstance(device, int) else None if device is None else torch.device(device).index
        index = self.current_device() if index is None else index
        if not 0 <= index < self.num_devices:
            raise CudaError(f"invalid device ordinal {index}")
        return index

    def current_device(self) -> int:
        return getattr(self._thread, "device", 0)

    def set_device(self, device: Any) -> None:
        self._thread.device = self.index(device)
        self.touch(self._thread.device)

    def current_stream(self, device: Any = None) -> Stream:
        index = self.index(device)
        return getattr(self._thread, f"stream{index}", self.defaults[index])

    def _set_stream(self, stream: Stream) -> None:
        self.set_device(stream.index)
        setattr(self._thread, f"stream{stream.index}", stream)

    @contextmanager
    def stream(self, stream: Stream | None) -> Iterator[None]:
        """As PyTorch does it: leaving it sets the device that was current before, and makes a context there."""
        if stream is None:
            yield
            return
        before = self.current_stream()
        on_device = self.current_stream(stream.index)
        self._set_stream(stream)
        try:
            yield
        finally:
            self._set_stream(on_device)
            self._set_stream(before)

    @contextmanager
    def on_device(self, device: Any) -> Iterator[None]:
        before = self.current_device()
        self.set_device(device)
        try:
            yield
        finally:
            self.set_device(before)

    def synchronize(self, device: Any = None) -> None:
        self.fail("synchronize")
        for stream in self.streams:
            if stream.index == self.index(device):
                stream.run_to(stream.queued)

    # ---- what tests ask for ----------------------------------------------------------------------------

    def advance(self, items: int, stream: Stream | None = None) -> None:
        """Let a device run up to `items` more items of a stream, as it may at any time."""
        stream = stream or self.current_stream()
        stream.run_to(min(stream.done + items, stream.queued))

    def fail(self, call: str) -> None:
        """Raise what a test put into `failures` for a call and the name of the thread that makes it."""
        error = self.failures.get((call, threading.current_thread().name))
        if error is not None:
            raise error

    def kernel(self, reference: Callable[..., None]) -> Callable[..., None]:
        """A stand-in for a function that launches one Triton kernel: `reference`, run when the stream comes to it.

        The kernel runs on the current device, which alone it can reach, beside pinned memory.
        """

        def launch(*args: Any, **kwargs: Any) -> None:
            index = self.current_device()
            for tensor in tree_leaves((_fields(args), _fields(kwargs))):
                if isinstance(tensor, DeviceTensor) and tensor._index != index:
                    raise CudaError(f"a kernel on device {index} cannot reach cuda:{tensor._index}")
                if type(tensor) is torch.Tensor and not self.is_pinned(tensor):
                    raise CudaError("a kernel cannot reach pageable memory of the host")
            host_args, host_kwargs = _unwrapped(args), _unwrapped(kwargs)
            self.launched.append(getattr(reference, "__name__", ""))
            self.current_stream().add(lambda: reference(*host_args, **host_kwargs))

        return launch

    # ---- tensors ---------------------------------------------------------------------------------------

    def touch(self, index: int) -> None:
        """The calling thread makes a context on a device, or uses the one that is there."""
        self.touched.add((threading.current_thread().name, index))

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self._pinned.add(tensor.untyped_storage().data_ptr())
        self._kept.append(tensor)
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return not tensor.nbytes or tensor.untyped_storage().data_ptr() in self._pinned

    def read(self, tensor: DeviceTensor, name: str) -> torch.Tensor:
        """What is in a tensor once its stream is through; the host waits."""
        self.host_reads.append(name)
        stream = self.current_stream(tensor._index)
        stream.synchronize()
        return tensor.host.clone()

    def check_index(self, index: Any) -> None:
        """A mask's length is known only to the device."""
        for mask in index if isinstance(index, tuple) else (index,):
            if isinstance(mask, DeviceTensor) and mask.dtype == torch.bool:
                self.host_reads.append("mask")
                self.current_stream(mask._index).synchronize()

    def move(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """`tensor.to(device)` between host and devices; None for all that stays where it is."""
        device = kwargs.get("device", args[0] if args else None)
        if isinstance(device, torch.Tensor):
            device = device.device
        if not isinstance(device, (str, torch.device)) or torch.device(device) == tensor.device:
            return None
        if torch.device(device).type == "cpu":
            return self.read(tensor, "to") if isinstance(tensor, DeviceTensor) else None
        index = self.index(device)
        moved = DeviceTensor(poisoned(_host(tensor)), index)
        self.copy(moved, tensor, kwargs.get("non_blocking", False))
        return moved

    def copy(self, to: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> None:
        """Copy on the current stream of the device, which may come to it late."""
        self.fail("copy")
        if not isinstance(to, DeviceTensor):
            assert isinstance(source, DeviceTensor)
            target, data, index = to, source.host, source._index
            if not (non_blocking and self.is_pinned(to)):
                self.host_reads.append("copy_")
        else:
            target, data, index = to.host, _host(source), to._index
            if not isinstance(source, DeviceTensor) and not self.is_pinned(source):
                self.pageable_copies.append(source.nbytes)
                data = data.clone()  # staged at once
        self.touch(index)
        stream = self.current_stream(index)
        stream.add(lambda: target.copy_(data))
        if not isinstance(to, DeviceTensor) and not (non_blocking and self.is_pinned(to)):
            stream.synchronize()

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An ATen op: views at once, all else when the stream comes to it."""
        tensors = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)]
        indices = {tensor._index for tensor in tensors if isinstance(tensor, DeviceTensor)}
        if len(indices) > 1 and func is not torch.ops.aten.copy_.default:
            raise CudaError(f"{func}: tensors on several devices: {sorted(indices)}")
        index = min(indices)
        self.touch(index)
        if func is torch.ops.aten.copy_.default:
            self.copy(args[0], args[1], kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
            return args[0]
        for tensor in tensors:
            if not isinstance(tensor, DeviceTensor) and tensor.dim():
                raise CudaError(f"{func}: a tensor of the host among those of cuda:{index}")
        kwargs = {name: value for name, value in kwargs.items() if name != "device"}
        host_args, host_kwargs = tree_map(_host, args), tree_map(_host, kwargs)
        if func.is_view or func is torch.ops.aten.detach.default:
            return tree_map(lambda out: DeviceTensor(out, index) if isinstance(out, torch.Tensor) else out,
                            func(*host_args, **host_kwargs))  # fmt: skip
        stream = self.current_stream(index)
        if func._schema.is_mutable:
            stream.add(lambda: func(*host_args, **host_kwargs))
            return args[0]
        shapes = func(*tree_map(_meta, host_args), **tree_map(_meta, host_kwargs))
        results = tree_map(lambda out: poisoned(out) if isinstance(out, torch.Tensor) else out, shapes)

        def work() -> None:
            outs = func(*host_args, **host_kwargs)
            for result, out in zip(tree_leaves(results), tree_leaves(outs)):
                if isinstance(result, torch.Tensor):
                    result.copy_(out)

        stream.add(work)
        return tree_map(lambda out: DeviceTensor(out, index) if isinstance(out, torch.Tensor) else out, results)


_active: FakeCuda | None = None


def _cuda() -> FakeCuda:
    assert _active is not None, "outside of `with FakeCuda()`"
    return _active


def poisoned(like: torch.Tensor) -> torch.Tensor:
    """Memory of the host in the shape of `like` that no device has written to."""
    with torch._C.DisableTorchFunction():
        return torch.full_like(like, POISON.get(like.dtype, POISON_INT), device="cpu")


def _host(value: Any) -> Any:
    return value.host if isinstance(value, DeviceTensor) else value


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _fields(value: Any) -> Any:
    """The tensors in a structure whose dataclasses are opened."""
    if isinstance(value, (tuple, list)):
        return [_fields(item) for item in value]
    if isinstance(value, dict):
        return [_fields(item) for item in value.values()]
    names = getattr(type(value), "__dataclass_fields__", ())
    return [_fields(getattr(value, name)) for name in names] if names else value


def _unwrapped(value: Any) -> Any:
    """The same structure on the host, dataclasses included."""
    if isinstance(value, (tuple, list)):
        return type(value)(_unwrapped(item) for item in value)
    if isinstance(value, dict):
        return {name: _unwrapped(item) for name, item in value.items()}
    if names := getattr(type(value), "__dataclass_fields__", ()):
        return type(value)(*(_unwrapped(getattr(value, name)) for name in names))
    return _host(value)
