"""The metrics of a server's workers, on the server's own page.

vLLM's page shows the Prometheus registry of the process that answers HTTP; hits and misses are counted in its workers.
Each worker that has a drafter listens on an abstract Unix socket of this machine, whose name only the server's
processes know from their environment, and answers processes of the same user with its metrics as text. The server asks
when its page is read, waits for a bounded time, and shows what it knew before where a worker does not answer.
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

METRICS_ENV = "VLLM_SSD_METRICS"
"""Environment variable with the name that a server's workers listen under."""
ANSWER_S = 0.1
"""The page waits so long for one worker."""
MAX_BYTES = 1 << 20
PEER = struct.Struct("3i")


def address(name: str, replica: int) -> str:
    """The socket of a replica's worker; abstract, so that it goes with its process."""
    return f"\0vllm-ssd/{name}/{replica}"


class MetricsListener:
    """Answers whoever connects with `render()`, on a thread of its own, until `close`."""

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
        """Listen no more; idempotent."""
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
    """What a worker answers, "" where there is none, None where it takes too long."""
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
    """Metrics of the workers of one server, for `prometheus_client`; each sample is labelled with its replica.

    replicas: their data-parallel indices
    """

    def __init__(self, name: str, replicas: Sequence[int]) -> None:
        self._name = name
        self._known: dict[int, str] = dict.fromkeys(replicas, "")

    def collect(self) -> Iterator[Metric]:
        """One family a name, with the samples of all replicas."""
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
        """Nothing: which metrics there are is known when a worker answers."""
        return []


_shown: dict[str, WorkersCollector] = {}


def show_workers(replicas: Sequence[int], registry: CollectorRegistry = REGISTRY) -> str:
    """Put the workers that this process is about to start on its metrics page; returns the name to give them.

    A process that configures the same server twice gets one page for it.
    """
    name = os.environ.get(METRICS_ENV) or os.urandom(16).hex()
    if name not in _shown:
        _shown[name] = WorkersCollector(name, replicas)
        registry.register(_shown[name])
    return name
