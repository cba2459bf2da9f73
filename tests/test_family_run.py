"""examples/family/run.sh in small: one variant of each factor; continued; with a failure."""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import compare
import numpy as np
import pytest
import report
import tyro
import variants

import common
import stage2_distill

ROOT = Path(__file__).resolve().parents[1]
RUN = [sys.executable, "examples/family/variants.py", "--quick", "--seed", "3", "--run"]


def make(run: Path, *flags: str) -> str:
    """variants.py --quick -> what it printed; its steps' logs where it failed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*RUN, str(run), *flags], cwd=ROOT, env=environment, text=True, capture_output=True
    )
    logs = "".join(f.read_text()[-1000:] for f in run.glob("logs/*/*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return done.stdout


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick run of all parts."""
    run = tmp_path_factory.mktemp("family") / "seed3"
    make(run)
    return run


def test_run_and_its_comparison(seed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not list(seed.glob("failed/*/*"))
    students = {folder.name for folder in (seed / "students").iterdir()}
    assert students == set(variants.QUICK)
    longer = {folder.name for folder in (seed / "curve/ce_gentle_longer").iterdir()}
    assert longer == {"epoch-003.000", "epoch-004.000"}
    spent = common.read_json(seed / "seconds.json")
    assert list(spent) == list(variants.PARTS)
    recorded = common.read_json(seed / "students" / "no_floor" / "args.json")["args"]
    assert (recorded["signal_floor"], recorded["signal_scale"]) == (0, 8)  # the default but one
    assert (recorded["kl_budget"], recorded["kl_budget_action"]) == (2, "rollback")

    output = seed.parent / "results.md"
    compare.main(compare.Args((seed,), output, resamples=40))
    text, printed = output.read_text(), capsys.readouterr().out
    for name in variants.QUICK:
        accuracy = common.read_json(seed / f"eval/student_{name}/metrics.json")["metrics"]
        row = next(line for line in text.splitlines() if f" | {name} | " in line)
        assert f"| {accuracy['accuracy'][0]:.3f} |" in row and row in printed
    column = text[text.index("| # |") :].splitlines()[0].split(" | ").index("minus the default")
    default = next(line for line in text.splitlines() if " | mse_unlearned | " in line)
    assert default.split(" | ")[column : column + 2] == ["", ""]  # beside itself: nothing
    assert "| grpo | not made |" in text  # the variants that --quick leaves out
    assert "| ce_gentle | " in text.split("own early-stopping curve")[1]
    for figure in ("accuracy_kl", "efficiency"):
        assert (seed.parent / f"results_{figure}.png").stat().st_size > 10_000


@pytest.mark.parametrize(("right", "beside_zero"), [(1, "(1 / 0)"), (0, "(0 / 1)")])
def test_minus_the_default(
    seed: Path, monkeypatch: pytest.MonkeyPatch, right: int, beside_zero: str
) -> None:
    """Of a student that is always right, or never: the signs, and the side that is counted."""
    evaluations, paths = report.load_run(seed)
    student, default = (evaluations[f"student_{n}"] for n in ("no_floor", "mse_unlearned"))
    assert 0 < default.correct.sum() < default.count.sum()
    evaluations[student.name] = dataclasses.replace(student, correct=student.count * right)
    monkeypatch.setattr(report, "load_run", lambda run: (evaluations, paths))
    row = compare.load_seed(seed, compare.Args((seed,), resamples=100)).students["no_floor"]
    accuracy = right - default.correct.sum() / default.count.sum()
    kl, its_kl = (e.summary["metrics"]["kl"][0] for e in (student, default))
    assert abs(kl - its_kl) > 0.01, "alike: no sign to be seen"
    expected = [f"{accuracy:+.3f} {beside_zero}", f"{kl - its_kl:+.2f}"]
    assert compare.against_default([row]) == expected
    assert compare.against_default([row, {}])[0] == expected[0]  # a seed without a default


def policy(name: str, accuracy: float, kl: float | None) -> report.Evaluation:
    """100 problems x 10 responses of one rate and one KL each: differences without any error."""
    metrics = {"accuracy": [accuracy, 0.0]} | ({"kl": [kl, 0.0]} if kl is not None else {})
    count = np.full(100, 10.0)
    return report.Evaluation(
        name, Path(name), {"metrics": metrics, "model": name}, [(str(i), "") for i in range(100)],
        count * accuracy, count, None if kl is None else count * kl, None if kl is None else count,
    )  # fmt: skip


def test_student_against_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: linear between checkpoints, the longer ones behind them, the best where several
    objectives are compared; and who is beyond the end of a curve."""
    base = policy("base", 0.5, None)
    two = {0.5: policy("epoch-000.500", 0.6, 0.2), 2.0: policy("epoch-002.000", 0.7, 0.4)}
    four = {4.0: policy("epoch-004.000", 0.8, 0.8)}
    other = {2.0: policy("epoch-002.000", 0.66, 1.0)}
    paths = {"base": {0.0: base}, "mse": two, "mse_longer": four, "nft": other}
    students = [policy("student_mse", 0.85, 0.6), policy("student_nft", 0.5, 1.5)]
    monkeypatch.setattr(
        report, "load_run", lambda run: ({e.name: e for e in [base, *students]}, paths)
    )
    monkeypatch.setattr(common, "load_rollouts", lambda folder: None)
    budgets = {"mse": 2, "nft": 1}  # at a proxy of 1.5: one beyond it
    for name, budget in budgets.items():
        folder = tmp_path / "students" / name
        common.write_json(folder / "args.json", {"args": {"signals": None, "kl_budget": budget}})
        common.write_jsonl(folder / "metrics.jsonl", [{"kl_proxy": 1.5}, {"step": 2}])
    seed = compare.load_seed(tmp_path, compare.Args((tmp_path,), resamples=20))
    # At 0.6 nats half-way between 0.7 and 0.8; of the others, 0.6 of the way from 0.5 to 0.66.
    assert seed.own["mse"]["accuracy_difference"] == pytest.approx(0.85 - 0.75)
    assert seed.students["mse"]["gain"] == pytest.approx(0.85 - 0.75)
    # Beyond 1 nat nft's curve has its best; the longer mse is better.
    assert seed.own["nft"]["accuracy_difference"] == pytest.approx(0.5 - 0.66)
    assert seed.students["nft"]["gain"] == pytest.approx(0.5 - 0.8)
    assert [seed.own[n]["beyond"] for n in ("mse", "nft")] == [False, True]
    assert [seed.students[n]["over_budget"] for n in ("mse", "nft")] == [False, True]
    cells = {row.split(" | ")[0][2:]: row.split(" | ") for row in compare.own_curve_table([seed])}
    # The teacher that the student learnt from had two epochs.
    assert cells["mse"][1:] == ["0.700", "0.40", "0.850", "0.60", "+0.100", "[+0.100, +0.100]",
                                "1 / 0", "", "never reached |"]  # fmt: skip
    assert cells["nft"][1:6] == ["0.660", "1.00", "0.500", "1.50", "-0.160"]
    assert cells["nft"][6:] == ["[-0.160, -0.160]", "0 / 1", "1", "0.00 |"]
    assert "not made" in cells["sapo"][1]
    table = {row.split(" | ")[1]: row.split(" | ") for row in compare.students_table([seed])}
    column = table["variant"].index("over budget")
    assert [table[name][column] for name in ("mse", "nft")] == ["", "1"]


def test_blame_equals_brute_force(seed: Path) -> None:
    """Token by token: which first wrong ones is the student asked to lower, and which others?"""
    rollouts, anything = common.load_rollouts(seed / "rollouts"), 0
    for name in ("mse_unlearned", "ce_gentle"):
        student = seed / "students" / name
        flags = common.read_json(student / "args.json")["args"]
        arrays = common.load_tensors(Path(flags["signals"]), {})[0]
        target = stage2_distill.bounded_target(arrays["signal"], arrays["base_logprobs"], **flags)
        firsts, found = 0, 0
        for s, first in enumerate(rollouts.first_wrong_token.tolist()):
            if rollouts.rewards[s] == 0 and first > 0:
                firsts += 1
                found += bool(target[rollouts.cu_seqlens[s] + first] < 0)
        asked = int((target < 0).sum())
        anything += found
        expected = {"found": found / firsts, "guilty": found / max(1, asked)}
        assert compare.blame(student, rollouts) == pytest.approx(expected)
    assert anything, "no student is asked to lower any first wrong token: nothing was compared"
    assert compare.blame(seed / "students" / "absent", rollouts) == {}


def test_what_is_there_is_not_made_again_and_a_failure_is_shown(seed: Path, tmp_path: Path) -> None:
    run = shutil.copytree(seed, tmp_path / "seed3", symlinks=True)
    kept = run / "students" / "mse_unlearned" / "model.safetensors"
    before = kept.stat().st_mtime_ns
    # The recorded paths are those of the first folder; a copy is a run with other settings.
    printed = make(run, "--part", "signals")
    assert "mse_unlearned: FAILED" in printed and "other settings" in printed
    assert kept.stat().st_mtime_ns == before
    shutil.rmtree(run / "eval" / "student_mse_unlearned")
    compare.main(compare.Args((seed, run), tmp_path / "results.md", resamples=40))
    row = next(line for line in (tmp_path / "results.md").read_text().splitlines()
               if " | mse_unlearned | " in line)  # fmt: skip
    assert " | 1 (failed in signals: error: --output " in row


def test_same_command_has_nothing_to_do(seed: Path) -> None:
    models = {f: f.stat().st_mtime_ns for f in seed.glob("st*/*/model.safetensors")}
    printed = make(seed, "--part", "trust")
    assert "no_floor: " in printed and "FAILED" not in printed
    assert models == {f: f.stat().st_mtime_ns for f in seed.glob("st*/*/model.safetensors")}


def test_a_quick_run_is_not_continued_as_a_full_one(seed: Path) -> None:
    with pytest.raises(common.UserError, match="holds a quick run"):
        variants.main(variants.Args(seed, part="trust"))


def test_every_line_of_the_tables_is_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flags that the script takes, policies and signals that an earlier command writes."""
    clones = dict.fromkeys(variants.CLONES)  # those of examples/family/stage2.py too
    monkeypatch.setattr(stage2_distill, "CLONES", clones)
    args, made = variants.Args(tmp_path / "seed1", seed=1), set()
    compare.numbers()
    for part, waves in variants.PARTS.items():
        for wave in waves(variants.Commands(args)):
            finished = set()
            for chain in wave.values():
                own = set()  # a chain sees what it has made, and what earlier waves have
                for script, *words in chain:
                    parsed = tyro.cli(importlib.import_module(Path(script).stem).Args, args=words)
                    if hasattr(parsed, "check") and script != "examples/family/score_topk.py":
                        parsed.check()  # that of score_topk.py reads the model
                    output = str(getattr(parsed, "output", ""))
                    named = {w for w in words if "/stage1/" in w or "/signals/" in w} - {output}
                    assert named <= made | own, (part, words)
                    own.add(output)
                finished |= own
            made |= finished
    for folder, table in {"stage1": variants.TEACHERS, "signals": variants.SIGNALS}.items():
        suffix = ".safetensors" if folder == "signals" else ""
        assert {f"{args.run}/{folder}/{name}{suffix}" for name in table} <= made
    for table in variants.factors().values():
        assert {f"{args.run}/students/{name}" for name in table} <= made
