"""The user's SSD configuration, validated before anything starts."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal

RUNTIME_ENV = "VLLM_SSD_RUNTIME"
"""Environment variable that carries `runtime_json()` to the workers: vLLM copies its VLLM_ variables to them."""
SERVER_PID_ENV = "VLLM_SSD_SERVER_PID"
"""Environment variable with the server's process id: the drafter exits when that process ends."""
REPLICAS_ENV = "VLLM_SSD_REPLICAS"
"""Environment variable with the number of data-parallel replicas on this node, which vLLM does not tell its workers;
0 if other servers may run replicas here that this one does not know of."""
METRICS_ENV = "VLLM_SSD_METRICS"
"""Environment variable with the name under which a server's workers listen."""
WORKER_ENVS = (RUNTIME_ENV, SERVER_PID_ENV, REPLICAS_ENV, METRICS_ENV)
"""All environment variables that a server sets for its workers."""

TARGET_FIELDS = ("num_speculative_tokens",)
"""Fields that change the target's forward.

Only these are in `to_json()`, whose result is part of vLLM's compile-cache key. The others affect the drafter, or what
the target does between two forwards.
"""

MAX_CPUS = 4096
SIZE_UNITS = {"B": 1} | {
    f"{letter}{infix}B": base**power
    for power, letter in enumerate("KMGT", start=1)
    for infix, base in (("", 1000), ("i", 1024))
}


def parse_cpus(text: str) -> tuple[int, ...]:
    """Parse a CPU list such as "2-5,7" into ascending CPU numbers; raises ValueError if it is malformed."""
    cpus: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not first <= last < MAX_CPUS:
            raise ValueError(f"{part!r} names no CPUs from 0 to {MAX_CPUS - 1}")
        cpus.update(range(first, last + 1))
    return tuple(sorted(cpus))


def parse_size(text: str) -> int:
    """Parse a size such as "512MiB" (binary) or "1.5GB" (decimal) into bytes; raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]+)\s*", text, re.ASCII)
    if match is None or match[2] not in SIZE_UNITS:
        raise ValueError(f"{text!r} is no number with one of the units {', '.join(SIZE_UNITS)}")
    return round(float(match[1]) * SIZE_UNITS[match[2]])


def parse_address(text: str) -> tuple[str, int]:
    """Split "HOST:PORT" or "[IPv6]:PORT" into host and port; raises ValueError for anything else."""
    host, colon, port = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not colon or not host or (":" in host and not bracketed) or not port.isascii() or not port.isdigit():
        raise ValueError(f"{text!r} is no HOST:PORT")
    if not 0 < int(port) < 1 << 16:
        raise ValueError(f"{text!r} has no port from 1 to 65535")
    return host, int(port)


POOL_PREFIX = "ray:"


def is_pool_name(text: str) -> bool:
    """Whether `text` is a valid name for a pool of drafters on Ray."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", text, re.ASCII) is not None


def check_resources(resources: Mapping[str, Any], given: SSDConfig) -> None:
    """Raise ValueError unless Ray can reserve `resources` for a drafter and the other keys of `given` suit them."""
    amounts = resources.values()
    if not resources or not all(
        isinstance(x, (int, float)) and not isinstance(x, bool) and 0 < x < math.inf for x in amounts
    ):
        raise ValueError(
            f'ssd: drafter_resources must name amounts over 0, as in {{"GPU": 1}}, got {json.dumps(resources)}'
        )
    if resources.get("GPU", 1) > 1 and resources["GPU"] % 1:
        raise ValueError(
            f"ssd: drafter_resources: Ray reserves either a fraction of one GPU or whole GPUs, not {resources['GPU']:g}"
        )
    if resources.get("GPU", 1) % 1 and given.kv_cache_memory is None and given.gpu_memory_utilization is None:
        raise ValueError(
            f"ssd: a drafter with {resources['GPU']:g} of a GPU cannot tell how much of its memory it may use: set "
            "kv_cache_memory"
        )


def _field(what: str, allows: Callable[[Any], bool], default: Any = MISSING) -> Any:
    """A field that accepts the values `allows` returns true for, and None if that is the default.

    what: describes these values in error messages
    """
    accepts = (lambda value: value is None or allows(value)) if default is None else allows
    return field(default=default, metadata={"what": what, "accepts": accepts})


def _integer(low: int, high: int, default: int | None) -> Any:
    return _field(f"an integer from {low} to {high}", lambda value: _is_int(value, low, high), default)


def _number(high: float, default: float | None) -> Any:
    def allows(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= high

    return _field(f"a number over 0 and up to {high:g}", allows, default)


def _choice(values: tuple[str, ...], default: str) -> Any:
    return _field(f"one of {', '.join(values)}", lambda value: isinstance(value, str) and value in values, default)


def _name(what: str, default: Any = None) -> Any:
    return _field(what, lambda value: isinstance(value, str) and value.strip() != "", default)


def _object() -> Any:
    """A field for a JSON object or None, excluded from the hash because dicts are not hashable."""
    metadata = {"what": "a JSON object", "accepts": lambda value: value is None or _is_json_object(value)}
    return field(default=None, hash=False, metadata=metadata)


def _flag(default: bool) -> Any:
    return _field("true or false", lambda value: isinstance(value, bool), default)


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_fan_out(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_int(count, 0, 64) for count in value) and any(value)
    return _is_int(value, 1, 64)


def _is_device(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"cpu|cuda(:\d{1,3}(,\d{1,3})*)?", value, re.ASCII) is not None


def _is_drafters(value: Any) -> bool:
    if isinstance(value, str):
        return value in ("local", "ray") or value.startswith(POOL_PREFIX) and is_pool_name(value[len(POOL_PREFIX) :])
    try:
        return isinstance(value, tuple) and len({parse_address(item) for item in value}) == len(value) > 0
    except (TypeError, ValueError):
        return False


def _is_cpu_list(value: Any) -> bool:
    try:
        return isinstance(value, str) and parse_cpus(value) != ()
    except ValueError:
        return False


def _is_json_object(value: Any) -> bool:
    try:
        return isinstance(value, dict) and json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        return False


@dataclass(frozen=True, slots=True)
class SSDConfig:
    """The user's choices; every instance is valid.

    num_speculative_tokens: K, the largest number of drafts per round
    fan_out: bonus tokens predicted per accept length 0..K: one number for all, or a list with one entry each
    branch_budget: branches per request, split by measured hit rates; 4 * (K + 1) if fan_out is not given either
    on_miss: decode plainly ("skip"), wait up to `wait_ms` for just-in-time drafts ("wait"), draft by n-gram match
        ("ngram"), or choose whichever gains most ("auto")
    adaptive: adapt the number of drafts per round to the load, down to none where speculation does not pay
    drafter_device: None lets the platform choose; several device numbers are distributed over the drafters
    num_drafters: drafters per data-parallel replica, which share its requests
    drafters: "local" for drafters that the server starts, a list of addresses of `vllm-ssd drafter`, "ray" for drafters
        that Ray places for this server, or "ray:POOL" for those of `vllm-ssd pool up POOL`
    min_drafters: number of drafters that the server waits for at startup if it does not start them itself; 1 by default
    drafter_resources: Ray resources to reserve for each drafter, by Ray's resource names
    ray_unauthenticated: allow a Ray cluster in which anyone who reaches its ports may run code
    drafter_key: credential file shared by targets and the drafters at these addresses
    tokenizer: the draft model's tokenizer, if its own folder has none
    hf_overrides: values to override in the draft model's Hugging Face config
    drafter_args: other vLLM engine arguments for the draft model, by their names in `EngineArgs`
    kv_cache_memory: bytes for the drafter's KV pages
    top_m: support of the proposal distribution when sampling
    heterogeneous_vocab: allow a draft model with another tokenizer; tokens are matched by their strings
    saguaro_c: weight of the predicted bonus tokens in the proposal when sampling; 1 leaves the proposal unchanged
    tree_attention: on a GPU, read each trunk once for all its branches, with page tables on the device
    metrics_port: None serves no metrics; each further data-parallel replica takes the next port
    """

    model: str = _name("the name or path of a draft model", MISSING)
    num_speculative_tokens: int = _integer(1, 16, 5)
    fan_out: int | tuple[int, ...] | None = _field(
        "an integer from 1 to 64, or a list of such with zeros allowed but not all zero", _is_fan_out, None
    )
    branch_budget: int | None = _integer(1, 1024, None)
    on_miss: Literal["skip", "wait", "ngram", "auto"] = _choice(("skip", "wait", "ngram", "auto"), "auto")
    wait_ms: float = _number(10_000, 50.0)
    ngram_min: int = _integer(1, 32, 2)
    ngram_max: int = _integer(1, 32, 4)
    adaptive: bool = _flag(True)
    drafter_device: str | None = _field("cpu, cuda, cuda:N or cuda:N,M,...", _is_device, None)
    num_drafters: int = _integer(1, 64, 1)
    drafters: str | tuple[str, ...] = _field(
        'a list of addresses such as ["10.0.0.7:7011"], "local", "ray" or "ray:POOL"', _is_drafters, "local"
    )
    min_drafters: int | None = _integer(0, 64, None)
    drafter_resources: dict[str, Any] | None = _object()
    ray_unauthenticated: bool = _flag(False)
    drafter_key: str | None = _name("the path of a file that `vllm-ssd key` made")
    drafter_cpus: str | None = _field("a list of CPU numbers and ranges such as 2-5,7", _is_cpu_list, None)
    dtype: str = _choice(("auto", "half", "float16", "bfloat16", "float", "float32"), "auto")
    quantization: str | None = _name("the name of a quantization method")
    load_format: str = _name("the name of one of vLLM's load formats", "auto")
    download_dir: str | None = _name("a folder")
    tokenizer: str | None = _name("the name or path of a tokenizer")
    hf_overrides: dict[str, Any] | None = _object()
    drafter_args: dict[str, Any] | None = _object()
    revision: str | None = _name("a branch, tag or commit of the draft model")
    trust_remote_code: bool = _flag(False)
    enforce_eager: bool = _flag(True)
    max_model_len: int | None = _integer(1, 2**31 - 1, None)
    kv_cache_memory: int | None = _field(
        'a size from 1MiB to 1024TiB, in bytes or such as "512MiB" or "1.5GB"',
        lambda value: _is_int(value, 2**20, 2**50),
        None,
    )
    gpu_memory_utilization: float | None = _number(1, None)
    top_m: int = _integer(1, 4096, 64)
    heterogeneous_vocab: bool = _flag(False)
    saguaro_c: float = _number(1, 1.0)
    tree_attention: bool = _flag(True)
    seed: int = _integer(0, 2**32 - 1, 0)
    startup_timeout_s: float = _number(86_400, 300.0)
    metrics_port: int | None = _integer(1, 65_535, None)

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not item.metadata["accepts"](value):
                raise ValueError(f"ssd: {item.name} must be {item.metadata['what']}, got {_shown(value)}")
        num_accept_lengths = self.num_speculative_tokens + 1
        if isinstance(self.fan_out, tuple) and len(self.fan_out) != num_accept_lengths:
            raise ValueError(
                f"ssd: fan_out must be a list of num_speculative_tokens + 1 = {num_accept_lengths} entries, "
                f"got {_shown(self.fan_out)}"
            )
        if isinstance(self.fan_out, tuple) and not self.fan_out[-1] and self.on_miss == "skip":
            raise ValueError(
                "ssd: with on_miss = 'skip' the last entry of fan_out must be over 0: it also serves rounds without "
                f"drafts, so with 0 there would never be any drafts, got {_shown(self.fan_out)}"
            )
        shortest = 2 * self.num_speculative_tokens + 3
        if self.max_model_len is not None and self.max_model_len < shortest:
            raise ValueError(
                f"ssd: max_model_len must be at least 2 * num_speculative_tokens + 3 = {shortest}, or no request has "
                f"room for drafts, got {self.max_model_len}"
            )
        self._check_drafters()
        if self.fan_out is not None and self.branch_budget is not None:
            raise ValueError("ssd: give fan_out or branch_budget, not both: fan_out already sets the branches")
        if self.ngram_min > self.ngram_max:
            raise ValueError(f"ssd: ngram_min must be at most ngram_max = {self.ngram_max}, got {self.ngram_min}")

    def _check_drafters(self) -> None:
        if not isinstance(self.drafters, str) and self.drafter_key is None:
            raise ValueError("ssd: drafters at addresses need drafter_key, the file that `vllm-ssd key` made")
        if isinstance(self.drafters, str) and self.drafter_key is not None:
            raise ValueError("ssd: drafter_key is only for drafters at addresses")
        if self.num_drafters != 1 and self.drafters not in ("local", "ray"):
            what = "the addresses in drafters" if self.pool is None else "a pool, which sets its own number"
            raise ValueError(f"ssd: give num_drafters or {what}, not both")
        if self.drafters == "local" and self.min_drafters is not None:
            raise ValueError("ssd: min_drafters is not for local drafters: a server waits for all it starts itself")
        if self.drafters != "ray" and self.drafter_resources is not None:
            raise ValueError('ssd: drafter_resources is for "drafters": "ray"')
        if self.pool is None and self.ray_unauthenticated:
            raise ValueError('ssd: ray_unauthenticated is for "drafters": "ray" or "ray:POOL"')
        if self.pool is not None and self.drafter_device is not None:
            raise ValueError("ssd: drafter_device is for drafters that the server starts; Ray chooses by resources")
        most = len(self.drafters) if isinstance(self.drafters, tuple) else self.num_drafters
        if not self.pool and self.min_drafters is not None and self.min_drafters > most:
            raise ValueError(f"ssd: min_drafters must be at most the number of drafters, {most}")
        if self.drafter_resources is not None:
            check_resources(self.drafter_resources, self)

    @classmethod
    def from_user(cls, speculative_config: Mapping[str, Any]) -> SSDConfig:
        """Build the configuration from the user's `speculative_config`.

        Keys may use dashes instead of underscores. Raises ValueError for an unknown key (naming the closest valid one),
        a value out of range (naming the range), and any rejection_sample_method but "standard".
        """
        values: dict[str, Any] = {}
        for key, value in speculative_config.items():
            name = key.replace("-", "_")
            if name in values:
                raise ValueError(f"ssd: {name} is given twice, once as {key!r}")
            values[name] = value
        method = values.pop("method", "ssd")
        if method != "ssd":
            raise ValueError(f"ssd: method must be 'ssd', got {_shown(method)}")
        verification = values.pop("rejection_sample_method", "standard")
        if verification != "standard":
            raise ValueError(
                f"ssd: rejection_sample_method must be 'standard', got {_shown(verification)}: with 'fly' and "
                "'synthetic' vLLM accepts drafts that the target would not choose, and 'block' is untested with ssd"
            )
        return cls._from_values(values)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> SSDConfig:
        """Rebuild the configuration in a worker from `to_json()` and the RUNTIME_ENV variable.

        Raises ValueError if the variable did not reach this process.
        """
        if RUNTIME_ENV not in environment:
            raise ValueError(
                f"ssd: this worker's environment has no {RUNTIME_ENV}, which the server sets; pass the server's VLLM_ "
                "variables on to its workers"
            )
        return cls._from_values({**json.loads(environment[RUNTIME_ENV]), **values})

    def to_json(self) -> dict[str, Any]:
        """The fields in TARGET_FIELDS, as JSON types."""
        return {name: getattr(self, name) for name in TARGET_FIELDS}

    def runtime_json(self) -> str:
        """All fields but TARGET_FIELDS, as JSON text."""
        return json.dumps({name: value for name, value in asdict(self).items() if name not in TARGET_FIELDS})

    def drafter_keys(self) -> dict[str, Any]:
        """The non-default keys to start a drafter with outside this server, local paths made absolute."""
        own = {"drafters", "num_drafters", "min_drafters", "drafter_resources", "ray_unauthenticated", "metrics_port"}
        defaults = SSDConfig(self.model)
        keys = {k: v for k, v in asdict(self).items() if k not in own and v != getattr(defaults, k)}
        keys["model"] = self.model
        paths = {k: os.path.abspath(keys[k]) for k in ("model", "tokenizer") if os.path.exists(keys.get(k) or "")}
        if self.download_dir is not None:
            paths["download_dir"] = os.path.abspath(self.download_dir)
        return keys | paths

    @property
    def num_awaited(self) -> int:
        """Number of drafters to wait for at startup if the server does not start them itself."""
        return 1 if self.min_drafters is None else self.min_drafters

    @property
    def pool(self) -> str | None:
        """Name of the Ray pool that provides the drafters; "" if it is this server's own, None without Ray."""
        if isinstance(self.drafters, str) and self.drafters.partition(":")[0] == "ray":
            return self.drafters.partition(":")[2]
        return None

    @property
    def max_branches(self) -> int:
        """The most branches a request can have."""
        num_accept_lengths = self.num_speculative_tokens + 1
        if isinstance(self.fan_out, tuple):
            return sum(self.fan_out)
        if self.fan_out is not None:
            return self.fan_out * num_accept_lengths
        return self.branch_budget or 4 * num_accept_lengths

    @classmethod
    def _from_values(cls, values: Mapping[str, Any]) -> SSDConfig:
        names = [item.name for item in fields(cls)]
        for name in values:
            if name not in names:
                meant = [key for key in difflib.get_close_matches(name, names) if _misspells(name, key)]
                hint = (
                    f"did you mean {meant[0]!r}?"
                    if meant
                    else (
                        f"valid keys are {', '.join(names)}; vLLM's other engine arguments for the draft model go into "
                        "drafter_args"
                    )
                )
                raise ValueError(f"ssd: unknown key {name!r} in speculative_config; {hint}")
        given: dict[str, Any] = {"model": None, **values}
        if isinstance(given.get("fan_out"), list):
            given["fan_out"] = tuple(given["fan_out"])
        if isinstance(given.get("drafters"), list):
            given["drafters"] = tuple(given["drafters"])
        if isinstance(given.get("drafter_args"), dict):
            given["drafter_args"] = {str(key).replace("-", "_"): value for key, value in given["drafter_args"].items()}
        if isinstance(given.get("kv_cache_memory"), str):
            try:
                given["kv_cache_memory"] = parse_size(given["kv_cache_memory"])
            except ValueError as error:
                raise ValueError(f"ssd: kv_cache_memory: {error}") from error
        return cls(**given)


def _misspells(name: str, key: str) -> bool:
    """Whether `name` is probably a misspelling of `key`: similar overall, and no word is a different one entirely."""

    def alike(a: str, b: str, ratio: float) -> bool:
        return difflib.SequenceMatcher(None, a, b).ratio() >= ratio

    words = list(zip(name.split("_"), key.split("_")))
    if name.count("_") == key.count("_") and not all(alike(a, b, 0.5) for a, b in words):
        return False
    return alike(name, key, 0.8)


def _shown(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)
