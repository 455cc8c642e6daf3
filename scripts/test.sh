#!/usr/bin/env bash
# Run the test suite on the newest vLLM that has a wheel for CPUs, and the tests marked `compat` on the newest and on the
# oldest supported release.
#
#   bash scripts/test.sh [--vllm RELEASE] [pytest arguments; paths among them replace the whole suite]
#
# With --vllm, everything runs on that release alone. Without arguments, scripts/quality.sh and a strict build of the
# documentation come first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

newest=0.33.0 oldest=0.29.0 only=
if [[ ${1:-} == --vllm ]]; then
  only=${2:?usage: bash scripts/test.sh [--vllm RELEASE] [pytest arguments]}
  shift 2
fi

# Two processes with one thread each fit two cores; nothing is looked up or reported over the network.
export OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1

set_up() { # RELEASE: sets `venv`, named after the minor
  venv=.venv-${1%.*}
  bash scripts/setup.sh --vllm "$1" --venv "$venv" --with test,bench
}

if [[ $only ]]; then
  set_up "$only"
else
  venv=.venv
  bash scripts/setup.sh
  if (($# == 0)); then
    bash scripts/quality.sh
    NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
  fi
fi
python=$PWD/$venv/bin/python

reports=$(mktemp -d)
trap 'rm -rf "$reports"' EXIT
status=0 selecting=$# ran=0
run() { # NAME [pytest arguments]: the first failing run decides the exit status; a run without a test is none
  local name=$1 code=0
  shift
  "$venv/bin/pytest" --durations=25 --junitxml="$reports/$name.xml" "$@" || code=$?
  if ((code == 5)); then return; fi
  ran=$((ran + 1))
  status=$((status ? status : code))
}

split() { # NAME EXPRESSION: the tests marked so; two at a time, long ones first, but for those marked `timed`
  local name=$1 marked=$2 timed before=$ran
  run "$name" -n 2 --dist loadfile --no-loadscope-reorder -m "$marked not timed" tests
  mapfile -t timed < <(grep -rl --include='test_*.py' 'mark\.timed' tests | sort) # to import all takes long
  run "$name-timed" -m "$marked timed" "${timed[@]}"
  if ((ran == before)); then
    echo "No test of $name ran." >&2
    status=$((status ? status : 5))
  fi
}
if ((selecting)); then
  [[ " $*" == *" tests"* ]] || set -- tests "$@"
  run selected "$@"
else
  split suite ""
fi

if [[ ! $only ]]; then
  for release in "$newest" "$oldest"; do
    set_up "$release"
    if ((selecting)); then
      run "compat-$release" -m compat "$@"
    else
      split "compat-$release" "compat and"
    fi
  done
fi

if ((ran == 0)); then
  echo "No test is selected." >&2
  exit 5
fi
# All runs in one line, in pytest's words.
"$python" - "$reports" <<'PY'
import sys
from pathlib import Path
from xml.etree import ElementTree

suites = [suite for path in Path(sys.argv[1]).glob("*.xml") for suite in ElementTree.parse(path).iter("testsuite")]
count = {key: sum(int(suite.get(key)) for suite in suites) for key in ("failures", "errors", "skipped", "tests")}
passed = count.pop("tests") - sum(count.values())
words = {"failed": count["failures"], "passed": passed, "skipped": count["skipped"], "errors": count["errors"]}
seconds = sum(float(suite.get("time")) for suite in suites)
if suites:
    print(f" {', '.join(f'{n} {word}' for word, n in words.items() if n)} in {seconds:.2f}s ".center(80, "="))
PY
exit $status
