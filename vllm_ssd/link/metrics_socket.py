"""The workers' metrics on the server's own metrics page.

vLLM's page shows the Prometheus registry of the HTTP process, but hits and misses are counted in the workers. So each
worker with a drafter listens on an abstract Unix socket, whose random name the server's processes get through their
environment, and sends its metrics as text to processes of the same user. The server queries the workers whenever its
page is read, waits for a bounded time, and repeats the previous values of a worker that does not answer.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from vllm_ssd.config import METRICS_ENV

ANSWER_S = 0.1
"""Longest time that the page waits for one worker."""
MAX_BYTES = 1 << 20
PEER = struct.Struct("3i")


def address(name: str, replica: int) -> str:
    """Address of a replica's socket; abstract, so that it disappears with its process."""
    return f"\0vllm-ssd/{name}/{replica}"


class MetricsListener:
    """Sends `render()` to every client that connects, from its own thread, until `close`."""

    def __init__(self, name: str, replica: int, render: Callable[[], bytes]) -> None:
        self._render = render
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.bind(address(name, replica))
            self._socket.listen(8)
        except OSError:
            self._socket.close()
            raise
        threading.Thread(target=self._serve, name="ssd-metrics", daemon=True).start()

    def close(self) -> None:
        """Stop listening; idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(ANSWER_S)
                if _is_same_user(connection):
                    connection.sendall(self._render())


def _is_same_user(connection: socket.socket) -> bool:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size)
    return PEER.unpack(credentials)[1] == os.geteuid()


def ask(name: str, replica: int) -> str | None:
    """Ask a worker for its metrics; "" if there is no such worker, None if it does not answer in time."""
    deadline, data = time.monotonic() + ANSWER_S, bytearray()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.settimeout(ANSWER_S)
            connection.connect(address(name, replica))
            while len(data) < MAX_BYTES:
                connection.settimeout(max(deadline - time.monotonic(), 1e-3))
                part = connection.recv(1 << 16)
                if not part:
                    return data.decode()
                data += part
        except ConnectionRefusedError:
            return ""
        except (OSError, UnicodeDecodeError):
            pass
    return None


class WorkersCollector:
    """A `prometheus_client` collector for the workers of one server, which labels each sample with its replica.

    replicas: data-parallel indices of the workers
    """

    def __init__(self, name: str, replicas: Sequence[int]) -> None:
        self._name = name
        self._known: dict[int, str] = dict.fromkeys(replicas, "")

    def collect(self) -> Iterator[Metric]:
        """One metric family per name, with the samples of all replicas."""
        families: dict[str, Metric] = {}
        for replica, known in list(self._known.items()):
            answer = ask(self._name, replica)
            text = self._known[replica] = known if answer is None else answer
            for found in text_string_to_metric_families(text):
                family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
                for sample in found.samples:
                    family.add_sample(sample.name, {**sample.labels, "engine": str(replica)}, sample.value)
        yield from families.values()

    def describe(self) -> list[Metric]:
        """Empty, because the metrics are not known before a worker answers."""
        return []


_shown: dict[str, WorkersCollector] = {}


def show_workers(replicas: Sequence[int], registry: CollectorRegistry = REGISTRY) -> str:
    """Add the workers that this process will start to its metrics page; returns the name to pass to them.

    Idempotent if a process configures the same server twice.
    """
    name = os.environ.get(METRICS_ENV) or os.urandom(16).hex()
    if name not in _shown:
        _shown[name] = WorkersCollector(name, replicas)
        registry.register(_shown[name])
    return name
