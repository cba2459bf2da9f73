#!/usr/bin/env bash
# The whole method on the embedded default: two cores, no GPU, a quarter of an hour after installation.
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
RUN=${RUN:-runs/arithmetic/seed$SEED}
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
  CE="--epochs 2" GENTLE="--epochs 1" SAPO="--epochs 2" GRPO="--epochs 1" UNLEARN="--epochs 1"
  STUDENT="--epochs 1"
else
  BASE="" N=16 EVAL_N=8 CURVE="--problems 256 --n 4"
  CE="--epochs 4 --save-at 0.5 1 2 3 4"
  GENTLE="--epochs 3 --save-at 0.5 1 2 3"
  SAPO="--epochs 3 --save-at 0.5 1 2 3"
  GRPO="--epochs 3 --save-at 0.5 1 2 3"
  UNLEARN="--epochs 2 --save-at 2"
  STUDENT="--epochs 3"
fi
# Stage 1. ce: the published beta, weak enough to go far past its best. sapo: a rate that ruins it.
# The unlearned policy learns inverted verdicts, gently, the pass rate of each problem taken out.
# Rivals, to be beaten at equal KL: ordinary clipped GRPO, and a CE bound enough to be stopped early.
CE="--loss ce --beta 0.05 --learning-rate 1e-4 $CE"
SAPO="--loss sapo --learning-rate 3e-4 $SAPO"
UNLEARN="--loss ce --beta 0.5 --ce-prior --invert-rewards --learning-rate 1e-4 $UNLEARN"
GRPO="--loss grpo --learning-rate 2e-4 $GRPO"
GENTLE="--loss ce --beta 0.5 --learning-rate 2e-4 $GENTLE"
# Stage 2. The ruined teacher blames much that is not guilty: few tokens pass floor and token-kl. The
# unlearned policy, never pushed far, is clean and faint: a large scale and a wide bound.
STRONG="--signal-scale 1 --signal-clip 3 --signal-floor 0.5 --token-kl 0.2 --learning-rate 2e-4"
RUINED="--signal-scale 1 --signal-clip 3 --signal-floor 1.5 --token-kl 0.15 --learning-rate 2e-4"
UNLEARNED="--signal-scale 5 --signal-clip 5 --signal-floor 1 --token-kl 0.6 --learning-rate 3e-4"
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
  "$PYTHON" stage2_distill.py --base "$RUN/base" --rollouts "$RUN/rollouts" $STUDENT \
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

extreme_and_gentle() {
  stage1 ce $CE
  stage1 ce_gentle $GENTLE
}
ruined_ordinary_and_unlearned() {
  stage1 sapo $SAPO
  stage1 grpo $GRPO
  stage1 unlearned $UNLEARN
}
say "stage 1: a strong teacher and its gentle rival; in the background a ruined one, GRPO, an unlearned"
beside stage1 ruined_ordinary_and_unlearned
extreme_and_gentle
join

from_strong_and_unlearned() {
  student strong "$RUN/stage1/ce" "$RUN/base" $STRONG
  student unlearned "$RUN/base" "$RUN/stage1/unlearned" $UNLEARNED
}
from_ruined_then_curve() {
  student ruined "$RUN/stage1/sapo" "$RUN/base" $RUINED
  "$PYTHON" examples/arithmetic/judge.py --run "$RUN" --what checkpoints --seed "$SEED" $CURVE
}
say "signals and stage 2; in the background the ruined teacher's, then all checkpoints of stage 1"
beside stage2 from_ruined_then_curve
from_strong_and_unlearned
join

say "evaluation on held-out problems"
"$PYTHON" examples/arithmetic/judge.py --run "$RUN" --what policies --seed "$SEED" --n $EVAL_N
"$PYTHON" examples/report.py --run "$RUN"
