"""Engines and drafters that are forked from a process that has imported vLLM, which saves most of their start.

`python tests/fork_server.py FD` is that process: it listens on the socket FD, and ends with the one that started it.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import random
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import setproctitle

ADDRESS = "TESTS_FORK_SERVER"
"""Environment variable of an engine whose drafters are forked, too: the address of their server, in hexadecimal."""
V2 = "VLLM_USE_V2_MODEL_RUNNER"
MODULES = [
    "vllm.entrypoints.llm",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.qwen3",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.worker.cpu_worker",
]
"""What engines and drafters import as they start."""


def preload() -> None:
    """Import what starts need; with the V2 runner in the environment, as `interpreted_v2` has it.

    The garbage collector leaves all that alone, in forks, too, for which vLLM collects several times a start.
    """
    if os.environ.get(V2) == "1":
        importlib.import_module("interpreted_v2")
    for module in MODULES:
        importlib.import_module(module)
    setproctitle.getproctitle()  # it finds the title's place by the environment, which forks replace
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None  # vLLM's, at an engine's end


class ForkedProcess:
    """Stands for `subprocess.Popen` of a process that a `ForkServer` has forked."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.pid, self.returncode = pid, None
        self._connection, self._lock = connection, threading.Lock()

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        return self._status(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once it has ended; raises `subprocess.TimeoutExpired`."""
        status = self._status(timeout)
        if status is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
        return status

    def kill(self) -> None:
        """End it at once."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def _status(self, timeout: float | None) -> int | None:
        with self._lock:
            if self.returncode is None and select.select([self._connection], [], [], timeout)[0]:
                answer = self._connection.recv(16)
                self.returncode = int(answer) if answer else -signal.SIGKILL  # the server has ended, and it with it
                self._connection.close()
            return self.returncode


def fork(
    address: str, program: str, arguments: Sequence[str], fd: int, environment: Mapping[str, str], output: int = 1
) -> ForkedProcess:
    """Have the server at `address` fork a process that runs `program`, one of `PROGRAMS`.

    arguments: of its command line, the last but `fd`, which follows them where `program` wants it; output: the
    descriptor of what it prints.
    """
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(bytes.fromhex(address))
    message = json.dumps([program, list(arguments), dict(environment)]).encode()
    socket.send_fds(connection, [len(message).to_bytes(4, "little")], [fd, output])
    connection.sendall(message)
    return ForkedProcess(connection, int(connection.recv(16)))


def fork_drafters() -> None:
    """Let drafters that this process starts be forked if it has been told of a server."""
    address = os.environ.get(ADDRESS)
    if not address:
        return
    from vllm_ssd.link import process

    def start(command: list[str], *, pass_fds: Sequence[int], env: Mapping[str, str], **arguments: Any) -> Any:
        if command[1:3] != ["-m", "vllm_ssd.drafter"]:  # a test's own
            return subprocess.Popen(command, pass_fds=pass_fds, env={**env, ADDRESS: address}, **arguments)
        return fork(address, "drafter", command[4:], *pass_fds, env)

    process.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": start})


class ForkServer:
    """The server's process, as the one that starts it sees it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        name = b"\0vllm-ssd-tests-" + os.urandom(8).hex().encode()
        self.address = name.hex()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(name)
            listener.listen()
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(listener.fileno())],
                pass_fds=[listener.fileno()],
                env={**environment},
                stdin=subprocess.DEVNULL,
            )

    @property
    def pid(self) -> int:
        """The parent of all that it forks."""
        return self._process.pid


class Server:
    """Forks what it is asked for, and tells how each fork ended."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener, self._selector = listener, selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def serve(self) -> None:
        """Answer for ever; a fork runs its program and ends."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._fork()
                else:
                    self._tell_end(key)

    def _fork(self) -> None:
        connection, _ = self._listener.accept()
        size, (fd, output), _, _ = socket.recv_fds(connection, 4, 2)
        message = b""
        while len(message) < int.from_bytes(size, "little"):
            message += connection.recv(1 << 20)
        pid = os.fork()
        if pid == 0:
            connection.close()
            self._close()
            self._run(*json.loads(message), fd, output)
        os.close(fd)
        os.close(output)
        connection.sendall(str(pid).encode())
        self._selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (connection, pid))

    def _close(self) -> None:
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                key.data[0].close()
                os.close(key.fd)
        self._listener.close()
        self._selector.close()

    def _tell_end(self, key: selectors.SelectorKey) -> None:
        connection, pid = key.data
        self._selector.unregister(key.fileobj)
        os.close(key.fd)
        _, status = os.waitpid(pid, 0)
        with suppress(OSError), connection:
            connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())

    def _run(self, program: str, arguments: list[str], environment: dict[str, str], fd: int, output: int) -> None:
        os.environ.clear()
        os.environ.update(environment)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        random.seed()
        tempfile.tempdir = None  # as `environment` has it
        status = 1
        try:
            status = PROGRAMS[program](arguments, fd)
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # to take vLLM's modules apart takes seconds


def run_engine(arguments: list[str], fd: int) -> int:
    """Be the process of an `engines.Engine`; returns its exit status."""
    sys.argv = [*arguments, str(fd)]
    from engine_host import EngineHost

    from vllm_ssd.planning.engine_host import serve

    serve(EngineHost)
    return 0


def run_drafter(arguments: list[str], fd: int) -> int:
    """Be a drafter, whose parent is this fork's server; returns its exit status."""
    import msgspec

    from vllm_ssd.drafter.__main__ import main
    from vllm_ssd.link.options import DrafterOptions

    setproctitle.setproctitle(f"python -m vllm_ssd.drafter {fd} {arguments[0]}")
    options = msgspec.json.decode(arguments[0], type=DrafterOptions)
    return main(fd, msgspec.structs.replace(options, parent_pid=os.getppid()))


def run_listener(arguments: list[str], fd: int) -> int:
    """Be a drafter that listens, with its keeper at `fd`; returns its exit status."""
    import msgspec

    from vllm_ssd.drafter.__main__ import main
    from vllm_ssd.link.options import DrafterOptions

    place, options = arguments
    return main(place, msgspec.structs.replace(msgspec.json.decode(options, type=DrafterOptions), keeper=fd))


def run_host(arguments: list[str], fd: int) -> int:
    """Be `python ARGUMENTS... FD`, the process of an `EngineProcess`; returns its exit status."""
    return run_script([*arguments, str(fd)], fd)


def run_script(arguments: list[str], fd: int) -> int:
    """Be `python ARGUMENTS...`, a script or with "-m" a module, whose drafters are forked; returns its exit status."""
    fork_drafters()
    is_module = arguments[0] == "-m"
    name, *_ = sys.argv = arguments[is_module:]
    if is_module:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(name).parent))
        runpy.run_path(name, run_name="__main__")
    return 0


PROGRAMS = {
    "engine": run_engine,
    "drafter": run_drafter,
    "listener": run_listener,
    "host": run_host,
    "script": run_script,
}

if __name__ == "__main__":
    from vllm_ssd.link.lifetime import die_with

    die_with(os.getppid())
    sys.path.insert(0, str(Path(__file__).parent))
    preload()
    Server(socket.socket(fileno=int(sys.argv[1]))).serve()
