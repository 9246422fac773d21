#!/usr/bin/env bash
# Lint, formatting and types, in an environment that this script makes if need be.
set -euo pipefail
cd "$(dirname "$0")/.."
"${PYTHON:-python3}" scripts/install.py dev
bin=${VENV:-.venv}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
