"""The benchmark's command line, prompts and systems, and a whole run whose engines only pretend."""

import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_decode  # noqa: E402
import bench_prompts  # noqa: E402
import bench_systems  # noqa: E402
import numpy as np  # noqa: E402
from bench_worker import text_key  # noqa: E402

FAKE_WORKER = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
from bench_worker import Turn
from vllm_ssd.planning.engine_host import serve

class Worker:
    def start(self, system):
        if system.method == "stock" and "broken" in system.speculative_config["model"]:
            raise ValueError("the draft model is broken")
        self.step_s = {{"plain": 0.020, "stock": 0.012, "ssd": 0.010, "ceiling": 0.009}}[system.method]
        self.is_ssd = system.method == "ssd"

    def generate(self, request):
        steps = [self.step_s] * request.max_tokens
        text = [[1] * request.max_tokens for _ in request.prompts]
        counts = dict(hits=3, misses=1, late=0) if self.is_ssd else {{}}
        n = len(steps)
        return Turn(token_ids=text, num_tokens=n, row_rounds=n, seconds=sum(steps), steps_s=steps, counts=counts)

serve(Worker)
"""


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt_token_ids": [1, 2, 3]}\n\n{"prompt_token_ids": [4], "note": "kept out"}\n')
    return path


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "models" / "some-model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def parse(*arguments):
    return bench_decode.parse_arguments(["--out", "results", *map(str, arguments)])


def refuse(capsys, *arguments):
    with pytest.raises(SystemExit) as refused:
        parse(*arguments)
    assert refused.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_the_bundled_pair_is_the_default():
    args = parse()
    assert args.drafters == ["dear", "cheap"] and args.intermediate_size == 40960 and args.dtype == "bfloat16"
    assert parse("--quick").drafters == ["dear"] and parse("--drafters", "cheap").drafters == ["cheap"]


def test_arguments_that_make_no_sense_are_refused(capsys, model, prompts, tmp_path):
    own = ("--target", model, "--drafter", model, "--prompts", prompts)
    assert "go together" in refuse(capsys, "--target", model)
    assert "go together" in refuse(capsys, "--prompts", prompts)
    assert "--dear-layers is for the bundled pair" in refuse(capsys, *own, "--dear-layers", 3)
    assert "--engine is for models of your own" in refuse(capsys, "--engine", '{"dtype": "float32"}')
    assert "there is no /nowhere" in refuse(capsys, "--target", "/nowhere", *own[2:])
    assert "holds no config.json" in refuse(capsys, *own[:2], "--drafter", tmp_path, *own[4:])
    assert "not JSON" in refuse(capsys, *own, "--engine", "dtype=float32")
    assert "needs num_speculative_tokens" in refuse(capsys, "--ssd", '{"fan_out": 3}')
    assert "names no CPUs" in refuse(capsys, "--cores", "0", "x")
    assert "at least 2" in refuse(capsys, "--rounds", 1)
    assert "up to 16" in refuse(capsys, "--batch-sizes", 32)
    assert parse(*own, "--batch-sizes", 32).target == str(model)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ('{"prompt": "a"}\nhello', "line 2 is not JSON"),
        ('["a"]', "line 1 must be an object"),
        ('{"text": "a"}', "either prompt or prompt_token_ids"),
        ('{"prompt": "a", "prompt_token_ids": [1]}', "either prompt or prompt_token_ids"),
        ('{"prompt": ""}', "prompt must be a text"),
        ('{"prompt": [1]}', "prompt must be a text"),
        ('{"prompt_token_ids": "a"}', "must be a list of token ids"),
        ('{"prompt_token_ids": []}', "must be a list of token ids"),
        ('{"prompt_token_ids": [1, -1]}', "must be a list of token ids"),
        ('{"prompt_token_ids": [1, true]}', "must be a list of token ids"),
    ],
)
def test_prompt_files_that_cannot_be_used(tmp_path, text, complaint):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(bench_systems.UserError, match=complaint):
        bench_prompts.read_prompts(path)


def test_prompt_files(tmp_path, prompts):
    assert bench_prompts.read_prompts(prompts) == [[1, 2, 3], [4]]
    with pytest.raises(bench_systems.UserError, match="cannot be read"):
        bench_prompts.read_prompts(tmp_path / "none.jsonl")
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"prompt": "def f(x):"}\n{"prompt_token_ids": [7]}\n')
    target = str(bench_systems.PAIR / "target")
    text, ids = bench_prompts.encode_prompts(bench_prompts.read_prompts(texts), target, {})
    assert ids == [7] and len(text) > 1 and all(isinstance(token, int) for token in text)
    with pytest.raises(bench_systems.UserError, match="tokenizer of .* cannot be loaded"):
        bench_prompts.encode_prompts(["a"], str(tmp_path), {})


def test_prompts_are_repeated_where_there_are_too_few(capsys):
    few = bench_prompts.repeated([[1], [2]], seed=0, wanted=5)
    assert sorted(next(few) for _ in range(4)) == [[1], [1], [2], [2]]
    assert "repeated" in capsys.readouterr().out


def test_systems():
    pair = bench_systems.Pair("p", "T", "D", {"dtype": "float32"}, {"drafter_cpus": "1"})
    args = parse("--stock-k", 2, "--ssd", '{"num_speculative_tokens": 3}', "--ssd-only-hidden")
    systems = bench_decode.make_systems(pair, args, ceiling=True)
    assert [s.name for s in systems] == ["plain", "stock K=2", "SSD K=3", "SSD K=3 on_miss=skip", "ceiling"]
    assert [s.method for s in systems] == ["plain", "stock", "ssd", "ssd", "ceiling"]
    assert all(s.engine_args["model"] == "T" and s.engine_args["dtype"] == "float32" for s in systems)
    ssd, hidden = systems[2].speculative_config, systems[3].speculative_config
    assert ssd and hidden == ssd | {"on_miss": "skip"} and "on_miss" not in ssd and ssd["drafter_cpus"] == "1"
    assert systems[4].speculative_config["num_speculative_tokens"] == 3
    assert "ceiling" not in [s.name for s in bench_decode.make_systems(pair, args, ceiling=False)]
    twice = parse("--ssd", '{"num_speculative_tokens": 3, "on_miss": "skip"}', "--ssd-only-hidden", "--stock-k", 2)
    assert len(bench_decode.make_systems(pair, twice, ceiling=False)) == 3


def test_cores(capsys):
    assert bench_systems.choose_cores(None, is_cpu=True) == [(0,), (1,)]
    assert bench_systems.choose_cores([(0, 1), (2,)], is_cpu=True) == [(0, 1), (2,)]
    assert bench_systems.choose_cores(None, is_cpu=False) == [(), ()] and not capsys.readouterr().out
    assert bench_systems.choose_cores([(0,), (1,)], is_cpu=False) == [(), ()]
    assert "--cores is ignored" in capsys.readouterr().out
    assert bench_systems.drafter_cores([(0,), (2, 3)]) == {"drafter_cpus": "2,3"}
    assert bench_systems.drafter_cores([(), ()]) == {}


def test_recorded_drafts_are_found_by_the_text_they_follow():
    row = np.arange(200, dtype=np.int32)
    assert text_key(row, 150) == text_key(row.copy(), 150) != text_key(row, 151)
    other = row.copy()
    other[120] = 0
    assert text_key(other, 150) != text_key(row, 150) and text_key(other, 100) == text_key(row, 100)
    assert text_key(row, 3)[0] == row[:3].tobytes()


@pytest.mark.parametrize("is_cpu", [True, False])
def test_a_run_with_models_of_ones_own(is_cpu, tmp_path, monkeypatch, prompts, model):
    """All engines together on a CPU, with costs and a ceiling; one after the other on a GPU, without."""
    worker = tmp_path / "fake_worker.py"
    worker.write_text(FAKE_WORKER)
    monkeypatch.setattr(bench_systems, "WORKER", worker)
    monkeypatch.setattr(bench_decode, "on_cpu", lambda: is_cpu)
    arguments = ["bench_decode.py", "--out", tmp_path / "out", "--target", model, "--drafter", model]
    arguments += ["--prompts", prompts, "--batch-sizes", 1, 2, "--temperatures", 0, "--stock-k", 2, "--rounds", 3]
    arguments += ["--ssd", '{"num_speculative_tokens": 3}', "--ssd-only-hidden", "--tokens", 8]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
    bench_decode.main()
    result = json.loads((tmp_path / "out" / "bench_decode.json").read_text())
    assert [point["batch_size"] for point in result["points"]] == [1, 2]
    point = result["points"][0]
    assert point["drafter"] == "some-model / some-model" and point["num_rounds"] == 3
    assert point["systems"]["SSD K=3"]["tokens_per_second"]["median"] == pytest.approx(100)
    assert point["systems"]["SSD K=3"]["hit_rate"] == 0.75 and point["systems"]["SSD K=3"]["identical"][0] > 0
    assert point["ratios"]["SSD K=3 on_miss=skip"]["plain"]["median"] == pytest.approx(2)
    assert ("ceiling of SSD K=3" in point["systems"]) == is_cpu
    assert bool(result["costs"]) == is_cpu
    assert (tmp_path / "out" / "bench_decode.png").exists()


def test_a_pair_that_does_not_start_is_reported_without_a_traceback(tmp_path, monkeypatch, capsys, prompts, model):
    worker = tmp_path / "fake_worker.py"
    worker.write_text(FAKE_WORKER)
    broken = model.rename(model.with_name("broken"))
    monkeypatch.setattr(bench_systems, "WORKER", worker)
    monkeypatch.setattr(bench_decode, "on_cpu", lambda: False)
    arguments = ["bench_decode.py", "--out", tmp_path, "--target", broken, "--drafter", broken, "--prompts", prompts]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments), "--quick"])
    with pytest.raises(SystemExit) as ended:
        bench_systems.run_script(bench_decode.main)
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "stock K=2 failed" in printed and printed.rstrip().endswith("ValueError: the draft model is broken")


def test_a_prompt_longer_than_the_model_takes_is_named(model, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f'{{"prompt_token_ids": [1]}}\n{{"prompt_token_ids": {[1] * 100}}}\n')
    own = ("--target", model, "--drafter", model, "--prompts", prompts, "--tokens", 32)
    args = parse(*own, "--engine", '{"max_model_len": 128}')
    with pytest.raises(bench_systems.UserError, match="prompt 2 has 100 tokens, but max_model_len=128 leaves 96"):
        next(bench_decode.own_pair(args, [(0,), (1,)], is_cpu=True))
