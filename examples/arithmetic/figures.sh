#!/usr/bin/env bash
# Makes what the figures of docs/figures.md are drawn from: run.sh, rounds.sh, plateau.sh, online.sh
# and the runs below, which take about a quarter of an hour on two cores.
#
#   for seed in 1 2 3; do SEED=$seed bash examples/arithmetic/figures.sh; done
#   python examples/arithmetic/figures.py --runs runs/arithmetic/seed{1,2,3} --output docs/figures
#
# Each seed also draws its own figures: runs/arithmetic/seed1/paper/figures. QUICK=1 makes all in
# small. The same command continues an interrupted run. Beyond the settings that the four scripts
# share, nothing here was tuned: coefficients and budgets are round numbers, spread wide.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
HERE=paper
source examples/arithmetic/steps.sh
BEGUN=$SECONDS OTHERS=0

if [ "$KIND" = quick ]; then
  REUSE="--epochs 2 --save-at 1 2" COLLAPSE="--epochs 1" RECOVER="--epochs 1 --save-at 0.5 1"
  SAPO="--epochs 2 --save-at 1 2" MSE="--epochs 1 --save-at 0.5 1" BUDGETED="--epochs 1"
  COEFS="0.003 0.03" BUDGETS="10" CURVE_N=2 STUDENT_N=2
else
  REUSE="--epochs 6 --save-at 0.5 1 2 3 4 6" COLLAPSE="--epochs 1"
  SAPO="--epochs 3 --save-at 0.5 1 2 3" MSE="--epochs 4 --save-at 0.5 1 2 4"
  RECOVER="--epochs 2 --save-at 0.25 0.5 1 2" BUDGETED="--epochs 2"
  COEFS="0.001 0.003 0.01 0.03" BUDGETS="0.15 0.3 0.6" CURVE_N=2 STUDENT_N=4
fi
SAPO="--loss sapo --learning-rate 3e-4 $SAPO" # as in run.sh: the objective that collapses
MSE="--loss mse $MSE"
BETA="--beta 0.3 --learning-rate 2e-4" WEAK="--beta 0.05 --learning-rate 1e-4"
COLLAPSE="--loss ce --unlearn $WEAK $COLLAPSE" # all responses down, right or wrong
RECOVER="--learning-rate 2e-4 $RECOVER"
BUDGETED="--kl-every 8 $BUDGETED"
# The ratio clips are wide, log-ratios from -2.3 to 1.1, so that the budget binds and not they.
PG="--objective pg --learning-rate 2e-4 --clip-low 0.9 --clip-high 2"

say "problems, base, its rollouts"
base_and_rollouts
export SEED RUN
others() { # others SCRIPT TABLE: runs a script unless what it ends with is there
  local begun=$SECONDS
  say "$1.sh"
  if [ -f "$RUN/$2" ]; then echo "$RUN/$2 is there"; else bash "examples/arithmetic/$1.sh"; fi
  OTHERS=$((OTHERS + SECONDS - begun))
}
others run summary.json
others rounds rounds/rounds.json
others online online/online.json

stage1() { # stage1 NAME FLAGS...
  local output=$HERE/stage1/$1
  shift
  timed "$output" "$PYTHON" stage1_extreme.py --base "$RUN/base" --rollouts "$RUN/rollouts" \
    --output "$output" --seed "$SEED" $QUICKLY "$@"
}
within() { # within BUDGET NAME FLAGS...: makes a student of the first round's signals
  local budget=$1 output=$HERE/students/$2
  shift 2
  student "$RUN/base" "$RUN/rollouts" "$RUN/signals/unlearned.safetensors" "$output" \
    $CHOICE --kl-budget "$budget" $BUDGETED "$@"
}
reuse_constraint_and_pg() {
  stage1 grpo --loss grpo --learning-rate $GRPO_RATE $REUSE
  for coef in $COEFS; do stage1 "sapo_kl$coef" $SAPO --kl-coef "$coef"; done
  for budget in $BUDGETS; do within "$budget" "pg$budget" $PG; done
}
mse_recovery_and_regression() {
  stage1 mse_soft_value $MSE $BETA --mse-target soft_value
  stage1 mse_verdict $MSE $BETA --mse-target verdict
  stage1 mse_weak $MSE $WEAK --mse-target soft_value
  stage1 collapsed $COLLAPSE
  stage1 recovered_mse --init "$HERE/stage1/collapsed" --loss mse --beta 0.3 $RECOVER
  stage1 recovered_sft --init "$HERE/stage1/collapsed" --loss sft $RECOVER
  for budget in $BUDGETS; do within "$budget" "regression$budget"; done
}
say "MSE, recovery, regression; in the background GRPO, SAPO under a KL penalty, policy gradient"
beside constraint reuse_constraint_and_pg
mse_recovery_and_regression
join

# All are judged on the same held-out problems and from the same base. The figures also follow two
# teachers of run.sh by epoch.
link "$HERE/base" ../base
link "$HERE/test.jsonl" ../test.jsonl
for teacher in ce sapo; do link "$HERE/stage1/$teacher" "../../stage1/$teacher"; done
judge_part() { # judge_part I: judges every second checkpoint and student, from the I-th
  local flags="--run $HERE --shard $1/2 --seed $SEED --base-run $RUN/eval/base"
  "$PYTHON" examples/arithmetic/judge.py --what checkpoints students \
    --n $CURVE_N $STUDENT_N $flags
}
say "evaluation on held-out problems"
beside judge1 judge_part 1
judge_part 0
join

others plateau plateau/plateau.json
judge_grpo() { # judge_grpo I: judges every second GRPO round, from the I-th
  local number=0
  for policy in "$RUN"/plateau/round*/policy; do
    number=$((number + 1))
    [ $((number % 2)) = "$1" ] || continue
    judge "$policy" "$HERE/judged/$(basename "$(dirname "$policy")")" "$RUN/test.jsonl" \
      --n $STUDENT_N --base "$RUN/base" --base-run "$RUN/eval/base"
  done
}
say "the GRPO rounds on held-out problems"
beside judge_grpo1 judge_grpo 1
judge_grpo 0
join

say "figures"
"$PYTHON" examples/arithmetic/figures.py --runs "$RUN" --output "$HERE/figures"
minutes=$(((SECONDS - BEGUN) / 60)) own=$(((SECONDS - BEGUN - OTHERS) / 60))
echo "figures.sh: $minutes minutes, $own of them its own runs"
