#!/usr/bin/env bash
# The paper's setting on one node of 8 GPUs: 1,000 Polaris problems x 16 rollouts per round, three
# rounds. Not measured: nothing here has run on a GPU. settings.sh says which values are the
# authors'.
#
#   bash examples/qwen3_4b/setup.sh              # once
#   bash examples/qwen3_4b/run.sh                # runs/qwen3_4b/round1 ... round3, judged/
#   GPUS=4 RUN=/data/r bash examples/qwen3_4b/run.sh
#
# The same command continues an interrupted run, from the last checkpoint of the step it was in.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/qwen3_4b/settings.sh

NODES=1
RENDEZVOUS=(--standalone)
each_node() { "$@"; }
first_node() { "$@"; }

source examples/qwen3_4b/rounds.sh
