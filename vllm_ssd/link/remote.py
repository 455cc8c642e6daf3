"""A link to a drafter that was started elsewhere, over TCP and mutual TLS."""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable

from vllm_ssd.config import parse_address
from vllm_ssd.link.checks import max_push_bytes
from vllm_ssd.link.handshake import DrafterFailed, DrafterRefused
from vllm_ssd.link.options import DrafterOptions
from vllm_ssd.link.process import WATCH_S, DrafterProcess
from vllm_ssd.link.protocol import DrafterStats, Hello, Welcome
from vllm_ssd.link.tcp import connect
from vllm_ssd.link.transport import ProcessTransport, TransportClosed

RETRY_S = (0.5, 4.0)
"""First and longest pause between attempts to connect, so that a drafter is used within 5 s of coming up."""


class RemoteDrafter(DrafterProcess):
    """A `DrafterProcess` with a connection in place of the process; the supervisor reconnects when it is lost.

    address: "HOST:PORT" of `vllm-ssd drafter`
    context: from `vllm_ssd.link.credential.tls_context`
    options: sizes that the target accepts; the drafter's own must not be larger

    A drafter that cannot be reached at first is no failure: `settled` stays False until it is connected, refuses, or
    `startup_timeout_s` is over.
    """

    def __init__(
        self,
        address: str,
        context: ssl.SSLContext,
        options: DrafterOptions,
        hello: Hello,
        *,
        startup_timeout_s: float,
        logger: logging.Logger,
        server_pid: int | None = None,
        on_stats: Callable[[DrafterStats, int], None] | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self._name = address
        self._address = parse_address(address)
        self._context = context
        self._settles_at = time.monotonic() + startup_timeout_s
        self._last_failure = ""
        super().__init__(
            options,
            hello,
            environment={},
            startup_timeout_s=startup_timeout_s,
            logger=logger,
            server_pid=server_pid,
            on_stats=on_stats,
            on_end=on_end,
        )

    def trust(self, context: ssl.SSLContext) -> None:
        """Use another context for future connections."""
        self._context = context

    @property
    def settled(self) -> bool:
        return super().settled or time.monotonic() >= self._settles_at

    def wait_until_ready(self) -> None:
        """Block until the drafter has shaken hands; raises `DrafterFailed` if it refuses or the time is over."""
        while not self.settled:
            self._settled.wait(WATCH_S)
        if not self._num_started:
            reason = self._last_failure or f"no drafter at {self._name}"
            raise self._failure or DrafterFailed(f"{reason} (startup_timeout_s={self._startup_timeout_s:g})")

    def _launch(self) -> tuple[ProcessTransport, Welcome, str]:
        try:
            stream = connect(self._address, self._context)
        except OSError as error:  # includes TLS errors
            reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or error
            raise DrafterFailed(f"the SSD drafter at {self._name} cannot be reached: {reason}") from None
        transport = ProcessTransport(stream, "target", max_message_bytes=max_push_bytes(self._options))
        try:
            return transport, self._shake_hands(transport), f"at {self._name}"
        except BaseException:
            transport.close()
            raise

    def _how_it_ended(self, error: TransportClosed) -> str:
        return f"at {self._name} closed the connection ({error})"

    def _backoff(self) -> tuple[float, float]:
        return RETRY_S

    def _goes_on(self, failure: DrafterFailed | None) -> bool:
        self._failure = failure if isinstance(failure, DrafterRefused) else None
        if failure is None or self._failure is not None:
            self._settled.set()
        if failure is not None:
            self._wanted.set()
            if str(failure) != self._last_failure:
                self._logger.warning("%s; trying again", failure)
        self._last_failure = "" if failure is None else str(failure)
        return not self._closed.is_set()
