"""The one place that talks to Ray."""

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
"""Of the named actors of all pools; theirs are "POOL/DRAFTER"."""
Handle = Any
"""Of an actor."""


class NoCluster(RuntimeError):
    """There is no cluster that may be used; the message is the one sentence the user needs."""


class BadResources(ValueError):
    """What Ray cannot reserve, wherever it may be; the message is the one sentence the user needs."""


def join(unauthenticated: bool) -> None:
    """Become a driver of the cluster that runs on this host, or that RAY_ADDRESS names; raises `NoCluster`.

    unauthenticated: whether one will do in which everybody who reaches its ports may run code
    """
    if not unauthenticated and not is_authenticated(os.environ):
        raise NoCluster(
            "Ray runs what anybody who reaches its ports tells it: start the cluster and this server with "
            "RAY_AUTH_MODE=token (or RAY_USE_TLS=1), or accept that with ray_unauthenticated"
        )
    try:
        ray.init("auto", namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise NoCluster(f"no Ray cluster can be joined from this host ({reason})") from None


def is_on_a_node() -> bool:
    """Whether the raylet that this driver joined by is alive; without it, nothing that it asks for has a place."""
    own = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == own and node["Alive"] for node in ray.nodes())


def quit() -> None:
    """Leave the cluster; drafters of pools stay."""
    ray.shutdown()


def is_authenticated(environment: Mapping[str, str]) -> bool:
    """Whether a process with this environment and its cluster prove to each other who they are."""
    has_tls = environment.get("RAY_USE_TLS", "").lower() in ("1", "true")
    return has_tls or environment.get("RAY_AUTH_MODE", "").lower() in ("token", "k8s")


def here() -> tuple[str, str]:
    """The address of this actor's node, and "HOST:PORT" of the GCS."""
    return ray.util.get_node_ip_address(), ray.get_runtime_context().gcs_address


def end_this_actor() -> None:
    """End the actor that this process is, for good; from any thread."""
    ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


def place(actor: type, name: str, spec: DrafterSpec, pool: str = "") -> Handle:
    """Have Ray place a drafter; one of a pool lives on without this driver.

    Raises `BadResources` for amounts that Ray does not take.
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
    """The drafters of a pool by their names."""
    prefix, found = f"{pool}/", {}
    for name in ray.util.list_named_actors():
        if isinstance(name, str) and name.startswith(prefix):
            try:
                found[name.removeprefix(prefix)] = ray.get_actor(name, namespace=NAMESPACE)
            except ValueError:  # it has just ended
                continue
    return found


def spec_of(handle: Handle, timeout_s: float) -> DrafterSpec | None:
    """What a drafter was made with, or None while it has no place."""
    try:
        return msgspec.json.decode(ray.get(handle.spec.remote(), timeout=timeout_s), type=DrafterSpec)
    except (RayError, TimeoutError):
        return None


def leave(handle: Handle) -> None:
    """Have a drafter leave its pool."""
    handle.leave.remote()


def end(handle: Handle) -> None:
    """End an actor, and its drafter with it, for good."""
    ray.kill(handle, no_restart=True)


class Watch:
    """Asks actors for their status, without waiting long for any."""

    def __init__(self) -> None:
        self._asked: dict[str, Any] = {}
        self._known: dict[str, Status] = {}

    def look(self, handles: Mapping[str, Handle], timeout_s: float) -> tuple[dict[str, Status], set[str]]:
        """What each actor said last, for those that ever said anything, and the names of those that are dead for good.

        Waits `timeout_s` at most. An actor that cannot be reached keeps its status: whether its drafter is there, its
        targets know better.
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
    """Why there are fewer drafters that are ready than are wanted, with numbers; "" for enough."""
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
        problems.append(f"{num_wanted - num_ready} of them load")
    return f"{num_ready} of {num_wanted} drafters: {'; '.join(problems)}"


def json_of(resources: Mapping[str, float]) -> str:
    """As a user writes them."""
    return "{" + ", ".join(f'"{name}": {amount:g}' for name, amount in resources.items()) + "}"
