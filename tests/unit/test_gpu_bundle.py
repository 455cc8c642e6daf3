"""Whether one wheel's Python fits the compiled operations of another."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from zipfile import ZipFile

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import gpu_bundle  # noqa: E402

LIBRARY = (
    b"\x7fELF\x00rms_norm(Tensor! result, Tensor input, Tensor? weight, float epsilon) -> ()\x00\x01\x02"
    b"swap(Tensor src,   Tensor(a!) dst, int[2] n = [1, 2], bool fast=False) -> (int, Tensor)\x00printf(x)\x00"
)
PYTHON = """
import torch
def good(x, w):
    torch.ops._C.rms_norm(x, x, w, 1e-5)
    torch.ops._C.rms_norm.default(x, x, w, epsilon=1e-5)
    torch.ops._C.swap(x, dst=x)
    torch.ops._C.swap(*x)
    torch.ops.other.swap()
def bad(x):
    torch.ops._C.rms_norm(x, x)
    torch.ops._C.rms_norm(x, x, x, 1e-5, 1)
    torch.ops._C.swap(x, x, slow=True)
    torch.ops._C.gone(x)
"""


def test_schemas_are_read_from_a_library():
    found = gpu_bundle.schemas(LIBRARY)
    assert sorted(found) == ["rms_norm", "swap"]
    assert [p.name for p in found["rms_norm"]] == ["result", "input", "weight", "epsilon"]
    assert [tuple(p) for p in found["swap"]] == [("src", False), ("dst", False), ("n", True), ("fast", True)]


def test_calls_that_do_not_fit_are_named():
    found = list(gpu_bundle.misfits([("ops.py", PYTHON)], gpu_bundle.schemas(LIBRARY)))
    assert [(item.place, item.operation, item.reason) for item in found] == [
        ("ops.py:10", "rms_norm", "without weight, epsilon"),
        ("ops.py:11", "rms_norm", "5 arguments for 4"),
        ("ops.py:12", "swap", "no parameter slow"),
        ("ops.py:13", "gone", "not defined"),
    ]


def test_two_wheels_are_compared(tmp_path, monkeypatch, capsys):
    for name, python in (("new.whl", PYTHON), ("old.whl", "")):
        with ZipFile(tmp_path / name, "w") as wheel:
            wheel.writestr(gpu_bundle.CORE, LIBRARY)
            wheel.writestr("vllm/ops.py", python)
    monkeypatch.setattr(sys, "argv", ["gpu_bundle.py", "calls", str(tmp_path / "new.whl"), str(tmp_path / "old.whl")])
    assert gpu_bundle.main() == 1
    assert "vllm/ops.py:13  gone  not defined" in capsys.readouterr().out


def fatbin(*entries: tuple[int, int, bytes]) -> bytes:
    """Code for GPUs as CUDA stores it: (kind, compute capability, code) of each."""
    body = b"".join(
        struct.pack("<HHIQ4I32x", kind, 0x101, 64, len(code), 0, 0, 0, capability) + code
        for kind, capability, code in entries
    )
    return gpu_bundle.FATBIN + struct.pack("<HHQ", 1, 16, len(body)) + body


def test_code_for_other_gpus_is_zeroed(tmp_path, monkeypatch):
    host, other, own, ptx = b"host" + gpu_bundle.FATBIN + b"code", b"80" * 20, b"90" * 30, b"ptx" * 8
    library = host + fatbin((2, 80, other), (2, 90, own)) + host + fatbin((1, 90, ptx)) + host
    pruned = gpu_bundle.pruned(library, 90)
    assert pruned == library.replace(other, bytes(40)).replace(ptx, bytes(24))
    files = [tmp_path / "library.so", tmp_path / "pruned.so"]
    files[0].write_bytes(library)
    for capability, status in (("90", 0), ("100", 1)):
        monkeypatch.setattr(sys, "argv", ["gpu_bundle.py", "prune", *map(str, files), capability])
        assert gpu_bundle.main() == status
