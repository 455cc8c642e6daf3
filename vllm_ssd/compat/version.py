"""The vLLM minors this package was tested with, and one clear error for all others."""

from __future__ import annotations

SUPPORTED = ((0, 30), (0, 32))
"""First and last supported vLLM minor, inclusive."""


class UnsupportedVLLM(RuntimeError):
    """The installed vLLM is outside the supported range, or lacks a symbol that we replace."""


def supported_range() -> str:
    """The supported vLLM versions in words, such as "0.30 to 0.32"."""
    return " to ".join(f"{major}.{minor}" for major, minor in SUPPORTED)


def unsupported(symbol: str, problem: str) -> UnsupportedVLLM:
    """The error to raise where the installed vLLM lacks what we rely on: its symbol, and what is wrong with it."""
    import vllm

    found = getattr(vllm, "__version__", "of unknown version")
    return UnsupportedVLLM(
        f"{symbol} {problem} in vLLM {found}; vllm-ssd supports vLLM {supported_range()}: "
        "install a supported vLLM or a newer vllm-ssd"
    )


def check_vllm_version(found: str) -> None:
    """Raise `UnsupportedVLLM` unless `found`, such as "0.32.0" or "0.32.0+cpu", is in the supported range."""
    try:
        minor = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    except ValueError:
        minor = ()
    if not SUPPORTED[0] <= minor <= SUPPORTED[1]:
        raise UnsupportedVLLM(
            f"speculative method 'ssd' supports vLLM {supported_range()}, found vLLM {found}; "
            "install a supported vLLM or a newer vllm-ssd"
        )
