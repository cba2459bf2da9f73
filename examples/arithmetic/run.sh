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
  BASE="--train 48 --test 64 --steps 150"
  N=4 EVAL_N=8 CURVE="--problems 16 --n 2"
  CE="--epochs 2" SAPO="--epochs 2" UNLEARN="--epochs 1" GRPO="--epochs 1" STUDENT="--epochs 1"
else
  BASE="" N=16 EVAL_N=8 CURVE="--problems 256 --n 4"
  CE="--epochs 4 --save-at 0.5 1 2 3 4"
  SAPO="--epochs 3 --save-at 0.5 1 2 3"
  GRPO="--epochs 3 --save-at 0.5 1 2 3"
  UNLEARN="--epochs 2 --save-at 2"
  STUDENT="--epochs 3"
fi
# Stage 1. ce: the published beta, weak enough to go far past its best. sapo: a rate that ruins it.
# The unlearned policy learns inverted verdicts, gently, the pass rate of each problem taken out.
CE="--loss ce --beta 0.05 --learning-rate 1e-4 $CE"
SAPO="--loss sapo --learning-rate 3e-4 $SAPO"
GRPO="--loss grpo --learning-rate 2e-4 $GRPO"
UNLEARN="--loss ce --beta 0.5 --ce-prior --invert-rewards --learning-rate 1e-4 $UNLEARN"
# Stage 2. The noisier the teacher, the smaller the scale and the shorter the run.
STRONG="--signal-scale 1 --signal-clip 3 --signal-floor 1.5 --learning-rate 2e-4 --epochs 1"
RUINED="--signal-scale 0.2 --signal-clip 3 --learning-rate 2e-4 --epochs 1"
UNLEARNED="--signal-scale 4 --signal-clip 5 --signal-floor 0.8 --learning-rate 2e-4 $STUDENT"
SAMPLE="--max-new-tokens 128 --seed $SEED"

say() { printf '\n== %s\n' "$1"; }

stage1() { # stage1 NAME FLAGS...
  local name=$1; shift
  "$PYTHON" stage1_extreme.py --base "$RUN/base" --rollouts "$RUN/rollouts" \
    --output "$RUN/stage1/$name" --seed "$SEED" "$@"
}
student() { # student NAME TEACHER REFERENCE FLAGS...: signals and distillation
  local name=$1 teacher=$2 reference=$3; shift 3
  "$PYTHON" build_signals.py --rollouts "$RUN/rollouts" --base "$RUN/base" \
    --teachers "$teacher" --references "$reference" --output "$RUN/signals/$name.safetensors"
  "$PYTHON" stage2_distill.py --base "$RUN/base" --rollouts "$RUN/rollouts" \
    --signals "$RUN/signals/$name.safetensors" --output "$RUN/students/$name" --seed "$SEED" "$@"
}

# Two independent jobs at a time, one core each: one shows its progress, the other writes a log.
export OMP_NUM_THREADS=2
beside() { # beside LOGNAME JOB: in the background
  local log=$RUN/logs/$1.log
  export OMP_NUM_THREADS=1
  "$2" > "$log" 2>&1 &
  BESIDE=$! BESIDE_LOG=$log
}
join() { # waits for the job in the background
  export OMP_NUM_THREADS=2
  wait "$BESIDE" && return
  echo "error: a step failed; the end of $BESIDE_LOG:" >&2
  tail -n 20 "$BESIDE_LOG" >&2
  exit 1
}

say "step 0: problems, base, fixed rollouts"
"$PYTHON" examples/arithmetic/make_base.py --output "$RUN" --seed "$SEED" $BASE
"$PYTHON" evaluate.py --model "$RUN/base" --problems "$RUN/train.jsonl" \
  --output "$RUN/rollouts" --n $N $SAMPLE
if [ ! -f "$RUN/annotated" ]; then
  "$PYTHON" examples/arithmetic/annotate.py --rollouts "$RUN/rollouts"
  touch "$RUN/annotated"
fi

strong_and_unlearned() {
  stage1 ce $CE
  stage1 unlearned $UNLEARN
}
ruined_and_ordinary() {
  stage1 sapo $SAPO
  stage1 grpo $GRPO
}
say "stage 1: a strong teacher and an unlearned policy; in the background a ruined one, and GRPO"
beside stage1 ruined_and_ordinary
strong_and_unlearned
join

from_strong_and_ruined() {
  student strong "$RUN/stage1/ce" "$RUN/base" $STRONG
  student ruined "$RUN/stage1/sapo" "$RUN/base" $RUINED
}
from_unlearned() {
  student unlearned "$RUN/base" "$RUN/stage1/unlearned" $UNLEARNED
}
say "signals and stage 2: students of the strong and the ruined teacher, and of the unlearned policy"
beside stage2 from_unlearned
from_strong_and_ruined
join

judge_checkpoints() {
  "$PYTHON" examples/arithmetic/judge.py --run "$RUN" --what checkpoints --seed "$SEED" $CURVE
}
say "evaluation on held-out problems; in the background the checkpoints of stage 1"
beside curve judge_checkpoints
"$PYTHON" examples/arithmetic/judge.py --run "$RUN" --what policies --seed "$SEED" --n $EVAL_N
join

"$PYTHON" examples/report.py --run "$RUN"
