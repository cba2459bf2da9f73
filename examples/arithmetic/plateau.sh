#!/usr/bin/env bash
# Asks whether the method still gains where ordinary on-policy training has come to its end.
#
#   bash examples/arithmetic/plateau.sh           # runs/arithmetic/seed0/plateau/plateau.md, .json
#   SEED=1 or QUICK=1 as in run.sh
#
# 1. GRPO rounds: fresh problems, fresh rollouts, one epoch. They end when accuracy on watched
#    problems has gained no more than 0.01 in two rounds, or after MAX_ROUNDS. The watched problems
#    are neither trained nor judged on: stopping at an unlucky measurement must not make what comes
#    next look good.
# 2. From that policy, on the same fresh rollouts: the method (erpd), and as rivals one epoch of
#    GRPO (grpo1), two epochs (grpo2_same), and a second round on rollouts of its own (grpo2_fresh).
# All train on all of these rollouts: no round here samples more, or leaves problems out. The same
# command continues an interrupted run. The student's settings were chosen on seed 0 for rounds.sh;
# nothing was tuned for this script.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
HERE=plateau
source examples/arithmetic/steps.sh
if [ "$KIND" = quick ]; then MAX_ROUNDS=2; else MAX_ROUNDS=${MAX_ROUNDS:-10}; fi
WATCHED=$HERE/watched JUDGED=$HERE/judged

grpo() { # grpo POLICY FOLDER OUTPUT EPOCHS
  timed "$3" "$PYTHON" stage1_extreme.py --base "$1" --rollouts "$2/rollouts" --output "$3" \
    --epochs "$4" --seed "$SEED" $GRPO
}
fresh() { # fresh POLICY NUMBER: samples from the policy on problems of their own
  problems "round$2" "$HERE/round$2/train.jsonl"
  sample "$1" "$HERE/round$2"
}
watch() { # watch POLICY NUMBER: judges it on the watched problems
  if [ "$2" = 0 ]; then judge_base "$WATCHED" "$HERE/watched.jsonl"
  else
    judge "$1" "$WATCHED/round$2" "$HERE/watched.jsonl" --n "$EVAL_N" --base "$RUN/base" \
      --base-run "$WATCHED/base"
  fi
}

say "problems, base, its rollouts"
base_and_rollouts
problems watched "$HERE/watched.jsonl"
link "$HERE/round1/rollouts" ../../rollouts

policy=$RUN/base
watched=("$WATCHED/base")
for ((round = 1; ; round++)); do
  here=$HERE/round$round
  say "fresh rollouts of GRPO round $((round - 1)); in the background it is watched"
  beside "watch$((round - 1))" watch "$policy" $((round - 1))
  [ $round = 1 ] || fresh "$policy" $round
  join
  verdict=$("$PYTHON" examples/arithmetic/flat.py --judged "${watched[@]}")
  if [ $round -gt "$MAX_ROUNDS" ] || [ "$verdict" = flat ]; then break; fi
  say "GRPO round $round"
  grpo "$policy" "$here" "$here/policy" 1
  policy=$here/policy
  watched+=("$WATCHED/round$round")
done
"$PYTHON" examples/arithmetic/rounds.py --output "$HERE/watched" --judged "${watched[@]}"
say "after $((round - 1)) GRPO rounds: $verdict"

# From here on $here is the folder with the plateau's own rollouts.
by_the_method() {
  unlearn "$policy" "$here/rollouts" "$HERE/unlearned"
  held_out "$policy" "$HERE"
  signals "$policy" "$here/rollouts" "$HERE" "$HERE/signals.safetensors" --teachers "$policy" \
    --references "$HERE/unlearned"
  student "$policy" "$here/rollouts" "$HERE/signals.safetensors" "$HERE/erpd" \
    --epochs $STUDENT_EPOCHS $LATER $CHOICE
  judge_base "$RUN/eval" "$RUN/test.jsonl"
  judge_policy "$policy" "$JUDGED/plateau"
  [ ! -f "$HERE/erpd/config.json" ] || judge_policy "$HERE/erpd" "$JUDGED/erpd"
}
by_more_grpo() {
  grpo "$policy" "$here" "$HERE/grpo" 2
  fresh "$HERE/grpo/checkpoints/epoch-001.000" $((round + 1))
  grpo "$HERE/grpo/checkpoints/epoch-001.000" "$HERE/round$((round + 1))" "$HERE/grpo2_fresh" 1
}
say "from there: the method; in the background more GRPO"
beside grpo by_more_grpo
by_the_method
join
say "evaluation on held-out problems"
judge_policy "$HERE/grpo/checkpoints/epoch-001.000" "$JUDGED/grpo1"
judge_policy "$HERE/grpo" "$JUDGED/grpo2_same"
judge_policy "$HERE/grpo2_fresh" "$JUDGED/grpo2_fresh"
rivals="grpo1 grpo2_same grpo2_fresh" ours=erpd
[ -f "$HERE/erpd/config.json" ] || ours= # its forecast promised nothing above the plateau
ways="$ours $rivals"
"$PYTHON" examples/arithmetic/rounds.py --output "$HERE/plateau" \
  --judged "$RUN/eval/base" "$JUDGED/plateau" $(printf "$JUDGED/%s " $ways) \
  --step $(printf '%s:plateau ' $ways) --pair $(printf '%s:plateau ' $ways) \
  $([ -z "$ours" ] || printf 'erpd:%s ' $rivals)
