"""Which of the server's environment variables its drafter inherits."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping

from vllm_ssd.config import WORKER_ENVS

NAMES = frozenset(
    """
    PATH HOME USER LOGNAME USERNAME SHELL PWD TERM TZ LANG LANGUAGE TMPDIR TEMP TMP NO_COLOR FORCE_COLOR DO_NOT_TRACK
    VIRTUAL_ENV SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY
    HF_HOME HF_TOKEN HF_TOKEN_PATH HF_ENDPOINT HUGGING_FACE_HUB_TOKEN HUGGINGFACE_HUB_CACHE MODELSCOPE_CACHE
    MODELSCOPE_API_TOKEN TOKENIZERS_PARALLELISM CC CXX CFLAGS CXXFLAGS CPATH C_INCLUDE_PATH CPLUS_INCLUDE_PATH
    LIBRARY_PATH MAX_JOBS GLIBC_TUNABLES COVERAGE_PROCESS_START
    """.split()
)
PREFIXES = tuple(
    """
    LC_ LD_ XDG_ PYTHON CONDA_ OMP_ GOMP_ KMP_ MKL_ OPENBLAS_ NUMEXPR_ MALLOC_ ONEDNN_ DNNL_ CUDA_ NVIDIA_ NCCL_
    CUDNN_ CUBLAS_ ROCM_ ROCR_ HIP_ HSA_ RCCL_ MIOPEN_ AMD_ GPU_ ZE_ SYCL_ ONEAPI_ CCL_ GLOO_ TORCH PYTORCH_
    TRITON_ FLASHINFER_ AITER_ FLASH_ATTENTION_ FLA_ FLYDSL_ XPU_ NVCC_ CUTE_DSL_ DG_JIT_ TVM_ NUMBA_ HF_HUB_
    HF_XET_ TRANSFORMERS_ SAFETENSORS_ VLLM_
    """.split()
)
TOPOLOGY = re.compile(r"VLLM_(DP|RAY|ELASTIC_EP)_|VLLM_(PP_LAYER_PARTITION|PORT)$|TORCH_?ELASTIC_")
"""The target's ranks, ports and layer partition. `RANK`, `WORLD_SIZE`, `MASTER_ADDR` etc. match no list above."""
LOADING = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN")
"""Tokens that a drafter needs only until its model and tokenizer are loaded."""
SECRET = re.compile(r"API_?KEY|ACCESS_KEY|SECRET|PASSWORD|CREDENTIAL|_TOKEN$|_AUTH$")


def is_passed_on(name: str) -> bool:
    """Whether the drafter inherits the variable.

    It inherits what loading and running a model needs: paths, locale, temporary folders; Python and the dynamic linker;
    OpenMP, MKL and oneDNN; CUDA, ROCm, oneAPI and their collectives; PyTorch, Triton and other compilers with their
    caches; proxies and certificates for downloads; the Hugging Face and ModelScope caches and tokens; vLLM's own
    variables. It does not inherit anything else, nor names that look like secrets (`VLLM_API_KEY`, `NVIDIA_API_KEY`) or
    that describe the process's rank in the target (`VLLM_DP_RANK`), as a drafter is a single process. Nor does it
    inherit what the server sets for its workers: the drafter's vLLM would warn of each variable.
    """
    if name in WORKER_ENVS:
        return False
    if name in NAMES or name.upper() in NAMES and name.lower().endswith("_proxy"):
        return True
    return name.startswith(PREFIXES) and SECRET.search(name) is None and TOPOLOGY.match(name) is None


def drafter_environment(environment: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    """The drafter's environment: the inherited variables, updated by `changes`; None removes a variable."""
    passed = {name: value for name, value in environment.items() if is_passed_on(name)}
    return {name: value for name, value in (passed | dict(changes)).items() if value is not None}


def forget_loading(environment: MutableMapping[str, str]) -> None:
    """Remove the tokens from the environment once the drafter has loaded its model, so that no child inherits them.

    /proc/PID/environ still shows the initial environment to root and the same user.
    """
    for name in LOADING:
        environment.pop(name, None)
