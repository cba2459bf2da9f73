"""examples/qwen3_4b: every script, with a tiny model: one node and two, ended and continued."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import make_base
import pytest
import tiny
import torch
import warm
from scripts import finish

import common

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "qwen3_4b"
PROBLEMS, N = 4, 4

# No GPU. And what Slurm does for the script, no more: the command once for each node (of the same
# machine), signals to the steps, host names. Like srun itself, it answers SIGTERM with a SIGKILL.
STAND_INS = {
    "nvidia-smi": "exit 1\n",  # else rounds.sh asks torch for GPUs that are hidden from it
    "srun": """
while [[ $1 == --* ]]; do
  case $1 in --nodes=*) nodes=${1#*=} ;; esac
  shift
done
: > "$SLURM_STAND_IN/steps"
for ((node = 0; node < nodes; node++)); do
  SLURM_NODEID=$node SLURM_PROCID=$node SLURM_NNODES=$nodes "$@" &
  echo $! >> "$SLURM_STAND_IN/steps"
done
trap 'kill -KILL $(cat "$SLURM_STAND_IN/steps")' TERM
code=0
for pid in $(cat "$SLURM_STAND_IN/steps"); do wait "$pid" || code=$?; done
exit $code
""",
    "scancel": """
[ "$1 $2" = "--signal=TERM $SLURM_JOB_ID" ] && kill -TERM $(cat "$SLURM_STAND_IN/steps")
""",
    "scontrol": """
case "$1 $2" in
  "show hostnames") [ "$3" = "$SLURM_JOB_NODELIST" ] && printf 'localhost\\nlocalhost\\n' ;;
  "requeue $SLURM_JOB_ID") echo requeued >> "$SLURM_STAND_IN/requeued" ;;
  *) exit 1 ;;
esac
""",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with model/, problems.jsonl, bin/ (the stand-ins) and a warm python."""
    folder = tmp_path_factory.mktemp("qwen3_4b")
    tokenizer = make_base.make_tokenizer()
    torch.manual_seed(0)
    lm = make_base.make_model(
        make_base.Args(output=folder, hidden_size=32, layers=2), tokenizer
    )  # fmt: skip
    rows = [{"id": f"p{i}", "problem": f"{i}+{i}", "answer": "1"} for i in range(PROBLEMS)]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["problem"]}], tokenize=False,
            add_generation_prompt=True,
        )
        for row in rows
    ]  # fmt: skip
    tiny.teach(lm, tokenizer, prompts, ["\\boxed{1}", "\\boxed{2}"])
    lm.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    common.write_jsonl(folder / "problems.jsonl", rows)
    (folder / "bin").mkdir()
    for name, body in STAND_INS.items():
        (folder / "bin" / name).write_text("#!/usr/bin/env bash\n" + body)
        (folder / "bin" / name).chmod(0o755)
    with warm.warm_python(folder):
        yield folder


def environment(folder: Path, **changes: str) -> dict[str, str]:
    """The settings in small, for the run in folder/run."""
    step = "--learning-rate 1e-3 --warmup-steps 2 --batch-size 8"
    python = str(folder / "python")
    return os.environ | warm.CPU | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHON": python, "PYTHON_EXEC": python,
        "MODEL": str(folder / "model"), "PROBLEMS": str(folder / "problems.jsonl"), "LIMIT": "4",
        "N": str(N), "ENGINE": "hf", "MAX_NEW_TOKENS": "12", "PROMPT": "{problem}",
        "SAMPLING": "--batch-size 4", "TEST": "", "RUN": str(folder / "run"),
        "TEACHER": f"--loss mse --epochs 20 --save-at 20 {step}",
        "UNLEARNED": "--loss ce --beta 0.5 --ce-prior --invert-rewards --epochs 8 --save-at 8 "
        + step,
        "STUDENT": f"--kl-holdout 0.25 --epochs 4 {step}",
        "MEMORY": "--micro-batch-tokens 64 --activation-checkpointing --defer-gradient-sync",
        "SCORING": "--micro-batch-tokens 64", "SHUTDOWN": "20",
    } | changes  # fmt: skip


def slurm(folder: Path, nodes: int) -> dict[str, str]:
    """What Slurm sets in a batch script; the names of this machine are not to be looked up."""
    return {
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": str(nodes), "SLURM_CPUS_PER_TASK": "1",
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_STAND_IN": str(folder), "PET_LOCAL_ADDR": "localhost", "GLOO_SOCKET_IFNAME": "lo",
        "ROUNDS": "1", "GPUS": "1",
    }  # fmt: skip


def heed_ctrl_c() -> None:
    """A shell that puts the tests into the background has them, and their children, ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(script: Path, environment_: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", script], env=environment_, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True, preexec_fn=heed_ctrl_c,
    )  # fmt: skip


def steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(True) if path.is_file() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


@pytest.fixture(scope="module")
def first_round(place: Path) -> Path:
    """Round 1 on two nodes under the stand-in for Slurm, told to end in the middle of stage 1, put
    back into the queue and started again."""
    # Slurm runs a copy of the script from a folder of its own.
    script = shutil.copy(EXAMPLE / "run.slurm", place / "slurm_script")
    settings, run = environment(place, **slurm(place, 2)), place / "run"
    process = start(script, settings)
    while process.poll() is None and len(steps(run / "round1" / "teacher")) < 4:
        time.sleep(0.01)
    process.terminate()  # the shell alone, as by --signal=B:TERM
    printed = finish(process, 143)
    assert "saves and ends" in printed
    assert (place / "requeued").read_text() == "requeued\n"
    assert not (run / "round1" / "teacher" / "config.json").exists()
    # The trainer saved at SIGTERM, so no step will be taken twice.
    taken = steps(run / "round1" / "teacher")
    saved = common.read_json(run / "round1" / "teacher" / "checkpoints" / "last.json")
    assert saved == {"folder": f"resume-{taken[-1]:07d}"} and 4 <= taken[-1] < 40
    printed = finish(start(script, settings))
    assert f"{run / 'round1' / 'rollouts' / 'metrics.json'}: complete" in printed
    return run


def test_first_round(place: Path, first_round: Path) -> None:
    here, model = first_round / "round1", common.fingerprint(place / "model")
    rollouts = common.load_rollouts(here / "rollouts")
    assert len(rollouts.rewards) == PROBLEMS * N and 0.2 < rollouts.rewards.mean() < 0.8
    assert rollouts.metadata["model_fingerprint"] == model
    assert "shard 1/2 is sampled" in (first_round / "logs/round1/rollouts/shard1.log").read_text()

    assert steps(here / "teacher") == list(range(1, 41))
    assert steps(here / "unlearned") == list(range(1, 17))
    inputs = {name: common.read_json(here / name / "args.json") for name in
              ("teacher", "unlearned", "student")}  # fmt: skip
    assert all(record["inputs"]["base"] == model for record in inputs.values())
    assert all(record["world_size"] == 2 for record in inputs.values())
    last = common.read_jsonl(here / "teacher" / "metrics.jsonl")[-1]
    assert last["log_ratio_correct"] > last["log_ratio_wrong"] + 0.1
    last = common.read_jsonl(here / "unlearned" / "metrics.jsonl")[-1]
    assert last["log_ratio_correct"] < last["log_ratio_wrong"] - 0.1
    made_with = common.load_tensors(here / "signals.safetensors", {})[1]["models"]
    for role, name in [("teacher_0", "teacher"), ("reference_0", "unlearned")]:
        assert made_with[role]["fingerprint"] == common.fingerprint(here / name)


def test_second_round_on_one_node(place: Path, first_round: Path) -> None:
    judged = {"TEST": str(place / "problems.jsonl"), "TEST_N": "2", "KL_SAMPLES": "4"}
    settings = environment(place, GPUS="1", ROUNDS="2", **judged)
    printed = finish(start(EXAMPLE / "run.sh", settings))
    assert f"{first_round / 'round1' / 'student' / 'config.json'}: complete" in printed
    student = common.fingerprint(first_round / "round1" / "student")
    assert student != common.fingerprint(place / "model")
    # The student is the base now: it drew the rollouts, and everything starts from it.
    rollouts = common.load_rollouts(first_round / "round2" / "rollouts")
    assert rollouts.metadata["model_fingerprint"] == student
    for name in ("teacher", "unlearned", "student"):
        record = common.read_json(first_round / "round2" / name / "args.json")
        assert record["inputs"]["base"] == student and record["world_size"] == 1
    # The KL is that to the very first model.
    record = common.read_json(first_round / "judged" / "round2" / "args.json")
    assert record["inputs"]["base"] == common.fingerprint(place / "model")
    metrics = common.read_json(first_round / "judged" / "round2" / "metrics.json")["metrics"]
    assert metrics["kl"][0] > 0 and metrics["base_accuracy"][0] > 0

    # Again: nothing is started. With other settings: refused by name.
    settings["PYTHON_EXEC"] = "/nonexistent"
    before = {p: p.stat().st_mtime_ns for p in first_round.rglob("*")}
    printed = finish(start(EXAMPLE / "run.sh", settings))
    assert printed.count("complete") == 14
    assert {p: p.stat().st_mtime_ns for p in first_round.rglob("*")} == before
    printed = finish(start(EXAMPLE / "run.sh", settings | {"N": "5"}), 2)
    assert "N=4" in printed and "other settings" in printed


def test_ctrl_c_saves(place: Path, tmp_path: Path, first_round: Path) -> None:
    """It reaches every process of the terminal; torchrun and its ranks must hear of it once."""
    run = tmp_path / "run"
    shutil.copytree(first_round / "round1" / "rollouts", run / "round1" / "rollouts")
    # Not the warm python, whose processes are elsewhere.
    real = {"PYTHON": sys.executable, "PYTHON_EXEC": sys.executable}
    settings = environment(place, RUN=str(run), GPUS="2", ROUNDS="1", **real)
    process = start(EXAMPLE / "run.sh", settings)
    while process.poll() is None and len(steps(run / "round1" / "teacher")) < 4:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    assert "SIGTERM: saved step" in finish(process, 143)
    last = common.read_json(run / "round1" / "teacher" / "checkpoints" / "last.json")
    assert last == {"folder": f"resume-{steps(run / 'round1' / 'teacher')[-1]:07d}"}


def test_lost_shard_ends_the_run(place: Path, tmp_path: Path) -> None:
    # Shard 1's folder cannot be written: a file stands where its log is to be.
    run = tmp_path / "run"
    (run / "logs" / "round1" / "rollouts" / "shard1.log").mkdir(parents=True)
    settings = environment(place, GPUS="2", RUN=str(run))
    printed = finish(start(EXAMPLE / "run.sh", settings), 1)
    assert "shard1.log" in printed
    assert not (run / "round1" / "rollouts" / "rollouts.safetensors").exists()


def test_shards_of_several_gpus(tmp_path: Path) -> None:
    """TENSOR_PARALLEL: each shard has GPUs of its own, and all shards together are the run."""
    sampler = tmp_path / "python"
    sampler.write_text(f'#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES $@" >> "{tmp_path}/called"\n')
    sampler.chmod(0o755)
    for node in ("0", "1"):
        settings = {"SAMPLER": str(sampler), "GPUS": "4", "NODES": "2", "TENSOR_PARALLEL": "2",
                    "SLURM_NODEID": node, "CUDA_VISIBLE_DEVICES": "4,5,6,7"}  # fmt: skip
        subprocess.run(
            ["bash", EXAMPLE / "shards.sh", tmp_path / "logs", "--n", "4"],
            env=os.environ | settings, check=True,
        )  # fmt: skip
    calls = sorted((tmp_path / "called").read_text().splitlines(), key=lambda line: line[-3:])
    assert calls == [
        f"{gpus} evaluate.py --n 4 --shard {shard}/4"
        for shard, gpus in enumerate(["4,5", "6,7"] * 2)
    ]


def test_gpus_that_torch_does_not_see(tmp_path: Path) -> None:
    """As with a driver too old: refused, not trained on the CPU."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "",
                "PYTHON": sys.executable, "ENGINE": "hf", "RUN": str(tmp_path / "run")}  # fmt: skip
    printed = finish(start(EXAMPLE / "run.sh", os.environ | settings), 2)
    assert "sees none of the GPUs" in printed and not (tmp_path / "run").exists()


def test_setup(place: Path, tmp_path: Path) -> None:
    """Where both environments are up to date it installs nothing and looks the inputs up."""
    environments = {"ERPD_VENV": "requirements.txt", "ERPD_CUDA_VENV": "requirements-cuda.txt"}
    for name, requirements in environments.items():
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "python").symlink_to(place / "python")
        stamp = tmp_path / name / "requirements-installed.txt"
        shutil.copy(ROOT / requirements, stamp)
    settings = environment(place, ENGINE="vllm", PYTHON=sys.executable)
    settings |= {name: str(tmp_path / name) for name in environments}
    printed = finish(start(EXAMPLE / "setup.sh", settings))
    assert "installing" not in printed
    assert f"in {tmp_path / 'ERPD_CUDA_VENV'}" in printed
    assert f"problems.jsonl: {PROBLEMS} problems" in printed
