"""Commands, flags, keys, metrics, variables and files that the documentation and deploy/ name are there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from filled_metrics import filled_metrics
from typer.main import get_command

from vllm_ssd.cli import app
from vllm_ssd.config import SSDConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "docs" / "llms.txt"]
FILES = [*PAGES, *sorted(path for path in (ROOT / "deploy").rglob("*") if path.is_file())]
OF_VLLM = {"method", "model"}
"""Keys of speculative_config that are vLLM's."""
ON_VLLM = {"benchmarks.md", "compatibility.md", "decisions.md", "gpu.md", "limits.md"}
"""Pages that name what is in vLLM's sources, and not in ours."""
OF_THE_USER = "deploy/.env"
"""A file that is named, and that whoever uses it writes."""
OF_THE_API_SERVER = {"--api-key", "--api-server-count", "--host", "--port"}
"""Flags of `vllm serve` that are not the engine's."""


def named(path: Path) -> Any:
    return pytest.param(path, id=path.relative_to(ROOT).as_posix())


@cache
def code(path: Path) -> str:
    """A file's text with commands that go over several lines on one."""
    text = re.sub(r"\\\n\s*", " ", path.read_text())
    return re.sub(r"'\{[^']*\}'|(?<!`)`[^`]+`(?!`)", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text)


def commands(program: str, path: Path) -> Iterator[tuple[str, list[str]]]:
    """What follows a program's name in each of its commands, and their flags."""
    for found in re.findall(rf"(?<![\w/-]){program} ([^`|\n#&]*)", code(path)):
        yield found.strip(), re.findall(r"(?<![\w-])--?[a-z][\w-]*", re.sub(r"'[^']*'|\"[^\"]*\"", "", found))


@cache
def serve_flags() -> frozenset[str]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return frozenset(parser._option_string_actions) | OF_THE_API_SERVER


@cache
def own_flags() -> dict[str, set[str]]:
    """Flags by command of `vllm-ssd`, such as "pool up"."""
    found = {}
    pending: list[tuple[str, Any]] = [("", get_command(app))]
    while pending:
        name, command = pending.pop()
        found[name] = {flag for parameter in command.params for flag in parameter.opts}
        pending += [(f"{name} {key}".strip(), inner) for key, inner in getattr(command, "commands", {}).items()]
    return found


def unknown_flags(path: Path) -> list[str]:
    """Flags and commands of `vllm-ssd`, `vllm serve` and scripts that are not theirs."""
    found = []
    for rest, flags in commands("vllm-ssd", path):
        words = rest.split()
        name = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in own_flags()), None)
        if name is not None:
            known = own_flags()[name] | (serve_flags() if name == "doctor" else set())
            found += [f"{name} {flag}" for flag in flags if flag not in known]
        elif flags or re.match(r"[a-z]+( [A-Z]|$)", rest):  # else the package's name in a sentence
            found.append(f"vllm-ssd {rest}")
    for _, flags in commands("vllm serve", path):
        found += [f"serve {flag}" for flag in flags if flag not in serve_flags()]
    for script in set(re.findall(r"scripts/(\w+)\.py", code(path))):
        source = (ROOT / "scripts" / f"{script}.py").read_text() + (ROOT / "scripts" / "generated_page.py").read_text()
        for _, flags in commands(f"scripts/{script}.py", path):
            found += [f"{script}.py {flag}" for flag in flags if f'"{flag}"' not in source]
    return found


def unknown_keys(path: Path) -> list[str]:
    known = {field.name for field in fields(SSDConfig)} | OF_VLLM
    texts = re.findall(r"--(?:speculative-)?config(?:=| |\n *- )'(\{[^']*\})'", code(path))
    return [key for text in texts for key in re.findall(r'"(\w+)":', text) if key not in known]


@cache
def metric_names() -> frozenset[str]:
    return frozenset(sample.name for family in filled_metrics().collect() for sample in family.samples)


def unknown_metrics(path: Path) -> list[str]:
    return [name for name in re.findall(r"\bvllm_ssd:[a-z]\w+", path.read_text()) if name not in metric_names()]


def unknown_files(path: Path) -> list[str]:
    folders = "tests|scripts|docs|deploy|benchmarks|kernels|vllm_ssd"
    found = re.findall(rf"(?<![\w./-])(?:\.\./)*((?:{folders})/[\w./-]*\.\w+)", path.read_text())
    return [name for name in found if not (ROOT / name).exists() and name != OF_THE_USER]


def unknown_variables(path: Path) -> list[str]:
    return [name for name in re.findall(r"\bVLLM_SSD_[A-Z_]+\b", path.read_text()) if name not in sources()]


def unknown_words(path: Path) -> list[str]:
    """Keys, counters and the like of several words that no source has."""
    found = re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)(?:[:=][^`]*)?`", path.read_text())
    return [] if path.name in ON_VLLM else [name for name in found if not re.search(rf"\b{name}\b", sources())]


@cache
def sources() -> str:
    folders = ("vllm_ssd", "kernels", "scripts", "tests")
    texts = [path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py") if path != Path(__file__)]
    return "\n".join([*texts, *(path.read_text() for path in (ROOT / "scripts").glob("*.sh"))])


@pytest.mark.parametrize("path", [named(path) for path in FILES])
def test_what_is_named_is_there(path: Path):
    assert unknown_flags(path) == []
    assert unknown_keys(path) == []
    assert unknown_metrics(path) == []
    assert unknown_files(path) == []
    assert unknown_variables(path) == []
    assert unknown_words(path) == []


@pytest.mark.parametrize(
    ("text", "look", "found"),
    [
        ("`vllm-ssd doktor TARGET DRAFT`", unknown_flags, ["vllm-ssd doktor TARGET DRAFT"]),
        ("    vllm-ssd top 8000 --all", unknown_flags, ["top --all"]),
        ("    vllm-ssd pool \\\n  up chat --number 3", unknown_flags, ["pool up --number"]),
        ("`vllm-ssd doctor A B --assume-gpu\n5 -tp 4`", unknown_flags, ["doctor --assume-gpu"]),
        ("    vllm serve A --max-num-seq 4 --port 80", unknown_flags, ["serve --max-num-seq"]),
        ("    python scripts/soak.py --minute 3", unknown_flags, ["soak.py --minute"]),
        ('--speculative-config \'{"method": "ssd",\n "drafter": 1}\'', unknown_keys, ["drafter"]),
        ("`vllm_ssd:hits` and `vllm_ssd:late_total`", unknown_metrics, ["vllm_ssd:hits"]),
        ("[x](../deploy/compose.yml), `scripts/soak.py`", unknown_files, ["deploy/compose.yml"]),
        ("`kv_cache_bytes: 1`, `kv_cache_memory`", unknown_words, ["kv_cache_bytes"]),
        ("`VLLM_SSD_TRACES` and `VLLM_SSD_TRACE`", unknown_variables, ["VLLM_SSD_TRACES"]),
    ],
)
def test_what_is_not_there_is_found(text: str, look: Callable[[Path], list[str]], found: list[str], tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(text)
    assert look(page) == found
