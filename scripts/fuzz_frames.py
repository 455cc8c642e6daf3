"""Send malformed frames to a drafter that listens, and look at its memory.

    python scripts/fuzz_frames.py --frames 100000 --seed 1
    python scripts/fuzz_frames.py --frames 100000 --seed 1 --start 42000 --seconds 200

The drafter is a process of its own, with the fake model of the tests. Each frame ends a connection of its own, by
turns one without TLS, one that has shown the credential, and one that was welcomed; frame number n depends on the seed
and n only. All the while a sound target decodes. The run exits with 1 where the drafter has ended, the sound target was
not served, a malformed frame did not end its connection, or the drafter has grown by over 16 MiB or 8 descriptors after
the first frames.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "unit")]

from listening_drafter import HELLO, OPTIONS, VOCAB_SIZE, K, opening  # noqa: E402
from malformed_frames import malformed  # noqa: E402

from vllm_ssd.link import tcp  # noqa: E402
from vllm_ssd.link.credential import make_credential, tls_context  # noqa: E402
from vllm_ssd.link.protocol import Outcome, Step, Welcome  # noqa: E402
from vllm_ssd.link.transport import ProcessTransport, TransportClosed  # noqa: E402

KINDS = ("without TLS", "before the Hello", "after the Hello")
START_S, ANSWER_S = 60.0, 20.0
WARM_UP = 300
"""Frames after which growth is counted."""
MAX_GROWN_KIB, MAX_MORE_DESCRIPTORS = 16 << 10, 8
REPORT = 5000


@contextlib.contextmanager
def listening(key: Path) -> Iterator[tuple[int, tuple[str, int]]]:
    """Process id and address of a drafter."""
    options = msgspec.structs.replace(OPTIONS, key=str(key))
    with subprocess.Popen(
        [sys.executable, str(TESTS / "listening_drafter.py"), "127.0.0.1:0", msgspec.json.encode(options).decode()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:2])},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            if "listens on" not in said:
                raise SystemExit("fuzz_frames: the drafter has not come up")
            yield process.pid, ("127.0.0.1", int(said.rpartition(":")[2]))
            if process.poll() is not None:
                raise SystemExit(f"fuzz_frames: the drafter has ended with status {process.returncode}")
        finally:
            process.kill()


def size_of(pid: int) -> tuple[int, int]:
    """Resident memory of a process in KiB, and its descriptors."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (resident,) = (int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
    return resident, len(os.listdir(f"/proc/{pid}/fd"))


class SoundTarget:
    """A target of one request, which decodes a token at a time and hears of each."""

    def __init__(self, connection: ProcessTransport) -> None:
        self._connection = connection
        self._length = self._epoch = 0

    def decode(self) -> None:
        """One round; exits where no block comes for it."""
        self._length += 1
        step = Step([Outcome("a", self._epoch, self._length, [self._length % VOCAB_SIZE], [])], K)
        if self._epoch == 0 or self._length > 150:
            self._epoch, self._length = self._epoch + 1, 5
            step = opening("a", epoch=self._epoch)
        self._connection.send(step)
        deadline = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline:
            for push in self._connection.poll(0.1):
                if any((b.epoch, b.length) == (self._epoch, self._length) for b in push.blocks):
                    return
        raise SystemExit(f"fuzz_frames: a sound target was not served for {ANSWER_S:g} s")


def join(address: tuple[str, int], context: Any) -> ProcessTransport:
    """A connection that was welcomed."""
    connection = ProcessTransport(tcp.connect(address, context), "target")
    connection.send(HELLO)
    answers = connection.poll(ANSWER_S)
    if not answers or not isinstance(answers[0], Welcome):
        raise SystemExit(f"fuzz_frames: a sound Hello was answered with {answers}")
    return connection


def ends_connection(rng: random.Random, kind: str, address: tuple[str, int], context: Any) -> bool:
    """Send one malformed frame; whether its connection is over, by whoever has to end it."""
    if kind == "without TLS":
        with socket.create_connection(address, ANSWER_S) as sock:
            sock.settimeout(ANSWER_S)
            bad = malformed(rng, HELLO, False)
            try:
                sock.sendall(bad.data)
                sock.shutdown(socket.SHUT_WR)  # of what looks like the beginning of a record, no more comes
                while sock.recv(4096):
                    pass
            except TimeoutError:
                return False
            except OSError:
                pass
            return True
    if kind == "after the Hello":
        connection = join(address, context)
    else:
        connection = ProcessTransport(tcp.connect(address, context), "target")
    bad = malformed(rng, HELLO, kind == "after the Hello")
    try:
        connection._socket.send(bad.data, 0)
        while bad.is_whole and connection.poll(ANSWER_S):
            pass
        return not bad.is_whole
    except (TransportClosed, OSError):
        return True
    finally:
        connection.close()


def main() -> int:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=int, default=0, help="number of the first frame")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    args = parser.parse_args()
    started, number, left_open = time.monotonic(), args.start, 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        key = Path(folder) / "ssd.pem"
        make_credential(key)
        context = tls_context(key, is_server=False)
        with listening(key) as (pid, address):
            sound = SoundTarget(join(address, context))
            before = size_of(pid)
            while number < args.frames and time.monotonic() - started < args.seconds:
                rng = random.Random(f"{args.seed} {number}")
                left_open += not ends_connection(rng, KINDS[number % len(KINDS)], address, context)
                number += 1
                if number % 20 == 0:
                    sound.decode()
                if number - args.start == WARM_UP:
                    before = size_of(pid)
                if number % REPORT == 0:
                    print(f"{number} frames, {left_open} not refused, {size_of(pid)[0]} KiB", flush=True)
            sound.decode()
            after = size_of(pid)
    seconds = time.monotonic() - started
    print(
        f"{number - args.start} frames in {seconds:.0f} s, {left_open} not refused; resident memory {before[0]} KiB, "
        f"then {after[0]} KiB; descriptors {before[1]}, then {after[1]}"
    )
    print(f"next: --start {number}" if number < args.frames else "done")
    grown = after[0] - before[0] > MAX_GROWN_KIB or after[1] - before[1] > MAX_MORE_DESCRIPTORS
    if number - args.start <= WARM_UP:
        print(f"inconclusive: growth is counted after {WARM_UP} frames")
        return 1
    return int(left_open > 0 or grown)


if __name__ == "__main__":
    sys.exit(main())
