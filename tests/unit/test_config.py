"""A configuration is valid or refused in words, and travels unchanged."""

import json
import math
from dataclasses import FrozenInstanceError, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.config import VllmConfig

from vllm_ssd.config import MAX_CPUS, RUNTIME_ENV, TARGET_FIELDS, SSDConfig, parse_cpus, parse_size

NAME = st.text("abc/-.", min_size=1, max_size=10)
COMMON = {
    "model": NAME,
    "on_miss": st.sampled_from(["skip", "wait", "ngram", "auto"]),
    "wait_ms": st.floats(0, 10_000, exclude_min=True),
    "ngram_min": st.integers(1, 4),
    "ngram_max": st.integers(4, 32),
    "adaptive": st.booleans(),
    "drafter_device": st.sampled_from([None, "cpu", "cuda", "cuda:7", "cuda:7,5"]),
    "num_drafters": st.integers(1, 64),
    "drafter_cpus": st.sampled_from([None, "1", "2-5,7", "0, 3"]),
    "dtype": st.sampled_from(["auto", "bfloat16", "float32"]),
    "quantization": st.none() | NAME,
    "load_format": NAME,
    "download_dir": st.none() | NAME,
    "tokenizer": st.none() | NAME,
    "hf_overrides": st.none() | st.dictionaries(NAME, st.integers() | st.lists(NAME)),
    "drafter_args": st.none() | st.dictionaries(NAME.filter(lambda name: "-" not in name), st.booleans() | NAME),
    "revision": st.none() | NAME,
    "trust_remote_code": st.booleans(),
    "enforce_eager": st.booleans(),
    "max_model_len": st.none() | st.integers(2 * 16 + 3, 2**31 - 1),
    "kv_cache_memory": st.none() | st.integers(2**20, 2**50),
    "gpu_memory_utilization": st.none() | st.floats(0, 1, exclude_min=True),
    "top_m": st.integers(1, 4096),
    "heterogeneous_vocab": st.booleans(),
    "saguaro_c": st.floats(0, 1, exclude_min=True),
    "tree_attention": st.booleans(),
    "seed": st.integers(0, 2**32 - 1),
    "startup_timeout_s": st.floats(0, 86_400, exclude_min=True),
    "metrics_port": st.none() | st.integers(1, 65_535),
}


@st.composite
def user_dicts(draw):
    """A valid `speculative_config` with any subset of its keys."""
    values = {"method": "ssd", **draw(st.fixed_dictionaries({}, optional=COMMON)), "model": draw(NAME)}
    num_drafts = draw(st.integers(1, 16))
    fan_out = st.integers(1, 64) | st.lists(
        st.integers(0, 64), min_size=num_drafts + 1, max_size=num_drafts + 1
    ).filter(lambda counts: counts[-1] or any(counts) and values.get("on_miss") != "skip")
    sizes = draw(
        st.just({})
        | st.builds(lambda value: {"fan_out": value}, fan_out)
        | st.builds(lambda value: {"branch_budget": value}, st.integers(1, 1024))
    )
    remote = st.just({})
    if values.get("num_drafters", 1) == 1:
        remote |= st.fixed_dictionaries(
            {"drafters": st.just(["a:1", "[::1]:2"]), "drafter_key": NAME}, optional={"min_drafters": st.integers(0, 2)}
        )
        if "drafter_device" not in values:
            remote |= st.fixed_dictionaries(
                {"drafters": st.just("ray:chat")}, optional={"ray_unauthenticated": st.booleans()}
            )
    if "drafter_device" not in values:
        remote |= st.fixed_dictionaries(
            {"drafters": st.just("ray"), "drafter_resources": st.just({"GPU": 1, "node:10.0.0.7": 0.01})}
        )
    return values | sizes | draw(remote) | {"num_speculative_tokens": num_drafts}


@given(user_dicts())
def test_valid_configurations_travel_unchanged(values):
    config = SSDConfig.from_user(values)
    for name, value in values.items():
        if name != "method":
            assert getattr(config, name) == (tuple(value) if isinstance(value, list) else value)
    travelled = json.loads(json.dumps(config.to_json()))
    assert travelled == config.to_json()
    assert travelled.keys() == set(TARGET_FIELDS)
    received = SSDConfig.from_json(travelled, {RUNTIME_ENV: config.runtime_json()})
    assert received == config
    assert hash(received) == hash(config)


@given(user_dicts())
def test_dashes_are_underscores(values):
    assert SSDConfig.from_user({k.replace("_", "-"): v for k, v in values.items()}) == SSDConfig.from_user(values)


def test_every_field_is_covered_by_the_round_trip():
    assert {item.name for item in fields(SSDConfig)} == {
        *COMMON, "num_speculative_tokens", "fan_out", "branch_budget", "drafters", "drafter_key", "min_drafters",
        "drafter_resources", "ray_unauthenticated",
    }  # fmt: skip


CHANGES_THE_TARGET = {"num_speculative_tokens": 3}
"""Keys after which the target's compiled forward may be another one, with a value that is not the default."""
LEAVES_THE_TARGET_ALONE = {
    "model": "other", "fan_out": 3, "branch_budget": 30, "on_miss": "skip", "wait_ms": 3.5, "ngram_min": 3,
    "ngram_max": 5, "adaptive": False, "drafter_device": "cpu", "drafter_cpus": "1", "dtype": "float32",
    "num_drafters": 3, "quantization": "fp8", "revision": "main", "trust_remote_code": True, "enforce_eager": False,
    "max_model_len": 100, "kv_cache_memory": "64MiB", "gpu_memory_utilization": 0.3, "top_m": 5, "saguaro_c": 0.5,
    "tree_attention": False, "seed": 1, "startup_timeout_s": 9, "metrics_port": 9100, "heterogeneous_vocab": True,
    "load_format": "safetensors", "download_dir": "d", "tokenizer": "t", "hf_overrides": {"a": 1},
    "drafter_args": {"kv_cache_dtype": "fp8"},
}  # fmt: skip
REMOTE = {"drafters": ["10.0.0.7:7011"], "drafter_key": "ssd.pem"}
RAY = {"drafters": "ray", "drafter_resources": {"gold": 1}, "ray_unauthenticated": True, "min_drafters": 0}
"""Keys that need each other, and leave the target alone as well."""


def test_only_keys_of_the_target_enter_its_compile_cache_key():
    assert CHANGES_THE_TARGET.keys() | LEAVES_THE_TARGET_ALONE.keys() | REMOTE.keys() | RAY.keys() == {
        item.name for item in fields(SSDConfig)
    }
    assert set(TARGET_FIELDS) == CHANGES_THE_TARGET.keys()

    def key(**user) -> str:
        ours = SSDConfig.from_user({"model": "m", **user}).to_json()
        return VllmConfig(additional_config={"ssd": ours}).compute_hash()

    assert {name for name, value in LEAVES_THE_TARGET_ALONE.items() if key(**{name: value}) != key()} == set()
    assert key(**REMOTE) == key(**RAY) == key()
    assert {name for name, value in CHANGES_THE_TARGET.items() if key(**{name: value}) == key()} == set()


def test_keys_for_a_drafter_elsewhere_make_the_same_drafter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "draft").mkdir()
    user = {"num_speculative_tokens": 3, "fan_out": [1, 2, 3, 4], "kv_cache_memory": "64MiB", "top_m": 5}
    folders = {"model": "draft", "download_dir": "not there yet"}
    config = SSDConfig.from_user({**RAY, **user, **folders, "num_drafters": 2, "metrics_port": 9100})
    keys = json.loads(json.dumps(config.drafter_keys()))
    whole = {name: str(tmp_path / folder) for name, folder in folders.items()}
    assert SSDConfig.from_user(keys) == SSDConfig.from_user({**user, **whole})
    assert SSDConfig("org/name").drafter_keys() == {"model": "org/name"}


def test_a_worker_without_the_server_s_variable_says_so():
    config = SSDConfig(model="m", wait_ms=3.5)
    with pytest.raises(ValueError, match=f"no {RUNTIME_ENV}, which the server sets"):
        SSDConfig.from_json(config.to_json(), {})


def test_defaults():
    config = SSDConfig.from_user({"model": "m"})
    assert config == SSDConfig("m")
    assert (config.num_speculative_tokens, config.on_miss, config.wait_ms, config.top_m) == (5, "auto", 50, 64)
    with pytest.raises(FrozenInstanceError):
        config.top_m = 3


@pytest.mark.parametrize(
    ("values", "max_branches"),
    [
        ({}, 24),
        ({"num_speculative_tokens": 1}, 8),
        ({"branch_budget": 7}, 7),
        ({"fan_out": 3}, 18),
        ({"fan_out": [3, 2, 0], "num_speculative_tokens": 2}, 5),
    ],
)
def test_max_branches(values, max_branches):
    assert SSDConfig.from_user({"model": "m", **values}).max_branches == max_branches


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fanout": 3}, "unknown key 'fanout' in speculative_config; did you mean 'fan_out'?"),
        ({"num-spec-tokens": 3}, "unknown key 'num_spec_tokens' .*did you mean 'num_speculative_tokens'?"),
        ({"zzz": 3}, "unknown key 'zzz' .*valid keys are model, num_speculative_tokens, fan_out"),
        ({"kv_cache_dtype": "fp8"}, "unknown key 'kv_cache_dtype' .*; valid keys are model, .*kv_cache_memory"),
        ({"top_k": 5}, "unknown key 'top_k' .*; valid keys are .* other engine arguments .* go into drafter_args"),
        ({"max_len": 5}, "unknown key 'max_len' .*; valid keys are "),
        ({"metric_port": 5}, "unknown key 'metric_port' .*did you mean 'metrics_port'?"),
        ({"top-m": 3, "top_m": 3}, "top_m is given twice, once as 'top_m'"),
        ({"method": "eagle"}, "method must be 'ssd', got 'eagle'"),
        ({"fan_out": 2, "branch_budget": 9}, "give fan_out or branch_budget, not both"),
        ({"fan_out": [1, 2]}, r"num_speculative_tokens \+ 1 = 6 entries, got \[1, 2\]"),
        ({"fan_out": [0] * 6}, "not all zero, got"),
        ({"fan_out": [2] * 5 + [0], "on_miss": "skip"}, "last entry of fan_out.*must be over 0"),
        ({"max_model_len": 12}, r"max_model_len must be at least 2 \* num_speculative_tokens \+ 3 = 13.*got 12"),
        ({"ngram_min": 5}, "ngram_min must be at most ngram_max = 4, got 5"),
        ({"on_miss": "ask"}, "on_miss must be one of skip, wait, ngram, auto, got 'ask'"),
        ({"num_speculative_tokens": 17}, "num_speculative_tokens must be an integer from 1 to 16, got 17"),
        ({"kv_cache_memory": "2 gigs"}, "kv_cache_memory: '2 gigs' is no number with one of the units B, KB, KiB"),
        ({"drafter_cpus": "4-2"}, "drafter_cpus must be a list of CPU numbers and ranges such as 2-5,7, got '4-2'"),
    ],
)
def test_errors_name_the_key_the_range_and_the_value(values, message):
    with pytest.raises(ValueError, match=f"^ssd: .*{message}"):
        SSDConfig.from_user({"model": "m", **values})


def test_the_model_is_required():
    with pytest.raises(ValueError, match="model must be the name or path of a draft model, got None"):
        SSDConfig.from_user({"method": "ssd"})


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("model", ["", " ", None, 3]),
        ("num_speculative_tokens", [0, 17, True, 5.0, "5", None]),
        ("fan_out", [0, 65, True, 2.0, "3", [], [1, 2, 3, 4, 5, -1], [1, 2, 3, 4, 5, 65], [1, 2, 3, 4, 5, "6"], {}]),
        ("branch_budget", [0, 1025, "24", False]),
        ("on_miss", ["", "SKIP", None, ["skip"]]),
        ("wait_ms", [0, -1, 10_001, math.nan, math.inf, True, "50", None]),
        ("ngram_min", [0, 33, None]),
        ("ngram_max", [0, 33, 1]),
        ("adaptive", [1, "true", None]),
        ("drafter_device", ["", "gpu", "cuda:", "cuda:x", "CPU", "cuda:1\n", "cuda:1,", "cuda:1-2", 0]),
        ("drafter_cpus", ["", ",", "1-", "a", "3-1", "1,,2", "-1", "4096", "0-99999999999", 1]),
        ("dtype", ["fp8", None]),
        ("quantization", ["", 8]),
        ("load_format", ["", None]),
        ("download_dir", [" ", 1]),
        ("tokenizer", ["", {}]),
        ("hf_overrides", [[], "{}", {1: 2}, {"a": {1, 2}}, {"a": print}]),
        ("drafter_args", [[], "{}", {"a": print}]),
        ("revision", ["", 1]),
        ("trust_remote_code", [1, None]),
        ("enforce_eager", ["yes", None]),
        ("max_model_len", [0, -1, 2**31, "4k"]),
        ("kv_cache_memory", [0, -1, 1.5e9, True, "", "512", "MiB", "-1GiB", "1e3GB", "512mib", "1000KB", 2**50 + 1]),
        ("gpu_memory_utilization", [0, 1.01, -0.5, math.nan, True, "0.9"]),
        ("top_m", [0, 4097, None]),
        ("heterogeneous_vocab", [1, "true", None]),
        ("saguaro_c", [0, 1.01, "0.5", None]),
        ("seed", [-1, 2**32, None]),
        ("startup_timeout_s", [0, 86_401, math.nan, None]),
        ("metrics_port", [0, 65_536, "9100"]),
    ],
)
def test_values_out_of_range_are_refused(name, wrong):
    for value in wrong:
        with pytest.raises(ValueError, match=rf"^ssd: {name if name != 'ngram_max' else 'ngram_m'}"):
            SSDConfig.from_user({"model": "m", name: value})


def test_received_values_are_checked_too():
    with pytest.raises(ValueError, match="wait_ms"):
        SSDConfig.from_json({}, {RUNTIME_ENV: '{"model": "m", "wait_ms": -1}'})
    with pytest.raises(ValueError, match="unknown key"):
        SSDConfig.from_json({"model": "m", "method": "ssd"}, {RUNTIME_ENV: "{}"})


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("1", (1,)), ("2-5,7", (2, 3, 4, 5, 7)), ("7, 2 ,3-3", (2, 3, 7)), ("1-3,2-4", (1, 2, 3, 4)), ("4095", (4095,))],
)
def test_cpu_lists(text, cpus):
    assert parse_cpus(text) == cpus


@given(st.text("0123456789-, ax", max_size=12))
def test_any_cpu_text_is_parsed_or_refused(text):
    try:
        cpus = parse_cpus(text)
    except ValueError:
        return
    assert cpus == tuple(sorted(set(cpus)))
    assert 0 <= cpus[0] <= cpus[-1] < MAX_CPUS


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 512 << 20), ("2TiB", 2 << 40), ("1.5GB", 1_500_000_000), (" 3 KB ", 3000), ("7B", 7)],
)
def test_sizes(text, size):
    assert parse_size(text) == size
    if size >= 2**20:
        assert SSDConfig.from_user({"model": "m", "kv_cache_memory": text}).kv_cache_memory == size


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"drafters": ["10.0.0.7:7011"]}, "need drafter_key, the file that `vllm-ssd key` made"),
        ({"drafter_key": "ssd.pem"}, "drafter_key is only for drafters at addresses"),
        ({"drafters": "ray", "drafter_key": "ssd.pem"}, "drafter_key is only for drafters at addresses"),
        ({"drafters": "ray:"}, "drafters must be a list of addresses"),
        ({"drafters": "ray:a/b"}, "drafters must be a list of addresses"),
        ({"drafters": "ray:chat", "num_drafters": 2}, "num_drafters or a pool, which sets its own number"),
        ({"drafters": "ray:chat", "drafter_resources": {"GPU": 1}}, 'drafter_resources is for "drafters": "ray"'),
        ({"drafters": "ray", "drafter_resources": {}}, "must name amounts over 0"),
        ({"drafters": "ray", "drafter_resources": {"GPU": "1"}}, "must name amounts over 0"),
        ({"drafters": "ray", "drafter_resources": {"GPU": 0.5}}, "with 0.5 of a GPU .* set kv_cache_memory"),
        ({"drafters": "ray", "drafter_resources": {"GPU": 1.5}}, "a fraction of one GPU or whole GPUs, not 1.5"),
        ({"drafters": "ray", "drafter_resources": {"gold": float("inf")}}, "must name amounts over 0"),
        ({"drafters": "ray", "drafter_device": "cuda:1"}, "Ray chooses by resources"),
        ({"drafters": "ray", "num_drafters": 2, "min_drafters": 3}, "at most the number of drafters, 2"),
        ({**REMOTE, "min_drafters": 2}, "at most the number of drafters, 1"),
        ({"min_drafters": 1}, "min_drafters is not for local drafters"),
        ({**REMOTE, "ray_unauthenticated": True}, "ray_unauthenticated is for"),
        ({**REMOTE, "num_drafters": 2}, "num_drafters or the addresses in drafters, not both"),
        ({**REMOTE, "drafters": ["10.0.0.7"]}, r"a list of addresses such as .*, got \['10.0.0.7'\]"),
        ({**REMOTE, "drafters": ["a:1", "a:1"]}, "a list of addresses"),
        ({**REMOTE, "drafters": []}, "a list of addresses"),
        ({**REMOTE, "drafters": "rays"}, '"local", "ray" or "ray:POOL"'),
    ],
)
def test_drafters_at_addresses_come_with_a_key(keys, message):
    with pytest.raises(ValueError, match=message):
        SSDConfig.from_user({"model": "m", **keys})
