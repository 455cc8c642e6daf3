"""Serve the bundled pair with SSD, stream a completion, and compare it with stock vLLM in one table.

    bash scripts/demo.sh

Four servers (SSD, plain, stock `draft_model` with two numbers of drafts) stay up, idle ones asleep, and are measured
in turns, once forwards and once backwards: whatever else the machine does meanwhile hits them alike. Everything runs
on two cores and in float32, where the number of tokens verified together cannot flip an argmax.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from urllib.request import urlopen

import openai
from resize_model import widen
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.syntax import Syntax
from rich.table import Table

from vllm_ssd.planning.engine_host import end_of_log

PAIR = Path(__file__).resolve().parents[1] / "tests" / "assets" / "pair"
VLLM = Path(sys.executable).parent / "vllm"
MODEL = "target"
NUM_SPECULATIVE_TOKENS = 5
STOCK_NUM_SPECULATIVE_TOKENS = (3, 5)
WIDENED_SIZE = 40960  # reading 0.7 GB of weights keeps one core busy for 20 ms and more
STREAM_TOKENS = 150
MEASURED_TOKENS = 64  # beyond these so small a model repeats itself, which flatters every speculation
WARM_UP_TOKENS = 24
SETTLE_S = 1.2  # vLLM's processes spin for a second after their last message before they sleep
STARTUP_TIMEOUT_S = 240
STOP_TIMEOUT_S = 10
PROMPTS = (  # none ends in white space, which the tokenizer would split otherwise than in its training text
    '''def read_config(path):
    """Return the settings found in a file."""
    settings = {}
    with open(path) as file:
        for line in file:
            if not line''',
    '''def _find_module(name, path=None):
    """Find a module on a path."""
    for entry in path:
        if''',
    '''def handle(self, request):
    """Handle one request."""
    try:
        response = self.process(request)
    except Exception as exc:''',
    '''class Lock:
    """A lock that can be acquired by one task at a time."""

    async def acquire(self):''',
    '''class Queue:
    """A FIFO queue with a maximum size."""

    def __init__(self, maxsize=0):
        self.maxsize = maxsize
        self._queue = []

    def put(self, item):''',
    '''    def close(self):
        """Close the connection."""
        if self.sock is not None:
            self.sock.close()''',
)

console = Console(highlight=False)


class ServerFailed(RuntimeError):
    """A server ended, did not come up in time or never speculated; the message holds its last log lines."""


@dataclass
class Completion:
    """The result of one request."""

    text: str
    num_tokens: int
    seconds: float


class Server:
    """One `vllm serve` on a free loopback port, with its log in a file."""

    def __init__(
        self, name: str, target: Path, folder: Path, speculative_config: dict | None, plugins: str = ""
    ) -> None:
        self.name = name
        self.speculative = speculative_config is not None
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log = folder / f"{name}.log"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=120, max_retries=0)
        port = self.url.rpartition(":")[2]
        command = [VLLM, "serve", target, "--served-model-name", MODEL, "--host", "127.0.0.1", "--port", port]
        command += ["--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "4"]
        command += ["--max-num-batched-tokens", "512", "--kv-cache-memory-bytes", "64M"]
        if speculative_config:
            command += ["--speculative-config", json.dumps(speculative_config)]
        environment = {**os.environ, "VLLM_PLUGINS": plugins, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
            )

    def ready(self) -> bool:
        """Whether the server answers; raises `ServerFailed` when it has ended."""
        if self.process.poll() is not None:
            raise ServerFailed(
                f"{self.name}: vllm serve ended with status {self.process.returncode}\n{end_of_log(self.log)}"
            )
        with suppress(OSError), urlopen(f"{self.url}/health", timeout=5):
            return True
        return False

    def complete(self, prompt: str, max_tokens: int) -> Completion:
        """One greedy completion of exactly `max_tokens` tokens."""
        start = time.perf_counter()
        with self.explained():
            answer = self.client.completions.create(
                model=MODEL, prompt=prompt, max_tokens=max_tokens, temperature=0, extra_body={"ignore_eos": True}
            )
        assert answer.usage is not None
        return Completion(answer.choices[0].text, answer.usage.completion_tokens, time.perf_counter() - start)

    def stream(self, prompt: str, max_tokens: int) -> Iterator[Completion]:
        """The same completion, as far as it has come, at each piece."""
        start, text = time.perf_counter(), ""
        options = {"include_usage": True, "continuous_usage_stats": True}
        with self.explained():
            for piece in self.client.completions.create(
                model=MODEL,
                prompt=prompt,
                max_tokens=max_tokens,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True, "stream_options": options},
            ):
                text += piece.choices[0].text if piece.choices else ""
                assert piece.usage is not None  # as `options` say
                yield Completion(text, piece.usage.completion_tokens, time.perf_counter() - start)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Show the end of the log when a request fails."""
        try:
            yield
        except openai.OpenAIError as error:
            raise ServerFailed(f"{self.name}: {error}\n{end_of_log(self.log)}") from error

    def counters(self) -> dict[str, float]:
        """The server's own Prometheus counters, summed over their labels."""
        return read_counters(self.url)


class SSDServer(Server):
    """A server that speculates ahead, with the plugin's own counters beside vLLM's."""

    def __init__(self, target: Path, folder: Path) -> None:
        metrics_port = free_port()
        self.metrics_url = f"http://127.0.0.1:{metrics_port}"
        config = {"method": "ssd", "model": str(PAIR / "drafter"), "num_speculative_tokens": NUM_SPECULATIVE_TOKENS}
        super().__init__("SSD", target, folder, {**config, "metrics_port": metrics_port}, plugins="ssd")

    def counters(self) -> dict[str, float]:
        return super().counters() | read_counters(self.metrics_url)


class Run:
    """The completions of one server, and how its counters grew meanwhile."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.completions: list[Completion] = []
        self._before = server.counters()

    def finish(self) -> None:
        """Read the counters again."""
        self._grown = {name: value - self._before.get(name, 0) for name, value in self.server.counters().items()}

    @property
    def texts(self) -> list[str]:
        return [completion.text for completion in self.completions]

    @property
    def tokens_per_second(self) -> float:
        return median(completion.num_tokens / completion.seconds for completion in self.completions)

    @property
    def tokens_per_round(self) -> float:
        num_tokens = sum(completion.num_tokens for completion in self.completions)
        return num_tokens / (num_tokens - self._grown.get("vllm:spec_decode_num_accepted_tokens_total", 0))

    @property
    def hit_rate(self) -> float | None:
        """Hits over all outcomes; None where nothing speculates ahead."""
        outcomes = [self._grown.get(f"vllm_ssd:{name}_total", 0) for name in ("hits", "misses", "late")]
        return outcomes[0] / sum(outcomes) if sum(outcomes) else None


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def read_counters(url: str) -> dict[str, float]:
    """All samples of a Prometheus page, summed over their labels."""
    with urlopen(f"{url}/metrics", timeout=10) as page:
        samples = re.findall(r"^([a-z_:]+)(?:\{.*\})? (\S+)$", page.read().decode(), re.MULTILINE)
    totals: dict[str, float] = {}
    for name, value in samples:
        totals[name] = totals.get(name, 0.0) + float(value)
    return totals


def two_cores() -> list[int]:
    """The first CPU this process may use, and the next one that is not the same core's other thread."""
    cpus = sorted(os.sched_getaffinity(0))

    def core(cpu: int) -> list[str]:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        return [(topology / name).read_text() for name in ("physical_package_id", "core_id")]

    return [cpus[0], *[cpu for cpu in cpus[1:] if core(cpu) != core(cpus[0])][:1]]


@contextmanager
def running(servers: list[Server]) -> Iterator[None]:
    """Stop every server in the list, with its children, on any exit."""
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for server in servers:
            server.process.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for server in servers:
            with suppress(subprocess.TimeoutExpired):
                server.process.wait(max(0.0, deadline - time.monotonic()))
            with suppress(ProcessLookupError):
                os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()


def start(servers: list[Server], makers: Sequence[Callable[[], Server]]) -> None:
    """Start servers side by side, put them into the list and wait until all of them answer."""
    with Progress(
        SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), TimeElapsedColumn(), console=console
    ) as progress:
        waiting = {}
        for make in makers:
            servers.append(make())
            waiting[servers[-1]] = progress.add_task(f"vllm serve: {servers[-1].name}", total=1)
        deadline = time.monotonic() + STARTUP_TIMEOUT_S
        while waiting:
            for server in [server for server in waiting if server.ready()]:
                progress.update(waiting.pop(server), completed=1)
            for server in waiting:
                if time.monotonic() > deadline:
                    raise ServerFailed(f"{server.name}: not up after {STARTUP_TIMEOUT_S} s\n{end_of_log(server.log)}")
            time.sleep(0.2)


def show_stream(server: Server, prompt: str) -> None:
    """Stream one completion: as much as fits the screen, then all of it."""

    def python(lines: list[str]) -> Syntax:
        return Syntax("\n".join(lines), "python", theme="ansi_dark", background_color="default", word_wrap=True)

    with Live(console=console, refresh_per_second=15, transient=True) as live:
        for completion in server.stream(prompt, STREAM_TOKENS):
            lines = (prompt + completion.text).splitlines()
            rate = f"{completion.num_tokens} tokens, {completion.num_tokens / completion.seconds:.0f} a second"
            progress = Table.grid(padding=(0, 1))
            progress.add_row(ProgressBar(STREAM_TOKENS, completion.num_tokens, width=40), rate)
            live.update(Group(python(lines[4 - console.height :]), progress))
    console.print(python(lines))
    console.print(f"SSD: {rate}\n")


def measure(servers: list[Server]) -> list[Run]:
    """Half of the prompts to every server in turn, then the other half in the opposite order."""
    for server in servers:
        server.complete(PROMPTS[0], WARM_UP_TOKENS)
    runs = [Run(server) for server in servers]
    with Progress(
        TextColumn("measuring"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console
    ) as progress:
        task = progress.add_task("", total=len(PROMPTS) * len(servers))
        for prompts, turns in ((PROMPTS[::2], runs), (PROMPTS[1::2], runs[::-1])):
            for run in turns:
                progress.update(task, description=run.server.name)
                time.sleep(SETTLE_S)
                for prompt in prompts:
                    run.completions.append(run.server.complete(prompt, MEASURED_TOKENS))
                    progress.advance(task)
    for run in runs:
        run.finish()
        if run.server.speculative and run.tokens_per_round == 1:
            raise ServerFailed(f"{run.server.name}: no draft was ever accepted\n{end_of_log(run.server.log)}")
    return runs


def report(plain: Run, stock: list[Run], ssd: Run, cores: list[int]) -> None:
    """Print the table, the conditions, and who was fastest."""
    best_stock = max(stock, key=lambda run: run.tokens_per_second)
    table = Table(box=SIMPLE_HEAD, title=f"Greedy, batch 1, {len(PROMPTS)} prompts × {MEASURED_TOKENS} tokens, medians")
    table.add_column("")
    for heading in ("tok/s", "× plain", "tokens/round", "hit rate", "text identical"):
        table.add_column(heading, justify="right")
    for run in (plain, best_stock, ssd):
        same = sum(text == expected for text, expected in zip(run.texts, plain.texts))
        table.add_row(
            run.server.name,
            f"{run.tokens_per_second:.1f}",
            f"{run.tokens_per_second / plain.tokens_per_second:.2f}",
            f"{run.tokens_per_round:.2f}",
            "-" if run.hit_rate is None else f"{run.hit_rate:.0%}",
            "yes" if same == len(PROMPTS) else f"no ({same} of {len(PROMPTS)})",
        )
    console.print(table)
    others = ", ".join(f"{run.server.name} {run.tokens_per_second:.1f}" for run in stock if run is not best_stock)
    console.print(
        f"Cores {cores} for target, drafter and vLLM's own processes; a plain decoding step takes "
        f"{1e3 / plain.tokens_per_second:.0f} ms. Stock was slower with {others} tok/s."
    )
    ranking = sorted((plain, best_stock, ssd), key=lambda run: -run.tokens_per_second)
    lead = ranking[0].tokens_per_second / ranking[1].tokens_per_second
    console.print(f"Fastest here: {ranking[0].server.name}, {lead:.2f}× {ranking[1].server.name}.")


def main() -> None:
    """Run the demo."""
    for end in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(end, lambda number, _: sys.exit(128 + number))
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
    cores = two_cores()
    os.sched_setaffinity(0, cores)

    servers: list[Server] = []
    with tempfile.TemporaryDirectory(prefix="vllm-ssd-demo-") as temporary, running(servers):
        folder = Path(temporary)
        target = folder / "target"
        console.print(
            f"Widening the bundled target's MLPs to {WIDENED_SIZE}: the same text, as slow as a larger model's."
        )
        widen(PAIR / "target", target, WIDENED_SIZE, dtype="float32")

        def stock(num_drafts: int) -> Server:
            config = {"method": "draft_model", "model": str(PAIR / "drafter"), "num_speculative_tokens": num_drafts}
            return Server(f"draft_model K={num_drafts}", target, folder, config)

        start(servers, [partial(SSDServer, target, folder)])
        show_stream(servers[0], PROMPTS[0])
        baselines = [partial(stock, num_drafts) for num_drafts in STOCK_NUM_SPECULATIVE_TOKENS]
        start(servers, [partial(Server, "plain", target, folder, None), *baselines])
        ssd, plain, *stocks = measure(servers)
    report(plain, stocks, ssd, cores)


if __name__ == "__main__":
    try:
        main()
    except ServerFailed as failure:
        console.print(str(failure), markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
