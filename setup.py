"""The package mapping that pyproject.toml cannot express: `kernels/` installs as `vllm_ssd.kernels`.

A top-level module `kernels` would shadow Hugging Face's package of that name, which transformers imports.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["vllm_ssd*"]), "vllm_ssd.kernels"],
    package_dir={"vllm_ssd.kernels": "kernels"},
)
