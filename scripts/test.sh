#!/usr/bin/env bash
# Run the test suite on the newest supported vLLM, then the tests marked `compat` on the oldest.
#
#   bash scripts/test.sh [pytest arguments; paths among them replace the whole suite]
#
# Without arguments, scripts/quality.sh and a strict build of the documentation come first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Two processes with one thread each fit two cores; nothing is looked up or reported over the network.
export OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1

bash scripts/setup.sh
if (($# == 0)); then
  bash scripts/quality.sh
  NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
fi

reports=$(mktemp -d)
trap 'rm -rf "$reports"' EXIT
status=0 ran=
run() { # NAME VENV [pytest arguments]: the first failing run decides the exit status
  local name=$1 venv=$2 code=0
  shift 2
  "$venv/bin/pytest" --durations=25 --junitxml="$reports/$name.xml" "$@" || code=$?
  if ((code != 5)); then ran=1; elif ((selecting)); then code=0; fi # a selection need not hold a test of every run
  status=$((status ? status : code))
}

selecting=$#
if [[ " $*" != *" tests"* ]]; then
  # Unit and kernel tests share nothing; an engine and its drafter take both cores.
  run parallel .venv -n 2 --dist loadfile tests/unit tests/kernels "$@"
  run engines .venv tests/integration tests/e2e "$@"
  set -- tests "$@"
else
  run selected .venv "$@"
fi

bash scripts/setup.sh --vllm 0.30.0 --venv .venv-0.30 --with test
run oldest .venv-0.30 -m compat "$@"

if [[ ! $ran ]]; then exit 5; fi
# All runs in one line, in pytest's words.
.venv/bin/python - "$reports" <<'EOF'
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
EOF
exit $status
