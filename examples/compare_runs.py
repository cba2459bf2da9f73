"""Sets finished evaluations of the same problems side by side.

    accuracy       share of correct responses, averaged over problems
    pass@k         chance that at least one of k responses is correct
    maj@k          chance that the most frequent answer among k responses is the correct one
    mean length    tokens of a response
    truncated      share of responses that reached the token limit
    KL             sequence KL(policy || base), in nats per response
    KL efficiency  least KL that could have bought this accuracy, as a share of the KL that was paid
    difference     of accuracy and of KL, each run minus one of them, paired by problem

Every number has its standard error over problems. k is the largest power of two for which every run
has enough responses. Differences have a 95 % bootstrap interval over problems; both runs get the
same resamples, so the difficulty of the problems cancels.

Reads   RUN/ metrics.json, args.json, problems.jsonl, samples.jsonl and, where the KL was measured,
        kl.safetensors: the output folders of evaluate.py.
Prints  two tables and notes on what makes the runs hard to compare. It writes nothing.

    python examples/compare_runs.py judged/base judged/teacher judged/student
    python examples/compare_runs.py judged/* --against judged/teacher --markdown
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate
from common import UserError, load_tensors, read_json, run

MAX_SAMPLES = 1000  # per problem for maj@k: beyond it C(n, k) exceeds a float64
SETTINGS = ("temperature", "top_p", "max_new_tokens", "prompt_template", "no_chat_template")


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """output folders of evaluate.py, all on the same problems"""
    against: Path | None = None
    """the run that is subtracted from the others; default: the first one"""
    markdown: bool = False
    """print Markdown tables instead of plain ones"""


# --------------------------------------------------------------------------------------------------
# The mathematics


def majority_at_k(classes: list[int], k: int) -> float:
    """Chance that the most frequent answer among k of n responses is the correct one.

    classes [n]: equal answers share a number, 0 is correct, a negative number has no vote. The
    chance is exact over all C(n, k) subsets. The correct answer wins a tie of t answers with chance
    1/t, and it loses where nobody votes.

    Suppose that the correct answer has j votes. ways[t, v] counts the ways to choose v other
    responses such that t wrong answers have j votes too and none has more."""
    n, sizes = len(classes), Counter(c for c in classes if c >= 0)
    if k > n or n > MAX_SAMPLES:
        raise ValueError(f"maj@{k} needs {k} to {MAX_SAMPLES} responses per problem, not {n}")
    correct, silent = sizes.pop(0, 0), n - sum(c >= 0 for c in classes)
    won = 0.0  # subsets of k that the correct answer wins; a tie counts in part
    for j in range(1, min(correct, k) + 1):
        rivals = sum(size >= j for size in sizes.values())
        ways = np.zeros((1 + rivals, k - j + 1))
        ways[0, : silent + 1] = [math.comb(silent, v) for v in range(min(silent, k - j) + 1)]
        for size in sizes.values():
            before, ways = ways, np.zeros_like(ways)
            for v in range(min(size, j - 1, k - j) + 1):
                ways[:, v:] += math.comb(size, v) * before[:, : k - j + 1 - v]
            if j <= min(size, k - j):
                ways[1:, j:] += math.comb(size, j) * before[:-1, : k - 2 * j + 1]
        shares = 1 / np.arange(1, 2 + rivals)
        won += math.comb(correct, j) * float(shares @ ways[:, k - j])
    return won / math.comb(n, k)


def answer_classes(responses: list[tuple[float, str | None]]) -> list[int]:
    """Numbers the answers to one problem, as `majority_at_k` takes them; responses: reward, answer.

    All correct answers are one. Wrong answers are equal where their text is, without its spaces.
    A response without an answer has no vote."""
    numbers: dict[str, int] = {}
    classes = []
    for reward, answer in responses:
        if reward == 1:
            classes.append(0)
        elif answer is None:
            classes.append(-1)
        else:
            text = "".join(answer.split())
            classes.append(numbers.setdefault(text, len(numbers) + 1))
    return classes


def paired_difference(
    ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]
) -> tuple[float, float, float]:
    """Returns ours minus theirs and the ends of its 95 % interval: (difference, low, high).

    Each is (total [P], count [P]) of the same problems in the same order. The interval holds the
    middle 95 % of the differences over resamples of the problems, the same ones for both."""
    problems = evaluate.bootstrap_draws(len(ours[0]))  # [resamples, P]; the first is the sample
    means = [
        total.double()[problems].sum(1) / count.double()[problems].sum(1)
        for total, count in (ours, theirs)
    ]
    difference = means[0] - means[1]
    # A resample in which nothing was measured (--kl-samples below the problems) is nan: left out.
    ends = difference.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return difference[0].item(), *ends.tolist()


# --------------------------------------------------------------------------------------------------
# Runs


@dataclass(frozen=True)
class Run:
    """A finished evaluation, its P problems sorted by id."""

    name: str
    metrics: dict[str, list[float | None]]  # [value, standard error]
    settings: dict[str, Any]
    base: str | None  # fingerprint of the model that the KL is measured to
    problems: list[tuple[str, str, str]]  # (id, problem, answer)
    classes: list[list[int]]  # of each problem's responses, see `answer_classes`
    kl: tuple[Tensor, Tensor] | None  # [P] nats summed over the [P] responses measured

    @property
    def correct(self) -> tuple[Tensor, Tensor]:
        """Correct responses [P], and all responses [P]."""
        correct = torch.tensor([float(c.count(0)) for c in self.classes])
        return correct, torch.tensor([float(len(c)) for c in self.classes])


def load_run(folder: Path) -> Run:
    """Reads the output folder of evaluate.py. Raises UserError naming the folder or file."""
    if not (folder / "metrics.json").is_file():
        raise UserError(f"{folder}: not a finished evaluation (no metrics.json); run evaluate.py")
    try:
        return read_run(folder)
    except (KeyError, TypeError, IndexError) as error:
        reason = f"{type(error).__name__} {error}"
        raise UserError(f"{folder}: not an output of evaluate.py, or damaged ({reason})") from None


def read_run(folder: Path) -> Run:
    """Reads the files of a finished evaluation and sums over the responses of each problem."""
    summary, record = read_json(folder / "metrics.json"), read_json(folder / "args.json")
    rows = evaluate.read_jsonl(folder / "problems.jsonl")
    problems = sorted((row["id"], row["problem"], row["answer"]) for row in rows)
    place = {key: i for i, (key, _, _) in enumerate(problems)}
    samples = evaluate.read_jsonl(folder / "samples.jsonl")
    index = [place[sample["id"]] for sample in samples]  # the problem of each response
    responses: list[list[tuple[float, str | None]]] = [[] for _ in problems]
    for i, sample in zip(index, samples, strict=True):
        responses[i].append((sample["reward"], sample["answer"]))
    if not all(responses):
        raise UserError(f"{folder / 'samples.jsonl'}: has no response to some problem; run again")
    kl = None
    if (folder / "kl.safetensors").is_file():
        arrays, _ = load_tensors(folder / "kl.safetensors")
        measured = torch.tensor(index)[arrays["response"]]
        total = evaluate.by_problem(arrays["kl"], measured, len(problems))
        kl = total, evaluate.by_problem(torch.ones(len(measured)), measured, len(problems))
    return Run(
        name=str(folder),
        metrics=summary["metrics"],
        settings={name: record["args"].get(name) for name in SETTINGS},
        base=record["inputs"].get("base"),
        problems=problems,
        classes=[answer_classes(group) for group in responses],
        kl=kl,
    )


def compare(ours: Run, theirs: Run) -> tuple[list[str], list[str]]:
    """Returns the cells "ours minus theirs" for accuracy and KL, and notes on their meaning.

    Raises UserError where the two are of other problems."""
    if different := set(ours.problems) ^ set(theirs.problems):
        raise UserError(
            f"{ours.name} and {theirs.name} are of other problems: {len(different)} are in one of "
            f"them only, for example id '{min(different)[0]}'; evaluate both on the same file"
        )
    notes = [
        f"{name} is {ours.settings[name]!r} in {ours.name} and {value!r} in {theirs.name}"
        for name, value in theirs.settings.items()
        if ours.settings[name] != value
    ]
    cells = [interval(paired_difference(ours.correct, theirs.correct)), "n/a"]
    if ours.kl and theirs.kl and ours.base != theirs.base:
        notes.append(f"the KL of {ours.name} is to another base than that of {theirs.name}")
    elif ours.kl and theirs.kl:
        cells[1] = interval(paired_difference(ours.kl, theirs.kl))
    return cells, notes


# --------------------------------------------------------------------------------------------------
# Tables


def cell(value: float | None, error: float | None) -> str:
    """Formats value ± standard error."""
    if value is None:
        return "n/a"
    digits = 0 if abs(value) >= 100 else 3
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def interval(difference: tuple[float, float, float]) -> str:
    """Formats a difference with the ends of its interval."""
    value, low, high = (0.0 + round(x, 3) for x in difference)  # 0.0 + : no -0.000
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def metric_rows(runs: list[Run]) -> list[list[str]]:
    """Returns the head and one row per run: its name, and every number with its standard error."""
    counts = [len(classes) for one in runs for classes in one.classes]
    k = 2 ** (min(counts).bit_length() - 1)
    names = ["accuracy", f"pass@{k}", f"maj@{k}", "mean_length", "truncated", "kl", "kl_efficiency"]
    rows = [["run", *(name.replace("_", " ") for name in names)]]
    for one in runs:
        majority: tuple[float | None, float | None] = (None, None)
        if max(counts) <= MAX_SAMPLES:
            chances = torch.tensor([majority_at_k(classes, k) for classes in one.classes])
            majority = evaluate.mean_over_problems(chances, torch.ones(len(chances)))
        metrics = one.metrics | {f"maj@{k}": majority}
        rows.append([one.name, *(cell(*metrics.get(name, (None, None))) for name in names)])
    return rows


def table(rows: list[list[str]], markdown: bool) -> str:
    """Lays out the rows, the first of them as head, in columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    padded = [[text.ljust(width) for text, width in zip(r, widths, strict=True)] for r in rows]
    if markdown:
        return "\n".join("| " + " | ".join(row) + " |" for row in padded)
    return "\n".join("  ".join(row).rstrip() for row in padded)


def main(args: Args) -> None:
    if not args.runs:
        raise UserError("no runs: name at least one output folder of evaluate.py")
    against = args.against or args.runs[0]
    folders = list(dict.fromkeys([*args.runs, against]))
    runs = {folder: load_run(folder) for folder in folders}
    theirs = runs[against]
    differences = [[f"minus {theirs.name}", "accuracy", "kl"]]
    notes = []
    for ours in (one for one in runs.values() if one is not theirs):
        cells, remarks = compare(ours, theirs)
        differences.append([ours.name, *cells])
        notes += remarks
    print(table(metric_rows(list(runs.values())), args.markdown))
    if len(runs) > 1:
        print("\nDifferences with their 95 % intervals, paired by problem\n")
        print(table(differences, args.markdown))
    for note in notes:
        print(f"\nnote: {note}")


if __name__ == "__main__":
    run(main, Args, __doc__)
