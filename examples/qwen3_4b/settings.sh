# The settings of this example: environment variables with defaults. The other scripts source it.
#
#   card   the authors' model card of Qwen3.5-9B-ERPD-003 (a larger model than this one) says so
#   ours   chosen by us, because no source that we could read says; not measured at this size
#
# What a policy is made of. A change, also of TEST, needs another RUN:
MODEL=${MODEL:-Qwen/Qwen3-4B-Thinking-2507} # base of round 1 (ours: the 4B thinking model)
PROBLEMS=${PROBLEMS:-polaris}               # card: Polaris; any --source of problem_sets.py
LIMIT=${LIMIT:-1000}                        # card: problems per round (ours: another choice each)
N=${N:-16}                                  # card: rollouts per problem
ENGINE=${ENGINE:-vllm}                      # ours; hf where there is no vLLM
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-32768}     # ours
# ours
PROMPT=${PROMPT:-'{problem} Please reason step by step, and put your final answer within \boxed{}.'}
SAMPLING=${SAMPLING:-} # further flags of evaluate.py
# card: an MSE teacher. ours: target, beta, rate, epochs (the defaults of stage 1, but for epochs).
teacher="--loss mse --mse-target soft_value --beta 0.05 --learning-rate 1e-6 --epochs 4 --save-at 4"
TEACHER=${TEACHER:-$teacher}
# card: the reference is an unlearned policy. ours: how it unlearns (CE, without pass-rate prior).
unlearned="--loss ce --beta 0.5 --ce-prior --invert-rewards --learning-rate 1e-6 --epochs 2"
UNLEARNED=${UNLEARNED:-$unlearned --save-at 2}
# ours: all of stage 2, by its defaults.
student="--objective regression --signal-scale 1 --signal-clip 2 --token-kl 0.2"
STUDENT=${STUDENT:-$student --learning-rate 1e-6 --epochs 2}
SETTINGS="MODEL PROBLEMS LIMIT N ENGINE MAX_NEW_TOKENS PROMPT SAMPLING"
SETTINGS="$SETTINGS TEACHER UNLEARNED STUDENT TEST"

# What it is judged on: HMMT Feb 25 (card), samples per problem and how many for the KL (ours).
TEST=${TEST-hmmt-feb25} # any --source of problem_sets.py; empty: nothing is judged
TEST_N=${TEST_N:-32}
KL_SAMPLES=${KL_SAMPLES:-240}

# Where and how far. Rounds: the student becomes the base of the next one (card: the third round's).
RUN=${RUN:-runs/qwen3_4b}
ROUNDS=${ROUNDS:-3}
GPUS=${GPUS:-8} # on each node
TENSOR_PARALLEL=${TENSOR_PARALLEL:-1} # GPUs that share one copy of the model when they sample
# For GPUs of 80 GB. They change memory and speed, never the objective (docs/scaling.md).
MEMORY=${MEMORY---micro-batch-tokens 32768 --activation-checkpointing}
SCORING=${SCORING---micro-batch-tokens 65536}
# Two environments, made by setup.sh, because vLLM needs other versions than the trainer.
PYTHON=${PYTHON:-.venv/bin/python}
SAMPLER=${SAMPLER:-.venv-cuda/bin/python}
[ "$ENGINE" = vllm ] || SAMPLER=$PYTHON
