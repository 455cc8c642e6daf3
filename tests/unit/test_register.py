"""`register()` as vLLM calls it: in any process, twice, on a whole vLLM and on broken ones; it never raises.

Each case runs in a process of its own, on a vLLM that it has broken first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.compat

HERE = Path(__file__).parent
"""Not the repository's root: from there, Transformers would import our `kernels`."""
ALL = ["create_engine_config", "create_speculative_config", "init_speculator", "max_concurrent_batches"]
REFUSED = "UnsupportedVLLM: speculative method 'ssd' is not available: "


class Fork:
    """A process with vLLM loaded, which answers each question in a child of its own; see `register_host`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "register_host.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=HERE,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )

    def register(self, break_vllm: str = "") -> dict[str, Any]:
        print(json.dumps(break_vllm), file=self._process.stdin, flush=True)
        assert self._process.stdout is not None  # a pipe
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise AssertionError("the process ended")

    def close(self) -> None:
        self._process.kill()  # it owns nothing, and an orderly end of vLLM takes seconds
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


@pytest.fixture(scope="module")
def register() -> Iterator[Callable[..., dict[str, Any]]]:
    fork = Fork()
    yield fork.register
    fork.close()


Register = Callable[..., dict[str, Any]]


def test_it_is_silent_and_idempotent(register: Register) -> None:
    found = register()
    assert sorted(found["replaced"]) == sorted(found["guarded"]) == ALL
    assert not found["replaced twice"] and not found["logged"]


def test_who_does_not_ask_for_ssd_loads_little_of_it(register: Register) -> None:
    assert {name for name in register()["imported"] if not name.startswith("vllm_ssd.compat")} == {"vllm_ssd.plugin"}


@pytest.mark.parametrize(
    ("break_vllm", "reason"),
    [
        pytest.param(
            "del EngineArgs.create_speculative_config", "EngineArgs.create_speculative_config is missing", id="no hook"
        ),
        pytest.param("del EngineArgs.create_engine_config", "create_engine_config is missing", id="no second hook"),
        pytest.param("del VllmConfig.max_concurrent_batches", "max_concurrent_batches is missing", id="no property"),
        pytest.param(
            "VllmConfig.max_concurrent_batches = 1", "max_concurrent_batches is a int, not", id="a plain attribute"
        ),
        pytest.param(
            "EngineArgs.create_speculative_config = lambda self, target: None",
            "has no parameter target_model_config, target_parallel_config",
            id="other parameters",
        ),
        pytest.param("del spec_decode.init_speculator", "init_speculator is missing", id="no speculator"),
        pytest.param(
            "spec_decode.init_speculator = lambda config, device: None",
            "has no parameter vllm_config",
            id="other speculator",
        ),
        pytest.param(
            'sys.modules["vllm.v1.worker.gpu.spec_decode"] = None',
            "vllm.v1.worker.gpu.spec_decode:init_speculator is missing",
            id="no module",
        ),
    ],
)
def test_a_broken_vllm_is_left_as_it_was(register: Register, break_vllm: str, reason: str) -> None:
    found = register(break_vllm)
    assert len(found["logged"]) == len(found["tracebacks"]) == 1
    assert "could not register" in found["logged"][0] and reason in found["tracebacks"][0]
    assert set(found["replaced"]) <= {"create_speculative_config", "create_engine_config"}, "half patched"
    assert set(found["replaced"]) == set(found["guarded"]), "only what refuses ssd is left"
    assert not found["replaced twice"]
    assert found["ssd"].startswith(REFUSED) and reason in found["ssd"]
    assert REFUSED not in (found["ngram"] or "")


def test_a_vllm_that_cannot_be_imported() -> None:
    script = "import sys; sys.modules['vllm'] = None; from vllm_ssd.plugin import register; register(); register()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=HERE)
    assert done.returncode == 0 and done.stderr.count("could not register") == 1, done.stderr
    assert done.stderr.count("Traceback") >= 1


def test_half_a_registration_is_completed(register: Register) -> None:
    found = register("from vllm_ssd.compat.target import batches; batches.run_one_batch_at_a_time()")
    assert sorted(found["guarded"]) == ALL and not found["logged"]
    assert sorted(found["replaced"]) == [name for name in ALL if name != "max_concurrent_batches"]
