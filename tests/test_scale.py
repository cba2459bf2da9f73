"""Several ranks, kills and run folders: whatever happens on the way, a run has the same result."""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import test_pipeline as pipeline
import tiny
import torch
import torch.distributed as dist
from test_pipeline import assert_same_files
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from transformers import LlamaConfig, LlamaForCausalLM

import build_signals
import common
import evaluate
import stage2_distill

ROOT = Path(common.__file__).parent


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tokenizer):
    """An untied model of several files, with scaled rotary frequencies and an odd vocabulary."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("models") / "llama"
    scaling = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0)
    scaling |= dict(high_freq_factor=4.0, original_max_position_embeddings=16)
    shape = tiny.WIDTHS | tiny.LIMITS | dict(vocab_size=65, eos_token_id=1)
    lm = LlamaForCausalLM(LlamaConfig(rope_parameters=scaling, **shape))
    lm.save_pretrained(folder, max_shard_size="20KB")
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return str(folder)


# --------------------------------------------------------------------------------------------------
# Files, run folders, shards


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "folder" / "x.json"
    common.write_json(path, 1)
    with pytest.raises(RuntimeError), common.atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert common.read_json(path) == 1 and list(path.parent.iterdir()) == [path]


def test_only_the_same_run_goes_on(ranks, tmp_path):
    data = tmp_path / "data.json"
    common.write_json(data, 1)
    args = pipeline.stage1_args(tmp_path / "run")

    def start(**changes):
        changed = dataclasses.replace(args, **changes)
        return common.start_run(args.output, changed, {"rollouts": data}, ranks)

    assert start() and start(micro_batch_tokens=64, max_noise=0.3, checkpoint_every=7)
    assert start(activation_checkpointing=True, tensorboard=True)
    assert common.read_json(args.output / "args.json")["args"]["tensorboard"]
    for name, value in dict(seed=1, loss="sft", save_at=(1.0,), init="x", ce_prior=True).items():
        with pytest.raises(common.UserError, match=f"other settings .{name}: .* -> .*;"):
            start(**{name: value})
    common.write_json(data, 2)
    with pytest.raises(common.UserError, match="rollouts: '[0-9a-f]{16}' -> '[0-9a-f]{16}'"):
        start()
    common.write_json(data, 1)
    common.write_json(args.output / "config.json", {})
    assert not start()  # complete


def test_a_checkpoint_before_the_first_step_counts_none(model_folders, ranks, tmp_path):
    """AdamW's first step is of full size. PyTorch would take, and count, one to save it."""
    policy = common.load_policy(model_folders[0], ranks, train=True)
    optimizer = common.make_optimizer(policy, 1e-3, 0.1)
    common.save_checkpoint(tmp_path, {"step": 0}, policy, optimizer, ranks)
    common.load_checkpoint(tmp_path, policy, optimizer, ranks)
    assert {state["step"].item() for state in optimizer.state.values()} == {0}


def test_a_run_goes_on_with_its_weights_on_the_cpu(tmp_path, monkeypatch):
    """On the CPU FSDP2 copies nothing under this policy; what it does on a GPU gpu.py measures."""
    whole, cut = (pipeline.stage2_args(tmp_path / name) for name in ("whole", "cut"))
    stage2_distill.main(whole)
    pipeline.run_until(6, stage2_distill.main, cut, monkeypatch)  # the last checkpoint is of step 4
    shard, policies = fsdp.fully_shard, []
    with monkeypatch.context() as patch:
        patch.setattr(fsdp, "fully_shard", lambda unit, **k: policies.append(k) or shard(unit, **k))
        stage2_distill.main(dataclasses.replace(cut, cpu_offload=True))
    assert policies and all(
        isinstance(k["offload_policy"], fsdp.CPUOffloadPolicy) for k in policies
    )
    assert_same_files(whole.output, cut.output)


def test_weights_on_the_cpu_in_a_mesh_of_gpus(ranks, tmp_path):
    """What --cpu-offload leaves on a GPU: DTensors that lie on the CPU while their mesh does not.
    Clips, steps and goes back to a checkpoint as with plain tensors."""
    mesh = DeviceMesh("cuda", [0], _init_backend=False)
    mesh._dim_group_names = [dist.group.WORLD.group_name]  # gloo, as setup_ranks(True) adds it

    def shard(x):
        spec = DTensorSpec(mesh, (Shard(0),), TensorMeta(x.shape, x.stride(), x.dtype))
        return DTensor(x, spec, requires_grad=False)

    def train(place, folder, steps):
        torch.manual_seed(0)
        module, found = torch.nn.Linear(4, 6), []
        for name, weight in list(module.named_parameters()):
            setattr(module, name, torch.nn.Parameter(place(weight.detach())))
        optimizer = common.make_optimizer(module, 1e-2, 0.1)
        begun = common.load_checkpoint(folder, module, optimizer, ranks).get("step", 0)
        for step in range(begun, steps):
            for parameter in module.parameters():
                generator = torch.Generator().manual_seed(step)
                parameter.grad = place(9 * torch.randn(parameter.shape, generator=generator))
            found.append(common.optimizer_step(module, optimizer, 1e-2, 1.0))
            common.save_checkpoint(folder, {"step": step + 1}, module, optimizer, ranks)
        moments = [v for state in optimizer.state.values() for v in state.values()]
        return found, [getattr(x, "_local_tensor", x) for x in (*module.parameters(), *moments)]

    norms, expected = train(lambda x: x, tmp_path / "plain", 3)
    first, _ = train(shard, tmp_path / "offloaded", 1)
    rest, ours = train(shard, tmp_path / "offloaded", 3)
    assert first + rest == norms and min(norms) > 1
    for one, other in zip(ours, expected, strict=True):
        assert one.device.type == "cpu" and torch.equal(one, other)


# --------------------------------------------------------------------------------------------------
# Processes of their own: two ranks, and kill -9


def runs_in(folder, llama, model_folders):
    """The arguments of four runs. Steps with one response leave the second rank without work."""
    setting, rollouts = tiny.setting(), folder / "rollouts"
    if not rollouts.is_dir():  # no scores of another run lie beside them
        shutil.copytree(setting / "rollouts", rollouts, ignore=lambda *_: ["logprobs"])
    data = dict(base=str(setting / "base"), rollouts=rollouts)
    long = dict(epochs=14, batch_size=31, save_at=(14.0,), checkpoint_every=4)
    models = (data["base"], str(setting / "other"), *model_folders)
    signals = folder / "signals.safetensors"
    return {
        "llama": pipeline.stage1_args(folder / "llama", **long | data | dict(base=llama)),
        "teacher": pipeline.stage1_args(folder / "teacher", **long, **data),
        "student": pipeline.stage2_args(folder / "student", epochs=14, batch_size=23, **data),
        "offloaded": pipeline.stage1_args(
            folder / "offloaded", **long | data | dict(cpu_offload=True)
        ),
        "signals": build_signals.Args(teachers=models, output=signals, **data),
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory, llama, model_folders):
    """What the scripts leave, run in this process without interruption."""
    folder = tmp_path_factory.mktemp("one")
    for args in runs_in(folder, llama, model_folders).values():
        sys.modules[type(args).__module__].main(args)
    evaluate.main(pipeline.evaluate_args(folder / "samples"))
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory, llama, model_folders):
    """The same at the two ranks of one torchrun."""
    folder = tmp_path_factory.mktemp("two")
    runs = runs_in(folder, llama, model_folders).values()
    at_two_ranks(runs, folder / "jobs.json")
    return folder


def at_two_ranks(runs, path):
    """Runs scripts by their arguments, one after the other, at the two ranks of one torchrun."""
    common.write_json(path, [[type(args).__module__, pipeline.flags(args)] for args in runs])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [*launch, "2", "--", ROOT / "tests" / "two_ranks.py", path]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.slow
def test_two_ranks_are_one(one, two, llama, model_folders, ranks):
    runs = runs_in(one, llama, model_folders)
    for name in ("llama", "teacher", "student"):
        pipeline.assert_close_runs(one / name, two / name)
        # The checkpoint of two ranks can be read at one. Its moments are means of gradients.
        found = []
        for folder in (one, two):
            policy = common.load_policy(runs[name].base, ranks, train=True)
            optimizer = common.make_optimizer(policy, 1e-3, 0.0)
            common.load_checkpoint(folder / name, policy, optimizer, ranks)
            found.append([v for state in optimizer.state.values() for v in state.values()])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    for path in one.glob("rollouts/logprobs/*"):
        scores, others = (common.load_tensors(p)[0] for p in (path, two / path.relative_to(one)))
        torch.testing.assert_close(scores["logprobs"], others["logprobs"], rtol=1e-4, atol=1e-5)
    assert len(list(one.glob("rollouts/logprobs/*"))) == 5


@pytest.mark.slow
def test_offloading_to_the_cpu_changes_no_byte_at_one_rank_or_two(one, two):
    for folder in (one, two):
        assert_same_files(folder / "teacher", folder / "offloaded")


def start(args, n_ranks):
    """Starts the script of `args`, one process a rank as torchrun does it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, ROOT / f"{type(args).__module__}.py", *pipeline.flags(args)]
    shared = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"WORLD_SIZE": str(n_ranks)}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n_ranks)]
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return [subprocess.Popen(command, env=os.environ | shared | one, **output) for one in own]


def kill_and_finish(args, progress, moments, n_ranks=1):
    """Kills the run each time that progress() reaches the next of `moments`, then lets it end."""
    for moment in [*moments, None]:
        processes = start(args, n_ranks)
        while moment and progress() < moment and all(p.poll() is None for p in processes):
            time.sleep(0.001)
        for process in processes if moment else ():
            process.kill()
        printed = [process.communicate(timeout=300)[0] for process in processes]
        ended = [process.returncode for process in processes]
        assert ended == [-signal.SIGKILL if moment else 0] * n_ranks, f"{moment}: {printed}"


def count(folder, pattern):
    """Returns how many files there are; in metrics.jsonl, how many lines."""
    files = folder.glob(pattern)
    return sum(f.read_bytes().count(b"\n") if f.suffix == ".jsonl" else 1 for f in files)


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bytes(one, two, tmp_path, llama, model_folders):
    draw = random.Random(time.time_ns())  # other moments each time; a failure prints them
    jobs = []
    for n_ranks in (2, 1):
        runs = runs_in(tmp_path / str(n_ranks), llama, model_folders)
        for name, kills in [("teacher", n_ranks), ("student", 3 - n_ranks)]:
            moments = sorted(draw.sample(range(1, 20), kills))
            progress = functools.partial(count, runs[name].output, "metrics.jsonl")
            jobs.append((runs[name], progress, moments, n_ranks))
    signals, samples = runs["signals"], pipeline.evaluate_args(tmp_path / "samples")
    jobs.append((signals, functools.partial(count, signals.rollouts, "logprobs/*"), [2]))
    progress = functools.partial(count, samples.output, "parts/unit-*")
    jobs.append((samples, progress, [draw.randint(1, 13)]))
    print([(args.output.name, *moments) for args, _, *moments in jobs])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: kill_and_finish(*job), jobs))
    for n_ranks, expected in ((1, one), (2, two)):
        for name in ("teacher", "student"):
            assert_same_files(expected / name, tmp_path / str(n_ranks) / name)
    assert_same_files(one, tmp_path / "1", ["signals.safetensors", "signals.json"])
    assert_same_files(one / "samples", samples.output, pipeline.SAMPLES)
