"""Kills the scripts with kill -9 at random moments, and shows that nothing is lost.

Each script runs on a tiny random model. It is killed after a random number of changes in its folder
(a line of the log, a file that is begun, written or renamed) and up to 10 ms more. The same command
starts again until the run is complete. Then the next run begins, until there were --kills kills.

After every kill, whatever has its final name is whole, no finished sample is gone, and the newest
checkpoint is no older than before. At the end of every run its files equal those of an
uninterrupted run, bit by bit.

    python benchmarks/crash.py                       # 30 kills of each of the four scripts
    python benchmarks/crash.py --what stage1 --kills 5 --seed 1
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "examples" / "arithmetic")]

import make_base  # noqa: E402
import training  # noqa: E402

import build_signals  # noqa: E402
import evaluate  # noqa: E402
import stage1_extreme  # noqa: E402
import stage2_distill  # noqa: E402

Name = Literal["evaluate", "stage1", "signals", "stage2"]
STEPS = {"batch_size": 6, "micro_batch_tokens": 128, "learning_rate": 1e-3, "epochs": 4}


@dataclass
class Args:
    what: tuple[Name, ...] = ("evaluate", "stage1", "signals", "stage2")
    """scripts to kill"""
    kills: int = 30
    """kills of each script"""
    seed: int | None = None
    """seed of the moments; default: the clock, and it is printed"""


@dataclass(frozen=True)
class Script:
    """A command, as a function of the folder that it writes, and the file that comes last."""

    command: Callable[[Path], Any]
    last: str


def make_scripts(folder: Path) -> dict[str, Script]:
    """Writes two random policies, problems, rollouts and signals; returns the commands."""
    vocabulary = len(make_base.make_tokenizer())
    shape = training.Shape(64, 3, vocabulary, tokens=512, longest=64)
    training.make_setting(folder / "teacher", shape, seed=1)
    training.make_setting(folder, shape)
    rows = [{"id": f"p{i}", "problem": f"{i}+{i}", "answer": str(2 * i)} for i in range(8)]
    problems = folder / "problems.jsonl"
    evaluate.write_jsonl(problems, rows)
    base, teacher = str(folder / "model"), str(folder / "teacher" / "model")
    rollouts, signals = folder / "rollouts", folder / "signals" / "signals.safetensors"
    sampled = {"engine": "hf", "n": 8, "max_new_tokens": 24, "batch_size": 4}
    saves = {"checkpoint_every": 3, "save_at": (0.5, 4.0)}
    budget = {"kl_every": 3, "kl_holdout": 0.2}

    def build(output: Path) -> build_signals.Args:
        """Returns the command that writes OUTPUT/signals.safetensors, on its own rollouts."""
        own = output.parent / "rollouts"  # its log-probs are kept there, and no other run has them
        shutil.copytree(rollouts, own, ignore=lambda *_: ["logprobs"], dirs_exist_ok=True)
        return build_signals.Args(own, base, (teacher,), output / signals.name)

    start(build_signals.Args(rollouts, base, (teacher,), signals)).join()
    return {
        "evaluate": Script(lambda o: evaluate.Args(base, problems, o, **sampled), "metrics.json"),
        "stage1": Script(
            lambda o: stage1_extreme.Args(base, rollouts, o, **saves, **STEPS), "config.json"
        ),
        "signals": Script(build, signals.name),
        "stage2": Script(
            lambda o: stage2_distill.Args(base, rollouts, signals, o, **budget, **STEPS),
            "config.json",
        ),
    }


def start(args: Any) -> Any:
    """Starts a command as a process of its own, by a server that has already imported torch."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=quiet_main, args=(args,))
    process.start()
    return process


def quiet_main(args: Any) -> None:
    """Runs main of the script that `args` belong to, without its output."""
    torch.set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    importlib.import_module(type(args).__module__).main(args)


def run_until(args: Any, goal: float) -> tuple[Any, int]:
    """Starts a command and waits for its end, or for `goal` changes in the folder of its output.

    Returns the process and the changes that were seen."""
    folder = args.output if args.output.suffix == "" else args.output.parent
    seen, before, process = 0, listing(folder.parent), start(args)
    while process.is_alive() and seen < goal:
        now = listing(folder.parent)
        seen += now != before
        before = now
        time.sleep(0.0002)
    return process, seen


def listing(folder: Path) -> set[tuple[str, int, int]]:
    """Returns name, size and time of every file below a folder, unfinished ones included."""
    found = set()
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # it was renamed just now
                path = os.path.join(parent, name)
                stat = os.stat(path)
                found.add((path, stat.st_size, stat.st_mtime_ns))
    return found


def final_files(folder: Path) -> dict[str, Path]:
    """Returns the files below a folder that have their final names, by their relative paths."""
    files = {p.relative_to(folder): p for p in folder.rglob("*") if p.is_file()}
    hidden = {name for name in files if any(part.startswith(".") for part in name.parts)}
    return {str(name): path for name, path in files.items() if name not in hidden}


def check_whole(output: Path) -> None:
    """Raises an error where anything that has its final name is half written."""
    for path in final_files(output).values():
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
    for folder in output.glob("checkpoints/resume-*"):
        assert (folder / ".metadata").is_file() and (folder / "state.json").is_file(), folder


def kept(output: Path) -> tuple[set[str], str]:
    """Returns the finished units of evaluate.py, and the newest checkpoint of a stage."""
    units = {path.name for path in output.glob("parts/*.safetensors")}
    return units, max((path.name for path in output.glob("checkpoints/resume-*")), default="")


def kill_run(script: Script, output: Path, draw: random.Random, most: int, n: int) -> list[bool]:
    """Kills one run up to n times, and lets it end. Returns which kills left a file unfinished.

    Raises AssertionError where a kill lost something."""
    kills: list[bool] = []
    units, newest = kept(output)
    while not (output / script.last).is_file():
        goal = draw.randint(1, max(1, most // 2)) if len(kills) < n else float("inf")
        old = {path for path, _, _ in listing(output.parent)}  # with what earlier kills left
        process, _ = run_until(script.command(output), goal)
        time.sleep(draw.uniform(0, 0.01))
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            assert process.exitcode == 0, f"{output}: a continued run failed"
            continue
        check_whole(output)
        before, (units, newest) = (units, newest), kept(output)
        sampled = (output / "rollouts.safetensors").is_file()  # the units are no longer needed
        assert sampled or units >= before[0], f"{output}: lost {before[0] - units}"
        assert newest >= before[1], f"{output}: went back from {before[1]} to {newest}"
        new = {path for path, _, _ in listing(output.parent)} - old
        kills.append(any(".tmp" in path for path in new))
        left = ", a file unfinished" if kills[-1] else ""
        print(f"kill after {goal} changes: {len(units)} units, {newest or 'no checkpoint'}{left}")
    return kills


def main(args: Args) -> None:
    seed = int(time.time()) if args.seed is None else args.seed
    draw = random.Random(seed)
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:3])  # for the server and its imports
    modules = ["evaluate", "stage1_extreme", "stage2_distill", "build_signals"]
    modules += ["transformers.models.qwen3.modeling_qwen3"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(modules)
    with tempfile.TemporaryDirectory(prefix="erpd-crash-") as name:
        scripts = make_scripts(Path(name))
        for what in args.what:
            script, whole = scripts[what], Path(name) / what / "whole" / "run"
            process, most = run_until(script.command(whole), float("inf"))
            assert process.exitcode == 0, f"{what}: the uninterrupted run failed"
            kills: list[bool] = []
            runs = 0
            while len(kills) < args.kills:
                output = Path(name) / what / str(runs) / "run"
                kills += kill_run(script, output, draw, most, args.kills - len(kills))
                ours, theirs = final_files(output), final_files(whole)
                assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
                for file in ours.keys() - {"args.json"}:  # it names the folder
                    assert ours[file].read_bytes() == theirs[file].read_bytes(), f"{file} differs"
                runs += 1
            print(
                f"{what}: {len(kills)} kills in {runs} runs (seed {seed}), {sum(kills)} of them "
                "while a file was written: nothing lost, equal to an uninterrupted run",
                flush=True,
            )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
