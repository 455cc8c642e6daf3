"""The sdist and the wheel build offline, hold the package and nothing else, and install."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
from importlib.metadata import distributions
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
MAX_WHEEL_BYTES = 1_000_000
NOT_IN_A_CLONE = (".*", "*.egg-info", "__pycache__", "build", "dist", "site", "bench-output")


def build(kind: str, source: Path, out: Path) -> Path:
    """Build an "sdist" or a "wheel" of `source` into `out` with the installed setuptools, without network."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


def files(wheel: Path) -> set[str]:
    return set(ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of this checkout, so that building leaves nothing behind in it."""
    copy = tmp_path_factory.mktemp("checkout") / "vllm-ssd"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*NOT_IN_A_CLONE))
    return copy


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory) -> Path:
    return build("sdist", checkout, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    return build("wheel", checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True)
    return target


def test_wheel_holds_every_module(wheel):
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "vllm_ssd").rglob("*.py")}
    kernels = {f"vllm_ssd/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert kernels
    info = {name for name in files(wheel) if ".dist-info/" in name}
    assert files(wheel) - info == package | kernels | {"vllm_ssd/py.typed"}


def test_wheel_is_small(wheel):
    assert wheel.stat().st_size < MAX_WHEEL_BYTES


def test_wheel_has_no_models_and_no_top_level_kernels(wheel):
    assert not [name for name in files(wheel) if "pair" in name or name.endswith(".safetensors")]
    assert {name.partition("/")[0].partition("-")[0] for name in files(wheel)} == {"vllm_ssd"}


def test_sdist_holds_the_sources_without_the_models(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md", "kernels/lookup.py"} <= names
    assert not [name for name in names if name.startswith("tests/") or name.endswith(".safetensors")]
    assert sdist.stat().st_size < MAX_WHEEL_BYTES


def test_wheel_from_the_sdist_is_the_same(sdist, wheel, tmp_path):
    shutil.unpack_archive(sdist, tmp_path)
    rebuilt = build("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path)
    assert files(rebuilt) == files(wheel)
    for name in files(wheel):
        if not name.endswith(("/RECORD", "/WHEEL")):
            assert ZipFile(rebuilt).read(name) == ZipFile(wheel).read(name), name


def test_entry_points(installed):
    (distribution,) = distributions(path=[str(installed)])
    assert {(e.group, e.name, e.value) for e in distribution.entry_points} == {
        ("vllm.general_plugins", "ssd", "vllm_ssd.plugin:register"),
        ("console_scripts", "vllm-ssd", "vllm_ssd.cli:app"),
    }


def test_installed_wheel_imports(installed):
    """Without `site`, so that an editable install of the checkout stays out; torch and Triton come from its folder."""
    code = (
        "import sys; sys.path += sys.argv[1:]; import vllm_ssd.kernels, vllm_ssd.plugin, importlib.metadata;"
        "print(vllm_ssd.kernels.__file__);"
        "print(vllm_ssd.plugin.__file__);"
        "print(vllm_ssd.__version__ == importlib.metadata.version('vllm-ssd'))"
    )
    command = [sys.executable, "-I", "-S", "-c", code, str(installed), sysconfig.get_path("purelib")]
    done = subprocess.run(command, cwd=installed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str(installed / "vllm_ssd/kernels/__init__.py"),
        str(installed / "vllm_ssd/plugin.py"),
        "True",
    ]
