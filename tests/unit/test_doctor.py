"""What `vllm-ssd doctor` says of this machine and of others."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from altered_models import altered
from engines import HAS_V2, PAIR
from marks import needs_v2
from typer.testing import CliRunner

from vllm_ssd.cli import app
from vllm_ssd.config import WORKER_ENVS
from vllm_ssd.doctor import Findings, Machine
from vllm_ssd.link.credential import make_credential

TARGET, DRAFTER = str(PAIR / "target"), str(PAIR / "drafter")
if HAS_V2:  # before the plugin registers, which patches the copy that this module holds
    importlib.import_module("vllm.v1.worker.gpu.model_runner")
HOST = Path(__file__).with_name("doctor_host.py")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*WORKER_ENVS, "VLLM_LOGGING_LEVEL", "VLLM_LOGGING_STREAM"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back afterwards
    for name in ("CUDA_VISIBLE_DEVICES", "VLLM_USE_V2_MODEL_RUNNER", "VLLM_LOGGING_LEVEL", "VLLM_LOGGING_STREAM"):
        monkeypatch.delenv(name, raising=False)


def doctor(*flags: str, target: str = TARGET, drafter: str = DRAFTER) -> tuple[int, dict[str, Any]]:
    """Exit status and findings by subject, of this machine."""
    done = CliRunner().invoke(app, ["doctor", target, drafter, "--json", *flags])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    found = json.loads(done.stdout)
    assert found["starts"] == (done.exit_code == 0)
    return done.exit_code, {finding["subject"]: finding for finding in found["findings"]}


def test_the_bundled_pair_starts_here():
    status, found = doctor("--dtype", "float32", "--max-model-len", "512", "--port", "8000")
    assert status == 0, found
    assert found["flags"]["text"].endswith("--port 8000") and found["flags"]["status"] == "note"
    assert "same tokenizer" in found["vocabulary"]["text"]
    assert found["context"]["text"] == "512 tokens; the drafter takes requests up to 500"
    assert "by file size" in found["memory"]["text"] and "for the drafter's KV" in found["memory"]["text"]
    assert found["runner"]["text"].startswith("V1: ") and found["asynchronous scheduling"]["fix"]
    assert found["target's attention"]["text"] == "CPU_ATTN"
    assert "generation config" not in found


def test_keys_and_dotted_flags_reach_the_plugin():
    status, found = doctor("--speculative-config.num_speculative_tokens", "3", "--speculative-config.on_miss", "skip")
    assert status == 0 and found["configuration"]["text"] == "K = 3, up to 16 branches a request, on_miss skip"


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--speculative-config", '{"fanout": 3}'), "did you mean 'fan_out'?"),
        (("--speculative-config", '{"rejection_sample_method": "synthetic"}'), "must be 'standard'"),
        (("--max-num-seqs", "many"), "--max-num-seqs"),
        (("--runner", "pooling"), "pooling model"),
    ],
)
def test_what_the_server_refuses_the_doctor_refuses(flags, text):
    status, found = doctor(*flags)
    assert status == 1 and found["configuration"]["status"] == "fails"
    assert text in found["configuration"]["text"]


def test_a_draft_model_that_is_not_there():
    status, found = doctor(drafter="./absent")
    assert status == 1 and "neither a folder nor the name of a model" in found["configuration"]["text"]


def test_another_vocabulary_is_refused_in_the_drafter_s_words(tmp_path):
    folder = altered(DRAFTER, tmp_path / "drafter")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = dict(zip(vocab, reversed(list(vocab.values()))))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    status, found = doctor(drafter=str(folder))
    assert status == 1 and found["vocabulary"]["status"] == "fails", found
    assert "heterogeneous_vocab" in found["vocabulary"]["text"] + found["vocabulary"]["fix"]
    assert "by its shape" in found["memory"]["text"]


def test_a_short_context_is_said(tmp_path):
    short = str(altered(DRAFTER, tmp_path / "drafter", max_position_embeddings=256))
    status, found = doctor(drafter=short)
    assert status == 0 and found["context"]["status"] == "note"
    assert "requests over 244 tokens run without its drafts" in found["context"]["text"]


def test_prefix_caches_of_both_sides():
    for flag, status in (("--enable-prefix-caching", "on"), ("--no-enable-prefix-caching", "off")):
        _, found = doctor(flag)
        assert found["target's prefix cache"]["text"] == status
        assert found["drafter's prefix cache"]["text"].startswith("on, whatever the target's is")


RECURRENT = {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "state_size": 16}


def test_a_recurrent_draft_model_is_refused_before_it_is_loaded(tmp_path):
    status, found = doctor(drafter=str(altered(DRAFTER, tmp_path / "drafter", **RECURRENT)))
    assert status == 1 and found["draft model"]["status"] == "fails"
    assert "recurrent or linear-attention layers, whose state branches cannot share" in found["draft model"]["text"]
    assert "a draft model is a decoder with attention in every layer" in found["draft model"]["text"]


@pytest.mark.parametrize(("flags", "is_said"), [((), True), (("--generation-config", "vllm"), False)])
def test_min_p_among_the_target_s_defaults_is_said(tmp_path, flags, is_said):
    target = altered(TARGET, tmp_path / "target")
    (target / "generation_config.json").write_text('{"min_p": 0.05}')
    status, found = doctor(*flags, target=str(target))
    assert status == 0 and ("generation config" in found) == is_said
    if is_said:
        said = found["generation config"]
        assert said["status"] == "note" and "min_p is 0.05" in said["text"] and "will fail" in said["text"]
        assert "--override-generation-config" in said["fix"]


def test_cores_that_are_not_here():
    status, found = doctor("--speculative-config.drafter_cpus", "4000-4001")
    assert status == 1 and "may not use [4000, 4001]" in found["drafter's device"]["text"]


def test_a_plugin_that_is_not_loaded(monkeypatch):
    monkeypatch.setattr("vllm_ssd.compat.target.runner.has_ssd", lambda config: False)
    status, found = doctor()
    assert status == 1 and "VLLM_PLUGINS" in found["configuration"]["text"]


def test_the_table_says_whether_it_starts():
    done = CliRunner().invoke(app, ["doctor", TARGET, DRAFTER], env={"COLUMNS": "200"})
    assert done.exit_code == 0 and "The server would start." in done.output
    failing = CliRunner().invoke(app, ["doctor", TARGET, "./absent"], env={"COLUMNS": "200"})
    assert failing.exit_code == 1 and "The server would not start." in failing.output


def test_memory_that_is_too_small():
    from vllm_ssd.doctor.examine import _on_gpu

    found = Findings()
    machine = Machine(1, 80 << 30, 8, 1 << 40)
    _on_gpu(found, "target's memory", 141e9, "by file size", 0.92, 0, 1 << 18, machine)
    _on_gpu(found, "drafter's memory", 2e9, "by file size", 0.92, 90 << 30, 1 << 15, machine)
    assert [finding.status.value for finding in found] == ["fails", "fails"] and not found.starts


@pytest.fixture(scope="module")
def ask() -> Iterator[Any]:
    """Findings by subject of a machine with GPUs."""
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "VLLM_USE_V2_MODEL_RUNNER")}
    host = subprocess.Popen(
        [sys.executable, str(HOST)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )

    def answer(
        gpus: int, *flags: str, target: str = TARGET, drafter: str = DRAFTER, **changes: str
    ) -> tuple[bool, dict[str, Any]]:
        case = {"gpus": gpus, "flags": flags, "target": target, "drafter": drafter, "environment": changes}
        host.stdin.write(json.dumps(case) + "\n")
        host.stdin.flush()
        found = json.loads(host.stdout.readline())
        return found["starts"], {finding["subject"]: finding for finding in found["findings"]}

    yield answer
    host.stdin.close()
    assert host.wait(30) == 0


def test_the_drafter_takes_the_first_gpu_that_the_target_leaves(ask):
    starts, found = ask(2)
    assert starts, found
    assert found["drafter's device"]["text"] == "GPU 1"
    assert found["runner"]["text"].startswith("V2: Triton" if HAS_V2 else "V1: ")
    assert "tree attention" in found["drafter's attention"]["text"]
    assert "of 80.0 GiB for KV" in found["target's memory"]["text"]
    starts, found = ask(5, "-tp", "4")
    assert starts and found["target's devices"]["text"].startswith("GPU 0, 1, 2, 3 (TP 4")
    assert found["drafter's device"]["text"] == "GPU 4"


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"head_dim": 512}, "a head size of 512"),
        ({"attention_sinks": True}, "attention sinks"),
        ({"alibi": True}, "ALiBi"),
        ({"attention_chunk_size": 64}, "chunked attention"),
    ],
)
def test_what_tree_attention_cannot_do_is_said(ask, tmp_path, changes, feature):
    starts, found = ask(2, drafter=str(altered(DRAFTER, tmp_path / "drafter", **changes)))
    assert starts, found
    said = found["drafter's attention"]
    assert said["status"] == "note" and said["text"] == f"vLLM's: the drafter's own does not support {feature}"


@needs_v2
def test_the_v2_runner_takes_min_p_among_the_target_s_defaults(ask, tmp_path):
    target = altered(TARGET, tmp_path / "target")
    (target / "generation_config.json").write_text('{"min_p": 0.05}')
    starts, found = ask(2, target=str(target))
    assert starts and found["runner"]["text"].startswith("V2") and "generation config" not in found
    _, found = ask(2, target=str(target), VLLM_USE_V2_MODEL_RUNNER="0")
    assert found["generation config"]["status"] == "note"


def test_a_machine_with_one_gpu_too_few(ask):
    starts, found = ask(4, "-tp", "4")
    assert not starts and found["drafter's device"]["status"] == "fails"
    assert "the target uses all" in found["drafter's device"]["text"]


def test_a_target_that_needs_more_gpus_than_vllm_sees(ask):
    starts, found = ask(8, "-tp", "16")
    assert not starts and "World size (16)" in found["configuration"]["text"]


def test_replicas_have_a_drafter_each(ask):
    starts, found = ask(8, "-tp", "2", "-dp", "2")
    assert starts, found
    assert [found[f"drafter's device, replica {i}"]["text"] for i in (0, 1)] == ["GPU 4", "GPU 5"]
    if HAS_V2:
        assert "data-parallel" in found["adaptive"]["text"]
    starts, found = ask(5, "-tp", "2", "-dp", "2")
    assert not starts and found["drafter's device, replica 1"]["status"] == "fails"


def test_each_drafter_of_a_fleet_is_placed(ask):
    starts, found = ask(6, "-tp", "4", "--speculative-config.num_drafters", "2")
    assert starts, found
    assert [found[f"device of drafter {i}"]["text"] for i in (0, 1)] == ["GPU 4", "GPU 5"]
    starts, found = ask(5, "-tp", "4", "--speculative-config.num_drafters", "2")
    assert not starts and "one GPU for 2 drafters" in found["device of drafter 1"]["text"]


@pytest.mark.parametrize(
    ("drafters", "says"), [("ray", "Ray places 1 when the server starts"), ("ray:chat", "the pool chat on Ray")]
)
def test_drafters_on_ray_are_left_to_it(ask, drafters, says):
    starts, found = ask(4, "-tp", "4", "--speculative-config.drafters", drafters)
    assert starts, found
    assert found["drafters"]["text"] == says
    assert "drafter's device" not in found


def test_drafters_elsewhere_are_named_and_their_credential_is_looked_at(ask, tmp_path):
    key = tmp_path / "ssd.pem"
    given = ("--speculative-config.drafters", '["10.0.0.7:7011"]', "--speculative-config.drafter_key", str(key))
    starts, found = ask(4, "-tp", "4", *given)
    assert not starts and "No such file" in found["drafters"]["text"]
    make_credential(key)
    starts, found = ask(4, "-tp", "4", *given)
    assert starts, found
    assert found["drafters"]["text"] == "not started here: 10.0.0.7:7011"


def test_a_shared_gpu_must_hold_both(ask):
    shared = ("--speculative-config.drafter_device", "cuda:0")
    starts, found = ask(1, *shared)
    assert not starts and "set kv_cache_memory" in found["drafter's device"]["text"]
    utilization = ("--gpu-memory-utilization", "0.9", "--speculative-config.gpu_memory_utilization", "0.3")
    starts, found = ask(1, *shared, *utilization)
    assert not starts and "ask for 120% of it" in found["drafter's device"]["text"]
    starts, found = ask(1, *shared, "--gpu-memory-utilization", "0.6", *utilization[2:])
    assert starts and found["drafter's device"]["status"] == "note"
    kv = ("--speculative-config.kv_cache_memory", "20GiB")
    starts, found = ask(1, *shared, *kv, "--gpu-memory-utilization", "0.9")
    assert not starts and "set --gpu-memory-utilization below 0.7" in found["shared GPU"]["fix"]
    starts, found = ask(1, *shared, *kv, "--gpu-memory-utilization", "0.7")
    assert starts and "shared GPU" not in found
    starts, found = ask(1, *shared, *kv, "--kv-cache-memory-bytes", "10G")
    assert starts and "at most 10.0 GiB of 80.0 GiB for KV" in found["target's memory"]["text"]


def test_weights_that_vllm_does_not_load_are_not_counted(tmp_path):
    from vllm_ssd.doctor.memory import weight_bytes

    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for name in (*shards.values(), "consolidated.safetensors"):
        (tmp_path / name).write_bytes(bytes(100))
    model = SimpleNamespace(model=str(tmp_path), revision=None)
    assert weight_bytes(model) == (300, "by file size")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert weight_bytes(model) == (200, "by file size")


def test_device_ids_are_the_target_s_and_leave_the_rest(ask):
    starts, found = ask(8, "-tp", "2", "--device-ids", "2,3,5")
    assert starts, found
    assert found["target's devices"]["text"].startswith("GPU 2, 3 ") and found["drafter's device"]["text"] == "GPU 5"


def test_the_runner_that_was_asked_for(ask):
    starts, found = ask(2, VLLM_USE_V2_MODEL_RUNNER="0")
    assert starts and found["runner"]["text"].startswith("V1: ")
    assert ("VLLM_USE_V2_MODEL_RUNNER=0" in found["runner"]["text"]) == HAS_V2


def test_ray_is_asked_for(ask):
    starts, found = ask(8, "-tp", "2", "--distributed-executor-backend", "ray")
    if importlib.util.find_spec("ray") is None:
        assert not starts and "Ray" in found["configuration"]["text"]
    else:
        assert "by Ray" in found["target's devices"]["text"]
