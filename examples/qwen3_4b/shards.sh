#!/usr/bin/env bash
# One evaluate.py for each GPU of this node, each with its shard. Called by rounds.sh once on each node:
#
#   bash examples/qwen3_4b/shards.sh LOGS ARGUMENTS OF evaluate.py
set -euo pipefail
logs=$1
shift
node=0
[ "${NODES:-1}" = 1 ] || node=$SLURM_NODEID # set by srun; of no meaning where one node was asked for
IFS=, read -r -a devices <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((GPUS - 1)))}"
mkdir -p "$logs"
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null; wait; exit 143' TERM INT
for ((g = 0; g < GPUS; g++)); do
  shard=$((node * GPUS + g))
  # The first shard shows its progress, the others write logs.
  if [ $shard = 0 ]; then exec 3>&2; else exec 3>>"$logs/shard$shard.log"; fi
  CUDA_VISIBLE_DEVICES=${devices[g]:-} \
    "$SAMPLER" evaluate.py "$@" --shard "$shard/$((NODES * GPUS))" >&3 2>&3 3>&- &
  pids+=($!)
done
for ((g = 0; g < GPUS; g++)); do
  if ! wait "${pids[g]}"; then
    shard=$((node * GPUS + g))
    echo "error: shard $shard failed; the end of its log:" >&2
    [ $shard = 0 ] || tail -n 20 "$logs/shard$shard.log" >&2
    kill -TERM "${pids[@]}" 2>/dev/null || true
    wait
    exit 1
  fi
done
