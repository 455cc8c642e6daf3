"""Messages over TLS arrive as over a socket pair, between holders of one credential and nobody else."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vllm_ssd.config import parse_address
from vllm_ssd.drafter import accept
from vllm_ssd.drafter.accept import Acceptor
from vllm_ssd.link import tcp
from vllm_ssd.link.credential import BadCredential, make_credential, tls_context
from vllm_ssd.link.protocol import Hello, Open, Refused, Step, pack_ids
from vllm_ssd.link.tcp import TlsStream
from vllm_ssd.link.transport import INBOX_BYTES, ProcessTransport, TransportClosed

SOON_S = 30.0
LOGGER = logging.getLogger("test_tcp")


@pytest.fixture
def listen():
    acceptors = []

    def start(path: Path) -> Acceptor:
        acceptors.append(Acceptor(("127.0.0.1", 0), tls_context(path, is_server=True), LOGGER))
        return acceptors[-1]

    yield start
    for acceptor in acceptors:
        acceptor.close()


def taken(acceptor: Acceptor, timeout_s: float = SOON_S) -> list[TlsStream]:
    """The next connections that have shaken hands, or none after the time."""
    select.select([acceptor], [], [], timeout_s)
    return [stream for stream, _ in acceptor.take()]


@pytest.fixture
def ends(listen, credential):
    acceptor = listen(credential)
    client = tcp.connect(acceptor.address, tls_context(credential, is_server=False))
    (server,) = taken(acceptor)
    target, drafter = ProcessTransport(client, "target"), ProcessTransport(server, "drafter")
    yield target, drafter
    target.close()
    drafter.close()


def opening(num_bytes: int) -> Step:
    return Step([Open("a", 0, pack_ids(np.random.default_rng(num_bytes).integers(0, 1 << 31, num_bytes // 4)), 0.0)], 5)


def test_messages_travel_both_ways_and_keep_their_order(ends):
    target, drafter = ends
    for i in range(500):
        target.send(Hello(1, 100, 5, str(i)))
        drafter.send(Refused(str(i)))
    found: dict[str, list[str]] = {"target": [], "drafter": []}
    while len(found["target"]) < 500 or len(found["drafter"]) < 500:
        found["drafter"] += [message.tokenizer for message in drafter.poll(0.01)]
        found["target"] += [message.reason for message in target.poll(0.01)]
    assert found == dict.fromkeys(("target", "drafter"), list(map(str, range(500))))


@pytest.mark.parametrize("num_bytes", [0, 62_000, 3 * INBOX_BYTES, 20 << 20])
def test_a_message_of_any_size_arrives_without_another_wakeup(ends, num_bytes):
    """What TLS has decrypted must not wait in its buffer while the receiver sleeps on the descriptor."""
    target, drafter = ends
    message = opening(num_bytes)
    with ThreadPoolExecutor() as pool:
        received = pool.submit(drafter.poll, 20.0)
        target.send(message)
        while target.pending_bytes:
            target.poll(0.001)
        assert received.result() == [message]


def test_a_full_stream_does_not_block_the_sender(ends):
    target, drafter = ends
    messages = [opening(4 << 20) for _ in range(8)]
    started = time.monotonic()
    for message in messages:
        target.send(message)
    assert time.monotonic() - started < SOON_S and target.pending_bytes
    received = []
    while len(received) < len(messages):
        target.poll()
        received += drafter.poll(0.01)
    assert received == messages and not target.pending_bytes


class HeldBack:
    """A socket that sends what it was given only when it is told to."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.held = sock, b""

    def __getattr__(self, name: str):
        return getattr(self.sock, name)

    def send(self, data: bytes, flags: int = 0) -> int:
        self.held += data
        return len(data)

    def release(self) -> None:
        self.sock.sendall(self.held)
        self.held = b""


def test_what_comes_with_the_end_of_the_handshake_is_not_missed(credential):
    """A target may send its Hello in the same packet: the descriptor must still be readable for it."""
    ours, theirs = socket.socketpair()
    held = HeldBack(ours)
    client = TlsStream(held, tls_context(credential, is_server=False))
    server = TlsStream(theirs, tls_context(credential, is_server=True), server_side=True)
    assert not client.shake_hands()
    held.release()
    assert not server.shake_hands()
    assert client.shake_hands()
    ProcessTransport(client, "target").send(Hello(1, 100, 5, "at once"))
    held.release()
    while not server.shake_hands():
        pass
    (hello,) = ProcessTransport(server, "drafter").poll(SOON_S)
    assert hello.tokenizer == "at once"
    ours.close()
    theirs.close()


@pytest.mark.parametrize("farewell", [True, False])
def test_the_end_of_the_other_side_is_noticed_after_its_last_message(ends, farewell):
    target, drafter = ends
    drafter.send(Refused("last"))
    if farewell:
        drafter.close()
    else:
        os.close(os.dup(drafter.fileno()))
        socket.socket(fileno=os.dup(drafter.fileno())).shutdown(socket.SHUT_RDWR)
    assert target.poll(SOON_S) == [Refused("last")]
    with pytest.raises(TransportClosed):
        target.poll(SOON_S)


def use(stream: TlsStream) -> list:
    """What arrives on a connection that was refused: with TLS 1.3 its own end learns of it when it reads."""
    return ProcessTransport(stream, "target").poll(SOON_S)


def test_another_credential_is_refused(listen, credential, tmp_path, caplog):
    other = tmp_path / "other.pem"
    make_credential(other)
    acceptor = listen(credential)
    with caplog.at_level(logging.INFO, LOGGER.name):
        with pytest.raises(OSError):
            use(tcp.connect(acceptor.address, tls_context(other, is_server=False)))
    assert not taken(acceptor, 0.3)


def test_a_server_with_another_credential_is_refused(listen, credential, tmp_path):
    other = tmp_path / "other.pem"
    make_credential(other)
    with pytest.raises(ssl.SSLCertVerificationError):
        tcp.connect(listen(other).address, tls_context(credential, is_server=False))


def test_a_client_without_a_credential_is_refused(listen, credential):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    acceptor = listen(credential)
    with pytest.raises(OSError):
        use(tcp.connect(acceptor.address, context))
    assert not taken(acceptor, 0.3)


def test_plain_text_is_refused(listen, credential):
    acceptor = listen(credential)
    with socket.create_connection(acceptor.address) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
        sock.settimeout(5.0)
        with contextlib.suppress(ConnectionError):
            while sock.recv(1000):
                pass
    assert not taken(acceptor, 0.1)


def test_old_versions_of_tls_are_refused(listen, credential):
    context = tls_context(credential, is_server=False)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(OSError):
        tcp.connect(listen(credential).address, context)


def test_silent_connections_end_and_delay_nobody(listen, credential, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(accept, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    acceptor = listen(credential)
    silent = [socket.create_connection(acceptor.address) for _ in range(100)]
    client = tcp.connect(acceptor.address, tls_context(credential, is_server=False))
    assert len(taken(acceptor)) == 1, "while no time passes for the others"
    clock[0] += accept.CONNECT_TIMEOUT_S + 1
    for sock in silent:
        sock.settimeout(SOON_S)
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
        sock.close()
    client.close()


def test_a_flood_of_connections_pushes_the_oldest_out(listen, credential, monkeypatch):
    monkeypatch.setattr(accept, "MAX_HANDSHAKES", 8)
    acceptor = listen(credential)
    silent = [socket.create_connection(acceptor.address) for _ in range(40)]
    client = tcp.connect(acceptor.address, tls_context(credential, is_server=False))
    assert len(taken(acceptor)) == 1
    silent[0].settimeout(5.0)
    with contextlib.suppress(ConnectionResetError):
        assert silent[0].recv(1) == b""
    for sock in (client, *silent):
        sock.close()


def test_a_connection_waits_for_a_descriptor_and_nobody_spins(listen, credential, monkeypatch):
    """A thread that asks all the time takes the interpreter from the drafter's steps."""
    acceptor, tries = listen(credential), []

    def accept_none(sock):
        tries.append(1)
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "accept", accept_none)
        began = time.monotonic()
        waiting = socket.create_connection(acceptor.address)
        while not tries or time.monotonic() < began + 3 * accept.TICK_S:
            time.sleep(accept.TICK_S)
        assert len(tries) <= 1 + (time.monotonic() - began) / accept.TICK_S
    client = tcp.connect(acceptor.address, tls_context(credential, is_server=False))
    assert len(taken(acceptor)) == 1
    for sock in (client, waiting):
        sock.close()


def test_a_host_that_does_not_answer_is_given_up(credential, monkeypatch):
    monkeypatch.setattr(tcp, "CONNECT_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(TimeoutError):
        tcp.connect(mute.getsockname(), tls_context(credential, is_server=False))


def test_a_credential_is_for_its_owner_alone_and_is_not_replaced(tmp_path):
    path = tmp_path / "ssd.pem"
    make_credential(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        make_credential(path)
    path.chmod(0o640)
    with pytest.raises(BadCredential, match="can be read by other users.*chmod 600"):
        tls_context(path, is_server=True)
    with pytest.raises(BadCredential, match="No such file.*vllm-ssd key"):
        tls_context(tmp_path / "missing.pem", is_server=False)
    (tmp_path / "noise.pem").touch(0o600)
    with pytest.raises(BadCredential, match="is not a credential written by"):
        tls_context(tmp_path / "noise.pem", is_server=False)


@pytest.mark.parametrize(
    ("text", "address"),
    [("10.0.0.7:7011", ("10.0.0.7", 7011)), ("node-3.local:1", ("node-3.local", 1)), ("[::1]:65535", ("::1", 65535))],
)
def test_addresses(text, address):
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "host", "host:", ":7011", "host:0", "host:65536", "::1:7011", "host:x", "host:٧"])
def test_what_is_no_address(text):
    with pytest.raises(ValueError, match="no (HOST:PORT|port)"):
        parse_address(text)
