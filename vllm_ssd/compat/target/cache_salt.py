"""Pass a request's `cache_salt` to the workers, to which vLLM does not send it."""

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
"""Key of the salt's digest in the `extra_args` of a request's sampling parameters, which vLLM sends to the workers."""
DIGEST_SIZE = 16


def carry_where_loaded() -> None:
    """Like `carry`, but only if the process has already imported vLLM's engine."""
    if hasattr(sys.modules.get(MODULE), "EngineCore"):
        carry()


def carry() -> None:
    """Attach the salt's digest to every request of a target with ssd; idempotent, needed in the engine's process."""
    patch.wrap(ADD_REQUEST, _has_salt, _add_request, parameters=("request",))


def cache_salt_of(params: SamplingParams) -> bytes:
    """The digest of a request's salt; empty without one.

    Clients can set `extra_args`, too, so anything that is not a digest is ignored.
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
