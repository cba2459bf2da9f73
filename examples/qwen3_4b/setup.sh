#!/usr/bin/env bash
# Once, on a machine with network: the two environments (minutes, several GB), model and problems.
# Where the nodes have no network, set HF_HUB_OFFLINE=1 when running.
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
"$PYTHON" - "$MODEL" "$PROBLEMS" "$TEST" <<'FETCH'
import sys
from pathlib import Path

import common
import evaluate

model, *problems = sys.argv[1:]
print("setup: model in", common.model_folder(model))
for name in filter(None, problems):
    args = evaluate.Args(model=model, problems=Path(name), output=Path("unused"))
    hub = evaluate.problem_set(args)
    rows = evaluate.read_hub_set(name, hub) if hub else common.read_jsonl(Path(name))
    print(f"setup: {name}: {len(rows)} problems")
FETCH
