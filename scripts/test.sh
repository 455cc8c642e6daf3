#!/usr/bin/env bash
# Run the whole test suite on the newest supported vLLM, then the tests marked `compat` on the oldest.
#
#   bash scripts/test.sh [pytest arguments; paths among them replace the whole suite]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

suites=()
if [[ " $*" != *" tests"* ]]; then
  for suite in tests/{unit,kernels,integration,e2e}; do
    if [[ -d $suite ]]; then suites+=("$suite"); fi
  done
fi

# Two processes with one thread each fit two cores; nothing is looked up or reported over the network.
export OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1

bash scripts/setup.sh
newest=0
.venv/bin/pytest "${suites[@]}" "$@" || newest=$?

bash scripts/setup.sh --vllm 0.30.0 --venv .venv-0.30 --with test
oldest=0
.venv-0.30/bin/pytest -m compat "${suites[@]}" "$@" || oldest=$?
if (($# > 0 && oldest == 5)); then
  oldest=0 # a selection of the caller's need not hold a compat test
fi
exit $((newest ? newest : oldest))
