"""The `cache_salt` of a request, which vLLM's scheduler knows and its workers do not."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_ssd.compat import patch
from vllm_ssd.compat.target.runner import has_ssd

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

MODULE = "vllm.v1.engine.core"
ADD_REQUEST = f"{MODULE}:EngineCore.preprocess_add_request"
KEY = "ssd_cache_salt"
"""In the `extra_args` of a request's sampling parameters, which travel to the workers: a digest of its salt."""
DIGEST_SIZE = 16


def carry_where_loaded() -> None:
    """As `carry`, in a process that has vLLM's engine; others are spared its import."""
    if hasattr(sys.modules.get(MODULE), "EngineCore"):
        carry()


def carry() -> None:
    """Let requests of a target with ssd bring their salt to the workers; idempotent, the engine's process needs it."""
    patch.wrap(ADD_REQUEST, _has_salt, _add_request, parameters=("request",))


def cache_salt_of(params: SamplingParams) -> bytes:
    """What stands for the salt of a request with these parameters; none without a salt.

    Clients write `extra_args`, too: whatever is not a digest is none.
    """
    digest = (params.extra_args or {}).get(KEY)
    if not isinstance(digest, str) or len(digest) != 2 * DIGEST_SIZE or not digest.isascii():
        return b""
    return digest.encode()


def _has_salt(engine: Any, request: Any, *args: Any, **kwargs: Any) -> bool:
    has_salt = getattr(request, "cache_salt", None) and request.sampling_params is not None
    return bool(has_salt) and has_ssd(engine.vllm_config)


def _add_request(original: Callable[..., Any], engine: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    params = request.sampling_params
    salt = request.cache_salt.encode(errors="surrogatepass")
    digest = hashlib.blake2b(salt, digest_size=DIGEST_SIZE, person=b"cache_salt")
    params.extra_args = {**(params.extra_args or {}), KEY: digest.hexdigest()}
    return original(engine, request, *args, **kwargs)
