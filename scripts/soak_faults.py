"""The faults of a soak: a seeded schedule, and how each is done to a drafter from outside, by signal, limit and socket.

Linux only. A fault *hits* when what it is made of was seen: the process was there, and died or was stopped by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import random
import re
import resource
import signal
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import psutil

from vllm_ssd.link.process import HANG_S
from vllm_ssd.link.transport import SOCKET_BUFFER_BYTES

KINDS = ("kill", "segv", "hang", "start", "memory", "socket", "slow", "disk")
"""SIGKILL; SIGSEGV; SIGSTOP for 1 to 30 s; SIGKILL while the next one boots; no more memory; both socket buffers as
small as can be, and full; a core for a fifth of the time; SIGKILL, and no byte more in any file for worker and drafter,
under which no drafter starts."""
PIDFD_GETFD = 438  # the number of the system call, on every architecture
SIOCOUTQ = 0x5411
BOOT_S = 60.0
"""A drafter takes less to come up, on a machine with two busy cores."""
SLICE_S = 0.05
AWAKE = 0.2
Limits = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done.

    seconds: it lasts, if it lasts; share: of a boot, after which it comes; pause_s: shortest rest before it
    """

    kind: str
    seconds: float
    share: float
    pause_s: float

    @property
    def hangs(self) -> bool:
        """Whether the target has to give the drafter up for its silence."""
        return self.kind in ("hang", "socket") and self.seconds > HANG_S


def schedule(seed: int, kinds: tuple[str, ...], longest_hang_s: float = 30.0) -> Iterator[Fault]:
    """Faults without end: every kind once, in random order, before any comes again.

    Hangs last 1 s to `longest_hang_s`, half of them longer than the target's patience where that is allowed.
    """
    rng = random.Random(f"{seed}/faults")
    while True:
        for kind in rng.sample(kinds, len(kinds)):
            seconds = rng.uniform(2.0, 6.0)
            if kind == "hang":
                is_long = rng.random() < 0.5 and longest_hang_s > HANG_S
                low, high = (HANG_S + 1, longest_hang_s) if is_long else (1.0, min(HANG_S - 1, longest_hang_s))
                seconds = rng.uniform(low, max(low, high))
            yield Fault(kind, seconds, rng.random(), rng.uniform(0.5, 3.0))


def worker_of(process: psutil.Process) -> int | None:
    """The process id of the worker that a drafter was started by; None of a process that is no drafter."""
    match = re.search(r'vllm_ssd\.drafter .*"parent_pid":(\d+),', " ".join(process.cmdline()))
    return int(match[1]) if match else None


def drafters_of(engine: psutil.Process) -> list[psutil.Process]:
    """The drafter processes that were started by the worker `engine`, oldest first; also those that outlived it."""
    found, parents = [], {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if worker_of(process) == engine.pid:
                parents[process.pid] = process.ppid()
                found.append(process)
    # A fork of a drafter has its command line until it executes something else.
    return sorted((p for p in found if parents[p.pid] not in parents), key=psutil.Process.create_time)


class Injector:
    """Does faults to the drafters of one worker; `live()` says which drafter is connected, if any."""

    def __init__(self, engine: psutil.Process, boot_s: float = 8.0) -> None:
        self._engine = engine
        self._boot_s = boot_s  # how long a boot takes, as far as was seen

    async def inject(self, fault: Fault) -> bool:
        """Do it, and undo what outlives no process; returns whether it hit."""
        drafter = self._drafter()
        if drafter is None:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            return await getattr(self, f"_{fault.kind}")(drafter, fault)
        return fault.kind in ("hang", "socket", "slow", "memory")  # it died of what was done

    def learn(self, boot_s: float) -> None:
        """A drafter took so long to come up."""
        self._boot_s = boot_s

    def _drafter(self) -> psutil.Process | None:
        alive = [p for p in drafters_of(self._engine) if p.status() != psutil.STATUS_ZOMBIE]
        return alive[-1] if alive else None

    async def _kill(self, drafter: psutil.Process, fault: Fault) -> bool:
        drafter.send_signal(signal.SIGKILL)
        return await gone(drafter)

    async def _segv(self, drafter: psutil.Process, fault: Fault) -> bool:
        drafter.send_signal(signal.SIGSEGV)
        return await gone(drafter)

    async def _hang(self, drafter: psutil.Process, fault: Fault) -> bool:
        async with stopped(drafter):
            await asyncio.sleep(fault.seconds)
        return True

    async def _start(self, drafter: psutil.Process, fault: Fault) -> bool:
        drafter.kill()
        if not await gone(drafter):
            return False
        deadline = time.monotonic() + BOOT_S
        while (successor := self._drafter()) is None or successor == drafter:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.02)
        await asyncio.sleep(fault.share * self._boot_s)
        successor.kill()
        return await gone(successor)

    async def _memory(self, drafter: psutil.Process, fault: Fault) -> bool:
        with limited(drafter, resource.RLIMIT_AS, drafter.memory_info().vms):
            await asyncio.sleep(fault.seconds)
        return True

    async def _socket(self, drafter: psutil.Process, fault: Fault) -> bool:
        """The kernel doubles what is asked for, and grants some kilobytes at least."""
        full = False
        with contextlib.ExitStack() as stack:
            for process in (drafter, self._engine):
                stack.enter_context(small_buffers(process))
            async with stopped(drafter):
                deadline = time.monotonic() + fault.seconds / 2
                while time.monotonic() < deadline:
                    await asyncio.sleep(0.1)
                    full = full or any(waiting >= least() / 2 for waiting in waiting_bytes(self._engine))
            await asyncio.sleep(fault.seconds / 2)
        return full

    async def _slow(self, drafter: psutil.Process, fault: Fault) -> bool:
        deadline = time.monotonic() + fault.seconds
        while time.monotonic() < deadline:
            async with stopped(drafter):
                await asyncio.sleep((1 - AWAKE) * SLICE_S)
            await asyncio.sleep(AWAKE * SLICE_S)
        return True

    async def _disk(self, drafter: psutil.Process, fault: Fault) -> bool:
        """The next drafter inherits the limit: neither it nor the server can write to a file while it boots."""
        with limited(self._engine, resource.RLIMIT_FSIZE, 0):
            drafter.kill()
            if not await gone(drafter):
                return False
            await asyncio.sleep(max(fault.seconds, self._boot_s))
            successor = self._drafter()
        if successor is not None:
            with contextlib.suppress(psutil.Error):
                successor.rlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return True


@contextlib.asynccontextmanager
async def stopped(process: psutil.Process) -> AsyncIterator[None]:
    """Keep a process from running for as long as the context lasts."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)


async def gone(process: psutil.Process, timeout_s: float = 5.0) -> bool:
    """Whether a process has ended within the time; one that nobody has waited for has."""
    deadline = time.monotonic() + timeout_s
    while is_alive(process):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs or is stopped."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return False


@contextlib.contextmanager
def limited(process: psutil.Process, what: int, soft: int) -> Iterator[None]:
    """Lower a process's own limit for as long as the context lasts; it ends with the process."""
    before: Limits = process.rlimit(what)
    process.rlimit(what, (soft, before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(psutil.Error, OSError):
            process.rlimit(what, before)


def link_sockets(process: psutil.Process) -> list[socket.socket]:
    """Duplicates of a process's ends of links: stream sockets without a name, with the transport's send buffer.

    Close them at once: while one is open, the other end does not see the process die.
    """
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    found = []
    pidfd = os.pidfd_open(process.pid)
    try:
        for name in os.listdir(f"/proc/{process.pid}/fd"):
            with contextlib.suppress(OSError):
                if not os.readlink(f"/proc/{process.pid}/fd/{name}").startswith("socket:"):
                    continue
                if (fd := syscall(PIDFD_GETFD, pidfd, int(name), 0)) < 0:
                    continue
                end = socket.socket(fileno=fd)
                if end.family == socket.AF_UNIX and end.type == socket.SOCK_STREAM and not end.getsockname():
                    found.append(end)
                else:
                    end.close()
    finally:
        os.close(pidfd)
    return found


@contextlib.contextmanager
def small_buffers(process: psutil.Process) -> Iterator[None]:
    """Leave the links of a process the smallest send buffers there are; others keep theirs."""
    changed = False
    for end in link_sockets(process):
        with end:
            if end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= granted():
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
                changed = True
    try:
        yield
    finally:
        if changed and is_alive(process):
            smallest = least()
            for end in link_sockets(process):
                with end:
                    if end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == smallest:
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)


def waiting_bytes(process: psutil.Process) -> list[int]:
    """Bytes in each small send buffer of a process that nobody has read yet."""
    import fcntl

    waiting = []
    for end in link_sockets(process):
        with end:
            if end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == least():
                waiting.append(struct.unpack("i", fcntl.ioctl(end, SIOCOUTQ, b"\0" * 4))[0])
    return waiting


def granted() -> int:
    """What the kernel makes of the send buffer that the transport asks for."""
    return _granted(SOCKET_BUFFER_BYTES)


def least() -> int:
    """The smallest send buffer."""
    return _granted(1)


def _granted(size: int) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
        return end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
