"""A Ray cluster of several raylets on this machine, whose parts tests may kill.

Ray is never imported in the tests' own process: it reads its environment once, and a driver ends with the GCS.
`python tests/ray_cluster.py` starts the cluster, adds a node for each line of resources that it reads, and ends it all
at end-of-file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fork_server
import psutil

TESTS = Path(__file__).parent
AGENT = [sys.executable, str(TESTS / "ray_drafters.py")]
"""Command of an agent, to which the class of its actors is added."""
NODE = {"num_cpus": 0, "object_store_memory": 80 << 20}
GCS_GONE_S = float(os.environ.get("VLLM_SSD_TESTS_GCS_GONE_S", "6"))
"""The target is to decode with its drafters so long after the GCS was killed."""
RECONNECT_S = round(GCS_GONE_S / 2)
"""Ray's processes end so long after the GCS has; it is a minute unless one says so."""


def environment() -> dict[str, str]:
    """Of the cluster and of whoever joins it."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "t" * 64,
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(RECONNECT_S),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS / 'unit'}",
    }


class RayCluster:
    """A head without resources, and the nodes that are added."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.address = self._answer()
        self._orphans: list[psutil.Process] = []  # of what was killed

    def _answer(self) -> str:
        assert self._process.stdout is not None
        said = []
        for line in self._process.stdout:
            if line.startswith("cluster: "):
                return line.removeprefix("cluster: ").strip()
            said.append(line)
        raise AssertionError("".join(said))

    def add_node(self, **resources: float) -> None:
        """A raylet with these resources."""
        assert self._process.stdin is not None
        print(json.dumps(resources), file=self._process.stdin, flush=True)
        self._answer()

    def of(self, name: str) -> list[psutil.Process]:
        """Processes of the cluster by what their names begin with; "ray::X" are actors of class X."""
        found = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with suppress(psutil.Error):
                title = "".join(process.cmdline()[:1]).rpartition("/")[2]  # empty once it has ended
                if process.status() != psutil.STATUS_ZOMBIE and title.startswith(name):
                    found.append(process)
        return found

    def kill(self, name: str) -> None:
        """SIGKILL for all of that name."""
        processes = self.of(name)
        assert processes, name
        self._orphans += psutil.Process(self._process.pid).children(recursive=True)
        for process in processes:
            process.kill()

    def shutdown(self) -> None:
        """End what is left of it."""
        left = psutil.Process(self._process.pid).children(recursive=True)
        assert self._process.stdin is not None
        if self.of("gcs_server"):  # without it, Ray's own end waits for it in vain
            self._process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
        for process in [*left, *self._orphans, self._process]:
            with suppress(psutil.Error):
                process.kill()


@contextmanager
def running(fork_server_address: str) -> Iterator[RayCluster]:
    """A cluster, which this process's children are told of in their environment."""
    changed = environment() | {fork_server.ADDRESS: fork_server_address}
    before = {name: os.environ.get(name) for name in (*changed, "RAY_ADDRESS")}
    os.environ.update(changed)
    cluster = None
    try:
        cluster = RayCluster()
        os.environ["RAY_ADDRESS"] = cluster.address
        yield cluster
    finally:
        if cluster is not None:
            cluster.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def reap(*_: object) -> None:
    """Take note of children that have ended: zombies keep what they held in Ray's eyes."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main() -> None:
    """The cluster's own process."""
    import signal

    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    print("cluster:", cluster.address, flush=True)
    signal.signal(signal.SIGCHLD, reap)
    for line in sys.stdin:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        resources = json.loads(line)
        cluster.add_node(**NODE, num_gpus=resources.pop("GPU", 0), resources=resources)
        signal.signal(signal.SIGCHLD, reap)
        reap()
        print("cluster: another node", flush=True)
    with suppress(Exception):  # of what a test has killed
        cluster.shutdown()


if __name__ == "__main__":
    main()
