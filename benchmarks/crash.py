"""Kills evaluate.py with kill -9 at random moments of sampling and writing; shows nothing is lost.

A run on a tiny random model (hf engine) is killed and started again with the same command until it
ends; then the next run begins, until there were --kills kills. After every kill: no stored response
is gone, none is there twice. At the end of every run: its files equal those of an uninterrupted
one, bit by bit, and nothing else is left. About half of the kills fall into the sampling, half into
the end of a run, where files are written and the parts removed.

    python benchmarks/crash.py
    python benchmarks/crash.py --kills 3 --seed 1
"""

from __future__ import annotations

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
from typing import Any

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "arithmetic")]

import make_base  # noqa: E402

import common  # noqa: E402
import evaluate  # noqa: E402

FILES = ["args.json", "problems.jsonl", "samples.jsonl", "rollouts.safetensors", "metrics.json"]


@dataclass
class Args:
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


def start(args: evaluate.Args) -> Any:
    """The command as a process of its own; by fork, so that it does not import torch again."""
    process = multiprocessing.get_context("fork").Process(target=quiet_main, args=(args,))
    process.start()
    return process


def quiet_main(args: evaluate.Args) -> None:
    """evaluate.main without its output."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    evaluate.main(args)


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


def main(args: Args) -> None:
    draw_seed = int(time.time()) if args.seed is None else args.seed
    draw = random.Random(draw_seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="erpd-crash-") as name:
        run = make_setting(Path(name))
        process = start(run)
        process.join()
        assert process.exitcode == 0, "the uninterrupted run failed"
        kills, runs, whole = 0, 0, run.output
        while kills < args.kills:
            run.output = Path(name) / f"run{runs}"
            before: set = set()
            while not (run.output / "metrics.json").exists():
                if kills == args.kills:  # enough: this one may end
                    process = start(run)
                    process.join()
                    assert process.exitcode == 0, "a continued run failed"
                    continue
                where = kill_once(run, draw)
                if where is None:
                    assert (run.output / "metrics.json").exists(), "a continued run failed"
                    continue
                kills += 1
                after = set(stored(run.output))
                ended = (run.output / "rollouts.safetensors").exists()
                assert ended or before <= after, f"lost: {sorted(before - after)[:3]}"
                before = after
                print(f"kill {kills}: {where}, {len(after)} stored", flush=True)
            check_complete(run.output, whole)
            runs += 1
        print(f"{kills} kills in {runs} runs (seed {draw_seed}): nothing lost, nothing doubled; "
              "all files equal those of an uninterrupted run")  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
