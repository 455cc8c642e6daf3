"""`vllm serve` as a user starts it: the OpenAI API, the metrics, and an end without remains."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import psutil
import pytest
from drafter_processes import is_drafter
from engines import ENVIRONMENT, ON_V2, PAIR, Engine, free_port, request, start_program
from marks import needs_v2

VLLM = Path(sys.executable).with_name("vllm")
FORKED = Path(__file__).parents[1] / "forked_vllm.py"
START_S = 240.0
RESTART_S = 90.0
END_S = 60.0
PROMPTS = (
    'def read_config(path):\n    """Return the settings found in a file."""\n',
    "class Queue:\n    def __init__(self, maxsize=0):\n",
    "import os\nimport sys\n\n\ndef main():\n",
    "    for name, value in self.items():\n",
)


class Server:
    """One `vllm serve` of the bundled target on a free loopback port, which is a fork or starts as a user starts it.

    A fork runs on the V2 model runner with `v2`.
    """

    def __init__(self, log: Path, arguments: Sequence[str], *, forked: bool = False, v2: bool = False) -> None:
        self.log = log
        self.port, self.metrics_port = free_port(), free_port()
        command = ["serve", str(PAIR / "target"), "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--served-model-name", "target", "--dtype", "float32", "--enforce-eager"]
        command += ["--max-model-len", "512", "--max-num-seqs", "4", "--kv-cache-memory-bytes", "64M"]
        command += [argument.replace("METRICS_PORT", str(self.metrics_port)) for argument in arguments]
        environment = ENVIRONMENT | {"VLLM_LOGGING_LEVEL": "INFO"} | (ON_V2 if v2 else {})
        with log.open("w") as output:
            if forked:
                self.process = start_program(FORKED, *command, output=output.fileno(), environment=environment)
                return
            self.process = subprocess.Popen(
                [str(VLLM), *command],
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while self.get(self.port, "/health") is None:
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.log.read_text()[-6000:]}"
            assert time.monotonic() < deadline, f"not ready:\n{self.log.read_text()[-6000:]}"
            time.sleep(0.5)

    def get(self, port: int, path: str) -> str | None:
        """The page at `path`, or None while nobody answers."""
        try:
            with urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                return answer.read().decode()
        except (URLError, OSError):
            return None

    def post(self, path: str, **body: Any) -> str:
        """The answer of the OpenAI API at `path` to a greedy request."""
        data = json.dumps({"model": "target", "temperature": 0, **body}).encode()
        request = Request(f"http://127.0.0.1:{self.port}/v1/{path}", data, {"Content-Type": "application/json"})
        with urlopen(request, timeout=120) as answer:
            return answer.read().decode()

    def complete(self, **body: Any) -> dict[str, Any]:
        """One choice of a completion."""
        return json.loads(self.post("completions", **{"max_tokens": 60, **body}))["choices"][0]

    def acceptance(self, **body: Any) -> dict[str, Any]:
        """What vLLM's answer says of the drafts of one request."""
        return json.loads(self.post("completions", max_tokens=60, **body))["metrics"]["speculative_decoding"]

    def tool_calls(self) -> list[str]:
        """The parts of name and arguments of the calls that a chat is made to stream."""
        body = {
            "messages": [{"role": "user", "content": PROMPTS[0]}],
            "tools": [{"type": "function", "function": {"name": "read_file", "parameters": {"type": "object"}}}],
            "tool_choice": "required",
        }
        lines = self.post("chat/completions", stream=True, max_tokens=100, **body).splitlines()
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        calls = [call for event in events for call in event["choices"][0]["delta"].get("tool_calls") or ()]
        return [call["function"].get("name") or call["function"].get("arguments") or "" for call in calls]

    def counter(self, name: str) -> float:
        """A counter of vllm-ssd's Prometheus page."""
        page = self.get(self.metrics_port, "/metrics")
        return float(re.search(rf"^vllm_ssd:{name}_total (\S+)", page, re.MULTILINE)[1])


@contextmanager
def serve(
    log: Path, *arguments: str, forked: bool = False, v2: bool = False
) -> Iterator[tuple[Server, list[psutil.Process]]]:
    """A server that is ready, and all its processes; whatever is left of them at the end is killed."""
    server = Server(log, arguments, forked=forked, v2=v2)
    processes = [psutil.Process(server.process.pid)]
    try:
        server.wait_until_ready()
        processes += processes[0].children(recursive=True)
        yield server, processes
    finally:
        for process in processes:
            if process.is_running():
                process.kill()
        server.process.wait()


def drafters_of(server: psutil.Process) -> list[psutil.Process]:
    return [process for process in server.children(recursive=True) if is_drafter(process)]


def drafter_of(processes: list[psutil.Process]) -> psutil.Process:
    (drafter,) = filter(is_drafter, processes)
    return drafter


def until_hits(server: Server, check: Callable[[], None]) -> None:
    """Check, until there are hits and accepted drafts: on a busy machine all blocks of a few answers may come late."""
    hits, deadline = server.counter("hits"), time.monotonic() + RESTART_S
    check()
    while server.counter("hits") == hits or not server.counter("accepted_tokens"):
        assert time.monotonic() < deadline, "inconclusive: no hits, or no drafts accepted"
        check()


def check_answers(server: Server, target_alone: Engine) -> None:
    """Four completions at once are those of the target alone."""
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(PAIR / "target" / "tokenizer.json")).encode
    requests = [request(encode(prompt).ids, max_tokens=60, ignore_eos=False) for prompt in PROMPTS]
    expected = [output.samples[0].text for output in target_alone.generate(requests).outputs]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = pool.map(lambda prompt: server.complete(prompt=prompt)["text"], PROMPTS)
        assert list(answers) == expected


def wait_for_hits(server: Server, target_alone: Engine) -> None:
    """Answer, rightly, until there are hits and accepted drafts."""
    until_hits(server, lambda: check_answers(server, target_alone))


def check_log(server: Server) -> None:
    """Nothing of a prompt is in the log of the server, its workers and its drafter, as text or as token ids."""
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(PAIR / "target" / "tokenizer.json")).encode
    log = server.log.read_text()
    assert "SSD drafter 1 ready" in log
    for prompt in PROMPTS:
        parts = [line.strip() for line in prompt.splitlines() if len(line.strip()) > 10]
        ids = encode(prompt).ids
        for separator in (", ", ",", " "):
            parts += [separator.join(map(str, ids[i : i + 4])) for i in range(len(ids) - 3)]
        assert not [part for part in parts if part in log]


def check_tool_calls(server: Server, tool_calls: str) -> None:
    """Streamed, they are those of the target alone; asked for until there are hits."""

    def check() -> None:
        streamed = server.tool_calls()
        assert "".join(streamed) == tool_calls and tool_calls.startswith("read_file")
        assert len(streamed) > 2, "inconclusive: nothing was streamed"

    until_hits(server, check)
    assert server.counter("accepted_tokens") > 0, "inconclusive: no drafts accepted"


CONFIG = {
    "method": "ssd",
    "model": str(PAIR / "drafter"),
    "num_speculative_tokens": 5,
    "on_miss": "wait",
    "adaptive": False,
    "branch_budget": 12,
    "kv_cache_memory": "64MiB",
}
KEYS = json.dumps(CONFIG)[:-1] + ', "metrics_port": METRICS_PORT}'


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Flags of a server that can be made to call tools."""
    template = tmp_path_factory.mktemp("chat") / "template.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    return "--chat-template", str(template), "--enable-auto-tool-choice", "--tool-call-parser", "hermes"


@pytest.fixture(scope="module")
def tool_calls(chat: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the target alone calls."""
    with serve(tmp_path_factory.mktemp("plain") / "log", *chat, forked=True) as (plain, _):
        return "".join(plain.tool_calls())


@needs_v2
def test_tool_calls_streamed_on_v2(
    tmp_path: Path, target_alone: Engine, chat: tuple[str, ...], tool_calls: str
) -> None:
    with serve(tmp_path / "log", "--speculative-config", KEYS, *chat, forked=True, v2=True) as (server, _):
        wait_for_hits(server, target_alone)
        check_tool_calls(server, tool_calls)


def test_configured_in_json_and_killed(
    tmp_path: Path, target_alone: Engine, chat: tuple[str, ...], tool_calls: str
) -> None:
    flags = ("--speculative-config", KEYS, "--per-request-spec-decode-metrics", "summary", *chat)
    with serve(tmp_path / "log", *flags) as (server, processes):
        wait_for_hits(server, target_alone)
        check_tool_calls(server, tool_calls)
        page = server.get(server.port, "/metrics") or ""  # vLLM's own: its counters and ours
        (accepted,) = re.findall(r'^vllm_ssd:accepted_tokens_total\{engine="0"\} (\S+)', page, re.MULTILINE)
        assert float(accepted) == server.counter("accepted_tokens") and "vllm:generation_tokens_total{" in page
        counted, deadline = [0, 0], time.monotonic() + RESTART_S
        while not counted[1]:
            assert time.monotonic() < deadline, "inconclusive: no drafts accepted"
            before = [server.counter(name) for name in ("draft_tokens", "accepted_tokens")]
            told = server.acceptance(prompt=PROMPTS[0])
            after = [server.counter(name) for name in ("draft_tokens", "accepted_tokens")]
            counted = [told["num_draft_tokens"], told["num_accepted_draft_tokens"]]
            assert counted == [b - a for a, b in zip(before, after)]
        drafter_of(processes).kill()
        wait_for_hits(server, target_alone)
        check_log(server)
        deadline = time.monotonic() + RESTART_S
        while not (restarted := [p for p in drafters_of(processes[0]) if p not in processes]):
            assert time.monotonic() < deadline, "hits without a drafter"
        processes += restarted
        server.process.kill()
        # vLLM leaves its engine and workers behind; they are killed below. The drafter must not stay with them.
        _, alive = psutil.wait_procs(restarted, timeout=END_S)
        assert not alive, f"still there after SIGKILL: {alive}"


def test_configured_by_dotted_keys_and_interrupted(tmp_path: Path, target_alone: Engine) -> None:
    with serve(
        tmp_path / "log",
        *("--speculative-config.method", "ssd"),
        *("--speculative-config.model", str(PAIR / "drafter")),
        *("--speculative-config.num-speculative-tokens", "4"),
        *("--speculative-config.fan-out", "[3,2,2,2,2]"),
        *("--speculative-config.on_miss", "ngram"),
        *("--speculative-config.adaptive", "false"),
        *("--speculative-config.metrics-port", "METRICS_PORT"),
    ) as (server, processes):
        wait_for_hits(server, target_alone)
        assert len(processes) >= 4
        os.killpg(server.process.pid, signal.SIGINT)  # as Ctrl-C does
        _, alive = psutil.wait_procs(processes, timeout=END_S)
        assert not alive, f"still there after Ctrl-C: {alive}"
    check_log(server)


def test_drafter_that_does_not_exist(tmp_path: Path) -> None:
    server = Server(tmp_path / "log", ["--speculative-config", '{"method": "ssd", "model": "/nonexistent"}'])
    try:
        assert server.process.wait(timeout=START_S) != 0
    finally:
        server.process.kill()
    assert "neither a folder nor the name of a model" in server.log.read_text()
