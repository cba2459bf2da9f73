#!/usr/bin/env bash
# Runs the tests that compare our objectives with TRL's. It sets up an environment of its own
# (.venv-trl, or the folder that ERPD_TRL_VENV names), because nothing else needs TRL. Further words
# go to pytest: bash tests/trl.sh -k grpo
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ERPD_VENV=${ERPD_TRL_VENV:-.venv-trl}
mkdir -p .pytest_cache
erpd_requirements=.pytest_cache/requirements-trl.txt
cat requirements.txt tests/requirements-trl.txt >"$erpd_requirements"
source tests/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$PYTHON" -m pytest tests/test_trl.py "$@"
