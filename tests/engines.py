"""A client for engines in processes of their own, and the requests they get."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import fork_server

from vllm_ssd.planning.engine_host import EngineFailed, EngineProcess

__all__ = [
    "ENVIRONMENT",
    "FORKED_WORKERS",
    "HAS_V2",
    "ON_V2",
    "PAIR",
    "Engine",
    "EngineFailed",
    "assert_conclusive",
    "cached_tokens",
    "request",
    "run_program",
    "start_program",
    "texts",
]

HOST = Path(__file__).with_name("engine_host.py")
PAIR = Path(__file__).parent / "assets" / "pair"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
ON_GPU = os.environ.get("VLLM_SSD_TESTS_ON_GPU") == "1"
"""Whether engines run on GPU 0, their drafters beside them, instead of on the CPU."""
ON_V2 = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TORCHDYNAMO_DISABLE": "1", **({} if ON_GPU else {"TRITON_INTERPRET": "1"})}
"""Environment of an engine on vLLM's V2 model runner; of what inductor compiles, the interpreter knows nothing."""
FORKED_WORKERS = {"vllm.v1.executor.multiproc_executor.get_mp_context": partial(multiprocessing.get_context, "fork")}
"""Patches of an engine whose workers are forked from it; on a CPU vLLM spawns them, on a GPU it prefers to fork."""
HAS_V2 = importlib.util.find_spec("vllm.v1.worker.gpu.spec_decode.ngram") is not None
"""Whether this vLLM's V2 runner has a method that SSD can pass for, and that runs on a CPU."""
XDIST_WORKER = "PYTEST_XDIST_WORKER"
"""Environment variable with the name of a test process of `pytest -n`: gw0, gw1 and so on."""
ANSWER_S = 240
"""No start and no run takes so long: an engine that has not answered by then hangs."""
BASE = ENVIRONMENT | ({"VLLM_USE_V2_MODEL_RUNNER": "0"} if ON_GPU else {"VLLM_CPU_OMP_THREADS_BIND": "nobind"})
FORKED = () if ON_GPU else (BASE, BASE | ON_V2)
"""Environments whose engines are forked; what else they may ask for could matter to vLLM's import."""
READ_LATER = {
    "PYTHONPATH",
    "PYTHONSAFEPATH",
    "TMPDIR",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_PLUGINS",
    "VLLM_SSD_HOSTILE",
}
"""Variables that do not matter to it."""
SERVERS = "TESTS_FORK_SERVERS"
"""Environment variable of a test process: address and process of the servers that it shares with others, as JSON."""


class SharedServer(NamedTuple):
    """A `ForkServer` that another process has started."""

    address: str
    pid: int


_servers: dict[bool, fork_server.ForkServer | SharedServer] = {}


def server(*, v2: bool = False) -> fork_server.ForkServer | SharedServer:
    """The server that forks engines, or on V2 interpreted ones, and drafters of both, started when first asked for."""
    if v2 not in _servers:
        shared = json.loads(os.environ.get(SERVERS, "[]"))[v2:]
        _servers[v2] = SharedServer(*shared[0]) if shared else fork_server.ForkServer({**os.environ, **FORKED[v2]})
    return _servers[v2]


def share_servers() -> None:
    """Start the servers now, for this process and those that it starts."""
    servers = [server(v2=v2) for v2 in ((False, True) if HAS_V2 else (False,))]
    os.environ[SERVERS] = json.dumps([[one.address, one.pid] for one in servers])


def start_program(
    program: Path, *arguments: str, output: int, environment: Mapping[str, str] | None = None
) -> fork_server.ForkedProcess | subprocess.Popen:
    """Start a Python program in a fork of a process that has imported vLLM; its drafters are forked, too.

    output: the descriptor of what it prints, errors included; environment: variables to set, `ON_V2` for that runner.
    """
    variables = {**os.environ, **BASE, **(environment or {})}
    command = [str(program), *arguments]
    if ON_GPU:
        return subprocess.Popen([sys.executable, *command], env=variables, stdout=output, stderr=output)
    variables[fork_server.ADDRESS] = server().address
    forks = server(v2=variables.get("VLLM_USE_V2_MODEL_RUNNER") == "1")
    return fork_server.fork(forks.address, "script", command, output, variables, output)


def run_program(program: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """What a program prints that `start_program` starts; fails where it does."""
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **(environment or {})}
    with tempfile.TemporaryFile("w+") as output:
        process = start_program(program, *arguments, output=output.fileno(), environment=variables)
        try:
            status = process.wait(ANSWER_S)
        finally:
            process.kill()
        output.seek(0)
        printed = output.read()
    assert status == 0, printed[-4000:]
    return printed


def own_cores() -> list[int]:
    """The cores of this test process, the drafters' last; with `pytest -n 2` each process has another one last."""
    cores = sorted(os.sched_getaffinity(0))
    first = int(os.environ.get(XDIST_WORKER, "gw0").removeprefix("gw")) % len(cores)
    return cores[first:] + cores[:first]


def free_port() -> int:
    """A TCP port of this machine that nobody listens on, and that no connection gets by chance."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class Engine(EngineProcess):
    """A vLLM engine in a process of its own, whose start has begun; see `engine_host.EngineHost` for what it can do.

    Without `speculative` it is the target alone. With `forked`, it and its drafters are forked where that makes no
    difference but in time, and in whose child a drafter is; with `own_drafters`, it starts those as a server does.
    """

    def __init__(
        self,
        log: Path,
        *,
        speculative: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
        forked: bool = True,
        own_drafters: bool = False,
        **engine_args: Any,
    ) -> None:
        *self._cores, drafter_core = own_cores()
        self._variables = BASE | (environment or {})
        self.on_v2 = self._variables.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
        self._forked = forked and {k: v for k, v in self._variables.items() if k not in READ_LATER} in FORKED
        self._own_drafters = own_drafters
        super().__init__(
            [str(HOST)],
            log,
            environment=self._variables,
            name="the engine's process",
            answer_timeout_s=ANSWER_S,
        )
        defaults = dict(
            model=str(PAIR / "target"),
            dtype="float32",
            enforce_eager=True,
            max_model_len=512,
            max_num_seqs=8,
            kv_cache_memory_bytes=128 << 20,
            disable_log_stats=False,
            seed=0,
        )
        if ON_GPU:
            defaults |= {"attention_backend": "TRITON_ATTN", "gpu_memory_utilization": 0.02}
        if speculative is not None:
            defaults["speculative_config"] = {
                "method": "ssd",
                "model": str(PAIR / "drafter"),
                "num_speculative_tokens": 5,
                "dtype": "float32",
                "kv_cache_memory": "64MiB",
                "adaptive": False,
                **({"drafter_cpus": str(drafter_core)} if os.environ.get(XDIST_WORKER) else {}),
                **({"drafter_device": "cuda:0"} if ON_GPU else {}),
                **speculative,
            }
            if {"tensor_parallel_size", "pipeline_parallel_size"} & engine_args.keys():
                defaults["speculative_config"]["metrics_port"] = free_port()
        self.arguments = {**defaults, **engine_args}
        self.send("start", **self.arguments)

    def _start(self, program: Sequence[str], connection: int, environment: Mapping[str, str], output: int) -> Any:
        if not self._forked:
            return super()._start(program, connection, environment, output)
        forks = server(v2=self.on_v2)
        if not self._own_drafters:
            environment = {**environment, fork_server.ADDRESS: server().address}
        return fork_server.fork(forks.address, "engine", program, connection, environment, output)

    def receive(self, timeout_s: float | None = None) -> Any:
        """The result of the last `send`. A start may use all cores; then the drafter has the last one to itself."""
        result = super().receive(timeout_s)
        self.pin(self._cores)
        self._cores = []
        return result

    def generate(self, requests: list[dict[str, Any]], **arguments: Any) -> SimpleNamespace:
        """Run requests to their ends; see `EngineHost.generate`."""
        return self.call("generate", requests=requests, **arguments)


def request(
    prompt: list[int],
    *,
    join_step: int = 0,
    abort_after: int | None = None,
    lora: str | None = None,
    priority: int = 0,
    embedded: bool = False,
    image: tuple[int, int, int] | None = None,
    cache_salt: str | None = None,
    temperature: float = 0.0,
    ignore_eos: bool = True,
    **params: Any,
) -> dict[str, Any]:
    """A request for `Engine.generate`: token ids, the step at which it joins, the tokens after which it is aborted,
    its priority (lower goes first), whether the prompt comes as embeddings, the colour of an image before the prompt,
    its salt in prefix caches, and vLLM's SamplingParams, with `regex` or `json_schema` for structured output."""
    params |= {"temperature": temperature, "ignore_eos": ignore_eos}
    return {
        "prompt": prompt,
        "params": params,
        "join_step": join_step,
        "abort_after": abort_after,
        "lora": lora,
        "priority": priority,
        "embedded": embedded,
        "image": image,
        "cache_salt": cache_salt,
    }


def cached_tokens(engine: Engine, prompt: list[int], salts: Sequence[str | None], other: list[int]) -> int:
    """Tokens of `prompt` that the drafter finds in its prefix cache over a few requests, one after the other with each
    salt; `other`: a prompt that it has not seen."""
    told = [request(prompt, max_tokens=6, cache_salt=salt) for salt in salts]
    engine.generate([request(other[:8], max_tokens=40)], min_seconds=0.02)  # the drafter counts before come with it
    before = engine.call("counts")
    for asked in [*told, request(other, max_tokens=6)]:
        engine.generate([asked], min_seconds=0.02)
    counts = {name: value - before.get(name, 0) for name, value in engine.call("counts").items()}
    assert counts["hits"] + counts["misses"] > 0, "inconclusive: the drafter drafted for none"
    return counts["drafter_cached_tokens"]


def texts(run: SimpleNamespace) -> list[list[list[int]]]:
    """Token ids [request][sample][token] of a run."""
    return [[sample.token_ids for sample in output.samples] for output in run.outputs]


def assert_conclusive(run: SimpleNamespace, *, hits: int = 1, misses: int = 0, accepted: int = 1) -> None:
    """Fail unless the run speculated: a test that drafted nothing has shown nothing; or if it counted wrongly."""
    counts = run.counts
    found = {name: counts[name] for name in ("hits", "misses", "vllm:spec_decode_num_accepted_tokens")}
    wanted = dict(zip(found, (hits, misses, accepted)))
    short = {name: value for name, value in found.items() if value < wanted[name]}
    assert not short, f"inconclusive: {short} where at least {wanted} are needed; all counts: {counts}"
    assert_counts_agree(run)


def assert_counts_agree(run: SimpleNamespace) -> None:
    """Fail unless SSD's own counters of drafts verified and accepted are vLLM's, to 0.1 %.

    On the V2 runner vLLM counts filler as drafts.
    """
    counts = run.counts
    drafts = counts["draft_tokens"] + counts["filler_tokens"]
    for name, ours in {"draft_tokens": drafts, "accepted_tokens": counts["accepted_tokens"]}.items():
        theirs = counts[f"vllm:spec_decode_num_{name}"]
        assert abs(ours - theirs) <= 0.001 * theirs, f"{name}: {ours}, in vLLM's counters {theirs}; all: {counts}"
