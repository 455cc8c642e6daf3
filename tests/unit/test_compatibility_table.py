"""The compatibility page is what the code's table says, and names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from script_modules import load_script

from vllm_ssd.compat.features import FEATURES, V2_SINCE, runners
from vllm_ssd.compat.symbols import FROM_0_32, symbols
from vllm_ssd.compat.version import SUPPORTED

ROOT = Path(__file__).parents[2]
SHOWN = [(feature.name, test) for feature in FEATURES for tests in feature.shown_by.values() for test in tests]


def test_the_page_is_as_the_code_has_it():
    script = load_script("compatibility_table")
    text = script.PAGE.read_text()
    assert text == script.page(text), "run python scripts/compatibility_table.py"
    with pytest.raises(ValueError, match="has no <!-- written by"):
        script.page("without markers")


@pytest.mark.parametrize(("feature", "shown"), SHOWN)
def test_what_shows_a_feature_exists(feature, shown):
    path, _, function = shown.partition("::")
    case = re.search(r"\[(.+)\]$", shown)
    source = (ROOT / "tests" / re.sub(r"\[.+\]$", "", path)).read_text()
    name = re.sub(r"\[.+\]$", "", function)
    functions = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
    assert not name or name in functions, feature
    assert not case or case[1] in source, feature


def test_v2_is_there_from_the_release_on_that_the_symbols_say():
    with_v2 = [minor for minor in range(SUPPORTED[0][1], SUPPORTED[1][1] + 1) if runners((0, minor))[1]]
    uses_v2 = [
        minor
        for minor in range(SUPPORTED[0][1], SUPPORTED[1][1] + 1)
        if any(s.name.startswith(FROM_0_32[-1] + "states") for s in symbols((0, minor)))
    ]
    assert with_v2 == uses_v2 and with_v2[0] == V2_SINCE[1]
    assert runners((0, SUPPORTED[1][1] + 1)) == (False, False)


def test_a_reason_is_given_where_a_runner_lacks_something():
    for feature in FEATURES:
        for column in ("v1", "v2"):
            if getattr(feature, column).startswith("no"):
                assert column in feature.why, feature.name
