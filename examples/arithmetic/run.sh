#!/usr/bin/env bash
# Runs the whole method on the embedded default: two cores, no GPU, a quarter of an hour once
# installed.
#
#   bash examples/arithmetic/run.sh              # runs/arithmetic/seed0: summary.json, report.html
#   SEED=1 bash examples/arithmetic/run.sh     # fresh problems, another base: runs/arithmetic/seed1
#   QUICK=1 bash examples/arithmetic/run.sh      # every step in small, about two minutes
#
# The same command continues an interrupted run. Every setting below was tuned on seed 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
HERE=
source examples/arithmetic/steps.sh

if [ "$KIND" = quick ]; then
  TEMPERATURES="0.5"
  CE="--epochs 2" GENTLE="--epochs 1" SAPO="--epochs 2" RIVAL="--epochs 1"
else
  TEMPERATURES="0.9 0.8 0.7 0.6 0.5 0.4 0.3"
  CE="--epochs 3 --save-at 1 2 3" SAPO="--epochs 2 --save-at 0.5 1 2"
  GENTLE="--epochs 3 --save-at 0.5 1 2 3" RIVAL="--epochs 3 --save-at 0.5 1 2 3"
fi
# Stage 1. ce is strong and extreme: nats are no object. sapo has a rate that ruins it. The
# unlearned policy of steps.sh learns inverted verdicts, and so does unlearned_b in another order of
# the data. The rivals, to be beaten at equal KL: SFT on right responses, ordinary clipped GRPO, MSE
# and a gentle CE, each stopped early or not. The last rival is free: the base at temperatures.
# Stage 2. Every student takes the bounds of the best forecast within a KL (steps.sh: CHOICE). The
# best signal found is twice the contrast of the unlearned policies and a tenth of the strong one.
if [ "$KIND" = quick ]; then WIDER=$CHOICE STRONG=$CHOICE
else WIDER="--within-kl 1.2" STRONG="--within-kl 1.4"; fi
CE="--loss ce --beta 0.2 --learning-rate 2e-4 $CE"
SAPO="--loss sapo --learning-rate 3e-4 $SAPO"
GENTLE="--loss ce --beta 0.5 --learning-rate 2e-4 $GENTLE"
SFT="--loss sft --learning-rate 6e-4 $RIVAL"
MSE="--loss mse --beta 0.3 --learning-rate 2e-4 $RIVAL"
ORDINARY="--loss grpo --learning-rate 6e-4 $RIVAL"

stage1() { # stage1 NAME FLAGS...
  local output=$RUN/stage1/$1
  shift
  timed "$output" "$PYTHON" stage1_extreme.py --base "$RUN/base" --rollouts "$RUN/rollouts" \
    --output "$output" --seed "$SEED" $QUICKLY "$@"
}
distil() { # distil NAME TEACHER FLAGS...: the signals teacher minus base, and their student
  local signals=$RUN/signals/$1.safetensors output=$RUN/students/$1 teacher=$RUN/stage1/$2
  shift 2
  signals "$RUN/base" "$RUN/rollouts" "$RUN" "$signals" --teachers "$teacher"
  student "$RUN/base" "$RUN/rollouts" "$signals" "$output" --epochs $STUDENT_EPOCHS "$@"
}

say "step 0: problems, base"
base

strong_and_unlearned() {
  sample "$RUN/base" "$RUN" $N
  stage1 ce $CE
  stage1 ce_gentle $GENTLE
  both_unlearned
}
ruined_and_rivals() { # the base is judged first, and sampled on other problems for the forecasts
  judge_base "$RUN/eval" "$RUN/test.jsonl"
  held_out "$RUN/base" "$RUN"
  until [ -f "$RUN/annotated" ]; do # the rollouts; if the script was killed, nobody makes them
    kill -0 $$ || exit 1
    sleep 1
  done
  stage1 sapo $SAPO
  stage1 sft $SFT
  [ "$KIND" = quick ] && return
  stage1 grpo $ORDINARY
  stage1 mse $MSE
}
say "rollouts, strong and unlearned policies; in the background the base, a ruined policy, rivals"
beside stage1 ruined_and_rivals
strong_and_unlearned
join

strong_and_ruined() {
  distil strong ce $STRONG
  distil ruined sapo $CHOICE
}
say "signals and stage 2; in the background the students of the strong and the ruined teacher"
beside stage2 strong_and_ruined
first_signals
first_student
MIXED=$RUN/signals/mixed.safetensors
signals "$RUN/base" "$RUN/rollouts" "$RUN" "$MIXED" --teachers "$RUN/stage1/ce" "$RUN/base" \
  "$RUN/base" --references "$RUN/base" "$U" "${U}_b" --weights 0.1 1 1
student "$RUN/base" "$RUN/rollouts" "$MIXED" "$RUN/students/mixed" --epochs $STUDENT_EPOCHS $WIDER
join

say "evaluation on held-out problems; in the background every second policy"
"$PYTHON" examples/temper.py --model "$RUN/base" --output "$RUN/temperature" \
  --temperatures $TEMPERATURES
judge_part() { # judge_part I: every second policy, from the I-th
  "$PYTHON" examples/arithmetic/judge.py --run "$RUN" --seed "$SEED" --shard "$1/2" \
    --what policies students temperatures checkpoints --n "$EVAL_N" "$EVAL_N" $CURVE_N \
    --kl-samples $KL_SAMPLES
}
beside judge1 judge_part 1
judge_part 0
join
"$PYTHON" examples/arithmetic/spending.py --run "$RUN" --seed "$SEED"
"$PYTHON" examples/report.py --run "$RUN"
