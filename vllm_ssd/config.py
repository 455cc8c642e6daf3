"""Everything a user may say about SSD, checked before anything starts."""

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
"""Environment variable with the process id of the server, whose end the drafter must not outlive."""
REPLICAS_ENV = "VLLM_SSD_REPLICAS"
"""Environment variable with the number of data-parallel replicas on this node, which vLLM's workers are not told; 0
where other servers may run some there, of which this one does not know."""

TARGET_FIELDS = ("num_speculative_tokens",)
"""Fields in `to_json()`, whose result enters vLLM's compile-cache key: those that change the target's forward.

The others are about the drafter, or about what the target does between two forwards.
"""

MAX_CPUS = 4096
SIZE_UNITS = {"B": 1} | {
    f"{letter}{infix}B": base**power
    for power, letter in enumerate("KMGT", start=1)
    for infix, base in (("", 1000), ("i", 1024))
}


def parse_cpus(text: str) -> tuple[int, ...]:
    """The CPU numbers that a list such as "2-5,7" names, ascending; raises ValueError when it is no such list."""
    cpus: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not first <= last < MAX_CPUS:
            raise ValueError(f"{part!r} names no CPUs from 0 to {MAX_CPUS - 1}")
        cpus.update(range(first, last + 1))
    return tuple(sorted(cpus))


def parse_size(text: str) -> int:
    """The bytes of a size such as "512MiB" (binary units) or "1.5GB" (decimal); raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]+)\s*", text, re.ASCII)
    if match is None or match[2] not in SIZE_UNITS:
        raise ValueError(f"{text!r} is no number with one of the units {', '.join(SIZE_UNITS)}")
    return round(float(match[1]) * SIZE_UNITS[match[2]])


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT" or "[IPv6]:PORT"; raises ValueError for anything else."""
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
    """Whether a pool of drafters on Ray may be called so."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", text, re.ASCII) is not None


def check_resources(resources: Mapping[str, Any], given: SSDConfig) -> None:
    """Raise ValueError unless Ray can reserve `resources` for a drafter, which the keys of `given` fit into."""
    amounts = resources.values()
    if not resources or not all(
        isinstance(x, (int, float)) and not isinstance(x, bool) and 0 < x < math.inf for x in amounts
    ):
        raise ValueError(
            f'ssd: drafter_resources must name amounts over 0, as in {{"GPU": 1}}, got {json.dumps(resources)}'
        )
    if resources.get("GPU", 1) > 1 and resources["GPU"] % 1:
        raise ValueError(
            f"ssd: drafter_resources: of GPUs Ray reserves a part of one, or whole ones, not {resources['GPU']:g}"
        )
    if resources.get("GPU", 1) % 1 and given.kv_cache_memory is None and given.gpu_memory_utilization is None:
        raise ValueError(
            f"ssd: a drafter that has {resources['GPU']:g} of a GPU cannot tell how much memory is its own: set "
            "kv_cache_memory"
        )


def _field(what: str, allows: Callable[[Any], bool], default: Any = MISSING) -> Any:
    """A field whose values are `what`, as `allows` decides; None is a value where it is the default."""
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
    """A JSON object, or None; it takes no part in the hash."""
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

    num_speculative_tokens: K, the most drafts a round may carry
    fan_out: bonus tokens predicted per accept length 0..K, one number for all or one each
    branch_budget: branches a request, divided by measured hit rates; with neither given, 4 * (K + 1)
    on_miss: decode plainly, wait for just-in-time drafts up to `wait_ms`, draft by n-gram match, or decide by gain
    adaptive: let the drafts a round carries follow the load, down to none where speculation does not pay
    drafter_device: None leaves the choice to the platform; of several numbers, each drafter gets one
    num_drafters: drafters of each data-parallel replica, which share its requests
    drafters: "local" for those that the server starts, the addresses of `vllm-ssd drafter`, "ray" for those that Ray
        places for this server, or "ray:POOL" for those of `vllm-ssd pool up POOL`
    min_drafters: of drafters that the server does not start itself, how many it waits for as it starts; 1 by default
    drafter_resources: what Ray reserves for each drafter, by Ray's names of resources
    ray_unauthenticated: use a Ray cluster in which everybody who reaches its ports may run code
    drafter_key: the credential that targets and those drafters share
    tokenizer: of the draft model, where its own folder has none
    hf_overrides: settings of the draft model's configuration to replace
    drafter_args: vLLM's other engine arguments for the draft model, by their names in `EngineArgs`
    kv_cache_memory: bytes for the drafter's KV pages
    top_m: support of the proposal distribution when sampling
    heterogeneous_vocab: let the draft model have another tokenizer, whose tokens are matched by their strings
    saguaro_c: weight of the predicted bonus tokens in the proposal when sampling; 1 leaves it as it is
    tree_attention: on a GPU, read each trunk once for all branches, with pages kept on the device
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
                "ssd: with on_miss = 'skip' the last entry of fan_out, which serves rounds without drafts too, must be "
                f"over 0, or there never are any, got {_shown(self.fan_out)}"
            )
        shortest = 2 * self.num_speculative_tokens + 3
        if self.max_model_len is not None and self.max_model_len < shortest:
            raise ValueError(
                f"ssd: max_model_len must be at least 2 * num_speculative_tokens + 3 = {shortest}, or no request has "
                f"room for drafts, got {self.max_model_len}"
            )
        self._check_drafters()
        if self.fan_out is not None and self.branch_budget is not None:
            raise ValueError("ssd: give fan_out or branch_budget, not both: the budget is what fan_out divides")
        if self.ngram_min > self.ngram_max:
            raise ValueError(f"ssd: ngram_min must be at most ngram_max = {self.ngram_max}, got {self.ngram_min}")

    def _check_drafters(self) -> None:
        if not isinstance(self.drafters, str) and self.drafter_key is None:
            raise ValueError("ssd: drafters at addresses need drafter_key, the file that `vllm-ssd key` made")
        if isinstance(self.drafters, str) and self.drafter_key is not None:
            raise ValueError("ssd: drafter_key is for drafters at addresses; all others need none")
        if self.num_drafters != 1 and self.drafters not in ("local", "ray"):
            what = "the addresses in drafters" if self.pool is None else "a pool, which has a number of its own"
            raise ValueError(f"ssd: give num_drafters or {what}, not both")
        if self.drafters == "local" and self.min_drafters is not None:
            raise ValueError("ssd: min_drafters is for drafters that others start; a server waits for all of its own")
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
        """The configuration that the user's `speculative_config` describes.

        Keys may have dashes for underscores. Raises ValueError for an unknown key, naming the nearest valid one, for a
        value out of range, naming the range, and for a verification other than vLLM's standard one.
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
                "'synthetic' vLLM accepts drafts that the target would not choose, and 'block' was not tested with ssd"
            )
        return cls._from_values(values)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> SSDConfig:
        """The configuration that `to_json` described, and `runtime_json` in the environment variable RUNTIME_ENV.

        Raises ValueError when that did not reach this process.
        """
        if RUNTIME_ENV not in environment:
            raise ValueError(
                f"ssd: this worker's environment has no {RUNTIME_ENV}, which the server sets; pass the server's VLLM_ "
                "variables on to its workers"
            )
        return cls._from_values({**json.loads(environment[RUNTIME_ENV]), **values})

    def to_json(self) -> dict[str, Any]:
        """The fields that change what the target computes, as JSON types."""
        return {name: getattr(self, name) for name in TARGET_FIELDS}

    def runtime_json(self) -> str:
        """All other fields as a JSON text."""
        return json.dumps({name: value for name, value in asdict(self).items() if name not in TARGET_FIELDS})

    def drafter_keys(self) -> dict[str, Any]:
        """The user's keys that a drafter is started with where somebody else starts it; folders by their whole path."""
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
        """Drafters that a server waits for as it starts, of those that it does not start itself."""
        return 1 if self.min_drafters is None else self.min_drafters

    @property
    def pool(self) -> str | None:
        """The pool on Ray that drafters belong to: "" for this server's own, None where Ray places none."""
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
    """Whether `name` may be meant as `key`: nearly the same letters, and no word that is another one altogether."""

    def alike(a: str, b: str, ratio: float) -> bool:
        return difflib.SequenceMatcher(None, a, b).ratio() >= ratio

    words = list(zip(name.split("_"), key.split("_")))
    if name.count("_") == key.count("_") and not all(alike(a, b, 0.5) for a, b in words):
        return False
    return alike(name, key, 0.8)


def _shown(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)
