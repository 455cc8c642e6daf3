"""An engine in a process of its own: start it, call it, stop it.

The process runs a program that ends in `serve(Host)`. A call is a pickled (method of Host, keyword arguments), its
answer a pickled (True, result) or (False, exception as text).
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
"""An engine whose connection has closed has this long to end by itself."""
LOG_LINES = 40


class EngineFailed(RuntimeError):
    """An engine raised, ended or hung; the message holds the end of its log, and in the last line what it raised."""


class EngineProcess:
    """An engine in a process of its own, which ends with the thread that started it.

    program: Python's arguments for a program that calls `serve`; environment: variables to set, or with None to remove;
    cpus: cores to run on, empty for all; name: the subject of error messages; idle_stop: suspend the process and its
    children while no call is pending; answer_timeout_s: longest time a call takes, None for any. Every method but
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
        """Move the threads that the process has now to `cpus`; those they start later, and children, inherit this."""
        if cpus and sys.platform == "linux":
            with suppress(FileNotFoundError):  # it has ended, which the next call reports
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
        """The result of the last `send`; an engine without one after `timeout_s`, if given, is killed."""
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
        """End the process, and its children with it; idempotent."""
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
    """The last lines of a log, after the errors further up, one of which is usually the cause."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    errors = [line for line in lines[:-LOG_LINES] if re.search(r"(Error|Failed|Exception): ", line)]
    return "\n".join([*errors, *lines[-LOG_LINES:]])


def threads_on(cpus: Sequence[int]) -> dict[str, str | None]:
    """The environment of an engine with one thread on each of `cpus`; it is not vLLM that binds them."""
    return {"OMP_NUM_THREADS": str(len(cpus)), "VLLM_CPU_OMP_THREADS_BIND": "nobind"} if cpus else {}


def serve(make_host: Callable[[], Any]) -> None:
    """Answer the calls of an `EngineProcess` with methods of `make_host()` until it closes the connection.

    The last argument of the command line is the connection's descriptor.
    """
    die_with(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent closes the connection
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
