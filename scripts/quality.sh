#!/usr/bin/env bash
# Check the whole tree: lint, format, types. Needs the environment of scripts/setup.sh and no network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright
