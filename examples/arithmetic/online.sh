#!/usr/bin/env bash
# Compares stage 2 offline, online and alternating: on fixed rollouts of the base, on fresh rollouts
# of the student every epoch, or on the one after the other.
#
#   bash examples/arithmetic/online.sh            # runs/arithmetic/seed0/online/online.md, .json
#   SEED=1 or QUICK=1 as in run.sh
#
# All start with one epoch on the base's rollouts. After every epoch online samples from the student
# (the same problems), scores that with the same teacher and reference, and goes on from the student
# (--init). Targets, ratios and KL stay against the base. Offline stays on what it has: it is the
# unlearned student of run.sh, and online takes as many epochs. Alternating goes back to the base's
# rollouts for the last epoch: fixed, fresh, fixed. The same command continues an interrupted run.
# The student's settings were chosen on seed 0 for one round; nothing was tuned for this script.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
HERE=online
source examples/arithmetic/steps.sh
TURNS=$STUDENT_EPOCHS
JUDGED=$HERE/judged

offline() {
  first_student
  judge_first_student
}
online() {
  local turn here policy=$HERE/turn1/student
  student "$RUN/base" "$RUN/rollouts" "$RUN/signals/unlearned.safetensors" "$policy" --epochs 1 \
    $CHOICE
  for ((turn = 2; turn <= TURNS; turn++)); do
    here=$HERE/turn$turn
    mkdir -p "$here"
    cp "$RUN/train.jsonl" "$here/train.jsonl"
    sample "$policy" "$here"
    "$PYTHON" build_signals.py --rollouts "$here/rollouts" --base "$RUN/base" --behavior "$policy" \
      --output "$here/signals.safetensors" $CONTRAST
    student "$RUN/base" "$here/rollouts" "$here/signals.safetensors" "$here/student" --epochs 1 \
      --init "$policy" $(bounds_of "$HERE/turn1/student")
    policy=$here/student
  done
  student "$RUN/base" "$RUN/rollouts" "$RUN/signals/unlearned.safetensors" "$HERE/alternating" \
    --epochs 1 $CHOICE --init "$HERE/turn$((TURNS - 1))/student"
}

say "problems, base, its rollouts"
base_and_rollouts
say "the unlearned policy, and base minus it"
first_signals
say "stage 2 online and alternating; in the background offline"
beside offline offline
online
join
say "evaluation on held-out problems"
link "$HERE/offline" ../students/unlearned
link "$JUDGED/offline" ../../eval/student_unlearned
table=("$RUN/eval/base" "$JUDGED/offline")
for ((turn = 1; turn <= TURNS; turn++)); do
  judge_policy "$HERE/turn$turn/student" "$JUDGED/turn$turn"
  table+=("$JUDGED/turn$turn")
done
judge_policy "$HERE/alternating" "$JUDGED/alternating"
table+=("$JUDGED/alternating")
"$PYTHON" examples/arithmetic/rounds.py --output "$HERE/online" --judged "${table[@]}" \
  --pair turn$TURNS:offline turn$TURNS:turn1 alternating:offline turn$TURNS:alternating
