"""See whether the compiled operations of one vLLM wheel can serve on the torch, or under the Python, of another.

    python scripts/gpu_bundle.py symbols vllm-0.33.0-….whl vllm-0.26.0-….whl
    python scripts/gpu_bundle.py calls vllm-0.33.0-….whl vllm-0.26.0-….whl
    python scripts/gpu_bundle.py prune _C_stable_libtorch.abi3.so pruned.so 90

For a GPU machine whose torch is older than a release asks for. `symbols` lists the functions of torch that libraries of
the first wheel need and no library of the second does, which was built for the torch at hand: where there are none, the
first wheel's own libraries load there. `calls` compares how the Python of the first wheel calls compiled operations
with the schemas in the libraries of the second. Both read files alone; `symbols` needs `nm` of binutils. `prune` writes
a library in which the code for GPUs of other compute capabilities is zeroed: it stays as long, and compresses well.
"""

from __future__ import annotations

import ast
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

CORE = "vllm/_C_stable_libtorch.abi3.so"
FLASH = "vllm/vllm_flash_attn/"
NAMESPACES = {"_C", "_C_cache_ops", "_C_cuda_utils", "_C_custom_ar", "_vllm_fa2_C", "_vllm_fa3_C"}
FATBIN = b"\x50\xed\x55\xba"
"""CUDA's mark of code for several GPUs: then version, size of this header, size of the entries, which follow."""
CUBIN = 2
"""The kind of an entry that holds machine code; others hold PTX."""
SCHEMA = re.compile(rb"(?<![\w.])([A-Za-z_]\w*)\(([^()\x00]*(?:\([^()\x00]*\)[^()\x00]*)*)\)\s*->")
TORCH = re.compile(r"^(torch_|aoti_torch_|_ZN?K?(2at|3c10|5torch))")


class Parameter(NamedTuple):
    """Of an operation."""

    name: str
    has_default: bool


class Misfit(NamedTuple):
    """A call of an operation that is not defined so, or not at all."""

    place: str
    operation: str
    reason: str


def schemas(library: bytes) -> dict[str, list[Parameter]]:
    """The operations that a library defines, by the schemas among its strings."""
    return {name.decode(): parameters(text.decode("ascii", "replace")) for name, text in SCHEMA.findall(library)}


def parameters(text: str) -> list[Parameter]:
    """Of a schema's text between its brackets."""
    found = []
    for part in re.split(r",(?![^(\[]*[)\]])", re.sub(r"\s*=\s*", "=", text)):
        if match := re.search(r"(\w+)(=.*)?$", part.strip()):
            found.append(Parameter(match[1], bool(match[2])))
    return found


def calls(source: str) -> Iterator[tuple[int, str, ast.Call]]:
    """Calls of `torch.ops.NAMESPACE.NAME`, with line and name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(operation := node.func, ast.Attribute):
            if operation.attr in ("default", "out") and isinstance(operation.value, ast.Attribute):
                operation = operation.value
            space = operation.value
            if (
                isinstance(space, ast.Attribute)
                and space.attr in NAMESPACES
                and ast.unparse(space.value) == "torch.ops"
            ):
                yield node.lineno, operation.attr, node


def misfit(call: ast.Call, known: list[Parameter]) -> str:
    """Why a call does not fit parameters; empty where it does, or cannot be told."""
    if any(isinstance(argument, ast.Starred) for argument in call.args) or any(k.arg is None for k in call.keywords):
        return ""
    given, named = len(call.args), {keyword.arg for keyword in call.keywords}
    if given + len(named) > len(known):
        return f"{given + len(named)} arguments for {len(known)}"
    if unknown := named - {parameter.name for parameter in known}:
        return f"no parameter {', '.join(sorted(map(str, unknown)))}"
    missing = [p.name for p in known[given:] if not p.has_default and p.name not in named]
    return f"without {', '.join(missing)}" if missing else ""


def misfits(sources: Iterable[tuple[str, str]], known: dict[str, list[Parameter]]) -> Iterator[Misfit]:
    """All calls in (path, source) that do not fit; operations of other platforms count as not defined."""
    for path, source in sources:
        for line, name, call in calls(source):
            reason = misfit(call, known[name]) if name in known else "not defined"
            if reason:
                yield Misfit(f"{path}:{line}", name, reason)


def torch_symbols(library: Path) -> set[str]:
    """What a library needs of torch."""
    command = ["nm", "--dynamic", "--undefined-only", "--format=just-symbols", str(library)]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return {name for name in names if TORCH.match(name)}


class Entry(NamedTuple):
    """Code for one GPU in a library: where it begins, its bytes, its kind, the compute capability."""

    offset: int
    size: int
    kind: int
    capability: int


def entries(library: bytes) -> Iterator[Entry]:
    """All code for GPUs in a library."""
    start = library.find(FATBIN)
    while 0 <= start <= len(library) - 16:
        version, header, size = struct.unpack_from("<HHQ", library, start + 4)
        if (version, header) != (1, 16):  # not CUDA's mark but four bytes like it
            start = library.find(FATBIN, start + 4)
            continue
        entry, end = start + header, start + header + size
        while entry < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", library, entry)
            (capability,) = struct.unpack_from("<I", library, entry + 28)
            yield Entry(entry + header, size, kind, capability)
            entry += header + size
        start = library.find(FATBIN, end)


def pruned(library: bytes, capability: int) -> bytes:
    """The library with the code for other GPUs, and PTX, zeroed."""
    kept = bytearray(library)
    for entry in entries(library):
        if (entry.kind, entry.capability) != (CUBIN, capability):
            kept[entry.offset : entry.offset + entry.size] = bytes(entry.size)
    return bytes(kept)


def libraries(archive: ZipFile) -> list[str]:
    """The core and FlashAttention, as far as a wheel has them."""
    names = archive.namelist()
    return [name for name in names if name == CORE or (name.startswith(FLASH) and name.endswith(".so"))]


def main() -> int:
    """Compare two wheels; 1 where something does not fit. Or prune a library; 1 where nothing of it is left."""
    if sys.argv[1:2] == ["prune"] and len(sys.argv) == 5:
        library, capability = Path(sys.argv[2]).read_bytes(), int(sys.argv[4])
        Path(sys.argv[3]).write_bytes(pruned(library, capability))
        return not any((entry.kind, entry.capability) == (CUBIN, capability) for entry in entries(library))
    command, newer, older = sys.argv[1:] if len(sys.argv) == 4 else ("", "", "")
    if command not in ("symbols", "calls"):
        print(__doc__, file=sys.stderr)
        return 2
    with ZipFile(newer) as first, ZipFile(older) as second:
        if command == "calls":
            known = {name: p for library in libraries(second) for name, p in schemas(second.read(library)).items()}
            python = [name for name in first.namelist() if name.startswith("vllm/") and name.endswith(".py")]
            found = list(misfits(((name, first.read(name).decode()) for name in python), known))
            for item in found:
                print(*item, sep="  ")
            return bool(found)
        with tempfile.TemporaryDirectory() as folder:
            needed, there = {}, set()
            for archive, place in ((second, "older"), (first, "newer")):
                for name in libraries(archive):
                    symbols = torch_symbols(Path(archive.extract(name, Path(folder) / place)))
                    if place == "older":
                        there |= symbols
                    else:
                        needed[name] = symbols
        for name, symbols in needed.items():
            print(
                f"{name}: {len(symbols)} of torch, beyond the other wheel's: {' '.join(sorted(symbols - there)) or '-'}"
            )
        return any(symbols - there for symbols in needed.values())


if __name__ == "__main__":
    sys.exit(main())
