"""What pyproject.toml cannot say: all packages below `vllm_ssd`, and `kernels/` among them.

A top-level module `kernels` would shadow Hugging Face's package of that name, which transformers imports.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["vllm_ssd*"]), "vllm_ssd.kernels"],
    package_dir={"vllm_ssd.kernels": "kernels"},
)
