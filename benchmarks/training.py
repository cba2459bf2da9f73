"""Compares speed and memory of training with peers and with an older version, on a CPU.

Part `step`: a stage-1 `grpo` step on 8,192 tokens of log-normal lengths up to 2,048, by a Qwen3 of
hidden size 256, 4 layers and a vocabulary of 151,936. Rows have at most 2,048 tokens.

    TRL     SFTTrainer on the same tokens, packed into rows of 2,048, and one sequence at a time
            (micro-batches are accumulated in both). At least 1.8 times the tokens/s of the faster,
            at most 0.6 of the memory of the smaller. Only where TRL is installed
    plain   the loop as one writes it first (padded micro-batches of 4, whole logits). At least
            twice its tokens/s, at most 1/3 of its memory
    score   the scoring pass, with the loading of its model. At least 3 times the tokens/s of a step
    before  the same step by an older version of this repository (--before), without a bar

Part `head`: the output head alone, forward and backward, on 2,048 positions. At most twice the time
of the three bare matrix products (it makes one of them twice), and at most 1/8 of the memory of
whole logits.

Every side runs in a process of its own, in turns, and the first step of each is left out. A ratio
compares neighbors of one round; the table has the median over the rounds and their range. Our step
is all that stage1_extreme.main does from one line of its log to the next. Everything is float32,
without gradient checkpointing, with torch's fused attention.

TRL 1.16 runs its loss "nll", which never holds whole logits, on response tokens; bf16 and gradient
checkpointing, its defaults, are off. That is a simpler loss than ours: it has no ratio and no
log-probs of the base. It is timed without its data loader, ours with.

    ERPD_TRL_VENV=.venv-trl bash tests/trl.sh                 # sets up the environment with TRL
    git worktree add ../before 251dcea                        # an older version, if wanted
    .venv-trl/bin/python benchmarks/training.py --before ../before --output benchmarks/RESULTS.md
    .venv-trl/bin/python benchmarks/training.py --part head --rounds 5
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "arithmetic")]

import make_base  # noqa: E402

import common  # noqa: E402
import evaluate  # noqa: E402

Results = dict[str, list[dict[str, Any]]]  # by side, round by round


@dataclass
class Args:
    part: tuple[Literal["step", "head"], ...] = ("step", "head")
    """what to measure"""
    rounds: int = 3
    """how often each side is started"""
    before: Path | None = None
    """folder of an older version of this repository, which is measured in the same rounds"""
    output: Path | None = None
    """Markdown file to write the tables to; without it they are printed only"""
    quick: bool = False
    """a tiny model and one round, to see that everything runs; the ratios mean nothing"""


@dataclass(frozen=True)
class Shape:
    """The sizes of a Qwen3 with tied embeddings and of the batch that it trains on."""

    hidden: int = 256
    layers: int = 4
    vocabulary: int = 151_936
    tokens: int = 8192  # of one step
    longest: int = 2048  # tokens of the longest sequence, its prompt included
    positions: int = 2048  # of part `head`


def make_setting(folder: Path, shape: Shape, seed: int = 0) -> None:
    """Writes model/ (random weights) and rollouts/ (random tokens, both verdicts) to `folder`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    heads = max(2, shape.hidden // 64)
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=3 * shape.hidden,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=min(64, shape.hidden // heads),
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "model")
    make_base.make_tokenizer().save_pretrained(folder / "model")
    lengths = torch.tensor(sample_lengths(shape))
    n = len(lengths)
    rollouts = common.Rollouts(
        path=folder / "rollouts" / "rollouts.safetensors",
        metadata={"model": "random"},
        tokens=torch.randint(3, shape.vocabulary, (shape.tokens,), dtype=torch.int32),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        prompt_lens=torch.full((n,), shape.longest // 32, dtype=torch.int32),
        rewards=(torch.arange(n) % 2).float(),
        problem_index=torch.arange(n, dtype=torch.int32) // 4,
        truncated=torch.zeros(n, dtype=torch.bool),
    )
    evaluate.save_rollouts(rollouts)


def sample_lengths(shape: Shape) -> list[int]:
    """Returns lengths that add up to the tokens of a step: log-normal, as lengths of reasoning are,
    with a median of a fifth of the longest and sigma 0.8."""
    generator, shortest = torch.Generator().manual_seed(0), shape.longest // 16
    lengths: list[int] = []
    while (left := shape.tokens - sum(lengths)) > 0:
        normal = torch.randn((), generator=generator).item()
        length = int(shape.longest / 5 * math.exp(0.8 * normal))
        length = min(max(length, shortest), shape.longest, left)
        lengths.append(left if left - length < shortest else length)
    return lengths


# --------------------------------------------------------------------------------------------------
# The parts: each returns rows of its table


@dataclass
class Row:
    """One line of a table: a value per round, and the bar."""

    what: str
    values: list[float]
    unit: str = "x"
    bar: float | None = None
    at_least: bool = True  # else: at most

    def __str__(self) -> str:
        """Formats the median, the range, and whether the bar is met."""

        def show(value: float) -> str:
            return f"{value:,.{0 if abs(value) >= 100 else 2 if abs(value) >= 0.1 else 3}f}"

        median, bar, met = statistics.median(self.values), "", ""
        if self.bar is not None:
            bar = f"{'≥' if self.at_least else '≤'} {self.bar:.3g}"
            met = "yes" if (median >= self.bar if self.at_least else median <= self.bar) else "no"
        spread = f"{show(min(self.values))} ... {show(max(self.values))}"
        return f"| {self.what} | {show(median)} {self.unit} | {spread} | {bar} | {met} |"


def side(name: str, root: Path = ROOT, **arguments: Any) -> dict[str, Any]:
    """Runs a side of training_sides.py, of this version or of another one.

    Raises UserError with its last lines where it fails."""
    script = root.resolve() / "benchmarks" / "training_sides.py"
    command = [sys.executable, str(script), name, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    if done.returncode:
        raise common.UserError(f"{script} {name} {arguments} failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"  {root.name} {name} {arguments}: {result}", file=sys.stderr, flush=True)
    return result


def in_turns(rounds: int, sides: dict[str, Callable[[], dict[str, Any]]]) -> Results:
    """Runs all sides `rounds` times, forwards and backwards in turns."""
    results: Results = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            results[name].append(sides[name]())
    return results


def seconds(results: list[dict[str, Any]]) -> list[float]:
    """Returns the median step of each round."""
    return [statistics.median(result["seconds"]) for result in results]


def megabytes(results: list[dict[str, Any]]) -> list[float]:
    """Returns the peak memory of each round in MiB."""
    return [result["bytes"] / 2**20 for result in results]


def over(a: list[float], b: list[float]) -> list[float]:
    """Returns a / b round by round."""
    return [x / y for x, y in zip(a, b, strict=True)]


def measure_step(args: Args, shape: Shape, folder: Path) -> list[Row]:
    """Compares our step with TRL, the plain loop and the older version."""
    make_setting(folder, shape)
    given = {"folder": str(folder), "steps": 1}
    packed, single = "TRL, packed", "TRL, one sequence at a time"
    sides = {"ours": lambda: side("ours", budget=shape.longest, **given)}
    if args.before is not None:
        sides["before"] = lambda: side("ours", args.before, budget=shape.longest, **given)
    if importlib.util.find_spec("trl") is not None:
        sides[packed] = lambda: side("trl", packing=True, **given)
        sides[single] = lambda: side("trl", packing=False, **given)
    sides["plain loop"] = lambda: side("plain", responses=4, **given)
    results = in_turns(args.rounds, sides)
    ours = results.pop("ours")
    scoring = [result["scoring"] for result in ours]
    rows = [
        Row("ours", [shape.tokens / s for s in seconds(ours)], "tokens/s"),
        Row("ours", megabytes(ours), "MiB"),
        Row("scoring over training, tokens/s", over(seconds(ours), scoring), bar=3.0),
    ]
    for name, theirs in results.items():
        speed = Row(f"{name}: tokens/s, ours over theirs", over(seconds(theirs), seconds(ours)))
        memory = Row(f"{name}: memory, ours over theirs", over(megabytes(ours), megabytes(theirs)))
        memory.at_least = False
        if name == "plain loop":
            speed.bar, memory.bar = 2.0, 1 / 3
        rivals = [results[packed], results[single]] if name in (packed, single) else []
        if rivals and theirs is min(rivals, key=lambda r: statistics.median(seconds(r))):
            speed.bar = 1.8
        if rivals and theirs is min(rivals, key=lambda r: statistics.median(megabytes(r))):
            memory.bar = 0.6
        rate = [shape.tokens / s for s in seconds(theirs)]
        rows += [speed, memory, Row(name, rate, "tokens/s"), Row(name, megabytes(theirs), "MiB")]
    return rows


def measure_head(args: Args, shape: Shape, _: Path) -> list[Row]:
    """Compares our head with its bare products, whole logits and the older version."""
    size = {"positions": shape.positions, "hidden": shape.hidden, "vocabulary": shape.vocabulary}
    sides = {
        kind: lambda kind=kind: side("head", kind=kind, steps=3, **size)
        for kind in ("ours", "products", "whole")
    }
    if args.before is not None:
        sides["before"] = lambda: side("head", args.before, kind="ours", steps=3, **size)
    results = in_turns(args.rounds, sides)
    ours, products, whole = (results[kind] for kind in ("ours", "products", "whole"))
    memory = over(megabytes(ours), megabytes(whole))
    rows = [
        Row("time over the bare products", over(seconds(ours), seconds(products)), "x", 2, False),
        Row("memory over whole logits", memory, "x", 1 / 8, False),
        Row("time of whole logits over the products", over(seconds(whole), seconds(products))),
        Row("ours", megabytes(ours), "MiB"),
        Row("whole logits", megabytes(whole), "MiB"),
    ]
    if args.before is not None:
        before = results["before"]
        rows.append(Row("time, ours over before", over(seconds(ours), seconds(before))))
        rows.append(Row("memory, ours over before", over(megabytes(ours), megabytes(before))))
    return rows


# --------------------------------------------------------------------------------------------------


def machine() -> str:
    """Describes cores, CPU model, memory and versions in generic words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = [p for p in ("torch", "transformers", "trl") if importlib.util.find_spec(p)]
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    return (
        f"{threads} ({(models or [platform.machine()])[0]}), {memory:.0f} GiB, no GPU used; "
        f"Python {platform.python_version()}, {versions}"
    )


def main(args: Args) -> None:
    common.require(args, "rounds", lambda v: v >= 1, "1 or more")
    if args.before and not (args.before / "benchmarks" / "training_sides.py").is_file():
        raise common.UserError(f"--before {args.before}: no benchmarks/training_sides.py there")
    shape = Shape()
    if args.quick:
        args.rounds, shape = 1, Shape(32, 2, 2048, tokens=512, longest=128, positions=128)
    text = "# Measured speed\n\nMade by `benchmarks/training.py`, whose docstring says what is "
    text += "compared and how. The value is the median over the rounds, the spread their range.\n"
    for part in args.part:
        load, began = os.getloadavg()[0], datetime.datetime.now(datetime.UTC)
        with tempfile.TemporaryDirectory(prefix="erpd-training-") as folder:
            measure = {"step": measure_step, "head": measure_head}[part]
            rows = measure(args, shape, Path(folder))
        minutes = (datetime.datetime.now(datetime.UTC) - began).total_seconds() / 60
        table = "| measured | value | spread | bar | met |\n|---|---|---|---|---|\n"
        table += "\n".join(map(str, rows))
        command = shlex.join(["python", "benchmarks/training.py", *sys.argv[1:]])
        made = f"{args.rounds} rounds, {minutes:.1f} minutes, {began:%Y-%m-%d}"
        made += f", load before {load:.1f}: `{command}`; {machine()}."
        print(f"\n{part}\n{table}\n{made}", flush=True)
        text += f"\n## {part}\n\n{table}\n\n{made}\n"
    if args.output is not None:
        with common.atomic(args.output) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    common.run(main, Args, __doc__)
