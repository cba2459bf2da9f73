#!/usr/bin/env bash
# Sets up a virtual environment (tests/setup.sh), then lints and runs all tests. Further arguments
# go to pytest: bash tests/run.sh -k losses
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest "$@"
echo "tests/test_vllm.py runs where vLLM is: bash tests/vllm.sh; tests with TRL: bash tests/trl.sh"
