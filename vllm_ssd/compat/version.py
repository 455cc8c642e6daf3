"""The supported vLLM minors, and the error for all others."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger("vllm.vllm_ssd")

SUPPORTED = ((0, 29), (0, 33))
"""First and last supported vLLM minor, inclusive."""

ANY_VLLM_ENV = "VLLM_SSD_ANY_VLLM"
"""Environment variable that, set to 1, lets ssd try a vLLM outside the supported range."""

ISSUES = "https://github.com/vllm-ssd/vllm-ssd/issues"


class UnsupportedVLLM(RuntimeError):
    """Raised if the installed vLLM is outside the supported range, or lacks a symbol that we need."""


def supported_range() -> str:
    """The supported vLLM versions in words, such as "0.29 to 0.33"."""
    return " to ".join(f"{major}.{minor}" for major, minor in SUPPORTED)


def minor_of(version: str) -> tuple[int, ...]:
    """`(0, 33)` for a version such as "0.33.0" or "0.33.0+cpu"; empty if it does not start with two numbers."""
    try:
        major, minor = (int(part) for part in version.split("+")[0].split(".")[:2])
    except ValueError:
        return ()
    return major, minor


def unsupported(symbol: str, problem: str) -> UnsupportedVLLM:
    """Build the error for a symbol of the installed vLLM; problem: what is wrong with it, such as "is missing"."""
    import vllm

    found = getattr(vllm, "__version__", "of unknown version")
    return UnsupportedVLLM(
        f"{symbol} {problem} in vLLM {found}; vllm-ssd supports vLLM {supported_range()}: "
        f"install a supported vLLM or a newer vllm-ssd, or ask at {ISSUES}"
    )


def check_vllm_version(found: str) -> None:
    """Raise `UnsupportedVLLM` unless `found`, such as "0.32.0" or "0.32.0+cpu", is in the supported range.

    With `VLLM_SSD_ANY_VLLM=1` in the environment this only warns; missing symbols still raise later.
    """
    if SUPPORTED[0] <= minor_of(found) <= SUPPORTED[1]:
        return
    outside = f"speculative method 'ssd' supports vLLM {supported_range()}, found vLLM {found}"
    if os.environ.get(ANY_VLLM_ENV) == "1":
        logger.warning("%s; %s=1 tries it: the text may differ from the target's own", outside, ANY_VLLM_ENV)
        return
    raise UnsupportedVLLM(
        f"{outside}: install a supported vLLM or a newer vllm-ssd, set {ANY_VLLM_ENV}=1 to try this one, "
        f"or ask at {ISSUES}"
    )
