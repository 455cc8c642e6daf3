"""A client for engines in processes of their own, and the requests they get."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HOST = Path(__file__).with_name("engine_host.py")
PAIR = Path(__file__).parent / "assets" / "pair"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
ON_V2 = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
"""Environment of an engine on vLLM's V2 model runner."""
ANSWER_S = 240
"""No start and no run takes so long: an engine that has not answered by then hangs."""


class EngineFailed(RuntimeError):
    """What the engine's process raised, as text."""


class Engine:
    """A vLLM engine in a process of its own; see `engine_host.EngineHost` for what it can do.

    Without `speculative` it is the target alone.
    """

    def __init__(
        self,
        log: Path,
        *,
        speculative: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
        **engine_args: Any,
    ) -> None:
        ours, theirs = socket.socketpair()
        self.log = log
        with theirs, log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(HOST), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._connection = Connection(ours.detach())
        self.pending = False
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
        if speculative is not None:
            defaults["speculative_config"] = {
                "method": "ssd",
                "model": str(PAIR / "drafter"),
                "num_speculative_tokens": 5,
                "dtype": "float32",
                "kv_cache_memory": "64MiB",
                "adaptive": False,
                **speculative,
            }
        self.arguments = {**defaults, **engine_args}
        self.send("start", **self.arguments)

    def send(self, method: str, **arguments: Any) -> None:
        """Ask for something and do not wait for the answer."""
        if self.pending:
            self.receive()
        self._connection.send((method, arguments))
        self.pending = True

    def receive(self) -> Any:
        """The answer to the last `send`."""
        self.pending = False
        if not self._connection.poll(ANSWER_S):
            self.process.kill()
            raise EngineFailed(f"no answer within {ANSWER_S} s:\n{self.log.read_text()[-4000:]}")
        try:
            succeeded, answer = self._connection.recv()
        except EOFError:
            raise EngineFailed(f"the engine's process ended:\n{self.log.read_text()[-4000:]}") from None
        if not succeeded:
            raise EngineFailed(answer)
        return answer

    def call(self, method: str, **arguments: Any) -> Any:
        """Ask for something and wait for the answer."""
        self.send(method, **arguments)
        return self.receive()

    def generate(self, requests: list[dict[str, Any]], **arguments: Any) -> SimpleNamespace:
        """Run requests to their ends; see `EngineHost.generate`."""
        return self.call("generate", requests=requests, **arguments)

    def close(self) -> None:
        """End the process; its drafter ends with it."""
        self._connection.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def request(
    prompt: list[int],
    *,
    join_step: int = 0,
    abort_after: int | None = None,
    lora: str | None = None,
    temperature: float = 0.0,
    ignore_eos: bool = True,
    **params: Any,
) -> dict[str, Any]:
    """A request for `Engine.generate`: token ids, the step at which it joins, the tokens after which it is aborted,
    and vLLM's SamplingParams, with `regex` or `json_schema` for structured output."""
    params |= {"temperature": temperature, "ignore_eos": ignore_eos}
    return {"prompt": prompt, "params": params, "join_step": join_step, "abort_after": abort_after, "lora": lora}


def texts(run: SimpleNamespace) -> list[list[list[int]]]:
    """Token ids [request][sample][token] of a run."""
    return [[sample.token_ids for sample in output.samples] for output in run.outputs]


def assert_conclusive(run: SimpleNamespace, *, hits: int = 1, misses: int = 0, accepted: int = 1) -> None:
    """Fail unless the run speculated: a test that drafted nothing has shown nothing."""
    counts = run.counts
    found = {name: counts[name] for name in ("hits", "misses", "vllm:spec_decode_num_accepted_tokens")}
    wanted = dict(zip(found, (hits, misses, accepted)))
    short = {name: value for name, value in found.items() if value < wanted[name]}
    assert not short, f"inconclusive: {short} where at least {wanted} are needed; all counts: {counts}"


def assert_counts_agree(run: SimpleNamespace) -> None:
    """Fail unless SSD's own counters of drafts verified and accepted are vLLM's, to 0.1 %.

    Not on the V2 runner, where vLLM counts filler as drafts, and SSD the rounds of which vLLM drops the result because
    the request had ended in the one before; and not where a worker process of its own keeps SSD's counters.
    """
    counts = run.counts
    if "verifications" in counts:
        return
    for ours in {"draft_tokens", "accepted_tokens"} & counts.keys():
        theirs = counts[f"vllm:spec_decode_num_{ours}"]
        assert abs(counts[ours] - theirs) <= 0.001 * theirs, f"{ours}: {counts[ours]}, in vLLM's counters {theirs}"
