#!/usr/bin/env bash
# Makes the two environments (minutes, several GB) and downloads model and problems. Run it once, on
# a machine with network. Where the nodes have no network, set HF_HUB_OFFLINE=1 when running.
#
#   bash examples/qwen3_4b/setup.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/qwen3_4b/settings.sh
(source tests/setup.sh)
if [ "$ENGINE" = vllm ]; then
  (
    ERPD_VENV=${ERPD_CUDA_VENV:-.venv-cuda} erpd_requirements=requirements-cuda.txt
    source tests/setup.sh
  )
fi
download='import sys, common; print("setup: model in", common.model_folder(sys.argv[1]))'
"$PYTHON" -c "$download" "$MODEL"
for source in "$PROBLEMS" $TEST; do # leaves the sets in the cache of the datasets library
  "$PYTHON" examples/problem_sets.py --source "$source" --output "$RUN/setup/${source##*/}.jsonl"
done
