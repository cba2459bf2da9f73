"""Speed and memory of training against peers and limits: ratios, measured in the same run.

    trl      a stage-1 `grpo` step against a step of TRL's SFTTrainer on the same tokens: tokens/s
             at least 1.0x, peak memory at most 1.0x. Qwen3 shape, vocabulary 151,936
    plain    the same step against the loop as one writes it first (padded micro-batches of 4, whole
             logits), on log-normal lengths: tokens/s at least 2x, peak memory at most 1/3
    head     the chunked head alone, forward and backward: memory at most 1/8 of whole logits, time
             at most 2x the three bare matrix products (it makes one of them twice)
    score    the scoring pass: at least 3x the tokens/s of the training step
    peak     share of this machine's matrix-product peak (float32, 2048 x 2048, measured after every
             step, the best) that the training step reaches, body of 25 M parameters: at least 50 %.
             FLOPs as in model_flops: what is computed again is not counted
    growth   2k, 4k, 8k, 16k tokens a step, responses of one length: within 10 % of a straight line

Every side runs in a process of its own, in turns; the first step of each warms up and is left out.
A ratio compares neighbours of one round; the table has the median over the rounds and their range.
Our step is all that stage1_extreme.main does from one line of its log to the next: packing, forward
with entropy, loss, backward, diagnostics, clipping, AdamW. Float32 throughout, no gradient
checkpointing, attention by torch's fused kernel on both sides.

TRL 1.16: loss "nll", which runs in chunks of tokens and vocabulary and never holds whole logits
("chunked_nll" is its old name); bf16 and gradient checkpointing, its defaults, are off. It is the
simpler loss: no ratio, no behavior log-probs; the entropy it makes as we do. Prompt tokens are left
out of its loss, as they are of ours; on a CPU its head computes them all the same, that is its way.
It is timed from the micro-batch at hand to the cleared gradients, so without its data loader; ours
with. Without FlashAttention its packed rows are attended to through a mask over the whole row, so
three settings are measured; the bar of speed is held against the fastest, that of memory against
the smallest:
    one      packing, one row of all tokens
    longest  packing, rows as long as the longest sequence, accumulated
    single   no packing: one sequence at a time, accumulated; no padding and no mask
Our rows have at most as many tokens as those of `longest`.

    bash tests/trl.sh --collect-only                            # sets the environment up
    .venv-trl/bin/python benchmarks/training.py
    .venv-trl/bin/python benchmarks/training.py --part head     # the others keep their numbers
    .venv-trl/bin/python benchmarks/training.py --quick         # small, to see that it runs
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
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
from pathlib import Path
from typing import Any, Literal

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "arithmetic")]

import make_base  # noqa: E402

import common  # noqa: E402

Part = Literal["trl", "plain", "head", "score", "peak", "growth"]


@dataclass
class Args:
    part: tuple[Part, ...] = ("trl", "plain", "head", "score", "peak", "growth")
    """what to measure; RESULTS.md is made of the newest numbers of every part"""
    rounds: int = 3
    """times that each side is started"""
    output: Path = ROOT / "benchmarks" / "RESULTS.md"
    """the table"""
    numbers: Path = ROOT / "runs" / "benchmarks"
    """folder for the numbers of each part"""
    quick: bool = False
    """a tiny model, one round: to see that it runs; the ratios mean nothing"""


@dataclass(frozen=True)
class Shape:
    """A Qwen3 with tied embeddings and the batch that it trains on."""

    hidden: int
    layers: int
    vocabulary: int
    tokens: int  # of one step
    lengths: Literal["log-normal", "fixed"] = "log-normal"
    longest: int = 2048  # tokens of a sequence, its prompt included; of all with fixed lengths

    def tiny(self) -> Shape:
        """For --quick."""
        return dataclasses.replace(
            self, hidden=32, layers=2, vocabulary=2048, tokens=self.tokens // 16,
            longest=self.longest // 16,
        )  # fmt: skip

    def __str__(self) -> str:
        lengths = (
            f"{self.lengths} lengths up to" if self.lengths == "log-normal" else "sequences of"
        )
        return (f"hidden {self.hidden}, {self.layers} layers, vocabulary {self.vocabulary:,}, "
                f"{self.tokens:,} tokens a step, {lengths} {self.longest:,}")  # fmt: skip


SHAPES = {
    "trl": Shape(256, 4, 151_936, 8192),
    "plain": Shape(256, 4, 151_936, 4096),
    "head": Shape(256, 4, 151_936, 2048),
    "score": Shape(256, 4, 151_936, 2048),
    "peak": Shape(512, 8, 151_936, 2048),
    "growth": Shape(256, 4, 4096, 2048, "fixed", 512),
}  # fmt: skip
GROWTH = (1, 2, 4, 8)  # times the tokens of the shape


def model_config(shape: Shape) -> Any:
    """Qwen3 in the proportions of its family: MLP 3 x hidden, two query heads to a key."""
    from transformers import Qwen3Config

    heads = max(2, shape.hidden // 64)
    return Qwen3Config(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        intermediate_size=3 * shape.hidden, num_attention_heads=heads,
        num_key_value_heads=heads // 2, head_dim=min(64, shape.hidden // heads),
        max_position_embeddings=32_768, tie_word_embeddings=True, eos_token_id=1, pad_token_id=0,
        bos_token_id=None,
    )  # fmt: skip


def draw_lengths(shape: Shape, seed: int = 0) -> list[int]:
    """Lengths that add up to the tokens of a step; log-normal: median a fifth of the longest,
    sigma 0.8, as lengths of reasoning spread."""
    if shape.lengths == "fixed":
        return [shape.longest] * (shape.tokens // shape.longest)
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while (left := shape.tokens - sum(lengths)) > 0:
        drawn = torch.randn(1, generator=generator).mul(0.8).add(math.log(shape.longest / 5)).exp()
        length = min(max(int(drawn), shape.longest // 16), shape.longest, left)
        lengths.append(left if left - length < shape.longest // 16 else length)
    return lengths


def make_setting(folder: Path, shape: Shape) -> common.Rollouts:
    """model/ (random weights) and rollouts/ (random tokens, both verdicts) in `folder`."""
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    Qwen3ForCausalLM(model_config(shape)).save_pretrained(folder / "model")
    make_base.make_tokenizer().save_pretrained(folder / "model")
    lengths = torch.tensor(draw_lengths(shape))
    n = len(lengths)
    rollouts = common.Rollouts(
        folder / "rollouts" / "rollouts.safetensors", {"model": "random"},
        tokens=torch.randint(3, shape.vocabulary, (shape.tokens,), dtype=torch.int32),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        prompt_lens=torch.full((n,), shape.longest // 32, dtype=torch.int32),
        rewards=(torch.arange(n) % 2).float(), problem_index=torch.zeros(n, dtype=torch.int32),
        truncated=torch.zeros(n, dtype=torch.bool),
    )  # fmt: skip
    common.save_rollouts(rollouts)
    return rollouts


def model_flops(config: Any, rollouts: common.Rollouts) -> float:
    """FLOPs of forward and backward that the model asks for; made-again logits are not counted.

    6 x parameters of the blocks a token, 6 V D a response token (the head scores no prompt), and
    attention: at position t forward 4 d t (scores and values, d all heads' width, t the causal
    half), so 2 d n^2 a sequence and layer, three times that with the backward."""
    from transformers import Qwen3ForCausalLM

    with torch.device("meta"):
        blocks = Qwen3ForCausalLM(config).model.layers
    parameters = sum(p.numel() for p in blocks.parameters())
    width = config.num_attention_heads * config.head_dim
    attention = config.num_hidden_layers * 2 * width * float(rollouts.lengths.square().sum())
    matrix = config.vocab_size * config.hidden_size * int(rollouts.response_lens.sum())
    return 6.0 * parameters * len(rollouts.tokens) + 6.0 * matrix + 3 * attention


# --------------------------------------------------------------------------------------------------
# The parts: each returns rows of the table


@dataclass
class Row:
    """One line of the table: a value per round, and the bar."""

    what: str
    values: list[float]
    unit: str = "x"
    bar: float | None = None
    at_least: bool = True  # else: at most

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def met(self) -> bool | None:
        if self.bar is None:
            return None
        return self.median >= self.bar if self.at_least else self.median <= self.bar

    def __str__(self) -> str:
        def show(value: float) -> str:
            return f"{value:,.{0 if abs(value) >= 100 else 2 if abs(value) >= 0.1 else 3}f}"

        bar = "" if self.bar is None else f"{'≥' if self.at_least else '≤'} {self.bar:.3g}"
        spread = f"{show(min(self.values))} ... {show(max(self.values))}"
        met = {None: "", True: "yes", False: "**no**"}[self.met]
        return f"| {self.what} | {show(self.median)} {self.unit} | {spread} | {bar} | {met} |"


def side(name: str, **arguments: Any) -> dict[str, Any]:
    """Runs a side of training_sides.py. Raises UserError with its last lines where it fails."""
    script = Path(__file__).with_name("training_sides.py")
    command = [sys.executable, str(script), name, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise common.UserError(f"side {name} {arguments} failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    short = {k: v for k, v in arguments.items() if k not in ("folder", "folders")}
    print(f"  {name} {short}: {result}", file=sys.stderr, flush=True)
    return result


def in_turns(rounds: int, sides: dict[str, Callable[[], Any]]) -> dict[str, list[Any]]:
    """Runs all sides `rounds` times, in changing order -> results by side, round by round."""
    results: dict[str, list[Any]] = {name: [] for name in sides}
    for number in range(rounds):
        names = list(sides)
        for name in names if number % 2 == 0 else names[::-1]:
            results[name].append(sides[name]())
    return results


def seconds(results: list[dict[str, Any]]) -> list[float]:
    """Median step of each round."""
    return [statistics.median(result["seconds"]) for result in results]


def megabytes(results: list[dict[str, Any]]) -> list[float]:
    return [result["bytes"] / 2**20 for result in results]


def over(a: list[float], b: list[float]) -> list[float]:
    """a / b round by round."""
    return [x / y for x, y in zip(a, b, strict=True)]


def against(
    what: str, shape: Shape, ours: list[Any], peer: list[Any], bars: tuple[float, float] | None
) -> list[Row]:
    """Speed and memory of ours and of a peer, and their ratios."""
    speed, memory = bars or (None, None)
    a, b = seconds(ours), seconds(peer)
    return [
        Row(f"{what}: tokens/s, ours over theirs", over(b, a), "x", speed),
        Row(f"{what}: peak memory, ours over theirs", over(megabytes(ours), megabytes(peer)), "x",
            memory, at_least=False),
        Row(f"{what}: theirs", [shape.tokens / s for s in b], "tokens/s"),
        Row(f"{what}: theirs", megabytes(peer), "MiB"),
    ]  # fmt: skip


def ours_alone(shape: Shape, ours: list[Any]) -> list[Row]:
    return [Row("ours", [shape.tokens / s for s in seconds(ours)], "tokens/s"),
            Row("ours", megabytes(ours), "MiB")]  # fmt: skip


def measure_trl(shape: Shape, rounds: int, folder: Path) -> list[Row]:
    try:
        importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        raise common.UserError("--part trl: TRL is not installed here; run tests/trl.sh and use "
                               "its environment, or leave the part out") from None  # fmt: skip
    make_setting(folder, shape)
    both = {"folder": str(folder), "steps": 1}
    settings = ("one", "longest", "single")
    results = in_turns(rounds, {
        "ours": lambda: side("ours", budget=shape.longest, **both),
        **{rows: lambda rows=rows: side("trl", rows=rows, **both) for rows in settings},
    })  # fmt: skip
    ours = results["ours"]
    fastest = min(settings, key=lambda rows: statistics.median(seconds(results[rows])))
    smallest = min(settings, key=lambda rows: statistics.median(megabytes(results[rows])))
    rows = ours_alone(shape, ours)
    for name in settings:
        speed, memory, *rest = against(f"TRL, {name}", shape, ours, results[name], None)
        speed.bar = 1.0 if name == fastest else None
        memory.bar = 1.0 if name == smallest else None
        rows += [speed, memory, *rest]
    return rows


def measure_plain(shape: Shape, rounds: int, folder: Path) -> list[Row]:
    make_setting(folder, shape)
    results = in_turns(rounds, {
        "ours": lambda: side("ours", folder=str(folder), steps=1, budget=shape.tokens),
        "plain": lambda: side("plain", folder=str(folder), steps=1, responses=4),
    })  # fmt: skip
    bars = (2.0, 1 / 3)
    return [*ours_alone(shape, results["ours"]),
            *against("plain loop", shape, results["ours"], results["plain"], bars)]  # fmt: skip


def measure_head(shape: Shape, rounds: int, folder: Path) -> list[Row]:
    size = {"positions": shape.tokens, "hidden": shape.hidden, "vocabulary": shape.vocabulary}
    kinds = {kind: lambda kind=kind: side("head", kind=kind, steps=3, **size)
             for kind in ("ours", "products", "whole")}  # fmt: skip
    results = in_turns(rounds, kinds)
    ours, products, whole = (results[kind] for kind in kinds)
    return [
        Row("head: time over the bare products", over(seconds(ours), seconds(products)), "x", 2.0,
            at_least=False),
        Row("head: peak memory over whole logits", over(megabytes(ours), megabytes(whole)), "x",
            1 / 8, at_least=False),
        Row("head: time of whole logits over the bare products",
            over(seconds(whole), seconds(products))),
        Row("head: ours", megabytes(ours), "MiB"),
        Row("head: whole logits", megabytes(whole), "MiB"),
    ]  # fmt: skip


def measure_score(shape: Shape, rounds: int, folder: Path) -> list[Row]:
    make_setting(folder, shape)
    run = {"folder": str(folder), "steps": 2, "budget": shape.tokens, "rescore": 3}
    results = in_turns(rounds, {"ours": lambda: side("ours", **run)})["ours"]
    scoring = [statistics.median(result["scoring"]) for result in results]
    return [
        Row("scoring over training, tokens/s", over(seconds(results), scoring), "x", 3.0),
        Row("scoring", [shape.tokens / s for s in scoring], "tokens/s"),
    ]


def measure_peak(shape: Shape, rounds: int, folder: Path) -> list[Row]:
    rollouts = make_setting(folder, shape)
    flops = model_flops(model_config(shape), rollouts)
    run = {"folder": str(folder), "steps": 2, "budget": shape.tokens, "probe": True}
    results = in_turns(rounds, {"ours": lambda: side("ours", **run)})["ours"]
    peaks = [max(result["products"]) for result in results]
    rates = [flops / s for s in seconds(results)]
    return [
        Row("share of the matrix-product peak", [100 * r for r in over(rates, peaks)], "%", 50.0),
        Row("matrix-product peak", [p / 1e9 for p in peaks], "GFLOP/s"),
    ]


def measure_growth(shape: Shape, rounds: int, folder: Path) -> list[Row]:
    """Largest distance of a median step from the line a + b tokens that fits best relatively."""
    sizes = [times * shape.tokens for times in GROWTH]
    for size in sizes:
        make_setting(folder / str(size), dataclasses.replace(shape, tokens=size))
    run = {"folders": [str(folder / str(size)) for size in sizes], "steps": 3, "budget": sizes[-1]}
    results = in_turns(rounds, {"growth": lambda: side("growth", **run)})["growth"]
    steps = [[statistics.median(times) for times in result["seconds"]] for result in results]
    distances = [100 * line_distance(sizes, times) for times in steps]
    costs = over(
        [times[-1] / sizes[-1] for times in steps], [times[0] / sizes[0] for times in steps]
    )
    each = [Row(f"growth: step of {size:,} tokens", [1e3 * times[i] for times in steps], "ms")
            for i, size in enumerate(sizes)]  # fmt: skip
    return [
        Row("growth: farthest from a straight line", distances, "%", 10.0, at_least=False),
        Row(f"growth: cost of a token, {sizes[-1]:,} over {sizes[0]:,} a step", costs), *each,
    ]  # fmt: skip


def line_distance(sizes: list[int], times: list[float]) -> float:
    """Largest relative distance of `times` from a + b sizes, a and b by least relative squares."""
    t = torch.tensor(times, dtype=torch.float64)
    x = torch.tensor(sizes, dtype=torch.float64)
    basis = torch.stack([1 / t, x / t], 1)  # of (a + b x) / t, which should be 1
    ones = torch.ones(len(t), 1, dtype=torch.float64)
    fitted = basis @ torch.linalg.lstsq(basis, ones).solution
    return float((fitted - 1).abs().max())


PARTS: dict[str, Callable[[Shape, int, Path], list[Row]]] = {
    "trl": measure_trl, "plain": measure_plain, "head": measure_head, "score": measure_score,
    "peak": measure_peak, "growth": measure_growth,
}  # fmt: skip

# --------------------------------------------------------------------------------------------------


def machine() -> str:
    """Cores, CPU model, memory: in generic words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")),
                 platform.machine())  # fmt: skip
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    flags = next((line for line in lines if line.startswith("flags")), "")
    wide = ", AVX-512" if "avx512f" in flags else ""
    return (f"{torch.get_num_threads()} threads on {os.cpu_count()} cores ({model}{wide}), "
            f"{memory:.0f} GiB, no GPU used")  # fmt: skip


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in ("torch", "transformers", "trl"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def report(parts: dict[str, dict[str, Any]]) -> str:
    """RESULTS.md from the numbers of the parts."""
    lines = ["# Measured speed", "",
             "Made by `benchmarks/training.py`, whose docstring says what is compared and how. The "
             "value is the median over the rounds, the spread their range.", ""]  # fmt: skip
    for name, part in parts.items():
        rows = [Row(**row) for row in part["rows"]]
        lines += [
            f"## {name}", "", f"{part['shape']}.", "", "| measured | value | spread | bar | met |",
            "|---|---|---|---|---|", *map(str, rows), "",
            f"{part['rounds']} rounds, {part['minutes']:.1f} minutes, {part['date']}, load before "
            f"{part['load']:.1f}: `{part['command']}`; {part['machine']}; {part['versions']}.", "",
        ]  # fmt: skip
    return "\n".join(lines)


def main(args: Args) -> None:
    for name in args.part:
        shape, rounds = SHAPES[name], args.rounds
        if args.quick:
            shape, rounds = shape.tiny(), 1
        load, began = os.getloadavg()[0], datetime.datetime.now(datetime.UTC)
        print(f"{name}: {shape}", flush=True)
        with tempfile.TemporaryDirectory(prefix="erpd-training-") as folder:
            rows = PARTS[name](shape, rounds, Path(folder))
        now = datetime.datetime.now(datetime.UTC)
        common.write_json(args.numbers / f"{name}.json", {
            "rows": [dataclasses.asdict(row) for row in rows], "shape": str(shape),
            "rounds": rounds, "minutes": (now - began).total_seconds() / 60, "load": load,
            "date": f"{now:%Y-%m-%d}", "machine": machine(), "versions": versions(),
            "command": shlex.join(["python", "benchmarks/training.py", *sys.argv[1:]]),
        })  # fmt: skip
        print("\n".join(map(str, rows)), flush=True)
    found = {name: args.numbers / f"{name}.json" for name in PARTS}
    parts = {name: common.read_json(path) for name, path in found.items() if path.is_file()}
    with common.atomic(args.output) as temporary:
        temporary.write_text(report(parts), encoding="utf-8")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    common.run(main, Args, __doc__)
