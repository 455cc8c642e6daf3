"""The vLLM minors this package was tested with, and one clear error for all others."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger("vllm.vllm_ssd")

SUPPORTED = ((0, 29), (0, 33))
"""First and last supported vLLM minor, inclusive."""

ANY_VLLM_ENV = "VLLM_SSD_ANY_VLLM"
"""Set to 1, it lets ssd try a vLLM outside the supported range."""

ISSUES = "https://github.com/vllm-ssd/vllm-ssd/issues"


class UnsupportedVLLM(RuntimeError):
    """The installed vLLM is outside the supported range, or lacks a symbol that we replace."""


def supported_range() -> str:
    """The supported vLLM versions in words, such as "0.29 to 0.33"."""
    return " to ".join(f"{major}.{minor}" for major, minor in SUPPORTED)


def minor_of(version: str) -> tuple[int, ...]:
    """`(0, 33)` of a version such as "0.33.0" or "0.33.0+cpu"; empty where it begins with no two numbers."""
    try:
        major, minor = (int(part) for part in version.split("+")[0].split(".")[:2])
    except ValueError:
        return ()
    return major, minor


def unsupported(symbol: str, problem: str) -> UnsupportedVLLM:
    """The error to raise where the installed vLLM lacks what we rely on: its symbol, and what is wrong with it."""
    import vllm

    found = getattr(vllm, "__version__", "of unknown version")
    return UnsupportedVLLM(
        f"{symbol} {problem} in vLLM {found}; vllm-ssd supports vLLM {supported_range()}: "
        f"install a supported vLLM or a newer vllm-ssd, or ask at {ISSUES}"
    )


def check_vllm_version(found: str) -> None:
    """Raise `UnsupportedVLLM` unless `found`, such as "0.32.0" or "0.32.0+cpu", is in the supported range.

    With `VLLM_SSD_ANY_VLLM=1` in the environment, warn instead: a symbol that is missing is still refused.
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
