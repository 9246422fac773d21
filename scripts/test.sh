#!/usr/bin/env bash
# Everything a change has to pass, for people and for CI alike. Arguments go to pytest, whose summary comes last.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/check.sh
exec "${VENV:-.venv}/bin/python" -m pytest "$@"
