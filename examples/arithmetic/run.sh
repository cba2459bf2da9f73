#!/usr/bin/env bash
# Runs the whole method on the embedded default: two cores, no GPU, a quarter of an hour once
# installed.
#
#   bash examples/arithmetic/run.sh              # runs/arithmetic/seed0: summary.json, report.html
#   SEED=1 bash examples/arithmetic/run.sh     # fresh problems, another base: runs/arithmetic/seed1
#   QUICK=1 bash examples/arithmetic/run.sh      # every step in small, under two minutes
#
# The same command continues an interrupted run. Every setting below was tuned on seed 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
HERE=
source examples/arithmetic/steps.sh

if [ "$KIND" = quick ]; then
  CURVE="--problems 16 --n 2"
  CE="--epochs 2" GENTLE="--epochs 1" SAPO="--epochs 2" ORDINARY="--epochs 1"
else
  CURVE="--problems 256 --n 4"
  CE="--epochs 4 --save-at 0.5 1 2 3 4"
  GENTLE="--epochs 3 --save-at 0.5 1 2 3"
  SAPO="--epochs 3 --save-at 0.5 1 2 3"
  ORDINARY="--epochs 3 --save-at 0.5 1 2 3"
fi
# Stage 1. ce has the published beta, weak enough to go far past its best. sapo has a rate that
# ruins it. The unlearned policy of steps.sh learns inverted verdicts. The rivals, to be beaten at
# equal KL, are ordinary clipped GRPO, and a CE that is bound enough to be stopped early.
CE="--loss ce --beta 0.05 --learning-rate 1e-4 $CE"
SAPO="--loss sapo --learning-rate 3e-4 $SAPO"
ORDINARY="$GRPO $ORDINARY"
GENTLE="--loss ce --beta 0.5 --learning-rate 2e-4 $GENTLE"
# Stage 2. The ruined teacher blames many tokens that are not guilty, so that floor and token-kl let
# few of them pass. The unlearned policy was never pushed far: its signal is clean and faint, and is
# scaled up (steps.sh).
STRONG="--signal-clip 3 --signal-floor 0.5 --token-kl 0.2 --learning-rate 2e-4"
RUINED="--signal-clip 3 --signal-floor 1.5 --token-kl 0.15 --learning-rate 2e-4"

stage1() { # stage1 NAME FLAGS...
  local output=$RUN/stage1/$1
  shift
  timed "$output" "$PYTHON" stage1_extreme.py --base "$RUN/base" --rollouts "$RUN/rollouts" \
    --output "$output" --seed "$SEED" "$@"
}
from_teacher() { # from_teacher NAME TEACHER FLAGS...: signals, teacher minus base, and distillation
  local signals=$RUN/signals/$1.safetensors output=$RUN/students/$1 teacher=$RUN/stage1/$2
  shift 2
  timed "$signals" "$PYTHON" build_signals.py --rollouts "$RUN/rollouts" --base "$RUN/base" \
    --teachers "$teacher" --references "$RUN/base" --output "$signals"
  student "$RUN/base" "$RUN/rollouts" "$signals" "$output" --epochs $STUDENT_EPOCHS "$@"
}

say "step 0: problems, base, fixed rollouts"
base_and_rollouts

extreme_and_gentle() {
  stage1 ce $CE
  stage1 ce_gentle $GENTLE
}
ruined_ordinary_and_unlearned() {
  stage1 sapo $SAPO
  stage1 grpo $ORDINARY
  first_signals
}
say "stage 1: a strong teacher, its gentle rival; in the background the ruined, GRPO, the unlearned"
beside stage1 ruined_ordinary_and_unlearned
extreme_and_gentle
join

from_strong_and_unlearned() {
  from_teacher strong ce $STRONG
  first_student
}
from_ruined_then_curve() {
  from_teacher ruined sapo $RUINED
  "$PYTHON" examples/arithmetic/judge.py --run "$RUN" --what checkpoints --seed "$SEED" $CURVE
}
say "signals and stage 2; in the background the ruined teacher's, then all checkpoints of stage 1"
beside stage2 from_ruined_then_curve
from_strong_and_unlearned
join

say "evaluation on held-out problems; in the background every second policy"
judge_base "$RUN/eval" "$RUN/test.jsonl"
judge_part() { # judge_part I: every second policy, from the I-th
  "$PYTHON" examples/arithmetic/judge.py --run "$RUN" --what policies --seed "$SEED" --n $EVAL_N \
    --base-run "$RUN/eval/base" --shard "$1/2"
}
beside judge1 judge_part 1
judge_part 0
join
"$PYTHON" examples/report.py --run "$RUN"
