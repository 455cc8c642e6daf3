"""The page of models has the zoo's models, and the zoo vLLM's text decoders or why not."""

from __future__ import annotations

from pathlib import Path

import model_zoo
import pytest
import vllm
from model_zoo import LEFT_OUT, ZOO
from script_modules import load_script
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS as REGISTRY

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
of_the_table = pytest.mark.skipif(
    not vllm.__version__.startswith("0.32."), reason="the table is of vLLM 0.32's registry"
)
ALIASES, *_, WITHOUT_TRANSFORMERS = LEFT_OUT.values()


def in_zoo() -> set[str]:
    return {model_zoo.architecture(entry) for entry in ZOO.values()}


def test_the_table_has_the_models_of_the_zoo() -> None:
    page, script = PAGE.read_text(), load_script("check_models")
    assert list(script.rows(page)) == list(ZOO)
    assert [cells[2] for cells in script.rows(page).values()] == [entry.attention for entry in ZOO.values()]
    assert page == script.with_results(page, {}), "run scripts/check_models.py with --table"


def test_only_the_rows_of_new_results_change() -> None:
    page, script = PAGE.read_text(), load_script("check_models")
    failed = {"target": "vLLM alone fails: E: broken", "attention": "full", "drafter": "not run", "trees": "not run"}
    before, after = script.rows(page), script.rows(script.with_results(page, {"llama": failed}))
    assert after.pop("llama") == ["llama", "–", "full", "not on this CPU (E: broken)", "not run", "not run"]
    before.pop("llama")
    assert after == before


@of_the_table
def test_every_text_decoder_of_vllm_is_in_the_zoo_or_left_out() -> None:
    left_out = [name for names in LEFT_OUT.values() for name in names]
    assert sorted(left_out) == sorted(REGISTRY.keys() - in_zoo())


@of_the_table
def test_the_reasons_hold() -> None:
    classes = {REGISTRY[name] for name in in_zoo() & REGISTRY.keys()}
    assert [name for name in ALIASES if REGISTRY[name] not in classes] == []
    assert [name for name in WITHOUT_TRANSFORMERS if REGISTRY[name] in classes] == []
    assert not {*WITHOUT_TRANSFORMERS} & {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
