"""Averages over seeds what run.sh of an example measured: docs/results.md, docs/results.json.

Reads   RUN/summary.json of each run folder; with --earlier also what an older OUTPUT.json has of
        other seeds, for runs on several machines.
Writes  OUTPUT.md, Markdown tables with the mean over the runs and, behind ±, their standard
        deviation; OUTPUT.json, {"seeds": {seed: {"policies", "best_student", "claims", "settings",
        "above_rivals_at_equal_kl"}}}: the rows of summary.json, and what the example is to show.

    python examples/arithmetic/seeds.py --runs runs/arithmetic/seed1 runs/arithmetic/seed2
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import report_page

import common
from common import UserError

COLUMNS = {
    "accuracy": ("accuracy", "{:.3f}"),
    "pass_at_8": ("pass@8", "{:.3f}"),  # one of the two, see report_page.pass_shown
    "pass_at_4": ("pass@4", "{:.3f}"),
    "kl": ("KL, nats", "{:.2f}"),
    "kl_efficiency": ("KL efficiency", "{:.2f}"),
    "optimum_share": ("optimum share", "{:.2f}"),
    "entropy": ("entropy", "{:.3f}"),
    "mean_length": ("length", "{:.1f}"),
}

RIVALS = ("sft", "ce_gentle", "mse", "grpo", "sapo", "temperature")  # each stopped early or not


@dataclass
class Args:
    runs: tuple[Path, ...]
    """folders of examples/arithmetic/run.sh"""
    earlier: Path | None = None
    """an OUTPUT.json of before; its seeds that are not among --runs come first"""
    output: Path | None = None
    """where to write OUTPUT.md and OUTPUT.json; default: print the tables only"""
    best: str = "student_mixed"
    """student that is compared with the rivals, named on seed 0 before the other seeds were run"""


def spread(values: list[float | None], form: str) -> str:
    """Writes mean ± standard deviation over seeds; n/a where a seed has no value."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "n/a"
    mean = form.format(statistics.mean(known))
    if len(known) == 1:  # no spread to speak of
        return mean
    return f"{mean} ± {form.replace('+', '').format(statistics.stdev(known))}"


def policies_table(results: dict[str, dict], passed: str) -> list[str]:
    """Writes one row for each policy that every seed has; passed: which pass@k is shown."""
    tables = [{row["name"]: row for row in found["policies"]} for found in results.values()]
    hidden = {"pass_at_8", "pass_at_4"} - {passed}
    columns = {key: column for key, column in COLUMNS.items() if key not in hidden}
    lines = ["| policy | " + " | ".join(title for title, _ in columns.values()) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, first in tables[0].items():
        if all(name in table for table in tables):
            cells = [
                spread([t[name].get(key) for t in tables], form)
                for key, (_, form) in columns.items()
            ]
            lines.append(f"| {first.get('label') or name} | " + " | ".join(cells) + " |")
    return lines


def signals_table(summaries: list[dict]) -> list[str]:
    """Writes one row for each signal that every run has."""
    tables = [{row["name"]: row for row in summary["signals"]} for summary in summaries]
    lines = ["| signal | AUC against the verdict | credit AUC |", "|---|---|---|"]
    for name in tables[0]:
        if all(name in table for table in tables):
            keys = ("auc", "credit_auc")
            cells = [spread([table[name][key] for table in tables], "{:.3f}") for key in keys]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def ranks(values: list[float]) -> list[int]:
    """Returns the place of each value in their order; ties have none here."""
    return [sorted(values).index(value) for value in values]


def forecast_table(results: dict[str, dict]) -> list[str]:
    """Writes forecast and measurement of every student that has a forecast, a column for a seed."""
    tables = [{row["name"]: row for row in found["policies"]} for found in results.values()]
    names = [n for n in tables[0] if all("forecast_kl" in t.get(n, {}) for t in tables)]
    heads = [f"seed {seed}: forecast, measured" for seed in results]
    lines = ["| student | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    form = "{forecast_accuracy:.3f} at {forecast_kl:.2f}, {accuracy:.3f} at {kl:.2f}"
    for name in names:
        cells = [form.format(**table[name]) for table in tables]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    pairs = [(t[n]["forecast_accuracy"], t[n]["accuracy"]) for n in names for t in tables]
    if len(pairs) > 2:
        found = statistics.correlation(*map(ranks, map(list, zip(*pairs, strict=True))))
        lines += ["", f"Rank correlation of the {len(pairs)} accuracies: {found:.2f}."]
    return lines


def comparisons(summaries: list[dict], kind: str) -> dict[tuple[str, str], list[dict]]:
    """Returns {(student, rival): its row of every run}, for the comparisons that all runs have."""
    tables = [
        {(row["student"], row["against"]): row for row in s["comparisons"] if row["kind"] == kind}
        for s in summaries
    ]
    return {k: [t[k] for t in tables] for k in tables[0] if all(k in table for table in tables)}


def paths_table(summaries: list[dict]) -> list[str]:
    """Compares students with stage 1 stopped early, at equal KL and at equal accuracy."""
    heads = "accuracy at equal KL: student minus it | KL at equal accuracy: it over student"
    lines = [f"| student | stage 1 stopped early | {heads} |", "|---|---|---|---|"]
    for (student, rival), rows in comparisons(summaries, "path").items():
        gain = spread([row["accuracy_difference"] for row in rows], "{:+.3f}")
        reached = [row["kl_ratio"] for row in rows if row["kl_ratio"] is not None]
        ratio = spread(reached, "{:.2f}")
        if len(reached) < len(rows):
            never = f"never reached in {len(rows) - len(reached)} of {len(rows)}"
            ratio = f"{ratio}; {never}" if reached else never
        lines.append(f"| {student} | {rival} | {gain} | {ratio} |")
    return lines


def ends_table(summaries: list[dict]) -> list[str]:
    """Compares students with what stage 1 ended with, by a paired bootstrap in each run."""
    heads = "accuracy: difference | lower in | pass@8: difference | KL: it over student"
    lines = [f"| student | end of | {heads} |", "|---|---|---|---|---|---|"]
    kinds = {row["name"]: row["kind"] for row in summaries[0]["policies"]}
    for (student, rival), rows in comparisons(summaries, "policy").items():
        if kinds.get(rival) != "stage1":
            continue
        lower = sum(row["accuracy_difference_ci"][1] < 0 for row in rows)  # 95 % interval
        cells = [
            spread([row["accuracy_difference"] for row in rows], "{:+.3f}"),
            f"{lower} of {len(rows)}",
            spread([row["pass_at_8_difference"] for row in rows], "{:+.3f}"),
            spread([row["kl_ratio"] for row in rows], "{:.2f}"),
        ]
        lines.append(f"| {student} | {rival} | " + " | ".join(cells) + " |")
    return lines


def claims(summary: dict, best_name: str) -> dict[str, float | None]:
    """Measures on one run what the example is to show: {what: value}; only of policies it has."""
    rows = {row["name"]: row for row in summary["policies"]}
    base, best, passed = rows["base"], rows[best_name], report_page.pass_shown(summary["settings"])
    cooler = [row["accuracy"] for name, row in rows.items() if name.startswith("temperature-")]
    found = {"best temperature: gain": max(cooler, default=0.0) - base["accuracy"]}
    for row in summary["comparisons"]:
        if row["student"] == best_name and row["kind"] == "path" and row["against"] in RIVALS:
            found[f"above {row['against']} at equal KL"] = row["accuracy_difference"]
            found[f"above {row['against']} at equal KL, low end"] = row["accuracy_difference_ci"][0]
    found |= {"best student: accuracy": best["accuracy"], "its share": best["optimum_share"]}
    if "student_unlearned" in rows:
        unlearned = rows["student_unlearned"]
        found["student of unlearned: accuracy"] = unlearned["accuracy"]
        found["student of unlearned: share"] = unlearned["optimum_share"]
    if {"sapo", "student_ruined"} <= rows.keys():
        found["ruined teacher: accuracy"] = rows["sapo"]["accuracy"]
        found["student of ruined: gain"] = rows["student_ruined"]["accuracy"] - base["accuracy"]
    if {"ce", "student_strong"} <= rows.keys():
        strong, teacher = rows["student_strong"], rows["ce"]
        found["student of strong minus its teacher"] = strong["accuracy"] - teacher["accuracy"]
        found["KL of student of strong / of its teacher"] = strong["kl"] / teacher["kl"]
    students = [row[passed] for row in rows.values() if row["kind"] == "student"]
    if None not in students:
        name = passed.replace("_at_", "@")
        found[f"lowest {name} of a student minus the base's"] = min(students) - base[passed]
    return found


def result(summary: dict, best: str) -> dict:
    """Makes what OUTPUT.json has of one run. Raises UserError if it has no such student."""
    names = [row["name"] for row in summary["policies"] if row["kind"] == "student"]
    if best not in names:
        raise UserError(f"--best {best}: the students of a run are {', '.join(names) or 'none'}")
    found = claims(summary, best)
    low = [value for name, value in found.items() if name.endswith("low end")]
    return {
        "policies": summary["policies"],
        "best_student": best,
        "above_rivals_at_equal_kl": bool(low)
        and all(value is not None and value > 0 for value in low),
        "claims": found,
        "settings": {k: v for k, v in summary["settings"].items() if k != "seed"},
    }


def check_alike(results: dict[str, dict], args: Args) -> None:
    """Raises UserError if seeds name other best students, or were judged in other ways."""
    *_, last = results.values()
    for seed, found in results.items():
        if found["best_student"] != args.best:
            why = f"seed {seed} has the best student {found['best_student']}, not {args.best}"
            raise UserError(f"--earlier {args.earlier}: {why}; give --best the same, or leave it")
        if found.get("settings", last["settings"]) != last["settings"]:  # older files have none
            what = f"seed {seed} was judged otherwise: {found['settings']}, not {last['settings']}"
            raise UserError(f"{what}; average seeds of equal settings")


def claims_table(results: dict[str, dict]) -> list[str]:
    """Writes one row for each number of `claims`, a column for each seed."""
    lines = [f"| | {' | '.join(f'seed {seed}' for seed in results)} |"]
    lines.append("|---" * (len(results) + 1) + "|")
    for name in next(reversed(results.values()))["claims"]:
        values = [found["claims"].get(name) for found in results.values()]
        cells = ["n/a" if value is None else f"{value:.3f}" for value in values]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main(args: Args) -> None:
    summaries = [common.read_json(run / "summary.json") for run in args.runs]
    results = common.read_json(args.earlier)["seeds"] if args.earlier else {}
    ours = {str(s["settings"]["seed"]): result(s, args.best) for s in summaries}
    results = {seed: found for seed, found in results.items() if seed not in ours} | ours
    check_alike(results, args)
    settings = summaries[0]["settings"]
    title = (
        f"Mean ± standard deviation over {len(results)} seeds (fresh problems and a fresh base "
        f"each); {settings['problems']} held-out problems x {settings['samples']} samples (of "
        f"a temperature {settings['temperature_samples']}, of a checkpoint "
        f"{settings['checkpoint_samples']}), KL on {settings['kl_responses']} responses or more, "
        f"temperature {settings['temperature']}, top-p {settings['top_p']}, at most "
        f"{settings['max_new_tokens']} tokens."
    )
    passed = report_page.pass_shown(settings)
    lines = [title, "", *policies_table(results, passed), "", *claims_table(results)]
    lines += ["", *forecast_table(results)]
    if len(ours) < len(results):  # an OUTPUT.json has no comparisons
        lines += ["", f"The tables below are of seed {', '.join(ours)} only."]
    for table in (signals_table, paths_table, ends_table):
        lines += ["", *table(summaries)]
    command = f"python examples/arithmetic/seeds.py --best {args.best} --runs "
    command += " ".join(run.name for run in args.runs)
    command += f" --earlier {args.earlier.name}" if args.earlier else ""
    lines += ["", f"Made by `{command}`."]
    text = "\n".join(lines) + "\n"
    if args.output:
        with common.atomic(args.output.with_suffix(".md")) as temporary:
            temporary.write_text(text)
        common.write_json(args.output.with_suffix(".json"), {"seeds": results})
    print(text, end="")


if __name__ == "__main__":
    common.run(main, Args, __doc__)
