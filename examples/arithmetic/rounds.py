"""One table of policies that followed from one another: accuracy, KL from the first, KL of a step.

Reads   evaluations by evaluate.py of the same problems (--judged, the base first), all but the
        base's with their KL to that same base.

Writes  OUTPUT.json and OUTPUT.md. --step A:B measures also the KL of A from the model of B, on the
        responses that A has (JUDGED/A/from_B/ keeps it). --pair A:B compares the two: A minus B, a
        paired bootstrap over problems.

    python examples/arithmetic/rounds.py --output rounds/table --judged judged/base judged/round1 \\
        judged/round2 --step round2:round1 --pair round2:round1
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common
import evaluate
from common import UserError

COLUMNS = ("accuracy", "pass@8", "kl", "kl_efficiency", "entropy", "mean_length")
TITLES = ("accuracy", "pass@8", "KL from the base", "KL efficiency", "entropy", "length")


@dataclass
class Args:
    judged: tuple[Path, ...]
    """folders of evaluate.py; their names are the policies', the first is the base"""
    output: Path
    """name of the table, without .json and .md"""
    step: tuple[str, ...] = ()
    """A:B, measure also the KL of A from B; names of --judged"""
    pair: tuple[str, ...] = ()
    """A:B, compare A with B; names of --judged"""

    def check(self) -> None:
        """Raises UserError on names that are not among --judged."""
        names = [folder.name for folder in self.judged]
        for flag in ("step", "pair"):
            for both in getattr(self, flag):
                if len(both.split(":")) != 2 or not set(both.split(":")) <= set(names):
                    raise UserError(f"--{flag} {both}: must be A:B, two of {' '.join(names)}")

    @property
    def folders(self) -> dict[str, Path]:
        """{name: folder}."""
        return {folder.name: folder for folder in self.judged}


def step_metrics(folder: Path, start: Path) -> dict[str, Any]:
    """KL and its efficiency of the policy in `folder` from that in `start`: {name: [value, se]}."""
    model, base = (common.read_json(f / "metrics.json")["model"] for f in (folder, start))
    rollouts, output = common.load_rollouts(folder), folder / f"from_{start.name}"
    if (output / "kl.safetensors").is_file():
        kl = common.load_tensors(output / "kl.safetensors", {})[0]
    else:
        args = evaluate.Args(model, folder / "problems.jsonl", output, base)
        kl = evaluate.measure_kl(args, rollouts, common.setup_ranks())
    metrics = evaluate.collect_metrics(rollouts, kl, common.load_rollouts(start))
    return {name: metrics[name] for name in ("kl", "kl_efficiency")}


def accuracy_difference(ours: Path, theirs: Path) -> list[float]:
    """Accuracy of ours minus theirs, with a 95 % interval: [difference, low, high]."""
    sums = []
    for folder in (ours, theirs):
        rollouts = common.load_rollouts(folder)
        n = len(common.read_jsonl(folder / "problems.jsonl"))
        values = (rollouts.rewards, torch.ones_like(rollouts.rewards))
        sums.append(tuple(evaluate.by_problem(v, rollouts.problem_index, n) for v in values))
    return list(evaluate.paired_difference(*sums))


def check_problems(folders: dict[str, Path]) -> None:
    """Raises UserError where the evaluations are not of the same problems and the same base."""
    (first, *others), found = folders, {}
    for name, folder in folders.items():
        inputs = common.read_json(folder / "args.json")["inputs"]
        found[name] = (inputs["problems"], inputs["model" if name == first else "base"])
    for name in others:
        if found[name] != found[first]:
            raise UserError(f"--judged {folders[name]}: other problems or another base than "
                            f"{folders[first]}; evaluate it with --base and --base-run of it"
                            )  # fmt: skip


def cell(value: float | None, error: float | None, digits: int = 3) -> str:
    """value ± standard error."""
    if value is None:
        return "n/a"
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def markdown(table: dict[str, Any]) -> str:
    """The rows, then the pairs."""
    heads = ["policy", *TITLES, "KL of the step", "its efficiency"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in table["rows"]:
        cells = [cell(*row[name]) for name in COLUMNS]
        step = row["step"]
        after = [""] * 2
        if step:
            after = [f"{cell(*step['kl'])} (from {step['from']})", cell(*step["kl_efficiency"])]
        lines.append("| " + " | ".join([row["name"], *cells, *after]) + " |")
    if table["pairs"]:
        lines += ["", "| policy | minus | accuracy: difference | 95 % interval |", "|---" * 4 + "|"]
    for pair in table["pairs"]:
        difference, low, high = pair["accuracy"]
        lines.append(f"| {pair['policy']} | {pair['minus']} | {difference:+.4f} "
                     f"| {low:+.4f} to {high:+.4f} |")  # fmt: skip
    settings = table["settings"]
    lines += ["", f"{table['problems']} held-out problems x {settings['n']} samples, temperature "
              f"{settings['temperature']}, top-p {settings['top_p']}, at most "
              f"{settings['max_new_tokens']} tokens, sampling seed {settings['seed']}; ±: standard "
              "error over problems."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main(args: Args) -> None:
    args.check()
    folders = args.folders
    check_problems(folders)
    steps = dict(both.split(":") for both in args.step)
    rows = []
    for name, folder in folders.items():
        summary = common.read_json(folder / "metrics.json")
        row = {"name": name, "model": summary["model"], "step": None}
        row |= {key: summary["metrics"].get(key, [None, None]) for key in COLUMNS}
        if name in steps:
            row["step"] = {"from": steps[name]} | step_metrics(folder, folders[steps[name]])
        rows.append(row)
    pairs = [
        {"policy": a, "minus": b, "accuracy": accuracy_difference(folders[a], folders[b])}
        for a, b in (both.split(":") for both in args.pair)
    ]
    table = {"rows": rows, "pairs": pairs, "problems": summary["problems"],
             "settings": summary["sampling"]}  # fmt: skip
    common.write_json(args.output.with_suffix(".json"), table)
    text = markdown(table)
    with common.atomic(args.output.with_suffix(".md")) as temporary:
        temporary.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    common.run(main, Args, __doc__)
