#!/usr/bin/env bash
# Runs rounds of the method: the student becomes the base, with fresh problems and fresh rollouts.
#
#   bash examples/arithmetic/rounds.sh              # runs/arithmetic/seed0/rounds/rounds.md, .json
#   ROUNDS=5 bash examples/arithmetic/rounds.sh     # goes on from three
#   SEED=1 or QUICK=1 as in run.sh
#
# Every round samples from its base, unlearns on that, builds the signal base minus unlearned, and
# trains a student. Students are judged on the same held-out problems, with the KL from the very
# first base and from the base of their round. The first round is the unlearned student of run.sh.
# Each later round has twice the problems of the one before, 512 x 2^(k-1) in round k, and trains on
# those with both verdicts, because ever fewer responses are wrong. Where the forecast of a round
# promises nothing above its base, the rounds end. The same command continues an interrupted run. The
# student's settings were chosen on seed 0 for one round; the lower rate of later rounds and the
# doubling were chosen on its third round.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
HERE=rounds
source examples/arithmetic/steps.sh
ROUNDS=${ROUNDS:-3}
JUDGED=$HERE/judged

later_round() { # later_round FOLDER BASE: FOLDER/train.jsonl is there
  sample "$2" "$1"
  keep_mixed "$1"
  unlearn "$2" "$1/mixed" "$1/unlearned"
  held_out "$2" "$1"
  signals "$2" "$1/mixed" "$1" "$1/signals.safetensors" --teachers "$2" \
    --references "$1/unlearned"
  student "$2" "$1/mixed" "$1/signals.safetensors" "$1/student" --epochs $STUDENT_EPOCHS $LATER $CHOICE
}

say "problems, base, its rollouts"
base_and_rollouts
say "round 1: the student of run.sh"
first_signals
first_student
link "$HERE/round1/rollouts" ../../rollouts
link "$HERE/round1/unlearned" ../../stage1/unlearned
link "$HERE/round1/signals.safetensors" ../../signals/unlearned.safetensors
link "$HERE/round1/student" ../../students/unlearned
link "$JUDGED/round1" ../../eval/student_unlearned

table=(--judged "$RUN/eval/base" "$JUDGED/round1") steps=()
base=$RUN/students/unlearned
judge_last=(judge_first_student)
for ((round = 2; round <= ROUNDS; round++)); do
  here=$HERE/round$round
  say "round $round; in the background its base is judged"
  beside judge$((round - 1)) "${judge_last[@]}"
  problems round$round "$here/train.jsonl" $((TRAIN << (round - 1)))
  later_round "$here" "$base"
  join
  judge_last=(true)
  [ -f "$here/student/config.json" ] || break # refused
  steps+=("round$round:round$((round - 1))") table+=("$JUDGED/round$round")
  base=$here/student
  judge_last=(judge_policy "$base" "$JUDGED/round$round")
done

say "the last student on held-out problems"
"${judge_last[@]}"
[ ${#steps[@]} = 0 ] || table+=(--step "${steps[@]}" --pair "${steps[@]}")
"$PYTHON" examples/arithmetic/rounds.py --output "$HERE/rounds" "${table[@]}"
