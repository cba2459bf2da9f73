# What run.sh, rounds.sh, plateau.sh, online.sh and figures.sh share: the run folder, the settings,
# and the steps as functions. They source this file from the repository root, after setting HERE to
# the name of their own subfolder (run.sh has none). Whichever script comes first makes what several
# of them need: the base, its rollouts, the first student, the base's evaluation.
source tests/setup.sh

SEED=${SEED:-0}
RUN=${RUN:-runs/arithmetic/seed$SEED}
RUN=${RUN#./} RUN=${RUN%/} # as Python writes it: two scripts name one policy alike
if [ "${QUICK:-0}" = 1 ]; then KIND=quick; else KIND=full; fi
# A full and a quick run have the same name. The other one is kept aside until it is asked for.
other=$(cat "$RUN/kind" 2>/dev/null || true)
if [ "${other:=$KIND}" != "$KIND" ]; then
  mv "$RUN" "$RUN.$other"
  if [ -d "$RUN.$KIND" ]; then mv "$RUN.$KIND" "$RUN"; fi
fi
HERE=$RUN${HERE:+/$HERE}
mkdir -p "$HERE/logs"
[ -s "$RUN/kind" ] || echo "$KIND" > "$RUN/kind"

if [ "$KIND" = quick ]; then
  BASE="--train 48 --test 64 --steps 150 --tried 0"
  TRAIN=48 N=4 HELD_OUT=16 HELD_OUT_N=4 EVAL_N=4 CURVE_N="2 2" BASE_N=8 STUDENT_EPOCHS=2
  KL_SAMPLES=64
  QUICKLY="--batch-size 48 --warmup-steps 0" # a few steps at least, and larger ones
  UNLEARN_RATE=1e-3 STUDENT_RATE=1e-3 LATER_RATE=1e-3 GRPO_RATE=1e-3 UNLEARN_EPOCHS=1
  CHOICE="--signal-scale 2" # so little data promises nothing
else
  BASE=""
  TRAIN=512 N=16 HELD_OUT=128 HELD_OUT_N=32 EVAL_N=8 CURVE_N="4 2" BASE_N=32 STUDENT_EPOCHS=3
  KL_SAMPLES=2048 # on which the KL of a policy is measured
  QUICKLY=""
  UNLEARN_RATE=2e-4 STUDENT_RATE=2e-4 LATER_RATE=1e-4 GRPO_RATE=2e-4 UNLEARN_EPOCHS=3
  CHOICE="--within-kl 1.1"
fi
# Base minus a policy that learnt inverted verdicts by MSE. Its scale and bounds are those that the
# forecast of build_signals.py prefers on base samples of other problems (CHOICE).
UNLEARN="--loss mse --beta 0.3 --invert-rewards --learning-rate $UNLEARN_RATE $QUICKLY"
UNLEARN="$UNLEARN --epochs $UNLEARN_EPOCHS"
STUDENT="--objective generalized_kl --learning-rate $STUDENT_RATE $QUICKLY"
LATER="--learning-rate $LATER_RATE"
GRPO="--loss grpo --learning-rate $GRPO_RATE $QUICKLY"
SAMPLE="--max-new-tokens 128 --seed $SEED"

say() { printf '\n== %s\n' "$1"; }
timed() { # timed OUTPUT COMMAND...: writes its seconds into HERE/seconds.jsonl if OUTPUT is new
  local output=$1 begun=$SECONDS new=1
  shift
  [ ! -e "$output" ] || new=0
  "$@"
  rm -rf "$output"/checkpoints/resume-* # the run is complete: nobody will continue it
  [ $new = 0 ] || [ ! -e "$output" ] || # it was there, or was refused
    printf '{"output": "%s", "seconds": %d}\n' "${output#"$RUN"/}" $((SECONDS - begun)) \
      >> "$HERE/seconds.jsonl"
}

base() { # makes RUN/base, RUN/train.jsonl, RUN/test.jsonl
  timed "$RUN/base" "$PYTHON" examples/arithmetic/make_base.py --output "$RUN" --seed "$SEED" $BASE
}
base_and_rollouts() { # and RUN/rollouts
  base
  sample "$RUN/base" "$RUN" $N
}
TAKEN=("$RUN/train.jsonl" "$RUN/test.jsonl")
problems() { # problems NAME FILE [N]: makes fresh problems, none that was used before
  [ -f "$2" ] || "$PYTHON" examples/arithmetic/problems.py --name "$1" --output "$2" \
    --n "${3:-$TRAIN}" --seed "$SEED" --without "${TAKEN[@]}"
  TAKEN+=("$2")
}
sample() { # sample MODEL FOLDER [N]: samples FOLDER/rollouts and marks the first wrong tokens
  timed "$2/rollouts" "$PYTHON" evaluate.py --model "$1" --problems "$2/train.jsonl" \
    --output "$2/rollouts" --n "${3:-$N}" $SAMPLE
  if [ ! -f "$2/annotated" ]; then
    "$PYTHON" examples/arithmetic/annotate.py --rollouts "$2/rollouts"
    touch "$2/annotated"
  fi
}
held_out() { # held_out BASE FOLDER: FOLDER/held_out/rollouts, of BASE on problems of their own
  problems "held-out-$(basename "$2")" "$2/held_out/train.jsonl" $HELD_OUT
  sample "$1" "$2/held_out" $HELD_OUT_N
}
keep_mixed() { # keep_mixed FOLDER: makes FOLDER/mixed of the problems with both verdicts
  [ -f "$1/mixed/rollouts.safetensors" ] ||
    "$PYTHON" examples/family/keep_mixed.py --rollouts "$1/rollouts" --output "$1/mixed"
}
unlearn() { # unlearn BASE ROLLOUTS OUTPUT FLAGS...
  local base=$1 rollouts=$2 output=$3
  shift 3
  timed "$output" "$PYTHON" stage1_extreme.py --base "$base" --rollouts "$rollouts" \
    --output "$output" --seed "$SEED" $UNLEARN "$@"
}
signals() { # signals BASE ROLLOUTS FOLDER OUTPUT FLAGS...: with a forecast on FOLDER/held_out
  local base=$1 rollouts=$2 held_out=$3/held_out/rollouts output=$4
  shift 4
  timed "$output" "$PYTHON" build_signals.py --rollouts "$rollouts" --base "$base" \
    --held-out-rollouts "$held_out" --output "$output" "$@"
}
unless_refused() { # unless_refused COMMAND...: goes on where it says that a signal promises nothing
  local code=0 said
  said=$(mktemp "$HERE/logs/said-XXXXXX")
  { "$@" 2>&1 >&3 | tee "$said" >&2; } 3>&1 || code=$?
  [ $code = 0 ] || grep -q "promises nothing" "$said" || exit $code
  rm "$said"
}
student() { # student BASE ROLLOUTS SIGNALS OUTPUT FLAGS...: OUTPUT, unless the signal is refused
  local base=$1 rollouts=$2 signals=$3 output=$4
  shift 4
  timed "$output" unless_refused "$PYTHON" stage2_distill.py --base "$base" \
    --rollouts "$rollouts" --signals "$signals" --output "$output" --seed "$SEED" $STUDENT "$@"
}
U=$RUN/stage1/unlearned
CONTRAST="--teachers $RUN/base $RUN/base --references $U ${U}_b --weights 0.5 0.5"
both_unlearned() { # learn inverted verdicts, in two orders of the data
  unlearn "$RUN/base" "$RUN/rollouts" "$U"
  unlearn "$RUN/base" "$RUN/rollouts" "${U}_b" --seed $((SEED + 100))
}
first_signals() { # base minus unlearned on the first rollouts: of run.sh, rounds.sh, online.sh
  both_unlearned
  held_out "$RUN/base" "$RUN"
  signals "$RUN/base" "$RUN/rollouts" "$RUN" "$RUN/signals/unlearned.safetensors" $CONTRAST
}
first_student() {
  student "$RUN/base" "$RUN/rollouts" "$RUN/signals/unlearned.safetensors" \
    "$RUN/students/unlearned" --epochs $STUDENT_EPOCHS $CHOICE
}
bounds_of() { # bounds_of STUDENT: the bounds that its run has chosen, as flags
  "$PYTHON" -c 'import json, sys
args = json.load(open(sys.argv[1]))["args"]
for name in ("signal_scale", "signal_clip", "signal_floor", "token_kl"):
    print("--" + name.replace("_", "-"), args[name])' "$1/args.json"
}
link() { # link NAME TARGET: gives a second name to what was made elsewhere
  mkdir -p "$(dirname "$1")"
  if [ -L "$1" ]; then return; fi
  if [ -e "$1" ]; then echo "error: $1: of an older version; move it away" >&2; exit 2; fi
  ln -s "$2" "$1"
}
judge() { # judge MODEL FOLDER PROBLEMS FLAGS...
  local model=$1 output=$2 problems=$3
  shift 3
  "$PYTHON" evaluate.py --model "$model" --problems "$problems" --output "$output" $SAMPLE "$@"
}
judge_base() { # judge_base FOLDER PROBLEMS: more samples, whose pass rates give the optimum
  # Its KL is 0; a part of the samples is enough for the entropy, which is measured with it.
  timed "$1/base" judge "$RUN/base" "$1/base" "$2" --n $BASE_N --base "$RUN/base" --kl-samples 512
}
judge_policy() { # judge_policy MODEL FOLDER: on held-out problems, with the KL from RUN/base
  judge "$1" "$2" "$RUN/test.jsonl" --n "$EVAL_N" --base "$RUN/base" --base-run "$RUN/eval/base" \
    --kl-samples $KL_SAMPLES
}
judge_first_student() {
  judge_base "$RUN/eval" "$RUN/test.jsonl"
  judge_policy "$RUN/students/unlearned" "$RUN/eval/student_unlearned"
}

# Two independent jobs run at a time, one core each. One shows its progress, the other writes a log.
# LANES=1: the other runs when the first has ended, for a GPU that holds one.
LANES=${LANES:-2}
ALONE=${OMP_NUM_THREADS:-2}
export OMP_NUM_THREADS=$ALONE
BESIDE=
end_beside() { # Ctrl-C and an error in front do not reach the background by themselves
  [ -z "$BESIDE" ] || kill $(pgrep -P "$BESIDE") "$BESIDE" 2> /dev/null || true
}
trap end_beside EXIT
beside() { # beside LOGNAME JOB ARGUMENTS...: starts the job in the background
  local log=$HERE/logs/$1.log
  shift
  if [ "$LANES" = 1 ]; then LATER_JOB=("$@"); return; fi
  export OMP_NUM_THREADS=1
  "$@" > "$log" 2>&1 &
  BESIDE=$! BESIDE_LOG=$log
}
join() { # waits for the job in the background
  export OMP_NUM_THREADS=$ALONE
  if [ "$LANES" = 1 ]; then "${LATER_JOB[@]}"; return; fi
  wait "$BESIDE" && BESIDE= && return
  echo "error: a step failed; the end of $BESIDE_LOG:" >&2
  tail -n 20 "$BESIDE_LOG" >&2
  exit 1
}
