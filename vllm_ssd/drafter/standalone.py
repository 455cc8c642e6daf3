"""A drafter that listens: boot the model, then serve every target that connects with the credential."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
from pathlib import Path

import msgspec

from vllm_ssd.drafter.accept import Acceptor
from vllm_ssd.drafter.engine import DraftEngine
from vllm_ssd.drafter.heartbeat import Heartbeat
from vllm_ssd.drafter.keeper import Keeper
from vllm_ssd.drafter.server import Booted, boot, serve
from vllm_ssd.drafter.tenants import Stopped, Tenants
from vllm_ssd.link.credential import tls_context
from vllm_ssd.link.options import DrafterOptions
from vllm_ssd.link.protocol import PROTOCOL_VERSION, Hello, Refused, Welcome

logger = logging.getLogger("vllm.vllm_ssd")

STOP_S = 4.0
"""Time after SIGTERM within which the process exits, whatever it is doing."""


class Host:
    """Builds the engine for the first target's vocabulary; all later targets must have the same."""

    def __init__(self, booted: Booted) -> None:
        self._booted: Booted | None = booted  # until the first target connects
        self._welcome = booted.welcome
        self._ids: tuple[int, str, bool] | None = None
        self.engine: DraftEngine | None = None

    def greet(self, hello: Hello) -> Welcome | Refused:
        """Answer a target's Hello; the first target waits until the engine has captured its steps."""
        ids = (hello.vocab_size, hello.tokenizer, hello.heterogeneous_vocab)
        if hello.version != PROTOCOL_VERSION:
            return Refused(f"protocol version {hello.version} of the target, {PROTOCOL_VERSION} of the drafter")
        if self._booted is not None:
            vocabulary = self._booted.greet(hello)
            if isinstance(vocabulary, Refused):
                return vocabulary
            self.engine = self._booted.engine(vocabulary)
            self._ids, self._welcome = ids, msgspec.structs.replace(self._welcome, notice=vocabulary.notice)
            self._booted = None
        elif ids != self._ids:
            return Refused("the drafter serves targets with another vocabulary; start one for each")
        return self._welcome


def listen(place: str, options: DrafterOptions) -> int:
    """Boot and serve on "HOST:PORT" or "[IPv6]:PORT" until SIGTERM; returns the process's exit status.

    Raises `BadCredential` before anything is loaded, and OSError if the address cannot be bound.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    keeper = Keeper(options) if options.keeper >= 0 else None
    context = tls_context(Path(options.key), is_server=True)
    booted = boot(place, options, keeper.fail if keeper else lambda error: None)
    drafter, longest = Host(booted), booted.max_step_bytes
    del booted
    host, _, port = place.rpartition(":")
    acceptor = Acceptor((host.strip("[]"), int(port)), context, logger)
    tenants = Tenants(acceptor, options, drafter.greet, longest, logger)
    signal.signal(signal.SIGTERM, lambda *_: _end(tenants))
    signal.signal(signal.SIGINT, lambda *_: _end(tenants))
    host, port = acceptor.address
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    print(f"vllm-ssd drafter: {options.engine_args['model']} listens on {address}", flush=True)
    if keeper is not None:
        keeper.serve(address, tenants, lambda: _end(tenants))
    try:
        while drafter.engine is None:
            tenants.poll(None)
        gc.collect()
        gc.freeze()
        heartbeat = Heartbeat(tenants)
        try:
            serve(heartbeat, drafter.engine)
        finally:
            heartbeat.close()
    except Stopped:
        pass
    finally:
        tenants.close()
    return 0


def _end(tenants: Tenants) -> None:
    timer = threading.Timer(STOP_S, os._exit, (0,))
    timer.daemon = True
    timer.start()
    tenants.stop()
