"""The vLLM minors this package was tested with, and one clear error for all others."""

from __future__ import annotations

SUPPORTED = ((0, 30), (0, 32))
"""First and last supported vLLM minor, inclusive."""


class UnsupportedVLLM(RuntimeError):
    """The installed vLLM is outside the supported range, or lacks a symbol that we replace."""


def check_vllm_version(found: str) -> None:
    """Raise `UnsupportedVLLM` unless `found`, such as "0.32.0" or "0.32.0+cpu", is in the supported range."""
    low, high = (f"{major}.{minor}" for major, minor in SUPPORTED)
    try:
        minor = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    except ValueError:
        minor = ()
    if not SUPPORTED[0] <= minor <= SUPPORTED[1]:
        raise UnsupportedVLLM(
            f"speculative method 'ssd' supports vLLM {low} to {high}, found vLLM {found}; "
            "install a supported vLLM or a newer vllm-ssd"
        )
