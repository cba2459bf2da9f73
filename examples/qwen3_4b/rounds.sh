# The rounds, step by step. Sourced by run.sh and run.slurm after settings.sh; they define
#
#   NODES, RENDEZVOUS     number of nodes, torchrun's flags to find them
#   each_node COMMAND     runs COMMAND once on every node;  first_node COMMAND: on one
#   stop_steps, go_again  what to do at SIGTERM: end the running step; afterwards
#
# A step whose last file is there is left out, so the same command goes on where it stopped.
export PYTHON SAMPLER GPUS NODES TENSOR_PARALLEL PYTHONUNBUFFERED=1

fail() {
  echo "error: $*" >&2
  exit 2
}

[ -x "$(command -v "$PYTHON")" ] && [ -x "$(command -v "$SAMPLER")" ] ||
  fail "no $PYTHON or no $SAMPLER; run examples/qwen3_4b/setup.sh first, or set PYTHON and SAMPLER"
if nvidia-smi -L > /dev/null 2>&1; then
  for python in "$PYTHON" "$SAMPLER"; do # torch would go on, on the CPU
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
      fail "$python: its torch sees none of the GPUs that nvidia-smi -L lists:" \
        "CUDA_VISIBLE_DEVICES, or a driver too old?"
  done
fi
[ "$TENSOR_PARALLEL" -ge 1 ] && [ $((GPUS % TENSOR_PARALLEL)) = 0 ] ||
  fail "TENSOR_PARALLEL=$TENSOR_PARALLEL: must divide the $GPUS GPUs of a node"
mkdir -p "$RUN"
current=$(for name in $SETTINGS; do echo "$name=${!name}"; done)
[ -f "$RUN/settings.txt" ] || echo "$current" > "$RUN/settings.txt"
diff "$RUN/settings.txt" - <<< "$current" >&2 ||
  fail "$RUN was begun with other settings (above, <); repeat them, or choose another RUN"

# In the background and waited for: the shell answers SIGTERM at once, not when the step ends. In a
# session of its own: Ctrl-C would else reach every process of the step, and end it before it saves.
CHILD=
attend() {
  setsid "$@" &
  CHILD=$!
  wait "$CHILD"
  CHILD=
}
on_term() {
  trap '' TERM INT HUP
  echo "SIGTERM: the running step saves and ends; the same command goes on from there"
  if [ -n "$CHILD" ]; then
    stop_steps
    wait "$CHILD" || true
  fi
  go_again
  exit 143
}
trap on_term TERM INT HUP

step() { # step LAST_FILE: is there anything to do?
  if [ -e "$1" ]; then echo "== $1: complete"; return 1; fi
  printf '\n== %s\n' "$1"
}
sample() { # sample OUTPUT ARGUMENTS: a shard for each GPU, then one process merges and grades
  local output=$1
  shift
  step "$output/metrics.json" || return 0
  set -- "$@" --output "$output" --engine "$ENGINE" --max-new-tokens "$MAX_NEW_TOKENS" \
    --prompt-template "$PROMPT" --tensor-parallel "$TENSOR_PARALLEL" $SAMPLING
  [ $((NODES * GPUS / TENSOR_PARALLEL)) = 1 ] ||
    each_node bash examples/qwen3_4b/shards.sh "$RUN/logs/${output#"$RUN/"}" "$@"
  first_node "$SAMPLER" evaluate.py "$@"
}
judge() { # judge MODEL NAME ARGUMENTS
  local model=$1 name=$2
  shift 2
  [ -z "$TEST" ] ||
    sample "$RUN/judged/$name" --model "$model" --problems "$TEST" --n "$TEST_N" "$@"
}
train() { # train SCRIPT OUTPUT LAST_FILE ARGUMENTS: a rank on every GPU of every node
  local script=$1 output=$2 last=$3
  shift 3
  step "$last" || return 0
  # The "--": on Python 3.11 torchrun takes --signals for a flag of its own.
  each_node "$PYTHON" -m torch.distributed.run "${RENDEZVOUS[@]}" --nnodes "$NODES" \
    --nproc-per-node "$GPUS" --shutdown-timeout "$SHUTDOWN" -- "$script" --output "$output" "$@"
}

base=$MODEL
judge "$MODEL" base
for ((round = 1; round <= ROUNDS; round++)); do
  here=$RUN/round$round
  sample "$here/rollouts" --model "$base" --problems "$PROBLEMS" --limit "$LIMIT" --n "$N" \
    --shuffle-seed "$round" --seed "$round"
  data=(--base "$base" --rollouts "$here/rollouts")
  for policy in teacher unlearned; do
    flags=$TEACHER
    [ $policy = teacher ] || flags=$UNLEARNED
    train stage1_extreme.py "$here/$policy" "$here/$policy/config.json" "${data[@]}" \
      --seed "$round" $flags $MEMORY
  done
  train build_signals.py "$here/signals.safetensors" "$here/signals.safetensors" "${data[@]}" \
    --teachers "$here/teacher" --references "$here/unlearned" $SCORING
  train stage2_distill.py "$here/student" "$here/student/config.json" "${data[@]}" \
    --signals "$here/signals.safetensors" --seed "$round" $STUDENT $MEMORY
  # KL to where everything began, not to the base of this round.
  judge "$here/student" "round$round" --base "$MODEL" --base-run "$RUN/judged/base" \
    --kl-samples "$KL_SAMPLES"
  base=$here/student
done
printf '\n%s rounds are complete; the last student: %s\n' "$ROUNDS" "$base"
