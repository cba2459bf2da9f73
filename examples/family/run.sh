#!/usr/bin/env bash
# Makes every objective, signal and trust region on the same data: the variants of variants.py, one
# factor at a time around a default, all students under one KL budget. About 90 minutes for each
# seed on two cores.
#
#   SEED=1 bash examples/family/run.sh                 # runs/family/seed1, every part
#   PART=teachers SEED=1 bash examples/family/run.sh   # one part, ten minutes or so each:
#       data teachers objectives options longer references signals constructed trust stage2 curves
#       judge report
#   PART=report SEEDS="1 2 3" bash examples/family/run.sh   # all seeds: runs/family/results.md
#   QUICK=1 bash examples/family/run.sh                # every step in small
#
# After an interruption the same command continues where it stopped; what failed is tried again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tests/setup.sh

SEED=${SEED:-0} PART=${PART:-all} JOBS=${JOBS:-2}
RUNS=runs/family QUICK_FLAG=
if [ "${QUICK:-0}" = 1 ]; then RUNS=runs/family_quick QUICK_FLAG=--quick; fi
export OMP_NUM_THREADS=1

if [ "$PART" != report ]; then
  "$PYTHON" examples/family/variants.py --run "$RUNS/seed$SEED" --seed "$SEED" --part "$PART" \
    --jobs "$JOBS" $QUICK_FLAG
fi
if [ "$PART" = report ] || [ "$PART" = all ]; then
  folders=()
  for seed in ${SEEDS:-$SEED}; do folders+=("$RUNS/seed$seed"); done
  "$PYTHON" examples/family/compare.py --runs "${folders[@]}" --output "$RUNS/results.md"
fi
