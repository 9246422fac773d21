#!/usr/bin/env bash
# Everything a change has to pass, for people and for CI alike. Arguments go to pytest, whose summary comes last.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/check.sh
# The models of the tests are tiny: a second thread would wait for the first more than it worked.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "${VENV:-.venv}/bin/python" -m pytest "$@"
