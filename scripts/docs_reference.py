"""MkDocs hook: the reference from docstrings, and links from docs/ to the rest of the repository.

Each package has one page, generated from its source files without importing them.
"""

from __future__ import annotations

import ast
import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

logger = logging.getLogger("mkdocs.hooks.docs_reference")  # in strict mode its warnings are errors

OUTSIDE_LINK = re.compile(r"\]\((?:\.\./)+([^)#]+)")
ROOT = Path(__file__).parents[1]
ORDER = [
    "vllm_ssd",
    "vllm_ssd.target",
    "vllm_ssd.target.v1",
    "vllm_ssd.target.v2",
    "vllm_ssd.link",
    "vllm_ssd.drafter",
    "vllm_ssd.drafter.pages",
    "vllm_ssd.policy",
    "vllm_ssd.planning",
    "vllm_ssd.doctor",
    "vllm_ssd.monitor",
    "vllm_ssd.cli",
    "vllm_ssd.kernels",
    "vllm_ssd.compat",
]
"""Packages in the order of the navigation; others follow by name."""


def packages() -> dict[str, Path]:
    """Folder of every package by its installed name."""
    found = {"vllm_ssd.kernels": ROOT / "kernels"}
    for init in (ROOT / "vllm_ssd").rglob("__init__.py"):
        found[init.parent.relative_to(ROOT).as_posix().replace("/", ".")] = init.parent
    return dict(sorted(found.items(), key=lambda item: (_place(item[0]), item[0])))


def page(name: str, folder: Path) -> str:
    """Markdown of one package: its docstring, then every public module."""
    lines = [f"# {name}", "", ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or "", ""]
    for path in sorted(folder.glob("*.py")):
        if path.stem.startswith("__"):
            continue
        source = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        lines += [f"::: {source}", "    options:", f'      heading: "{name}.{path.stem}"', ""]
    return "\n".join(lines)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the generated pages in the navigation."""
    nav: list[Any] = config.nav or []
    for entry in nav:
        if "Reference" in entry:
            entry["Reference"] = [{name: _uri(name)} for name in packages()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for name, folder in packages().items():
        files.append(File.generated(config, _uri(name), content=page(name, folder)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links such as `../benchmarks/results/bench_decode.json` to the repository; warn where nothing is there."""

    def to_repository(match: re.Match[str]) -> str:
        if not (ROOT / match[1]).exists():
            logger.warning("%s: the repository has no %s", page.file.src_uri, match[1])
        return f"]({config.extra['repository']}/blob/main/{match[1]}"

    return markdown if page.file.generated_by else OUTSIDE_LINK.sub(to_repository, markdown)


def _place(name: str) -> int:
    return ORDER.index(name) if name in ORDER else len(ORDER)


def _uri(name: str) -> str:
    return f"reference/{name}.md"
