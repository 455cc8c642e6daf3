"""The part of the server's environment that its drafter gets."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping

from vllm_ssd.config import REPLICAS_ENV, RUNTIME_ENV, SERVER_PID_ENV
from vllm_ssd.link.metrics_socket import METRICS_ENV

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
"""The target's ranks, ports and layers a rank; `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and the like are on no list."""
FOR_WORKERS = frozenset((RUNTIME_ENV, SERVER_PID_ENV, REPLICAS_ENV, METRICS_ENV))
"""What a server tells its workers."""
LOADING = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN")
"""What a drafter needs until its model and tokenizer are loaded, and no longer."""
SECRET = re.compile(r"API_?KEY|ACCESS_KEY|SECRET|PASSWORD|CREDENTIAL|_TOKEN$|_AUTH$")


def is_passed_on(name: str) -> bool:
    """Whether the drafter gets the variable.

    Passed on is what loads and runs a model: paths, locale, temporary folders; Python and the dynamic linker; OpenMP,
    MKL and oneDNN; CUDA, ROCm, oneAPI and their collectives; PyTorch, Triton and other compilers with their caches;
    proxies and certificates for downloads; the Hugging Face and ModelScope caches and tokens; vLLM's own variables.
    Anything else stays with the server, and so does what is named like a secret (`VLLM_API_KEY`, `NVIDIA_API_KEY`) and
    what says which part of the target a process is (`VLLM_DP_RANK`): a drafter is whole, and alone. What the server
    tells its workers stays with them: the drafter's vLLM would warn of each variable.
    """
    if name in FOR_WORKERS:
        return False
    if name in NAMES or name.upper() in NAMES and name.lower().endswith("_proxy"):
        return True
    return name.startswith(PREFIXES) and SECRET.search(name) is None and TOPOLOGY.match(name) is None


def drafter_environment(environment: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    """The drafter's environment: what is passed on of the server's, with `changes`; None removes a variable."""
    passed = {name: value for name, value in environment.items() if is_passed_on(name)}
    return {name: value for name, value in (passed | dict(changes)).items() if value is not None}


def forget_loading(environment: MutableMapping[str, str]) -> None:
    """Take the tokens out of the environment of a drafter that has loaded its model.

    What it starts from now on does not inherit them. The kernel keeps showing what a process was started with, in
    /proc/PID/environ, to the same user and root.
    """
    for name in LOADING:
        environment.pop(name, None)
