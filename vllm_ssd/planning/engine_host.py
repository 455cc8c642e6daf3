"""An engine in its own process: start it, call it, stop it.

The process runs a program that ends in `serve(Host)`. A call is a pickled (method of Host, keyword arguments); the
answer is a pickled (True, result) or (False, exception as text).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from vllm_ssd.link.lifetime import die_with

EXIT_TIMEOUT_S = 10.0
"""Time for an engine to exit by itself after its connection has closed; then it is killed."""
LOG_LINES = 40


class EngineFailed(RuntimeError):
    """An engine raised, exited or hung; the message has the end of its log and, in the last line, its exception."""


class EngineProcess:
    """An engine in its own process, which ends with the thread that started it.

    program: arguments to Python for a program that calls `serve`; environment: variables to set, or to remove if None;
    cpus: cores to run on, empty for all; name: subject of error messages; idle_stop: suspend the process and its
    children while no call is pending; answer_timeout_s: time limit of a call, None for no limit. Every method but
    `close` may raise `EngineFailed`.
    """

    def __init__(
        self,
        program: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str | None] | None = None,
        cpus: Sequence[int] = (),
        name: str = "the engine",
        idle_stop: bool = False,
        answer_timeout_s: float | None = None,
    ) -> None:
        self.log, self.pending = log, False
        self._name, self._idle_stop, self._answer_timeout_s = name, idle_stop, answer_timeout_s
        variables = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **(environment or {})}
        self._connection, theirs = Pipe()
        with theirs, log.open("w") as output:
            self.process = self._start(
                program,
                theirs.fileno(),
                {key: value for key, value in variables.items() if value is not None},
                output.fileno(),
            )
        self.pin(cpus)

    def _start(
        self, program: Sequence[str], connection: int, environment: Mapping[str, str], output: int
    ) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *program, str(connection)],
            pass_fds=[connection],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )

    def pin(self, cpus: Sequence[int]) -> None:
        """Pin the current threads of the process to `cpus`; later threads and child processes inherit the affinity."""
        if cpus and sys.platform == "linux":
            with suppress(FileNotFoundError):  # the process has ended; the next call reports that
                for thread in os.listdir(f"/proc/{self.process.pid}/task"):
                    with suppress(ProcessLookupError):
                        os.sched_setaffinity(int(thread), cpus)

    def send(self, method: str, **arguments: Any) -> None:
        """Call a method of the host without waiting for its result."""
        if self.pending:
            self.receive()
        self._signal(signal.SIGCONT)
        try:
            self._connection.send((method, arguments))
        except OSError:
            raise self._failure("ended") from None
        self.pending = True

    def receive(self, timeout_s: float | None = None) -> Any:
        """Wait for the result of the last `send`; kill the engine if there is none within `timeout_s`, if given."""
        self.pending = False
        timeout_s = self._answer_timeout_s if timeout_s is None else timeout_s
        try:
            if not self._connection.poll(timeout_s):
                self._kill()
                raise self._failure(f"gave no answer within {timeout_s:g} s")
            succeeded, answer = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._failure("ended") from None
        self._signal(signal.SIGSTOP)
        if not succeeded:
            raise self._failure("failed", answer)
        return answer

    def call(self, method: str, **arguments: Any) -> Any:
        """Call a method of the host and wait for its result."""
        self.send(method, **arguments)
        return self.receive()

    def close(self) -> None:
        """End the process and its children; idempotent."""
        self._signal(signal.SIGCONT)
        self._connection.close()
        try:
            self.process.wait(EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._kill()

    def _kill(self) -> None:
        for process in self._tree():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self._idle_stop:
            for process in self._tree():
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def _tree(self) -> list[psutil.Process]:
        """The process and its descendants; empty once it has ended."""
        try:
            process = psutil.Process(self.process.pid)
            return [process, *process.children(recursive=True)] if self.process.poll() is None else []
        except psutil.NoSuchProcess:
            return []

    def _failure(self, what: str, cause: str = "") -> EngineFailed:
        lines = [f"{self._name} {what}; the end of its log:", end_of_log(self.log), cause]
        return EngineFailed("\n".join(lines).rstrip())


def end_of_log(log: Path) -> str:
    """The last lines of a log, preceded by any earlier error lines, since one of these is usually the cause."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    errors = [line for line in lines[:-LOG_LINES] if re.search(r"(Error|Failed|Exception): ", line)]
    return "\n".join([*errors, *lines[-LOG_LINES:]])


def threads_on(cpus: Sequence[int]) -> dict[str, str | None]:
    """Environment for an engine with one thread per core of `cpus`, not bound by vLLM; empty if `cpus` is."""
    return {"OMP_NUM_THREADS": str(len(cpus)), "VLLM_CPU_OMP_THREADS_BIND": "nobind"} if cpus else {}


def serve(make_host: Callable[[], Any]) -> None:
    """Serve an `EngineProcess`: call methods of `make_host()` until the connection closes.

    The last command-line argument is the connection's file descriptor.
    """
    die_with(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent shuts us down
    connection, host = Connection(int(sys.argv[-1])), make_host()
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, getattr(host, method)(**arguments))
        except Exception as error:  # the parent decides what a failure means
            traceback.print_exc()
            answer = (False, f"{type(error).__name__}: {error}")
        connection.send(answer)
