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
  BASE="" N=16 EVAL_N=8 CURVE=""
  CE="--epochs 8 --save-at 0.25 0.5 0.75 1 2 3 4 6 8"
  SAPO="--epochs 6 --save-at 0.5 1 2 3 4 6"
  GRPO="--epochs 4 --save-at 0.5 1 2 3 4"
  UNLEARN="--epochs 2"
  STUDENT="--epochs 3"
fi
SAMPLE="--max-new-tokens 128 --seed $SEED"

say() { printf '\n== %s\n' "$1"; }

evaluate() { # evaluate NAME MODEL: on the held-out problems, beside the base
  "$PYTHON" evaluate.py --model "$2" --problems "$RUN/test.jsonl" --output "$RUN/eval/$1" \
    --base "$RUN/base" --base-run "$RUN/eval/base" --n $EVAL_N $SAMPLE
}
stage1() { # stage1 NAME FLAGS...
  local name=$1; shift
  "$PYTHON" stage1_extreme.py --base "$RUN/base" --rollouts "$RUN/rollouts" \
    --output "$RUN/stage1/$name" --seed "$SEED" "$@"
}
student() { # student NAME TEACHER REFERENCE FLAGS...: signals, distillation, evaluation
  local name=$1 teacher=$2 reference=$3; shift 3
  "$PYTHON" build_signals.py --rollouts "$RUN/rollouts" --base "$RUN/base" \
    --teachers "$teacher" --references "$reference" --output "$RUN/signals/$name.safetensors"
  "$PYTHON" stage2_distill.py --base "$RUN/base" --rollouts "$RUN/rollouts" \
    --signals "$RUN/signals/$name.safetensors" --output "$RUN/students/$name" --seed "$SEED" "$@"
  evaluate "student_$name" "$RUN/students/$name"
}

# Two independent jobs at a time, one core each: the first shows its progress, the second logs.
beside() { # beside LOGNAME JOB WITH ARGUMENTS: in the background
  local log=$RUN/logs/$1.log; shift
  ( OMP_NUM_THREADS=1; export OMP_NUM_THREADS; "$@" ) > "$log" 2>&1 &
  BESIDE=$! BESIDE_LOG=$log
}
join() { # waits for the job in the background
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
"$PYTHON" evaluate.py --model "$RUN/base" --problems "$RUN/test.jsonl" --output "$RUN/eval/base" \
  --base "$RUN/base" --n $((2 * EVAL_N)) $SAMPLE

teacher_and_unlearned() {
  stage1 ce --loss ce $TEACHER $CE
  stage1 unlearned --loss ce $TEACHER --invert-rewards $UNLEARN
}
ruined_and_ordinary() {
  stage1 sapo --loss sapo --learning-rate 3e-4 $SAPO
  stage1 grpo --loss grpo --learning-rate 2e-4 $GRPO
}
say "stage 1: a strong teacher (ce) and an unlearned policy; beside them a ruined one and GRPO"
beside stage1 ruined_and_ordinary
teacher_and_unlearned
join

one() {
  student strong "$RUN/stage1/ce" "$RUN/base" $STRONG $STUDENT
  student unlearned "$RUN/base" "$RUN/stage1/unlearned" $FROM_UNLEARNED $STUDENT
}
two() {
  student ruined "$RUN/stage1/sapo" "$RUN/base" $RUINED $STUDENT
  student strong_unlearned "$RUN/stage1/ce" "$RUN/stage1/unlearned" $BOTH $STUDENT
}
say "signals and stage 2: a student from each teacher, and one from the strong minus the unlearned"
beside stage2 two
one
join

judge_others() {
  evaluate grpo "$RUN/stage1/grpo"
  evaluate sapo "$RUN/stage1/sapo"
  evaluate unlearned "$RUN/stage1/unlearned"
  evaluate ce "$RUN/stage1/ce"
  evaluate ce_best "$RUN/stage1/ce/checkpoints/$CE_BEST"
}
say "evaluation: the teachers, and the checkpoints of stage 1"
beside evaluation judge_others
"$PYTHON" examples/arithmetic/curve.py --run "$RUN" --max-new-tokens 128 --seed "$SEED" $CURVE
join

"$PYTHON" examples/report.py --run "$RUN"
