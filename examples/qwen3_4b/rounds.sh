# The rounds, step by step. Sourced by run.sh and run.slurm after settings.sh; they define
#
#   NODES, RENDEZVOUS     the number of nodes, and torchrun's flags with which they find each other
#   each_node COMMAND     runs COMMAND once on every node;  first_node COMMAND: on one
#
# A step whose last file is there is left out, so the same command continues an interrupted run.
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
      fail "$python: its torch sees none of the GPUs that nvidia-smi -L lists;" \
        "check CUDA_VISIBLE_DEVICES and the driver's version"
  done
fi
[ "$TENSOR_PARALLEL" -ge 1 ] && [ $((GPUS % TENSOR_PARALLEL)) = 0 ] ||
  fail "TENSOR_PARALLEL=$TENSOR_PARALLEL: must divide the $GPUS GPUs of a node"
mkdir -p "$RUN"
current=$(for name in $SETTINGS; do echo "$name=${!name}"; done)
[ -f "$RUN/settings.txt" ] || echo "$current" > "$RUN/settings.txt"
diff "$RUN/settings.txt" - <<< "$current" >&2 ||
  fail "$RUN was begun with other settings (above, <); repeat them, or choose another RUN"

step() { # step LAST_FILE: is there anything to do?
  if [ -e "$1" ]; then echo "== $1: complete"; return 1; fi
  printf '\n== %s\n' "$1"
}
problems() { # problems SOURCE FILE FLAGS...
  local source=$1 output=$2
  shift 2
  step "$output" || return 0
  first_node "$PYTHON" examples/problem_sets.py --source "$source" --output "$output" "$@"
}
sample() { # sample OUTPUT ARGUMENTS...: each GPU samples a shard, one process merges and grades
  local output=$1
  shift
  step "$output/metrics.json" || return 0
  set -- "$@" --output "$output" --engine "$ENGINE" --max-new-tokens "$MAX_NEW_TOKENS" \
    --prompt-template "$PROMPT" --tensor-parallel "$TENSOR_PARALLEL" $SAMPLING
  [ $((NODES * GPUS / TENSOR_PARALLEL)) = 1 ] ||
    each_node bash examples/qwen3_4b/shards.sh "$RUN/logs/${output#"$RUN/"}" "$@"
  first_node "$SAMPLER" evaluate.py "$@"
}
judge() { # judge MODEL NAME ARGUMENTS...
  local model=$1 name=$2
  shift 2
  [ -n "$TEST" ] || return 0
  sample "$RUN/judged/$name" --model "$model" --problems "$RUN/test.jsonl" --n "$TEST_N" "$@"
}
train() { # train SCRIPT OUTPUT LAST_FILE ARGUMENTS...: with a rank on every GPU of every node
  local script=$1 output=$2 last=$3
  shift 3
  step "$last" || return 0
  # The "--": on Python 3.11 torchrun takes --signals for a flag of its own.
  each_node "$PYTHON" -m torch.distributed.run "${RENDEZVOUS[@]}" --nnodes "$NODES" \
    --nproc-per-node "$GPUS" -- "$script" --output "$output" "$@"
}

base=$MODEL
[ -z "$TEST" ] || problems "$TEST" "$RUN/test.jsonl"
judge "$MODEL" base
for ((round = 1; round <= ROUNDS; round++)); do
  here=$RUN/round$round
  problems "$PROBLEMS" "$here/train.jsonl" --limit "$LIMIT" --shuffle-seed "$round"
  sample "$here/rollouts" --model "$base" --problems "$here/train.jsonl" --n "$N" --seed "$round"
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
  # The KL from where everything began, not from the base of this round.
  judge "$here/student" "round$round" --base "$MODEL" --base-run "$RUN/judged/base" \
    --kl-samples "$KL_SAMPLES"
  base=$here/student
done
printf '\n%s rounds are complete; the last student: %s\n' "$ROUNDS" "$base"
