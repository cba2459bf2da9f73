#!/usr/bin/env bash
# Sets up a virtual environment (tests/setup.sh), checks form and style, then runs the tests: first
# the quick ones, which stay in one process, then those that start processes of their own. With
# --quick as the first word it ends after the quick ones. Further words go to pytest:
#   bash tests/run.sh --quick -k losses
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
quick=
if [ "${1:-}" = --quick ]; then
  quick=yes
  shift
fi
source tests/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the models are tiny

tests() {
  "$PYTHON" -m pytest "$@" || [ $? = 5 ] # 5: -k has chosen none of these
}

"$PYTHON" -m ruff format --check .
"$PYTHON" -m ruff check .
tests -m "not slow" "$@"
[ -n "$quick" ] || tests -m slow "$@"
echo "tests/test_vllm.py runs where vLLM is: bash tests/vllm.sh; tests with TRL: bash tests/trl.sh"
