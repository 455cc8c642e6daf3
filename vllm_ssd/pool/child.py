"""The drafter process of an actor."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vllm_ssd.config import SSDConfig
from vllm_ssd.link.credential import write_credential
from vllm_ssd.link.environment import drafter_environment
from vllm_ssd.link.placement import place_standalone, run_on
from vllm_ssd.link.process import DRAFTER_MODULE
from vllm_ssd.link.roster import Report
from vllm_ssd.pool.spec import DrafterSpec

MAX_REPORT_BYTES = 1 << 16


def start_process(command: Sequence[str], keeper: int, environment: Mapping[str, str]) -> Any:
    """Start a drafter, which detaches itself from this process at once (`vllm_ssd.drafter.__main__.detach`)."""
    return subprocess.Popen(command, pass_fds=[keeper], env=environment, stdin=subprocess.DEVNULL)


class DrafterChild:
    """A drafter that listens on `host`; `run` starts it and returns why it has ended.

    registry: address of Ray's GCS; on_report: called with the drafter's reports
    """

    def __init__(
        self,
        spec: DrafterSpec,
        host: str,
        registry: str,
        on_report: Callable[[Report], None],
        start: Callable[..., Any] = start_process,
    ) -> None:
        self._spec = spec
        self._host = f"[{host}]" if ":" in host else host
        self._registry = registry
        self._on_report = on_report
        self._start = start
        self._pid = 0

    def run(self) -> str:
        """Start the drafter and follow its reports until it ends; raises ValueError for invalid keys."""
        spec = self._spec
        config = SSDConfig.from_user(spec.keys)
        options, environment, _ = place_standalone(config, spec.max_num_seqs, on_cpu=spec.on_cpu)
        if missing := run_on(options.cpus):
            raise ValueError(f"drafter_cpus: the drafter may not run on CPU {', '.join(map(str, missing))}")
        ours, theirs = socket.socketpair()
        with tempfile.TemporaryDirectory(prefix="vllm-ssd-") as folder, ours:
            key = Path(folder) / "ssd.pem"
            write_credential(key, spec.credential.encode())
            options = msgspec.structs.replace(
                options, key=str(key), keeper=theirs.fileno(), registry=self._registry, parent_pid=0
            )
            command = [sys.executable, "-m", DRAFTER_MODULE, f"{self._host}:0", msgspec.json.encode(options).decode()]
            with theirs:
                process = self._start(command, theirs.fileno(), drafter_environment(os.environ, environment))
            process.wait()
            return self._follow(ours, key)

    def stop(self, hard: bool = False) -> None:
        """Send SIGTERM, or SIGKILL if `hard`, to the drafter that reported last."""
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL if hard else signal.SIGTERM)

    def _follow(self, reports: socket.socket, key: Path) -> str:
        problem = ""
        with contextlib.suppress(OSError), reports.makefile("rb") as lines:
            while line := lines.readline(MAX_REPORT_BYTES):
                report = msgspec.json.decode(line, type=Report)
                self._pid, problem = report.pid, report.problem or problem
                if report.address:
                    key.unlink(missing_ok=True)  # the drafter has read it
                self._on_report(report)
        self._pid = 0
        return problem or "it ended"
