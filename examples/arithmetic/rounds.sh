#!/usr/bin/env bash
# Rounds of the method: the student becomes the base, with fresh problems and fresh rollouts.
#
#   bash examples/arithmetic/rounds.sh              # runs/arithmetic/seed0/rounds/rounds.md, .json
#   ROUNDS=5 bash examples/arithmetic/rounds.sh     # goes on from three
#   SEED=1 or QUICK=1 as in run.sh
#
# Every round: sample from its base, unlearn on that, signals base minus unlearned, student. Judged on
# the same held-out problems, its KL from the very first base and from the base of its round.
# Interrupted, the same command goes on where it stopped. The student's settings were chosen on seed 0
# for one round, the lower rate of the later ones on its third.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
HERE=rounds
source examples/arithmetic/steps.sh
ROUNDS=${ROUNDS:-3}
JUDGED=$HERE/judged

one_round() { # one_round FOLDER BASE FLAGS...: FOLDER/rollouts are there
  local here=$1 base=$2
  shift 2
  unlearn "$base" "$here/rollouts" "$here/unlearned"
  signals "$base" "$here/rollouts" "$here/unlearned" "$here/signals.safetensors"
  student "$base" "$here/rollouts" "$here/signals.safetensors" "$here/student" \
    --epochs $STUDENT_EPOCHS "$@"
}

say "problems, base, its rollouts"
base_and_rollouts
mkdir -p "$HERE/round1"
[ -e "$HERE/round1/rollouts" ] || ln -s "../../rollouts" "$HERE/round1/rollouts"
table=(--judged "$JUDGED/base") steps=() later=
base=$RUN/base
for ((round = 1; round <= ROUNDS; round++)); do
  here=$HERE/round$round
  say "round $round; in the background its base is judged"
  if [ $round = 1 ]; then
    beside judge0 judge_base "$JUDGED" "$RUN/test.jsonl"
  else
    beside judge$((round - 1)) judge_policy "$base" "$JUDGED" round$((round - 1)) "$RUN/test.jsonl"
    steps+=("round$round:round$((round - 1))") later=$LATER
    problems round$round "$here/train.jsonl"
    sample "$base" "$here"
  fi
  one_round "$here" "$base" $later
  join
  table+=("$JUDGED/round$round")
  base=$here/student
done

say "the last student on held-out problems"
judge_policy "$base" "$JUDGED" round$ROUNDS "$RUN/test.jsonl"
[ ${#steps[@]} = 0 ] || table+=(--step "${steps[@]}" --pair "${steps[@]}")
"$PYTHON" examples/arithmetic/rounds.py --output "$HERE/rounds" "${table[@]}"
