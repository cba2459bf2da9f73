"""Kills the scripts with kill -9 at random moments of work and of writing; shows nothing is lost.

A run on a tiny random model is killed and started again with the same command until it ends; then
the next run begins, until there were --kills kills. At the end of every run: its files equal those
of an uninterrupted one, bit by bit, and nothing else is left.

    sampling  evaluate.py (hf engine). After every kill: no stored response is gone, none is there
              twice. About half of the kills fall into the sampling, half into the end of a run,
              where files are written and the parts removed
    training  stage1_extreme.py and stage2_distill.py in turns. After every kill: whatever has its
              final name is whole, and the last checkpoint is no older than before. About half of
              the kills fall between steps, half into the writing of a checkpoint or a model

    python benchmarks/crash.py
    python benchmarks/crash.py --what training
    python benchmarks/crash.py --kills 3 --seed 1
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "arithmetic")]

import make_base  # noqa: E402

import build_signals  # noqa: E402
import common  # noqa: E402
import evaluate  # noqa: E402
import stage1_extreme  # noqa: E402
import stage2_distill  # noqa: E402

FILES = ["args.json", "problems.jsonl", "samples.jsonl", "rollouts.safetensors", "metrics.json"]


@dataclass
class Args:
    what: Literal["sampling", "training"] = "sampling"
    """evaluate.py, or stages 1 and 2"""
    kills: int = 30
    """kill -9 in all"""
    seed: int | None = None
    """seed of the moments; default: the clock, printed"""


def make_setting(folder: Path) -> evaluate.Args:
    """A random policy, eight problems, and the command to sample them: 16 batches."""
    torch.manual_seed(0)
    tokenizer = make_base.make_tokenizer()
    model = make_base.Args(output=folder, hidden_size=32, layers=2)
    make_base.make_model(model, tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    problems = [{"id": f"p{i}", "problem": f"{i}+{i + 1}", "answer": str(2 * i + 1)}
                for i in range(8)]  # fmt: skip
    common.write_jsonl(folder / "problems.jsonl", problems)
    return evaluate.Args(
        model=str(folder / "model"), problems=folder / "problems.jsonl", output=folder / "whole",
        engine="hf", n=8, max_new_tokens=24, batch_size=4,
    )  # fmt: skip


def start(args: Any) -> Any:
    """The command of `args` as a process of its own, in which torch need not be read again: a fork
    of this process; for training of a server without threads (a fork of this one may hang)."""
    training = not isinstance(args, evaluate.Args)
    context = multiprocessing.get_context("forkserver" if training else "fork")
    if training:
        context.set_forkserver_preload(["stage1_extreme", "stage2_distill", "build_signals"])
    process = context.Process(target=quiet_main, args=(args,))
    process.start()
    return process


def quiet_main(args: Any) -> None:
    """main of the script that `args` belong to, without its output."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    importlib.import_module(type(args).__module__).main(args)


def finish(args: Any) -> None:
    """Runs the command to its end."""
    process = start(args)
    process.join()
    assert process.exitcode == 0, f"{type(args).__module__} failed"


def n_stored(output: Path) -> int:
    """Lines in parts/, whole or not."""
    try:
        return sum(path.read_bytes().count(b"\n") for path in output.glob("parts/*.jsonl"))
    except FileNotFoundError:  # removed between the listing and the reading
        return 0


def stored(output: Path) -> Counter:
    """How often each (problem, sample) is in parts/; raises AssertionError on one that is twice."""
    found: Counter = Counter()
    for path in output.glob("parts/*.jsonl"):
        whole = [line for line in path.read_bytes().splitlines(True) if line.endswith(b"\n")]
        rows = (json.loads(line) for line in whole)
        found.update((row["problem"], row["sample"]) for row in rows)
    assert max(found.values(), default=1) == 1, f"{output}: stored twice: {found.most_common(3)}"
    return found


def modified(path: Path) -> int:
    """Time of the last change, in ns; 0 where there is no file."""
    return path.stat().st_mtime_ns if path.exists() else 0


def kill_once(args: evaluate.Args, draw: random.Random) -> str | None:
    """Starts the run and kills it at a random moment -> where; None where it ended before."""
    process, output = start(args), args.output
    total = 8 * args.n
    if draw.random() < 0.5 and n_stored(output) < total:
        goal = draw.randint(n_stored(output), total)
        where, reached = f"{goal} responses stored", lambda: n_stored(output) >= goal
    else:
        name = draw.choice(["problems.jsonl", "samples.jsonl", "rollouts.safetensors"])
        where, age = f"{name} written", modified(output / name)
        reached = lambda: modified(output / name) != age  # noqa: E731
    while process.is_alive() and not reached():
        time.sleep(0.0005)
    time.sleep(draw.uniform(0, 0.02))
    process.kill()
    process.join()
    return where if process.exitcode == -signal.SIGKILL else None


def check_complete(output: Path, whole: Path) -> None:
    """Raises AssertionError where a finished run differs from the uninterrupted one."""
    names = sorted(path.name for path in output.iterdir() if not path.name.startswith("."))
    assert names == sorted(FILES), f"{output}: holds {names}"
    for name in FILES[1:]:
        same = (output / name).read_bytes() == (whole / name).read_bytes()
        assert same, f"{output / name} differs from {whole / name}"


def sampling(kills: int, draw: random.Random, folder: Path) -> int:
    """Kills evaluate.py so often; returns the number of runs. Raises AssertionError on a loss."""
    run = make_setting(folder)
    finish(run)
    done, runs, whole = 0, 0, run.output
    while done < kills:
        run.output = folder / f"run{runs}"
        before: set = set()
        while not (run.output / "metrics.json").exists():
            if done == kills:  # enough: this one may end
                finish(run)
                continue
            where = kill_once(run, draw)
            if where is None:
                assert (run.output / "metrics.json").exists(), "a continued run failed"
                continue
            done += 1
            after = set(stored(run.output))
            ended = (run.output / "rollouts.safetensors").exists()
            assert ended or before <= after, f"lost: {sorted(before - after)[:3]}"
            before = after
            print(f"kill {done}: {where}, {len(after)} stored", flush=True)
        check_complete(run.output, whole)
        runs += 1
    return runs


# --------------------------------------------------------------------------------------------------
# Training

STEPS = {"batch_size": 6, "micro_batch_tokens": 128, "learning_rate": 1e-3, "epochs": 4}


def make_training(folder: Path) -> list[Any]:
    """Two random policies, random rollouts and signals; the commands of both stages: 16 steps."""
    tokenizer = make_base.make_tokenizer()
    for seed, name in enumerate(("base", "teacher")):
        torch.manual_seed(seed)
        model = make_base.Args(output=folder, hidden_size=64, layers=3)
        make_base.make_model(model, tokenizer).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    n, length = 24, 20
    common.save_rollouts(common.Rollouts(
        folder / "rollouts" / "rollouts.safetensors", {},
        tokens=torch.randint(3, len(tokenizer), (n * length,), dtype=torch.int32),
        cu_seqlens=torch.arange(n + 1) * length,
        prompt_lens=torch.full((n,), 4, dtype=torch.int32),
        rewards=(torch.arange(n) % 2).float(),
        problem_index=torch.arange(n, dtype=torch.int32) // 4,
        truncated=torch.zeros(n, dtype=torch.bool),
    ))  # fmt: skip
    rollouts, base, signals = folder / "rollouts", str(folder / "base"), folder / "s.safetensors"
    finish(build_signals.Args(rollouts, base, (str(folder / "teacher"),), signals))
    return [
        stage1_extreme.Args(base, rollouts, folder / "whole1", checkpoint_every=3,
                            save_at=(0.5, 4.0), **STEPS),
        stage2_distill.Args(base, rollouts, folder / "whole2", signals, kl_every=3, kl_holdout=0.1,
                            **STEPS),
    ]  # fmt: skip


def n_steps(output: Path) -> int:
    """Lines of metrics.jsonl."""
    path = output / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def being_written(output: Path) -> set[str]:
    """Temporary names of checkpoints and models, and whether last.json is behind them."""
    found = {str(path) for path in output.glob("checkpoints/.*.tmp")}
    found |= {str(path) for path in output.parent.glob(f".{output.name}.tmp")}
    newest = {path.name for path in output.glob("checkpoints/resume-*")}
    return found | (newest - {saved(output)})


def saved(output: Path) -> str:
    """The checkpoint that a continued run goes on from; "" where none is."""
    try:
        return common.read_json(output / "checkpoints" / "last.json")["folder"]
    except common.UserError:
        return ""


def check_whole(output: Path) -> None:
    """Raises where anything that has its final name is half written."""
    for path in output.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(output).parts):
            continue  # a temporary name
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                assert all(len(file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
        elif path.suffix == ".json":
            json.loads(path.read_text())
    if name := saved(output):
        folder = output / "checkpoints" / name
        assert (folder / ".metadata").is_file() and (folder / "state.json").is_file(), folder


def kill_training(args: Any, draw: random.Random) -> tuple[str, bool] | None:
    """Starts the run and kills it at a random moment -> where, and was anything being written; None
    where it ended before."""
    output, seen = args.output, set()
    stale = being_written(output)  # left behind by earlier kills
    kind = draw.choice(["step", "step", "checkpoint", "model"])
    goal = draw.randint(n_steps(output), 16) if kind == "step" else draw.randint(1, 3)

    def reached() -> bool:
        if kind == "step":
            return n_steps(output) >= goal
        names = {Path(name).name for name in being_written(output) - stale}
        models = {name for name in names if name.startswith((".epoch", f".{output.name}"))}
        seen.update(models if kind == "model" else names)
        return len(seen) >= (1 if kind == "model" else goal)

    process = start(args)
    while process.is_alive() and not reached():
        time.sleep(0.0002)
    time.sleep(draw.uniform(0, 0.02 if kind == "step" else 0.004))
    process.kill()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        return None
    inside = sorted(Path(name).name for name in being_written(output) - stale)
    return f"{kind} {goal}" + (f", {inside[0]} unfinished" if inside else ""), bool(inside)


def check_training(output: Path, whole: Path) -> None:
    """Raises AssertionError where a finished run differs from the uninterrupted one."""

    def files(folder: Path) -> dict[str, bytes]:
        found = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
        return {name: path.read_bytes() for name, path in found.items()
                if name != "args.json" and not Path(name).name.startswith(".")}  # fmt: skip

    ours, theirs = files(output), files(whole)
    assert ours.keys() == theirs.keys(), f"{output}: {ours.keys() ^ theirs.keys()}"
    for name in ours:
        assert ours[name] == theirs[name], f"{output / name} differs from {whole / name}"


def training(kills: int, draw: random.Random, folder: Path) -> int:
    """Kills both stages so often; returns the number of runs. Raises AssertionError on a loss."""
    commands = make_training(folder)
    wholes = [run.output for run in commands]
    for run in commands:
        finish(run)
    done, runs, writing = 0, 0, 0
    while done < kills:
        run, whole = commands[runs % 2], wholes[runs % 2]
        run.output = folder / f"run{runs}"
        before = ""
        while not (run.output / "config.json").exists():
            if done == kills:  # enough: this one may end
                finish(run)
                continue
            killed = kill_training(run, draw)
            if killed is None:
                assert (run.output / "config.json").exists(), "a continued run failed"
                continue
            done, writing = done + 1, writing + killed[1]
            check_whole(run.output)
            after = saved(run.output)
            ended = (run.output / "config.json").exists()  # the checkpoint is removed then
            assert ended or after >= before, f"went back from {before} to {after}"
            before = after
            print(f"kill {done}: {type(run).__module__}, {killed[0]}, {after or 'no checkpoint'}",
                  flush=True)  # fmt: skip
        finish(run)  # once more: what a kill after the last file left is cleared up
        check_training(run.output, whole)
        runs += 1
    print(f"{writing} of {kills} kills fell into the writing of a checkpoint or model")
    return runs


# --------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    seed = int(time.time()) if args.seed is None else args.seed
    torch.set_num_threads(1)
    kill = {"sampling": sampling, "training": training}[args.what]
    with tempfile.TemporaryDirectory(prefix="erpd-crash-") as name:
        runs = kill(args.kills, random.Random(seed), Path(name))
    print(f"{args.kills} kills in {runs} runs (seed {seed}): nothing lost, nothing doubled; "
          "all files equal those of an uninterrupted run")  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
