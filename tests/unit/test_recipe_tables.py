"""The tables of docs/recipes/ and docs/pool.md are what planner and simulator say today."""

from __future__ import annotations

import pytest
from script_modules import load_script

script = load_script("recipe_tables")


@pytest.mark.parametrize("name", script.PAGES)
def test_the_pages_are_as_planner_and_simulator_have_them(name: str):
    text = (script.DOCS / name).read_text()
    assert text == script.page(name, text), "run python scripts/recipe_tables.py"


def test_a_table_follows_the_command_of_its_page():
    name = "recipes/8b-two-gpus.md"
    text = (script.DOCS / name).read_text().replace("--device H100 --batch-size 1", "--device B200 --batch-size 2")
    filled = script.page(name, text)
    assert "| 2 | " in filled and "| 1 | 141 |" in text and "| 1 | 141 |" not in filled
    with pytest.raises(ValueError, match="has no <!-- methods"):
        script.page(name, text.replace("<!-- methods", "<!-- rates"))
    with pytest.raises(ValueError, match="H900"):
        script.page(name, text.replace("--device B200", "--device H900"))
    with pytest.raises(ValueError, match="not enough values"):
        script.page(name, text.replace("`vllm-ssd plan", "`vllm-ssd plans"))


def test_every_recipe_has_a_table():
    recipes = {path.relative_to(script.DOCS).as_posix() for path in (script.DOCS / "recipes").glob("*.md")}
    assert {name for name in script.PAGES if name.startswith("recipes/")} == recipes - {"recipes/index.md"}


def test_stock_speculation_drafts_on_each_replica_s_own_devices():
    profile = script.guess_8b()
    own, four = (
        next(script.rates(profile, ["--requests=1", "--tokens=32", f"--replicas={n}"], 32, [0])) for n in (1, 4)
    )
    assert own == four
