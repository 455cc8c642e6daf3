"""One drafter that listens and several targets: each hears of its own requests alone, whatever the others do."""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import fake_model
import msgspec
import numpy as np
import pytest
from listening_drafter import HELLO, OPTIONS, SLOTS, VOCAB_SIZE, WELCOME, K, engine_with, opening
from malformed_frames import malformed

from vllm_ssd.drafter import tenants as tenants_module
from vllm_ssd.drafter.accept import Acceptor
from vllm_ssd.drafter.server import Booted, serve
from vllm_ssd.drafter.standalone import Host
from vllm_ssd.drafter.tenants import Stopped, Tenants
from vllm_ssd.drafter.vocabulary import VocabularyMap
from vllm_ssd.link import process, remote, tcp
from vllm_ssd.link.checks import PushChecker
from vllm_ssd.link.credential import tls_context
from vllm_ssd.link.handshake import DrafterFailed, DrafterRefused
from vllm_ssd.link.protocol import Close, Hello, Open, Outcome, Push, Refused, Step, Welcome, pack_ids
from vllm_ssd.link.remote import RemoteDrafter
from vllm_ssd.link.transport import ProcessTransport, TransportClosed

LOGGER = logging.getLogger("test_tenants")
SOON_S = 30.0
LONGEST_STEP = 1 << 20


class Drafter:
    """A drafter that listens, on a thread of this process."""

    def __init__(self, credential: Path, address: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        self.engine = engine_with(OPTIONS, fake_model.FakePagedModel(400))
        acceptor = Acceptor(address, tls_context(credential, is_server=True), LOGGER)
        self.address = acceptor.address
        self.tenants = Tenants(acceptor, OPTIONS, lambda hello: WELCOME, LONGEST_STEP, LOGGER)
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        try:
            serve(self.tenants, self.engine)
        except Stopped:
            pass
        finally:
            self.tenants.close()

    def stop(self) -> None:
        if self.thread.is_alive():
            self.tenants.stop()
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture
def drafter(credential: Path) -> Iterator[Drafter]:
    drafter = Drafter(credential)
    yield drafter
    drafter.stop()


class Target:
    """A target's end of a connection, by hand."""

    def __init__(self, drafter: Drafter, credential: Path, hello: Hello | None = HELLO) -> None:
        self.stream = tcp.connect(drafter.address, tls_context(credential, is_server=False))
        self.transport = ProcessTransport(self.stream, "target")
        self.pushes: list[Push] = []
        if hello is not None:
            self.transport.send(hello)

    def answer(self) -> Welcome | Refused:
        (answer, *_) = self.transport.poll(SOON_S)
        return answer

    def until(self, done: Callable[[], bool], timeout_s: float = SOON_S) -> bool:
        """Read pushes until something holds; whether it does in time."""
        deadline = time.monotonic() + timeout_s
        while not done() and time.monotonic() < deadline:
            self.pushes += self.transport.poll(0.02)
        return done()

    def blocks(self, request_id: str) -> list:
        return [block for push in self.pushes for block in push.blocks if block.request_id == request_id]

    def evicted(self) -> list[str]:
        return [lost.request_id for push in self.pushes for lost in push.evicted]


@pytest.fixture
def join(drafter: Drafter, credential: Path) -> Iterator[Callable[..., Target]]:
    """Targets that have been welcomed."""
    targets: list[Target] = []

    def join() -> Target:
        targets.append(Target(drafter, credential))
        assert targets[-1].answer() == WELCOME
        return targets[-1]

    yield join
    for target in targets:
        target.transport.close()


def test_targets_with_the_same_request_ids_hear_of_their_own(join: Callable[..., Target]) -> None:
    one, other = join(), join()
    one.transport.send(opening("a", length=5))
    other.transport.send(opening("a", length=9))
    assert one.until(lambda: bool(one.blocks("a"))) and other.until(lambda: bool(other.blocks("a")))
    one.until(lambda: False, 0.1)
    assert {block.length for block in one.blocks("a")} == {5}
    assert {block.length for block in other.blocks("a")} == {9}


def test_sampled_requests_come_with_their_own_proposals(join: Callable[..., Target]) -> None:
    targets = [join(), join()]
    prompts = [pack_ids([i % VOCAB_SIZE for i in range(length)]) for length in (5, 9)]
    for target, prompt in zip(targets, prompts):
        target.transport.send(
            Step([Open("a", 1, prompt, 1.0), Open("b", 1, prompt, 0.0), Open("c", 1, prompt, 0.7)], K)
        )
    checker = PushChecker.of(OPTIONS, VOCAB_SIZE)
    for target in targets:
        assert target.until(lambda: all(target.blocks(name) for name in "abc"))  # noqa: B023
        assert {checker.reason(push) for push in target.pushes} == {None}
        drafts = 0
        for pushed in (pushed for push in target.pushes for pushed in push.each() if pushed.block.sampled):
            for branch in range(pushed.block.num_branches):
                for draft, proposal in zip(pushed.block.drafts(branch), pushed.proposals(branch), strict=True):
                    assert proposal is not None and proposal[0][0] == draft
                    drafts += 1
        assert drafts > 0


def test_a_target_that_is_gone_leaves_nothing_and_the_others_go_on(
    drafter: Drafter, join: Callable[..., Target]
) -> None:
    one, other = join(), join()
    one.transport.send(opening("a", "b"))
    other.transport.send(opening("a"))
    assert one.until(lambda: bool(one.blocks("b"))) and other.until(lambda: bool(other.blocks("a")))
    one.transport.close()
    other.transport.send(Step([Outcome("a", 1, 6, [1], [])], K))
    assert other.until(lambda: any(block.length == 6 for block in other.blocks("a")))
    assert other.until(lambda: len(drafter.engine.sequences) == 1)
    assert len(drafter.tenants) == 1


@pytest.mark.parametrize("welcomed", [False, True])
def test_malformed_frames_end_their_connection_alone(
    drafter: Drafter, join: Callable[..., Target], credential: Path, welcomed: bool
) -> None:
    """`scripts/fuzz_frames.py` sends as many as there is time for."""
    sound, rng = join(), random.Random(0)
    sound.transport.send(opening("a"))
    assert sound.until(lambda: bool(sound.blocks("a")))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(200):
        bad = Target(drafter, credential, HELLO if welcomed else None)
        if welcomed:
            assert bad.answer() == WELCOME
        frame = malformed(rng, HELLO, welcomed)
        try:
            with contextlib.suppress(OSError):  # closed while it is being written, or when it is read
                bad.stream.send(frame.data)
                deadline = time.monotonic() + 10.0
                while frame.is_whole:
                    bad.transport.poll(0.05)
                    assert time.monotonic() < deadline, frame
        finally:
            bad.transport.close()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 << 10, f"{grown} KiB"
    sound.transport.send(Step([Outcome("a", 1, 6, [1], [])], K))
    assert sound.until(lambda: any(block.length == 6 for block in sound.blocks("a")))


@pytest.mark.parametrize(
    "step",
    [
        Step([Open("x", 1, pack_ids([VOCAB_SIZE]), 0.0)], K),
        Step([Open("x", 1, pack_ids([]), 0.0)], K),
        Step([Open("x", 1, pack_ids([1] * 199), 0.0)], K),
        Step([Open("x", 1, pack_ids([1]), 1e300)], K),
        Step([Outcome("x", 1, 5, [1], [2])], K),
        Step([Open("x", 1, pack_ids([1, 2]), 0.0), Outcome("x", 1, 3, [VOCAB_SIZE], [])], K),
        Step([Open("x", 1, pack_ids([1, 2]), 0.0), Outcome("x", 1, 2, [], [1] * 50)], K),
    ],
)
def test_what_no_sound_target_says_costs_it_that_request(join: Callable[..., Target], step: Step) -> None:
    one, other = join(), join()
    one.transport.send(step)
    other.transport.send(opening("a"))
    assert one.until(lambda: "x" in one.evicted()) and other.until(lambda: bool(other.blocks("a")))


def test_a_target_that_does_not_read_is_given_up(
    drafter: Drafter, join: Callable[..., Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf, other = join(), join()
    deaf.transport.send(opening("a"))
    assert deaf.until(lambda: bool(deaf.blocks("a")))
    tenant = next(iter(drafter.tenants._tenants.values()))
    monkeypatch.setattr(tenant.transport, "_write", lambda data: 0)
    monkeypatch.setattr(tenant.transport, "_max_pending_bytes", 100)
    other.transport.send(opening("a"))
    deaf.transport.send(Step([Outcome("a", 1, 6, [1], [])], K))
    assert other.until(lambda: len(drafter.tenants) == 1 and bool(other.blocks("a")))
    other.transport.send(Step([Outcome("a", 1, 6, [1], [])], K))
    assert other.until(lambda: any(block.length == 6 for block in other.blocks("a")))


def test_more_drafts_than_the_drafter_has_are_not_asked_of_it(join: Callable[..., Target]) -> None:
    one = join()
    one.transport.send(msgspec.structs.replace(opening("a"), num_speculative_tokens=1 << 40))
    assert one.until(lambda: bool(one.blocks("a")))
    one.transport.send(Step([Outcome("a", 1, 6, [1], [], 1 << 40)], 1 << 40))
    assert one.until(lambda: any(block.length == 6 for block in one.blocks("a")))


def test_the_target_with_most_requests_makes_room(drafter: Drafter, join: Callable[..., Target]) -> None:
    hog, modest = join(), join()
    hog.transport.send(opening(*map(str, range(SLOTS))))
    assert hog.until(lambda: len(drafter.engine.sequences) == SLOTS)
    modest.transport.send(opening("a", "b"))
    assert modest.until(lambda: bool(modest.blocks("a") and modest.blocks("b")))
    assert hog.until(lambda: len(hog.evicted()) == 2) and hog.evicted() == ["0", "1"]
    hog.transport.send(opening(*map(str, range(20, 40))))
    assert hog.until(lambda: len(hog.evicted()) == 22)
    modest.until(lambda: False, 0.1)
    assert not modest.evicted() and len(drafter.engine.sequences) == SLOTS


def test_a_long_request_id_ends_the_connection(join: Callable[..., Target]) -> None:
    one = join()
    one.transport.send(opening("x" * 5000))
    with pytest.raises(TransportClosed):
        one.until(lambda: False)


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        ({"num_speculative_tokens": K + 1}, "num_speculative_tokens 3, the target has 4"),
        ({"max_branches": 5}, "up to 12 branches .* the target takes 5"),
        ({"max_support": 2}, "up to 5 token ids in a proposal .* takes 2"),
    ],
)
def test_a_target_that_cannot_take_what_the_drafter_sends_is_refused(
    drafter: Drafter, credential: Path, hello: dict, reason: str
) -> None:
    target = Target(drafter, credential, msgspec.structs.replace(HELLO, **hello))
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(target.answer())
    with pytest.raises(TransportClosed):
        target.until(lambda: False)


def test_who_says_nothing_is_let_go(drafter: Drafter, credential: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenants_module, "HELLO_S", 0.2)
    target = Target(drafter, credential, hello=None)
    with pytest.raises(TransportClosed):
        target.until(lambda: False)


def test_silent_and_plain_connections_do_not_slow_pushes(
    drafter: Drafter, join: Callable[..., Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 connections that say nothing or no TLS, and handshakes that hang: they are another thread's."""
    one = join()
    one.transport.send(opening("a"))
    assert one.until(lambda: bool(one.blocks("a")))

    def has_answered(length: int) -> bool:
        return any(block.length == length for block in one.blocks("a"))

    def rounds(first: int, count: int) -> None:
        for length in range(first, first + count):
            one.transport.send(Step([Outcome("a", 1, length, [1], [])], K))
            assert one.until(functools.partial(has_answered, length))

    others = [socket.create_connection(drafter.address) for _ in range(100)]
    for sock in others[::2]:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
    rounds(6, 40)
    began, over = threading.Event(), threading.Event()
    monkeypatch.setattr(tcp.TlsStream, "shake_hands", lambda stream: began.set() or over.wait() and False)
    others.append(socket.create_connection(drafter.address))
    others[-1].sendall(b"\0")
    assert began.wait(SOON_S)
    rounds(46, 40)
    over.set()
    for sock in others:
        sock.close()


# ---- the target's link -----------------------------------------------------------------------------------


@pytest.fixture
def connect(credential: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RemoteDrafter]]:
    monkeypatch.setattr(remote, "RETRY_S", (0.05, 0.2))
    monkeypatch.setattr(process, "WATCH_S", 0.05)
    links: list[RemoteDrafter] = []

    def connect(address: tuple[str, int], hello: Hello = HELLO, startup_timeout_s: float = SOON_S) -> RemoteDrafter:
        context = tls_context(credential, is_server=False)
        name = f"{address[0]}:{address[1]}"
        links.append(RemoteDrafter(name, context, OPTIONS, hello, startup_timeout_s=startup_timeout_s, logger=LOGGER))
        return links[-1]

    yield connect
    for link in links:
        link.close()


def hits(link: RemoteDrafter, timeout_s: float = SOON_S) -> bool:
    """Whether a request that is opened now gets a block."""
    link.poll()
    link.send(opening("a", epoch=link.generation))
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if any(block.request_id == "a" for push in link.poll(0.05) for block in push.blocks):
            return True
    return False


def test_a_link_connects_again_when_the_drafter_is_there_again(
    credential: Path, connect: Callable[..., RemoteDrafter]
) -> None:
    drafter = Drafter(credential)
    link = connect(drafter.address)
    link.wait_until_ready()
    assert hits(link) and link.generation == 1 and link.max_model_len == 200
    drafter.stop()
    started = time.monotonic()
    while link.connected:
        link.poll(0.01)
    assert time.monotonic() - started < process.HANG_S / 2, "seen by its end, not by its silence"
    link.send(Step([Close("a")], K))  # dropped
    again = Drafter(credential, drafter.address)
    deadline = time.monotonic() + SOON_S
    while not link.connected and time.monotonic() < deadline:
        link.poll(0.01)
    assert link.generation == 2 and hits(link)
    link.close()
    again.stop()


def test_a_drafter_that_comes_late_is_used_and_one_that_does_not_is_named(
    credential: Path, connect: Callable[..., RemoteDrafter]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = probe.getsockname()
    link = connect(address, startup_timeout_s=0.5)
    with pytest.raises(DrafterFailed, match=f"at 127.0.0.1:{address[1]} cannot be reached: Connection refused"):
        link.wait_until_ready()
    drafter = Drafter(credential, address)
    deadline = time.monotonic() + SOON_S
    while not link.connected and time.monotonic() < deadline:
        link.poll(0.01)
    assert hits(link)
    link.close()
    drafter.stop()


def test_a_refusal_is_said_at_once(drafter: Drafter, connect: Callable[..., RemoteDrafter]) -> None:
    link = connect(drafter.address, msgspec.structs.replace(HELLO, max_branches=5))
    with pytest.raises(DrafterRefused, match="give both the same keys"):
        link.wait_until_ready()


def test_targets_of_another_vocabulary_are_refused() -> None:
    """The engine is made once, in the ids of the first target that fits the draft model."""
    made: list[VocabularyMap] = []
    unlike, like = Refused("unlike"), VocabularyMap(np.arange(3), np.ones(3, np.bool_))

    def engine(vocabulary: VocabularyMap) -> object:
        made.append(vocabulary)
        return object()

    booted = SimpleNamespace(
        welcome=WELCOME, greet=lambda hello: unlike if hello.tokenizer == "x" else like, engine=engine
    )
    host = Host(cast(Booted, booted))
    assert host.greet(msgspec.structs.replace(HELLO, tokenizer="x")) is unlike and host.engine is None
    assert host.greet(HELLO) == WELCOME == host.greet(HELLO) and len(made) == 1 and made[0] is like
    for other in ({"tokenizer": "g"}, {"vocab_size": VOCAB_SIZE + 1}, {"heterogeneous_vocab": True}):
        refused = host.greet(msgspec.structs.replace(HELLO, **other))
        assert isinstance(refused, Refused) and "another vocabulary" in refused.reason
    old = host.greet(msgspec.structs.replace(HELLO, version=0))
    assert isinstance(old, Refused) and "protocol version 0" in old.reason
