#!/usr/bin/env bash
# Starts one evaluate.py for each GPU of this node (or for each TENSOR_PARALLEL of them), each with
# its shard. Called by rounds.sh once on each node:
#
#   bash examples/qwen3_4b/shards.sh LOGS ARGUMENTS OF evaluate.py
set -euo pipefail
logs=$1
shift
node=0
[ "${NODES:-1}" = 1 ] || node=$SLURM_NODEID # set by srun; means nothing on one node
IFS=, read -r -a devices <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((GPUS - 1)))}"
here=$((GPUS / TENSOR_PARALLEL)) # shards of this node
mkdir -p "$logs"
pids=()
trap 'kill "${pids[@]}" 2> /dev/null || true' EXIT # if one fails or the job ends, all end
trap 'exit 143' TERM INT
for ((g = 0; g < here; g++)); do
  shard=$((node * here + g))
  # The first shard shows its progress, the others write logs.
  if [ $shard = 0 ]; then exec 3>&2; else exec 3>>"$logs/shard$shard.log"; fi
  CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${devices[*]:g * TENSOR_PARALLEL:TENSOR_PARALLEL}") \
    "$SAMPLER" evaluate.py "$@" --shard "$shard/$((NODES * here))" >&3 2>&3 3>&- &
  pids+=($!)
done
for ((g = 0; g < here; g++)); do
  if ! wait "${pids[g]}"; then
    shard=$((node * here + g))
    echo "error: shard $shard failed; the end of its log:" >&2
    [ $shard = 0 ] || tail -n 20 "$logs/shard$shard.log" >&2
    exit 1
  fi
done
