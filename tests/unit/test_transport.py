"""Messages arrive whole and in order or the transport says that it is closed; sending never blocks."""

import os
import select
import signal
import subprocess
import sys
import threading
import time
import tracemalloc

import pytest
from fake_link import pair

from vllm_ssd.link.protocol import Close, Hello, Open, Push, Refused, SpeculationBlock, Step, encode
from vllm_ssd.link.transport import (
    INBOX_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_POLL_MESSAGES,
    MIN_POLL_BYTES,
    SMALL_MESSAGES,
    TransportClosed,
    socket_pair,
)

ECHO = """
import sys
from vllm_ssd.link.protocol import Refused, Step
from vllm_ssd.link.transport import TransportClosed
from vllm_ssd.link.transport import ProcessTransport

transport = ProcessTransport.from_fd(int(sys.argv[1]), "drafter")
try:
    while True:
        for message in transport.poll(None):
            transport.send(Refused(f"{len(message.events)}" if isinstance(message, Step) else message.tokenizer))
except TransportClosed:
    sys.exit(7)
"""


@pytest.fixture
def ends():
    target, drafter = pair()
    yield target, drafter
    target.close()
    drafter.close()


@pytest.fixture
def raw():
    """The target's end, and a bare socket in the drafter's place."""
    transport, sock = socket_pair()
    yield transport, sock
    transport.close()
    sock.close()


@pytest.fixture
def child():
    """The target's end, and a process that answers every message."""
    transport, sock = socket_pair()
    process = subprocess.Popen([sys.executable, "-c", ECHO, str(sock.fileno())], pass_fds=[sock.fileno()])
    sock.close()
    yield transport, process
    transport.close()
    process.kill()
    process.wait()


def hello(i: int) -> Hello:
    return Hello(1, 100, 5, str(i))


def opening(num_bytes: int) -> Step:
    return Step([Open("a" * (1 + num_bytes % 4), 0, bytes(num_bytes // 4 * 4), 0.0)], 5)


def frame(message) -> bytes:
    data = encode(message)
    return len(data).to_bytes(4, "little") + data


def receive(transport, count: int, timeout_s: float = 20.0) -> list:
    messages, deadline = [], time.monotonic() + timeout_s
    while len(messages) < count and time.monotonic() < deadline:
        messages += transport.poll(0.1)
    return messages


def fill(transport) -> int:
    """Send until something has to wait; the number of messages sent."""
    sent = 0
    while not transport.pending_bytes:
        transport.send(opening(1000 + sent))
        sent += 1
    return sent


def test_both_directions_keep_order_and_type(ends):
    target, drafter = ends
    for i in range(100):
        target.send(hello(i))
        drafter.send(Refused(str(i)))
    assert drafter.poll() == [hello(i) for i in range(100)]
    assert target.poll() == [Refused(str(i)) for i in range(100)]
    assert (drafter.poll(), target.poll()) == ([], [])


def test_what_a_slow_reader_leaves_waits_and_arrives_in_order(ends):
    target, drafter = ends
    sent = fill(target)
    for i in range(50):
        target.send(opening(1000 + sent + i))
    received = []
    while target.pending_bytes:
        received += drafter.poll()
        target.poll()
    received += receive(drafter, sent + 50 - len(received))
    assert received == [opening(1000 + i) for i in range(sent + 50)]


def test_sending_flushes_what_waits(ends):
    target, drafter = ends
    sent = fill(target)
    received = []
    while arrived := drafter.poll():
        received += arrived
    target.send(hello(0))
    assert target.pending_bytes == 0
    assert received + receive(drafter, sent + 1 - len(received)) == [
        *(opening(1000 + i) for i in range(sent)),
        hello(0),
    ]


def test_waiting_also_flushes(ends):
    target, drafter = ends
    sent = fill(target) + 1
    target.send(opening(3 * INBOX_BYTES))

    def answer():
        assert len(receive(drafter, sent)) == sent
        drafter.send(Refused("all read"))

    thread = threading.Thread(target=answer)
    thread.start()
    assert target.poll(20.0) == [Refused("all read")]
    thread.join()


def test_the_receive_buffer_keeps_its_size_between_large_messages(ends):
    """Memory that is made anew costs more than the bytes that come into it; small messages give it back."""
    target, drafter = ends
    buffers = []
    for _ in range(3):
        target.send(opening(3 * INBOX_BYTES))
        while not drafter.poll():
            target.poll()
        target.send(hello(0))  # as what a drafter says beside its pushes
        receive(drafter, 1)
        buffers.append(drafter._inbox._buffer)
    assert buffers[0] is buffers[1] is buffers[2] and len(buffers[0]) > 3 * INBOX_BYTES
    for _ in range(SMALL_MESSAGES):
        target.send(hello(0))
        receive(drafter, 1)
    assert len(drafter._inbox._buffer) == INBOX_BYTES


def test_a_reader_that_never_reads_closes_the_transport_at_the_bound():
    target, drafter = pair(max_pending_bytes=100_000)
    with pytest.raises(TransportClosed, match="does not read"):
        for _ in range(100_000):
            target.send(opening(1000))
            assert target.pending_bytes <= 100_000
    assert (target.pending_bytes, target.fileno()) == (0, -1)
    with pytest.raises(TransportClosed, match="does not read"):
        target.send(hello(0))
    with pytest.raises(TransportClosed, match="does not read"):
        target.poll()
    assert len(drafter.poll()) > 10
    with pytest.raises(TransportClosed, match="the other end closed"):
        receive(drafter, 100_000)


def test_everything_sent_before_the_end_closed_is_delivered(ends):
    target, drafter = ends
    drafter.send(Refused("no such model"))
    drafter.close()
    with pytest.raises(TransportClosed, match="gone"):
        target.send(hello(0))
    assert target.poll() == [Refused("no such model")]
    for _ in range(2):
        with pytest.raises(TransportClosed, match="closed"):
            target.poll(None)


def test_an_end_that_closed_with_unread_messages_still_delivers_its_own(ends):
    target, drafter = ends
    target.send(hello(0))
    drafter.send(Refused("too late"))
    drafter.close()
    assert target.poll(None) == [Refused("too late")]
    with pytest.raises(TransportClosed, match="gone"):
        target.poll(None)


def test_what_waits_for_an_end_that_is_gone_is_dropped(ends):
    target, drafter = ends
    fill(target)
    drafter.close()
    with pytest.raises(TransportClosed):
        target.poll()
    assert target.pending_bytes == 0


def test_a_dead_peer_does_not_kill_a_host_with_default_sigpipe(ends):
    target, drafter = ends
    drafter.close()
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        with pytest.raises(TransportClosed):
            target.send(hello(0))
    finally:
        signal.signal(signal.SIGPIPE, before)


def test_closing_is_idempotent_and_final(ends):
    target, _ = ends
    target.close()
    target.close()
    assert target.fileno() == -1
    for call in (target.poll, lambda: target.send(hello(0))):
        with pytest.raises(TransportClosed, match="this end is closed"):
            call()


def test_poll_waits_no_longer_than_asked_and_wakes_at_once(ends):
    target, drafter = ends
    started = time.monotonic()
    assert target.poll(0.05) == []
    assert 0.05 <= time.monotonic() - started < 20.0
    timer = threading.Timer(0.05, drafter.send, [Refused("now")])
    timer.start()
    assert target.poll(None) == [Refused("now")]
    timer.join()


def test_fileno_tells_when_to_poll(ends):
    target, drafter = ends
    assert select.select([target], [], [], 0)[0] == []
    drafter.send(Refused("x"))
    assert select.select([target], [], [], 5)[0] == [target]


def test_messages_cut_anywhere_are_put_together(raw):
    transport, sock = raw
    messages = [
        Push([], [], None),
        Refused("é" * 50),
        Push([SpeculationBlock("a", 0, 9, 0, b"\0" * 8, b"\0" * 4)], [], None),
    ]
    data = b"".join(map(frame, messages))
    received = []
    for i in range(len(data)):
        sock.send(data[i : i + 1])
        received += transport.poll()
    assert received == messages


@pytest.mark.parametrize("size", [INBOX_BYTES - 30, INBOX_BYTES, INBOX_BYTES + 1, 20_000_000])
def test_large_messages_arrive_between_small_ones(ends, size):
    target, drafter = ends
    messages = [hello(0), opening(size), hello(1), opening(2 * size), hello(2), opening(size // 2), hello(3)]
    sender = threading.Thread(target=lambda: [*map(target.send, messages), receive(target, 1)])
    sender.start()
    assert receive(drafter, len(messages)) == messages
    drafter.send(Refused("done"))
    sender.join()


def test_a_stream_much_longer_than_the_inbox_arrives_whole(ends):
    target, drafter = ends
    received = []
    for i in range(600):
        target.send(opening(4 * i))
        target.send(opening(7001))
        if i % 7 == 0:
            received += drafter.poll()
    received += receive(drafter, 1200 - len(received))
    assert received == [m for i in range(600) for m in (opening(4 * i), opening(7001))]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        pytest.param(b"\3\0\0\0xyz", "not a message", id="bytes"),
        pytest.param(b"\0\0\0\0", "not a message", id="empty"),
        pytest.param(frame(Step([Close("a")], 5)), "not a message", id="other direction"),
        pytest.param((MAX_MESSAGE_BYTES + 1).to_bytes(4, "little"), "268435457 bytes announced", id="length"),
    ],
)
def test_malformed_bytes_close_after_what_came_before(raw, bad, reason):
    transport, sock = raw
    sock.sendall(frame(Refused("good")) + bad + frame(Refused("never seen")))
    assert transport.poll() == [Refused("good")]
    for _ in range(2):
        with pytest.raises(TransportClosed, match=reason):
            transport.poll(None)
    assert transport.fileno() == -1


def test_memory_grows_with_what_arrives_not_with_what_is_announced(raw):
    transport, sock = raw
    tracemalloc.start()
    try:
        sock.sendall(MAX_MESSAGE_BYTES.to_bytes(4, "little") + b"1234")
        assert transport.poll() == [] and transport.mid_message
        assert tracemalloc.get_traced_memory()[1] < 4 * INBOX_BYTES
    finally:
        tracemalloc.stop()


def test_a_lower_bound_refuses_longer_messages():
    transport, sock = socket_pair(max_message_bytes=1000)
    sock.sendall((1000).to_bytes(4, "little"))
    assert transport.poll() == []
    sock.sendall(bytes(1000))
    with pytest.raises(TransportClosed, match="not a message"):
        transport.poll()
    transport, sock = socket_pair(max_message_bytes=1000)
    sock.sendall((1001).to_bytes(4, "little"))
    with pytest.raises(TransportClosed, match="1001 bytes announced"):
        transport.poll()


def test_one_poll_returns_a_bounded_number_of_messages(ends):
    target, drafter = ends
    for i in range(MAX_POLL_MESSAGES + 10):
        drafter.send(Refused(str(i)))
    assert target.poll() == [Refused(str(i)) for i in range(MAX_POLL_MESSAGES)]
    assert target.at_bound and not target.mid_message
    assert target.poll(None) == [Refused(str(MAX_POLL_MESSAGES + i)) for i in range(10)]
    assert not target.at_bound and target.poll() == []


def test_one_poll_reads_a_bounded_number_of_bytes():
    target, drafter = pair()
    target.limit_messages(1 << 20)
    total = 2 * MIN_POLL_BYTES >> 16
    for _ in range(total):
        drafter.send(Refused("x" * (1 << 16)))
    first = target.poll()
    assert target.at_bound and len(first) << 16 <= MIN_POLL_BYTES + INBOX_BYTES
    drafter.poll()
    assert len(receive(target, total - len(first))) == total - len(first)


def test_end_in_the_middle_of_a_message(raw):
    transport, sock = raw
    sock.sendall(frame(Refused("good")) + frame(Refused("cut"))[:-1])
    sock.close()
    assert transport.poll() == [Refused("good")]
    with pytest.raises(TransportClosed, match="in the middle of a message"):
        transport.poll(None)


def test_a_message_over_the_limit_is_not_sent(ends, monkeypatch):
    monkeypatch.setattr("vllm_ssd.link.transport.MAX_MESSAGE_BYTES", 1000)
    target, drafter = ends
    with pytest.raises(TransportClosed, match="exceeds the limit of 1000"):
        target.send(opening(1000))
    with pytest.raises(TransportClosed):
        drafter.poll(None)


def test_a_child_process_inherits_its_end(child):
    transport, process = child
    for i in range(20):
        transport.send(hello(i))
    assert receive(transport, 20) == [Refused(str(i)) for i in range(20)]
    transport.close()
    assert process.wait(20) == 7


def test_a_large_message_crosses_processes(child):
    transport, _ = child
    transport.send(Step([Close("x" * 1000)] * 20_000, 5))
    assert transport.poll(20.0) == [Refused("20000")]


def test_a_killed_peer_is_noticed_while_waiting(child):
    transport, process = child
    transport.send(hello(0))
    assert transport.poll(20.0) == [Refused("0")]
    timer = threading.Timer(0.1, process.kill)
    timer.start()
    with pytest.raises(TransportClosed):
        transport.poll(20.0)
    with pytest.raises(TransportClosed):
        transport.send(hello(1))
    timer.join()


def test_a_killed_peer_is_noticed_while_sending(child):
    transport, process = child
    process.send_signal(signal.SIGSTOP)
    fill(transport)
    process.kill()
    process.wait()
    with pytest.raises(TransportClosed):
        transport.send(hello(0))


def test_a_child_does_not_pass_its_end_on():
    transport, sock = socket_pair()
    code = (
        "import subprocess, sys; from vllm_ssd.link.transport import ProcessTransport;"
        "ProcessTransport.from_fd(int(sys.argv[1]), 'drafter');"
        "print(subprocess.Popen(['sleep', '60'], close_fds=False, stdout=subprocess.DEVNULL).pid)"
    )
    fd = sock.fileno()
    child = subprocess.Popen([sys.executable, "-c", code, str(fd)], pass_fds=[fd], stdout=subprocess.PIPE)
    sock.close()
    grandchild = int(child.communicate(timeout=20)[0])
    try:
        with pytest.raises(TransportClosed):
            transport.poll(20.0)
        os.kill(grandchild, 0)
    finally:
        os.kill(grandchild, signal.SIGKILL)
