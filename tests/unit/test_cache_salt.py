"""What the workers learn of a request's `cache_salt`, and when."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.v1.engine.core import EngineCore

from vllm_ssd.compat.target import cache_salt


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch):
    """`EngineCore.preprocess_add_request` of an engine with the keys `additional_config`, as the patch has it."""
    monkeypatch.setattr(EngineCore, "preprocess_add_request", lambda self, request: (request, 0))
    cache_salt.carry_where_loaded()

    def add(salt: str | None, additional_config: dict, **params) -> SamplingParams:
        engine = SimpleNamespace(vllm_config=SimpleNamespace(additional_config=additional_config))
        request = SimpleNamespace(cache_salt=salt, sampling_params=SamplingParams(**params))
        assert EngineCore.preprocess_add_request(engine, request) == (request, 0)
        return request.sampling_params

    return add


def test_equal_salts_are_told_apart_from_others_and_from_none(add) -> None:
    first, again, other = (add(salt, {"ssd": {}}, extra_args={"a": 1}) for salt in ("mine", "mine", "yours"))
    assert cache_salt.cache_salt_of(first) == cache_salt.cache_salt_of(again) != cache_salt.cache_salt_of(other)
    assert len(cache_salt.cache_salt_of(first)) == 32 and first.extra_args["a"] == 1
    assert "mine" not in str(first.extra_args), "the salt itself is the client's secret"
    assert cache_salt.cache_salt_of(add(None, {"ssd": {}})) == b""


def test_other_engines_are_left_alone(add) -> None:
    assert add("mine", {}).extra_args is None
    assert cache_salt.cache_salt_of(SamplingParams()) == b""


def test_an_engine_that_embeds_has_no_sampling_parameters(add) -> None:
    engine = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={"ssd": {}}))
    request = SimpleNamespace(cache_salt="mine", sampling_params=None)
    assert EngineCore.preprocess_add_request(engine, request) == (request, 0)


@pytest.mark.parametrize("written", ["", "x", 5, None, "\ud800" * 32, "z" * 1000, ["a"]])
def test_what_clients_write_in_its_place_is_no_salt(add, written: object) -> None:
    assert cache_salt.cache_salt_of(SamplingParams(extra_args={cache_salt.KEY: written})) == b""
    params = add("\ud800", {"ssd": {}}, extra_args={cache_salt.KEY: written})
    assert len(cache_salt.cache_salt_of(params)) == 32
