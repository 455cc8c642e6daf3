"""Who did not ask for ssd does not notice us: every patch hands such a call to vLLM as it came, and its result back."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from engines import HAS_V2

from vllm_ssd.compat import patch
from vllm_ssd.compat.target import runner_v1
from vllm_ssd.plugin import register

pytestmark = pytest.mark.compat

ARGUMENTS = "vllm.engine.arg_utils:EngineArgs"
V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
V2 = "vllm.v1.worker.gpu.model_runner"
JUDGE = "vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler.__call__"

GUARDED = {
    f"{ARGUMENTS}.create_speculative_config",
    f"{ARGUMENTS}.create_engine_config",
    "vllm.config.vllm:VllmConfig.max_concurrent_batches",
    "vllm.v1.worker.gpu.spec_decode:init_speculator",
    f"{V1}.execute_model",
    f"{V1}.propose_draft_token_ids",
    f"{V1}._sample",
    f"{V1}._get_spec_decode_draft_probs",
    f"{V1}.initialize_kv_cache",
    f"{V1}._update_states",
}
ON_V2 = {
    f"{V2}:init_speculator",
    f"{V2}:GPUModelRunner.load_model",
    f"{V2}:GPUModelRunner.add_requests",
    f"{V2}:GPUModelRunner.finish_requests",
    f"{V2}:GPUModelRunner.sample_tokens",
    f"{V2}:GPUModelRunner._remove_request",
    JUDGE,
}
REPAIRS = {"vllm.v1.sample.rejection_sampler:expand_batch_to_tokens"}
"""What is replaced for a whole worker process, which has an ssd target: vLLM's function is wrong there for everyone."""


def install() -> None:
    """All that a process with ssd may patch."""
    register()
    runner_v1.install(type("Proposer", (), {}))
    pipeline = importlib.import_module("vllm_ssd.compat.target.pipeline")
    pipeline.install()
    if HAS_V2:
        importlib.import_module("vllm_ssd.compat.target.runner_v2").install()


@pytest.fixture(scope="module")
def calls() -> Iterator[list[tuple[str, tuple, dict]]]:
    """Every patch, over functions that note what they are called with and return their symbol."""
    noted: list[tuple[str, tuple, dict]] = []
    kept = list(patch._patches)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if HAS_V2:  # as if its runner had been imported before the plugin was loaded
            copied = patch.original("vllm.v1.worker.gpu.spec_decode:init_speculator")
            monkeypatch.setattr(importlib.import_module(V2), "init_speculator", copied)
        install()
        symbols = {symbol: found.original for symbol, found in patch.patched().items() if found.ours is not None}
        for found in reversed(list(patch._patches)):
            patch.undo(found)
        for symbol, original in symbols.items():
            monkeypatch.setattr(*place(symbol), note(noted, symbol, original))
        install()
        yield noted
        for found in reversed(list(patch._patches)):
            patch.undo(found)
    if kept:
        install()


def place(symbol: str) -> tuple[Any, str]:
    module, _, path = symbol.partition(":")
    *outer, name = path.split(".")
    return functools.reduce(getattr, outer, importlib.import_module(module)), name


def note(noted: list, symbol: str, original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def stand_in(*args: Any, **kwargs: Any) -> str:
        noted.append((symbol, args, kwargs))
        return symbol

    owner, name = place(symbol)
    return property(stand_in) if isinstance(inspect.getattr_static(owner, name), property) else stand_in


def test_every_patch_is_installed(calls: list) -> None:
    """The tests below see all of them."""
    found = patch.patched()
    guarded = {symbol for symbol, p in found.items() if p.ours is not None}
    assert GUARDED | (ON_V2 if HAS_V2 else set()) <= guarded
    repairs = {symbol for symbol in found.keys() - guarded if not symbol.endswith(".kernel")}
    assert repairs <= REPAIRS, "patched for everyone in the process"


def bystanders() -> list[Any]:
    """What calls come from when ssd was not asked for: bare, and as stock speculation looks."""
    others = [None, {}, {"other": 1}, "text"]
    objects = [SimpleNamespace()]
    for method, additional in zip(("ngram", "custom_class", "eagle", "ngram_gpu"), others):
        stock = SimpleNamespace(method=method)
        config = SimpleNamespace(speculative_config=stock, additional_config=additional)
        objects.append(
            SimpleNamespace(vllm_config=config, drafter=stock, speculator=stock, _ssd_speculator=None, **vars(config))
        )
        objects.append(SimpleNamespace(speculative_config={"method": method}, spec_method=method))
    return objects


def shapes(original: Callable[..., Any]) -> list[tuple[int, list[str]]]:
    """Numbers of positional arguments after the first, and names of those by keyword, that vLLM's function takes."""
    parameters = list(inspect.signature(original).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    required = sum(p.default is p.empty for p in parameters)
    return [(n, names[n:m]) for n in range(len(names) + 1) for m in {max(n, required), len(names)}]


def test_vllm_is_called_as_it_was(calls: list) -> None:
    for symbol, function, original in guarded_functions():
        for first in bystanders():
            for positional, keywords in shapes(original):
                args, kwargs = (first, *(object() for _ in range(positional))), {k: object() for k in keywords}
                calls.clear()
                assert function(*args, **kwargs) == symbol
                ((called, found_args, found_kwargs),) = calls
                assert called == symbol and found_kwargs == kwargs
                assert len(found_args) == len(args) and all(a is b for a, b in zip(found_args, args))


def guarded_functions() -> list[tuple[str, Callable[..., Any], Callable[..., Any]]]:
    """Symbols, what is called for each of them now, and vLLM's own function."""
    functions = []
    for symbol, p in patch.patched().items():
        if p.ours is not None:
            owner, name = place(symbol)
            found = inspect.getattr_static(owner, name)
            functions.append((symbol, found.fget if isinstance(found, property) else found, p.original))
    assert functions
    return functions


@pytest.mark.parametrize("arguments", [(None,), (None, None), (None, None, None)])
@pytest.mark.parametrize("by_name", [False, True])
def test_init_speculator_on_every_minor(calls: list, arguments: tuple, by_name: bool) -> None:
    """vLLM 0.28 to 0.31 give it two arguments, 0.32 three; the next may give more."""
    function = getattr(*place("vllm.v1.worker.gpu.spec_decode:init_speculator"))
    config = SimpleNamespace(additional_config={})
    calls.clear()
    names = dict(zip(("device", "req_states", "more"), arguments))
    result = function(vllm_config=config, **names) if by_name else function(config, *arguments)
    assert result == "vllm.v1.worker.gpu.spec_decode:init_speculator"
    assert [(args, kwargs) for _, args, kwargs in calls] == [
        ((), {"vllm_config": config} | names) if by_name else ((config, *arguments), {})
    ]


def test_a_future_argument_is_passed_on(calls: list) -> None:
    """Whatever a newer vLLM adds to a call reaches it."""
    for symbol, function, original in guarded_functions():
        if len(inspect.signature(original).parameters) > 1:  # a property has no more
            calls.clear()
            function(SimpleNamespace(), 1, 2, 3, 4, 5, 6, added=7)
            assert calls[0][0] == symbol and calls[0][1][1:] == (1, 2, 3, 4, 5, 6) and calls[0][2] == {"added": 7}
