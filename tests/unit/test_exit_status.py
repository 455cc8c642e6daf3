"""The exit status of `scripts/test.sh`, with a pytest that only reports what it is told to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from script_modules import SCRIPTS

# Exits with the code that the file `codes` gives for the run, which is named in --junitxml; 0 unless given.
PYTEST = """#!/usr/bin/env bash
for argument; do
  if [[ $argument == --junitxml=* ]]; then name=$(basename "${argument#*=}" .xml); fi
done
code=$(sed -n "s/^$name //p" codes)
if [[ ${code:-0} != 5 ]]; then echo "$name" >>ran; fi
exit "${code:-0}"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose environments hold that pytest, and nothing else that test.sh calls."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "test.sh").write_text((SCRIPTS / "test.sh").read_text())
    for name in ("setup.sh", "quality.sh"):
        (scripts / name).write_text("")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_it.py").write_text("pytestmark = pytest.mark.timed\n")
    for venv in (".venv", ".venv-0.33", ".venv-0.29"):
        tools = tmp_path / venv / "bin"
        tools.mkdir(parents=True)
        for name, text in (
            ("pytest", PYTEST),
            ("mkdocs", "#!/bin/sh\n"),
            ("python", f'#!/bin/sh\nexec {sys.executable} "$@"'),
        ):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
    return tmp_path


def run(checkout: Path, codes: dict[str, int], *arguments: str) -> tuple[int, list[str]]:
    """The exit status of test.sh, and the names of the runs that had tests."""
    (checkout / "codes").write_text("".join(f"{name} {code}\n" for name, code in codes.items()))
    (checkout / "ran").write_text("")
    done = subprocess.run(["bash", "scripts/test.sh", *arguments], cwd=checkout, capture_output=True, timeout=60)
    return done.returncode, (checkout / "ran").read_text().split()


RUNS = ["suite", "suite-timed", "compat-0.33.0", "compat-0.33.0-timed", "compat-0.29.0", "compat-0.29.0-timed"]


def test_all_runs_pass(checkout):
    assert run(checkout, {}) == (0, RUNS)


@pytest.mark.parametrize("failing", RUNS)
def test_one_run_fails_and_the_others_still_run(checkout, failing):
    assert run(checkout, {failing: 1}) == (1, RUNS)


def test_a_release_without_timed_tests_passes(checkout):
    without = {"compat-0.33.0-timed": 5, "compat-0.29.0-timed": 5}
    assert run(checkout, without) == (0, [name for name in RUNS if name not in without])


def test_a_release_without_any_test_fails(checkout):
    status, ran = run(checkout, {"compat-0.29.0": 5, "compat-0.29.0-timed": 5})
    assert (status, ran) == (5, RUNS[:4])


def test_the_suite_without_any_test_fails(checkout):
    assert run(checkout, {"suite": 5, "suite-timed": 5})[0] == 5


def test_the_first_failure_decides(checkout):
    assert run(checkout, {"suite-timed": 3, "compat-0.29.0": 1})[0] == 3


def test_a_selection_needs_a_test_in_one_run(checkout):
    assert run(checkout, {"compat-0.33.0": 5, "compat-0.29.0": 5}, "-k", "it") == (0, ["selected"])
    assert run(checkout, {"selected": 5, "compat-0.33.0": 5, "compat-0.29.0": 5}, "-k", "it")[0] == 5
    assert run(checkout, {"selected": 1}, "-k", "it")[0] == 1


def test_one_release_alone(checkout):
    assert run(checkout, {}, "--vllm", "0.29.0") == (0, RUNS[:2])
