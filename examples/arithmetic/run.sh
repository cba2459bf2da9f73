#!/usr/bin/env bash
# The whole method on the embedded default: two cores, no GPU, about ten minutes after installation.
#
#   bash examples/arithmetic/run.sh              # runs/arithmetic/seed0: summary.json, report.html
#   SEED=1 bash examples/arithmetic/run.sh       # fresh problems, another base: runs/arithmetic/seed1
#   QUICK=1 bash examples/arithmetic/run.sh      # every step in small, under two minutes
#
# Interrupted, the same command goes on where it stopped. Every setting below was tuned on seed 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tests/setup.sh

SEED=${SEED:-0}
RUN=runs/arithmetic/seed$SEED
if [ "${QUICK:-0}" = 1 ]; then KIND=quick; else KIND=full; fi
# A full and a quick run share the name; the other one is kept aside and comes back when asked for.
other=$(cat "$RUN/kind" 2>/dev/null || echo "$KIND")
if [ "$other" != "$KIND" ]; then
  mv "$RUN" "$RUN.$other"
  if [ -d "$RUN.$KIND" ]; then mv "$RUN.$KIND" "$RUN"; fi
fi
mkdir -p "$RUN/logs"
echo "$KIND" > "$RUN/kind"

if [ "$KIND" = quick ]; then
  BASE="--train 64 --test 64 --steps 200"; N=8; EVAL_N=4; CURVE="--problems 16 --n 2"
  CE="--epochs 2"; SAPO="--epochs 2"; UNLEARN="--epochs 1"; GRPO="--epochs 1"; STUDENT="--epochs 1"
else
  BASE=""; N=16; EVAL_N=8; CURVE=""
  CE="--epochs 8"; SAPO="--epochs 8"; UNLEARN="--epochs 3"; GRPO="--epochs 3"; STUDENT="--epochs 3"
fi

say() { printf '\n== %s\n' "$1"; }
py() { "$PYTHON" "$@"; }

# Two independent commands at once, one core each: the first shows its progress, the second logs.
both() { # both NAME "command one" "command two"
  local log=$RUN/logs/$1.log
  OMP_NUM_THREADS=1 $3 > "$log" 2>&1 &
  local second=$! status=0
  OMP_NUM_THREADS=1 $2 || status=$?
  wait "$second" || { tail -n 20 "$log" >&2; exit 1; }
  return $status
}
...
