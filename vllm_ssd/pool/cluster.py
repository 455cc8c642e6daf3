"""All uses of Ray."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import msgspec
import ray
from ray.exceptions import ActorDiedError, RayError

from vllm_ssd.pool.spec import DrafterSpec, Status

NAMESPACE = "vllm-ssd"
"""Ray namespace of all pools; their actors are named "POOL/DRAFTER"."""
Handle = Any
"""A Ray actor handle."""


class NoCluster(RuntimeError):
    """Raised if no usable cluster is found; the message is one sentence for the user."""


class BadResources(ValueError):
    """Raised for resources that Ray can never reserve; the message is one sentence for the user."""


def join(unauthenticated: bool) -> None:
    """Become a driver of the cluster on this host, or of the one in RAY_ADDRESS; raises `NoCluster`.

    unauthenticated: allow a cluster in which anyone who reaches its ports may run code
    """
    if not unauthenticated and not is_authenticated(os.environ):
        raise NoCluster(
            "anyone who reaches the ports of this Ray cluster may run code: start the cluster and this server with "
            "RAY_AUTH_MODE=token (or RAY_USE_TLS=1), or accept that with ray_unauthenticated"
        )
    try:
        ray.init("auto", namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise NoCluster(f"no Ray cluster can be joined from this host ({reason})") from None


def is_on_a_node() -> bool:
    """Whether the raylet through which this driver joined is alive; without it nothing can be placed."""
    own = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == own and node["Alive"] for node in ray.nodes())


def quit() -> None:
    """Leave the cluster; drafters of pools keep running."""
    ray.shutdown()


def is_authenticated(environment: Mapping[str, str]) -> bool:
    """Whether a process with this environment and its cluster authenticate each other."""
    has_tls = environment.get("RAY_USE_TLS", "").lower() in ("1", "true")
    return has_tls or environment.get("RAY_AUTH_MODE", "").lower() in ("token", "k8s")


def here() -> tuple[str, str]:
    """Address of this actor's node, and "HOST:PORT" of the GCS."""
    return ray.util.get_node_ip_address(), ray.get_runtime_context().gcs_address


def end_this_actor() -> None:
    """End this process's actor without a restart; may be called from any thread."""
    ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


def place(actor: type, name: str, spec: DrafterSpec, pool: str = "") -> Handle:
    """Have Ray place a drafter; in a pool it outlives this driver.

    Raises `BadResources` for amounts that Ray does not accept.
    """
    resources = dict(spec.resources)
    options: dict[str, Any] = {
        "num_cpus": resources.pop("CPU", 0),
        "num_gpus": resources.pop("GPU", 0),
        "max_restarts": -1,
        "max_task_retries": 0,
    }
    if "memory" in resources:
        options["memory"] = resources.pop("memory")
    if pool:
        options |= {"name": f"{pool}/{name}", "lifetime": "detached"}
    try:
        remote = ray.remote(actor).options(resources=resources, **options)  # pyright: ignore[reportAttributeAccessIssue]
        return remote.remote(name, msgspec.json.encode(spec))
    except (ValueError, TypeError, OverflowError) as error:
        raise BadResources(f"Ray cannot reserve {json_of(spec.resources)}: {error}") from None


def of_pool(pool: str) -> dict[str, Handle]:
    """The drafters of a pool, by name."""
    prefix, found = f"{pool}/", {}
    for name in ray.util.list_named_actors():
        if isinstance(name, str) and name.startswith(prefix):
            try:
                found[name.removeprefix(prefix)] = ray.get_actor(name, namespace=NAMESPACE)
            except ValueError:  # it has ended in the meantime
                continue
    return found


def spec_of(handle: Handle, timeout_s: float) -> DrafterSpec | None:
    """The settings of a drafter; None while Ray has not placed it."""
    try:
        return msgspec.json.decode(ray.get(handle.spec.remote(), timeout=timeout_s), type=DrafterSpec)
    except (RayError, TimeoutError):
        return None


def leave(handle: Handle) -> None:
    """Have a drafter leave its pool."""
    handle.leave.remote()


def end(handle: Handle) -> None:
    """End an actor and its drafter, without a restart."""
    ray.kill(handle, no_restart=True)


class Watch:
    """Asks actors for their status with a bounded wait."""

    def __init__(self) -> None:
        self._asked: dict[str, Any] = {}
        self._known: dict[str, Status] = {}

    def look(self, handles: Mapping[str, Handle], timeout_s: float) -> tuple[dict[str, Status], set[str]]:
        """The latest status of each actor that has answered so far, and the names of permanently dead actors.

        Waits up to `timeout_s`. An unreachable actor keeps its status, because its targets notice by themselves whether
        its drafter is gone.
        """
        dead: set[str] = set()
        for name in (self._asked.keys() | self._known.keys()) - handles.keys():
            self._asked.pop(name, None)
            self._known.pop(name, None)
        for name, handle in handles.items():
            if name not in self._asked:
                self._asked[name] = handle.status.remote()
        asked = list(self._asked.values())
        ready, _ = ray.wait(asked, num_returns=len(asked), timeout=timeout_s) if asked else ([], [])
        for name, reference in list(self._asked.items()):
            if reference not in ready:
                continue
            del self._asked[name]
            try:
                self._known[name] = msgspec.json.decode(ray.get(reference), type=Status)
            except ActorDiedError:
                dead.add(name)
                self._known.pop(name, None)
            except RayError:
                pass
        return dict(self._known), dead


def shortage(known: Mapping[str, Status], num_wanted: int, resources: Mapping[str, float]) -> str:
    """Why fewer than `num_wanted` drafters are ready; "" if enough are."""
    num_placed, num_ready = len(known), sum(bool(status.address) for status in known.values())
    if num_ready >= num_wanted:
        return ""
    problems = [f"on {status.node}: {status.problem}" for status in known.values() if status.problem]
    if num_placed < num_wanted and not resources:
        problems.append(f"Ray has placed {num_placed}")
    elif num_placed < num_wanted:
        total, free = ray.cluster_resources(), ray.available_resources()
        amounts = {name: (total.get(name, 0), free.get(name, 0)) for name in resources}
        several = len(amounts) > 1
        counts = "; ".join(
            f"{f'{name} ' if several else ''}{t:g} total, {f:g} free" for name, (t, f) in amounts.items()
        )
        problems.append(f"no node has {json_of(resources)} free ({counts})")
    elif not problems:
        problems.append(f"{num_wanted - num_ready} still loading")
    return f"{num_ready} of {num_wanted} drafters: {'; '.join(problems)}"


def json_of(resources: Mapping[str, float]) -> str:
    """Resources as a user writes them."""
    return "{" + ", ".join(f'"{name}": {amount:g}' for name, amount in resources.items()) + "}"
