"""Compares the minutes of examples/arithmetic/run.sh with those of an older checkout, step by step.

Runs both, one after the other, from an empty run folder each, with their own settings. The bar is
0.55 of commit 4239b1a. A section is what stands between two lines of run.sh that begin with "==";
jobs are what its seconds.jsonl lists, two of which run at a time.

Writes  OUTPUT/before, OUTPUT/ours (run folders); OUTPUT/seconds.json, {side: {section: seconds}}.
        A side that is in it is not run again.

    git worktree add ../before 4239b1a
    python benchmarks/example.py --before ../before --output runs/minutes   # idle, half an hour
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402


@dataclass
class Args:
    before: Path
    """checkout of an older version"""
    output: Path
    """folder for the two runs and their seconds"""
    seed: int = 0
    """SEED of both"""
    quick: bool = False
    """every step in small (QUICK=1), to try this script"""


def run_example(root: Path, folder: Path, args: Args) -> dict[str, float]:
    """Runs run.sh of a checkout and returns {section: seconds}."""
    settings = {"SEED": str(args.seed), "QUICK": str(int(args.quick)), "RUN": str(folder)}
    command = ["bash", str(root / "examples/arithmetic/run.sh")]
    seconds: dict[str, float] = {}
    section, begun = "setup", time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    with subprocess.Popen(
        command, env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        for line in process.stdout:
            if line.startswith(b"== "):
                now = time.perf_counter()
                seconds[section], begun = now - begun, now
                section = line.decode().removeprefix("== ").split(":")[0].split(";")[0].strip()
                print(f"{root.name}: {section}", flush=True)
    seconds[section] = time.perf_counter() - begun
    del seconds["setup"]  # installs packages, the first time
    if process.returncode:
        raise common.UserError(f"{command[1]} ended with {process.returncode}; run it by hand")
    return seconds


def main(args: Args) -> None:
    sides = {"before": args.before.resolve(), "ours": ROOT}
    file = args.output.resolve() / "seconds.json"
    found = common.read_json(file) if file.is_file() else {}
    for side, root in sides.items():
        if side not in found:
            found[side] = run_example(root, file.parent / side, args)
            common.write_json(file, found)
    for side, sections in found.items():
        print(f"\n{side}: {sum(sections.values()) / 60:.1f} minutes")
        for section, seconds in sections.items():
            print(f"  {seconds:7.0f} s  {section}")
        lines = (file.parent / side / "seconds.jsonl").read_text().splitlines()
        for row in map(json.loads, lines):
            print(f"  {row['seconds']:7d} s    job {row['output']}")
    before, ours = (sum(found[side].values()) for side in sides)
    print(f"\nours over before: {ours / before:.2f}")


if __name__ == "__main__":
    common.run(main, Args, __doc__)
