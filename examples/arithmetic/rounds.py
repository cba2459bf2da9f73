"""Writes one table of policies that followed from one another: accuracy, and KL from the first.

Reads   evaluations by evaluate.py of the same problems (--judged, the base first), all but the
        base's with their KL from that same base.
Writes  OUTPUT.json and OUTPUT.md. --step A:B also measures the KL of A from the model of B, on the
        responses that A has, and keeps it in JUDGED/A/from_B/. --pair A:B compares the two, A minus
        B, by a paired bootstrap over problems.

    python examples/arithmetic/rounds.py --output rounds/table --judged judged/base judged/round1 \\
        judged/round2 --step round2:round1 --pair round2:round1
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import compare_runs
import report
from report_page import number

import common
import evaluate
from common import UserError

COLUMNS = {  # name in metrics.json: title
    "accuracy": "accuracy",
    "pass@8": "pass@8",
    "kl": "KL from the base",
    "kl_efficiency": "KL efficiency",
    "entropy": "entropy",
    "mean_length": "length",
}


@dataclass
class Args:
    judged: tuple[Path, ...]
    """folders of evaluate.py; their names are the policies', and the first is the base"""
    output: Path
    """name of the table, without .json and .md"""
    step: tuple[str, ...] = ()
    """A:B, also measure the KL of A from B; names of --judged"""
    pair: tuple[str, ...] = ()
    """A:B, compare A with B; names of --judged"""

    def check(self) -> None:
        """Raises UserError on names that are not among --judged."""
        common.require(self, "judged", bool, "at least one folder")
        for flag in ("step", "pair"):
            for both in getattr(self, flag):
                if len(both.split(":")) != 2 or not set(both.split(":")) <= self.folders.keys():
                    raise UserError(
                        f"--{flag} {both}: must be A:B, two of {' '.join(self.folders)}"
                    )

    @property
    def folders(self) -> dict[str, Path]:
        """{name: folder}."""
        return {folder.name: folder for folder in self.judged}


def step_metrics(folder: Path, start: Path) -> dict[str, Any]:
    """Measures KL and efficiency of the policy in `folder` from the one in `start`.

    Returns {name: [value, standard error]}."""
    model, base = (common.read_json(f / "metrics.json")["model"] for f in (folder, start))
    rollouts, output = common.load_rollouts(folder), folder / f"from_{start.name}"
    if (output / "kl.safetensors").is_file():
        kl = common.load_tensors(output / "kl.safetensors")[0]
    else:
        args = evaluate.Args(model, folder / "problems.jsonl", output, base)
        kl = evaluate.measure_kl(args, rollouts, common.setup_ranks())
    metrics = evaluate.collect_metrics(rollouts, kl, common.load_rollouts(start))
    return {name: metrics[name] for name in ("kl", "kl_efficiency")}


def accuracy_difference(ours: Path, theirs: Path) -> list[float]:
    """Computes the accuracy of ours minus theirs: [difference, ends of its 95 % interval]."""
    pairs = []
    for folder in (ours, theirs):
        found = report.load_evaluation(folder, folder.name)
        pairs.append((torch.tensor(found.correct), torch.tensor(found.count)))
    return list(compare_runs.paired_difference(*pairs))


def check_problems(folders: dict[str, Path]) -> None:
    """Raises UserError where the evaluations are not of the same problems and the same base."""
    (first, *others), found = folders, {}
    for name, folder in folders.items():
        inputs = common.read_json(folder / "args.json")["inputs"]
        found[name] = (inputs["problems"], inputs.get("model" if name == first else "base"))
    for name in others:
        if found[name] != found[first]:
            what = f"other problems or another base than {folders[first]}"
            raise UserError(f"--judged {folders[name]}: {what}; evaluate it against that one")


def markdown(table: dict[str, Any]) -> str:
    """Writes the table of the policies, then that of the pairs."""
    heads = ["policy", *COLUMNS.values(), "KL of the step", "its efficiency"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in table["rows"]:
        cells, step = [number(*row[name]) for name in COLUMNS], row["step"]
        after = ["", ""]
        if step:
            after = [f"{number(*step['kl'])} (from {step['from']})", number(*step["kl_efficiency"])]
        lines.append("| " + " | ".join([row["name"], *cells, *after]) + " |")
    if table["pairs"]:
        lines += ["", "| policy | minus | accuracy: difference | 95 % interval |", "|---" * 4 + "|"]
    for pair in table["pairs"]:
        difference, low, high = pair["accuracy"]
        both = f"{pair['policy']} | {pair['minus']}"
        lines.append(f"| {both} | {difference:+.4f} | {low:+.4f} to {high:+.4f} |")
    s = table["settings"]
    note = (
        f"{table['problems']} held-out problems x {s['n']} samples, temperature "
        f"{s['temperature']}, top-p {s['top_p']}, at most {s['max_new_tokens']} tokens, sampling "
        f"seed {s['seed']}; ± is one standard error over problems."
    )
    return "\n".join([*lines, "", note]) + "\n"


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
    pairs = []
    for a, b in (both.split(":") for both in args.pair):
        difference = accuracy_difference(folders[a], folders[b])
        pairs.append({"policy": a, "minus": b, "accuracy": difference})
    table = {"rows": rows, "pairs": pairs, "problems": summary["problems"]}
    table["settings"] = summary["sampling"]
    common.write_json(args.output.with_suffix(".json"), table)
    text = markdown(table)
    with common.atomic(args.output.with_suffix(".md")) as temporary:
        temporary.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    common.run(main, Args, __doc__)
