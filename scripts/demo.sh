#!/usr/bin/env bash
# Serve the bundled pair with SSD, stream a completion, and compare it with stock vLLM in one table.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec .venv/bin/python scripts/demo.py
