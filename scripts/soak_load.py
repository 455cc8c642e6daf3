"""The load of a soak: random requests of many kinds over the OpenAI API, and what must be true of each answer."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

PAIR = Path(__file__).resolve().parents[1] / "tests" / "assets" / "pair"
MAX_MODEL_LEN = 512
CORPUS = ("argparse", "collections", "configparser", "csv", "dataclasses", "difflib")
STOPS = ("\n\n", "return", "self.", ")")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "lines": {"type": "integer", "maximum": 999}},
    "required": ["name", "lines"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "read_file", "parameters": {"type": "object"}}}]
TIE = 1e-4
"""Logprobs this close may be told apart by the composition of a batch, in float32, with or without drafts."""
LOGPROB_TOLERANCE = 2e-3
ANSWER_S = 90.0
"""A request that is not answered by then hangs."""
CHECKED = ("greedy", "greedy, at once", "stop", "logprobs", "json_schema", "tools", "near the limit")
UNCHECKED = ("sampled", "n", "abort", "invalid")
WEIGHTS = {"greedy": 6, "greedy, at once": 2, "sampled": 3}
INVALID: tuple[tuple[dict[str, Any], tuple[int, ...]], ...] = (
    ({"temperature": -1.0}, (400, 422)),
    ({"max_tokens": 10 * MAX_MODEL_LEN}, (400,)),
    ({"prompt": [5] * (MAX_MODEL_LEN + 1)}, (400,)),
    ({"prompt": [10**9]}, (400,)),
    ({"model": "nobody"}, (404,)),
    ({"top_p": 7}, (400, 422)),
    ({"structured_outputs": {"regex": "("}}, (400,)),
    ({"max_tokens": "many"}, (400, 422)),
)


@dataclass(frozen=True)
class Asked:
    """A request. path: of the API; key: of its greedy answer; abort_after: pieces after which the client hangs up;
    statuses: that answer it."""

    kind: str
    path: str
    body: dict[str, Any]
    key: str = ""
    abort_after: int = 0
    statuses: tuple[int, ...] = (200,)

    @property
    def streams(self) -> bool:
        """Whether the answer comes in pieces."""
        return bool(self.body.get("stream"))


@dataclass
class Answer:
    """What came back. times: when each piece of text did, on the monotonic clock; choices: of an answer at once."""

    status: int = 0
    text: str = ""
    finish: str | None = None
    times: list[float] = field(default_factory=list)
    choices: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass
class Expected:
    """The target's own answer. margins: of its best token over the next, where a tie could part two texts; offsets:
    where in the text each token begins."""

    text: str
    finish: str | None
    logprobs: list[float]
    margins: list[float]
    offsets: list[int]

    def ties_at(self, text: str) -> bool:
        """Whether the target was undecided at the token in which `text` first differs."""
        part = next((i for i, (a, b) in enumerate(zip(text, self.text)) if a != b), min(len(text), len(self.text)))
        at = max((i for i, offset in enumerate(self.offsets) if offset <= part), default=None)
        return at is not None and at < len(self.margins) and self.margins[at] < TIE


class Requests:
    """An endless supply, the same for the same seed; greedy ones come from a pool of `pool` whose answers are known."""

    def __init__(self, seed: int, pool: int) -> None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(PAIR / "target" / "tokenizer.json"))
        self._corpus = tokenizer.encode("".join(inspect.getsource(__import__(name)) for name in CORPUS)).ids
        self._decode = tokenizer.decode
        self._seed = seed
        kinds = itertools.cycle(CHECKED)
        self.pool = [self._checked(kind, i, random.Random(f"{seed}/pool/{i}")) for i, kind in zip(range(pool), kinds)]

    def stream(self, client: int) -> Iterator[Asked]:
        """What one client asks, one after the other; the first requests of all clients are of every kind."""
        rng = random.Random(f"{self._seed}/client/{client}")
        pools = {kind: [asked for asked in self.pool if asked.kind == kind] for kind in CHECKED}
        kinds = [kind for kind in (*CHECKED, *UNCHECKED) if pools.get(kind, True)]
        first = rng.sample(kinds, len(kinds))
        weights = [WEIGHTS.get(kind, 1) for kind in kinds]
        for kind in itertools.chain(first, iter(lambda: rng.choices(kinds, weights)[0], None)):
            yield rng.choice(pools[kind]) if kind in pools else self._unchecked(kind, rng)

    def _prompt(self, rng: random.Random, length: int) -> list[int]:
        start = rng.randrange(len(self._corpus) - length)
        return self._corpus[start : start + length]

    def _body(self, rng: random.Random, **values: Any) -> dict[str, Any]:
        prompt = self._prompt(rng, rng.randint(4, 120))
        return {"model": "target", "prompt": prompt, "max_tokens": rng.randint(16, 80), "temperature": 0} | values

    def _chat(self, rng: random.Random, **values: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": self._decode(self._prompt(rng, rng.randint(8, 60)))}]
        return {"model": "target", "messages": messages, "max_tokens": 60, "temperature": 0} | values

    def _checked(self, kind: str, number: int, rng: random.Random) -> Asked:
        path = "completions"
        match kind:
            case "greedy":
                body = self._body(rng, stream=True, ignore_eos=True)
            case "stop":
                body = self._body(rng, stop=rng.sample(STOPS, 2), include_stop_str_in_output=rng.random() < 0.5)
            case "logprobs":
                body = self._body(rng, logprobs=rng.choice([0, 1, 4]))
            case "json_schema":
                schema = {"name": "file", "schema": SCHEMA}
                body = self._chat(rng, response_format={"type": "json_schema", "json_schema": schema})
                path = "chat/completions"
            case "tools":
                body = self._chat(rng, tools=TOOLS, tool_choice="required")
                path = "chat/completions"
            case "near the limit":
                length = MAX_MODEL_LEN - rng.randint(2, 16)
                most = MAX_MODEL_LEN - length
                body = self._body(rng, prompt=self._prompt(rng, length), max_tokens=most, ignore_eos=True)
            case _:
                body = self._body(rng)
        return Asked(kind, path, body, key=f"{kind} {number}")

    def _unchecked(self, kind: str, rng: random.Random) -> Asked:
        sampling = {"temperature": rng.choice([0.6, 1.0])} | rng.choice([{}, {"top_p": 0.9}, {"top_k": 20}])
        match kind:
            case "sampled":
                return Asked(kind, "completions", self._body(rng, stream=True, **sampling))
            case "n":
                return Asked(kind, "completions", self._body(rng, n=rng.randint(2, 3), **sampling))
            case "abort":
                return Asked(kind, "completions", self._body(rng, stream=True), abort_after=rng.randint(1, 8))
            case _:
                fault, statuses = rng.choice(INVALID)
                return Asked(kind, "completions", self._body(rng, **fault), statuses=statuses)


async def ask(session: aiohttp.ClientSession, url: str, asked: Asked) -> Answer:
    """Send a request and read its answer; raises what aiohttp raises, and TimeoutError after `ANSWER_S`."""
    answer = Answer()
    async with asyncio.timeout(ANSWER_S), session.post(f"{url}/v1/{asked.path}", json=asked.body) as response:
        answer.status = response.status
        if response.status != 200:
            await response.read()
        elif not asked.streams:
            _take_whole(answer, json.loads(await response.read()))
        else:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    _take_piece(answer, json.loads(line[6:]))
                    if asked.abort_after and len(answer.times) >= asked.abort_after:
                        response.close()
                        break
    return answer


def _take_whole(answer: Answer, found: dict[str, Any]) -> None:
    answer.choices = found["choices"]
    choice = found["choices"][0]
    answer.text, answer.finish = _text(choice.get("message") or choice), choice["finish_reason"]
    answer.logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or []


def _take_piece(answer: Answer, found: dict[str, Any]) -> None:
    if "error" in found:
        raise ConnectionError(f"an error in a stream: {found['error']}")
    for choice in found["choices"]:
        text = _text(choice.get("delta") or choice)
        answer.text += text
        answer.finish = choice.get("finish_reason") or answer.finish
        if text:
            answer.times.append(time.monotonic())


def _text(message: dict[str, Any]) -> str:
    """The text of a completion, or what a chat says and calls."""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    said = [call.get(part) or "" for call in calls for part in ("name", "arguments")]
    return (message.get("text") or message.get("content") or "") + "".join(said)


async def expected_answers(url: str, pool: list[Asked]) -> dict[str, Expected]:
    """The answers of a server without speculation to all requests of a pool, by key."""
    limit = asyncio.Semaphore(8)

    async def one(asked: Asked) -> tuple[str, Expected]:
        body = asked.body if asked.path.startswith("chat") else asked.body | {"logprobs": 2, "stream": False}
        async with limit:
            answer = await ask(session, url, Asked(asked.kind, asked.path, body))
        assert answer.status == 200, f"{asked.kind}: the target alone answers {answer.status}"
        details = (answer.choices or [{}])[0].get("logprobs") or {}
        best = [sorted(top.values(), reverse=True) for top in details.get("top_logprobs") or ()]
        margins = [values[0] - values[1] if len(values) > 1 else float("inf") for values in best]
        offsets = details.get("text_offset") or []
        return asked.key, Expected(answer.text, answer.finish, answer.logprobs, margins, offsets)

    async with client_session() as session:
        return dict(await asyncio.gather(*(one(asked) for asked in pool)))


def client_session() -> aiohttp.ClientSession:
    """A session without a limit of connections, and without one that is kept: descriptors are counted."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))


def faults_of(asked: Asked, answer: Answer, expected: Expected | None) -> tuple[str, str]:
    """What is wrong with an answer, as (kind of fault, description); the kind is "" for none, "tie" for a tie."""
    if answer.status not in asked.statuses:
        return "failed", f"{asked.kind}: status {answer.status}, not {asked.statuses}"
    if answer.status != 200 or asked.abort_after:
        return "", ""
    if expected is not None:
        if answer.text != expected.text or answer.finish != expected.finish:
            text = f"{asked.key}: {answer.text!r} ({answer.finish}), not {expected.text!r} ({expected.finish})"
            return ("tie" if expected.ties_at(answer.text) else "text"), text
        if "logprobs" in asked.body:
            pairs = list(zip(answer.logprobs, expected.logprobs))
            if len(answer.logprobs) != len(expected.logprobs):
                return "text", f"{asked.key}: {len(answer.logprobs)} logprobs, not {len(expected.logprobs)}"
            if any(abs((a or 0.0) - (b or 0.0)) > LOGPROB_TOLERANCE for a, b in pairs):
                return "text", f"{asked.key}: logprobs {answer.logprobs}, not {expected.logprobs}"
    elif len(answer.choices) != asked.body.get("n", 1) and not asked.streams:
        return "text", f"{asked.kind}: {len(answer.choices)} choices"
    if answer.finish not in ("stop", "length", "tool_calls"):
        return "text", f"{asked.kind}: ended with {answer.finish!r}"
    return "", ""


class Load:
    """Clients that each ask one request after another, until told to rest.

    on_gap: gets (start, end) of each pause between two pieces of a stream.
    """

    def __init__(
        self, url: str, requests: Requests, expected: dict[str, Expected], on_gap: Callable[[float, float], None]
    ) -> None:
        self.answered: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.failed: list[str] = []
        self.ties = 0
        self.first_piece_s = 0.0  # longest time to the first piece of a stream
        self._url, self._requests, self._expected, self._on_gap = url, requests, expected, on_gap
        self._runs = asyncio.Event()
        self._busy = 0

    @property
    def total(self) -> int:
        """Requests answered, of any kind."""
        return sum(self.answered.values())

    def go(self) -> None:
        """Let the clients ask."""
        self._runs.set()

    async def rest(self) -> None:
        """Let no client ask, and wait until none is answered."""
        self._runs.clear()
        while self._busy:
            await asyncio.sleep(0.05)

    async def client(self, number: int) -> None:
        """Ask for as long as the task lives."""
        async with client_session() as session:
            for asked in self._requests.stream(number):
                await self._runs.wait()
                self._busy += 1
                try:
                    await self._ask(session, asked)
                finally:
                    self._busy -= 1

    async def _ask(self, session: aiohttp.ClientSession, asked: Asked) -> None:
        started = time.monotonic()
        try:
            answer = await ask(session, self._url, asked)
        except (aiohttp.ClientError, TimeoutError, ConnectionError, ValueError, LookupError) as error:
            self.failed.append(f"{asked.kind}: {type(error).__name__} {error}")
            await asyncio.sleep(0.2)  # a server that is gone
            return
        self.answered[asked.kind] += 1
        for start, end in itertools.pairwise(answer.times):
            self._on_gap(start, end)
        if answer.times:
            self.first_piece_s = max(self.first_piece_s, answer.times[0] - started)
        what, description = faults_of(asked, answer, self._expected.get(asked.key))
        if what == "tie":
            self.ties += 1
        elif what:
            (self.wrong if what == "text" else self.failed).append(description)
