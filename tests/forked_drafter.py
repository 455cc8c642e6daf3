"""A drafter that is forked from a process that has imported vLLM, which saves most of its start."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec


class ForkedDrafter:
    """In place of `subprocess.Popen` in `vllm_ssd.link.process`, for one start; to be made before any engine runs.

    The fork waits for that start, with the socket and the options of a drafter, and then is one. With `tree_attention`
    it has the drafter's own attention, which a CPU otherwise has no use for, or refuses with the reason.
    """

    def __init__(self, *, tree_attention: bool = False) -> None:
        self._tree_attention = tree_attention
        self._ours, theirs = socket.socketpair()
        self.pid = os.fork()
        self.returncode: int | None = None
        if self.pid == 0:
            self._ours.close()
            self._become_drafter(theirs)
        theirs.close()

    def install(self) -> None:
        """Let the next drafter that this process starts be this one."""
        from vllm_ssd.link import process

        process.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": self._start})

    def _start(self, command: Sequence[str], *, pass_fds: Sequence[int], env: Mapping[str, str], **_: Any) -> Any:
        if self._ours.fileno() < 0:
            raise RuntimeError("the forked drafter has ended, and there is but one")
        socket.send_fds(self._ours, [msgspec.json.encode([command[-1], env])], list(pass_fds))
        self._ours.close()
        return self

    def _become_drafter(self, connection: socket.socket) -> None:
        status = 1
        try:
            message, (fd, *_), _, _ = socket.recv_fds(connection, 1 << 20, 1)
            options, environment = msgspec.json.decode(message)
            os.environ.clear()
            os.environ.update(environment)
            from vllm_ssd.drafter import server
            from vllm_ssd.drafter.__main__ import main
            from vllm_ssd.link.options import DrafterOptions

            options = msgspec.json.decode(options, type=DrafterOptions)
            if self._tree_attention:
                options = msgspec.structs.replace(options, tree_attention=True)
                server._start_over = lambda *_: None  # the reason is what is asked for, not another drafter
            status = main(fd, options)
        except ValueError:  # nobody wanted a drafter
            status = 0
        finally:
            os._exit(status)

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once it has ended."""
        deadline = time.monotonic() + (timeout or 60.0)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("forked drafter", timeout or 60.0)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        """End it at once."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
