"""examples/report.py: interpolation, intervals, the optimum, and the page of one small run."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil

import drawing
import make_base
import matplotlib.pyplot as plt
import measured
import numpy as np
import pytest
import report
import seeds
import tiny
import torch
from matplotlib.text import Text
from matplotlib.transforms import Bbox

import common
import evaluate


def make_evaluation(folder, model, accuracy, kl, problems=60, n=8, seed=0, temperature=1.0):
    """A folder of evaluate.py: verdicts of a given mean, KLs around a given one (base: None)."""
    generator = torch.Generator().manual_seed(seed)
    rewards = (torch.rand(problems * n, generator=generator) < accuracy).float()
    index = [s // n for s in range(problems * n)]
    pairs, path = [([3, 4], [5, 6, 1])] * (problems * n), folder / "rollouts.safetensors"
    tiny.save_rollouts(tiny.make_rollouts(path, pairs, rewards.tolist(), index))
    rows = [{"id": str(i), "problem": f"{i}+1=?", "answer": str(i + 1)} for i in range(problems)]
    tiny.write_jsonl(folder / "problems.jsonl", rows)
    metrics = {"accuracy": [rewards.mean().item(), 0.02]}
    if kl is not None:
        arrays = {"kl": torch.full((problems * n,), kl), "response": torch.arange(problems * n)}
        common.save_tensors(folder / "kl.safetensors", arrays, {})
        metrics["kl"] = [kl, 0.05 * kl]
    sampling = dict(n=n, temperature=temperature, top_p=1.0, max_new_tokens=128, seed=0)
    record = {"model": model, "sampling": sampling, "metrics": metrics}
    common.write_json(folder / "metrics.json", record)


def make_run(run, model):
    """A run folder with a base, one path that peaks and falls, one student and its signal."""
    make_evaluation(run / "eval/base", "base", 0.5, None, n=32)
    make_evaluation(run / "eval/ce", "x/stage1/ce", 0.4, 10.0, seed=3)
    make_evaluation(run / "eval/student_strong", "x/students/strong", 0.9, 0.6, seed=4)
    make_evaluation(run / "eval/temperature-0.9", "x/temperature/0.9", 0.51, 0.1, seed=5)
    make_evaluation(run / "eval/temperature-0.5", "x/temperature/0.5", 0.55, 0.4, seed=6)
    for epoch, accuracy, kl in [(0.5, 0.6, 0.5), (1, 0.7, 1.5), (2, 0.4, 10.0)]:
        folder = run / f"curve/ce/epoch-{epoch:07.3f}"
        make_evaluation(folder, "x/stage1/ce/checkpoints/e", accuracy, kl, problems=30, n=4, seed=2)
    names = list(itertools.chain(*report.DYNAMICS.values()))
    steps = [{"step": i, "epoch": i / 10} | dict.fromkeys(names, 0.1 * i) for i in range(1, 21)]
    tiny.write_jsonl(run / "stage1/ce/metrics.jsonl", steps)
    args = {"args": {"loss": "ce", "epochs": 2, "unlearn": False, "kl_budget": math.inf}}
    common.write_json(run / "stage1/ce/args.json", args)
    shutil.copytree(model, run / "base")
    problems, tokenizer = run / "eval/base/problems.jsonl", make_base.make_tokenizer()
    rollouts = tiny.write_rollouts(run / "rollouts", problems, tokenizer)
    arrays = {name: -torch.rand(len(rollouts.tokens)) for name in ("signal", "base_logprobs")}
    models = {"base": "x/base", "teacher_0": "x/stage1/ce", "reference_0": "x/base"}
    metadata = {"rollouts": common.fingerprint(rollouts.path), "weights": [1.0]}
    metadata["models"] = {role: {"path": path} for role, path in models.items()}
    common.save_tensors(run / "signals/strong.safetensors", arrays, metadata)
    common.write_json(run / "signals/strong.json", {"auc": 0.5, "credit_auc": None} | metadata)


def test_interpolation_on_a_path():
    def at(read, value, path_kl, path_accuracy):
        return read(np.array([path_kl]), np.array([path_accuracy]), np.array([value]))[0]

    out_and_back = (0.0, 2.0, 1.0), (0.5, 0.7, 0.8)
    assert at(report.accuracy_at_kl, 0.5, *out_and_back) == pytest.approx(0.55)  # the way out
    assert at(report.accuracy_at_kl, 1.5, *out_and_back) == pytest.approx(0.75)  # the way back
    falling = (0.0, 1.0, 3.0, 4.0), (0.5, 0.7, 0.6, 0.8)
    assert at(report.accuracy_at_kl, 2.0, *falling) == pytest.approx(0.65)
    assert at(report.accuracy_at_kl, 9.0, *falling) == pytest.approx(0.8)  # beyond: its best
    for accuracy, kl in [(0.6, 0.5), (0.75, 3.75), (0.4, 0), (0.9, math.inf)]:
        assert at(report.kl_at_accuracy, accuracy, *falling) == pytest.approx(kl)  # the first time


def test_bootstrap_interval_is_that_of_the_standard_error():
    values = np.random.default_rng(1).normal(0.3, 1, 400)
    weights = report.bootstrap_weights(400, 2000, 0)
    assert (weights.sum(1) == 400).all() and (weights[0] == 1).all()
    low, high = report.interval(report.resampled(weights, values, np.ones(400)))
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert report.interval(np.array([1.0] + [1.0] * 50 + [math.inf] * 50)) == [1.0, None]


def test_tilted_optimum_by_its_definition():
    rates = torch.tensor([0.2, 0.7], dtype=torch.float64)
    accuracy, kl = report.tilted_optimum(rates, torch.tensor([1.5]))
    base = torch.stack([rates, 1 - rates])  # the outcomes: correct, wrong
    tilted = base * torch.tensor([[math.exp(1.5)], [1.0]])
    tilted /= tilted.sum(0)
    assert accuracy.item() == pytest.approx(tilted[0].mean().item())
    assert kl.item() == pytest.approx((tilted * (tilted / base).log()).sum(0).mean().item())


def test_tilted_kl_at_is_the_inverse_of_the_optimum():
    rates = torch.tensor([0.2, 0.7, 0.0, 1.0], dtype=torch.float64)
    accuracy, kl = report.tilted_optimum(rates, torch.tensor([0.5, 3.0]))
    weights = np.array([[1.0, 1, 1, 1], [2.0, 2, 2, 2]])
    found = report.tilted_kl_at(rates.numpy(), weights, accuracy.numpy())
    assert found == pytest.approx(kl.numpy(), abs=1e-6)
    resample, there = np.array([[0.0, 2, 0, 0]]), np.array([0.9])  # one problem alone: d(a || p)
    alone = report.tilted_kl_at(rates.numpy(), resample, there)[0]
    least = evaluate.least_kl(torch.tensor(0.9), torch.tensor(0.7)).item()
    assert alone == pytest.approx(least, abs=1e-6)
    assert np.isnan(report.tilted_kl_at(rates.numpy(), weights[:1], np.array([0.9])))  # at most 3/4


def test_comparison_is_paired_and_on_shared_problems(tmp_path):
    make_evaluation(tmp_path / "a", "students/a", 0.7, 1.0)
    make_evaluation(tmp_path / "b", "stage1/b", 0.7, 1.0, problems=30, n=4)
    a, b = (report.load_evaluation(tmp_path / name, name) for name in "ab")
    row = report.compare_with_policy(a, dataclasses.replace(a, name="twin"), 200, 0)
    assert row["accuracy_difference_ci"] == [0, 0] and row["kl_ratio_ci"] == [1, 1]
    row = report.compare_with_policy(a, b, 100, 0)
    assert row["problems"] == 30 and row["pass_at_8_difference"] is None  # 4 samples cannot tell
    assert row["student_accuracy"] == pytest.approx((a.correct / a.count)[:30].mean())


def test_whole_report_and_the_table_over_seeds(tmp_path, model_folders, monkeypatch):
    run = tmp_path / "seed0"
    make_run(run, model_folders[0])
    report.main(report.Args(run, resamples=200))
    summary = common.read_json(run / "summary.json")
    names = ["base", "ce", "temperature-0.5", "temperature-0.9", "student_strong"]
    assert [row["name"] for row in summary["policies"]] == names
    assert summary["policies"][1]["recipe"] == {"loss": "ce", "epochs": 2}
    student = summary["policies"][-1]
    assert 0.5 < student["optimum_share"] < 1 and 0 < student["optimum_share_se"] < 0.2
    assert summary["policies"][1]["optimum_share"] is None  # no better than the base
    cooler = [row for row in summary["curve"] if row["run"] == "temperature"]
    assert [row["temperature"] for row in cooler] == [0.9, 0.5]
    rivals = {row["against"] for row in summary["comparisons"] if row["kind"] == "path"}
    assert rivals == {"ce", "temperature"}
    assert summary["signals"][0]["formula"] == "log ce - log base"
    path = next(row for row in summary["comparisons"] if row["kind"] == "path")
    assert path["accuracy_difference_ci"][0] > 0 and path["kl_ratio_reason"] == "never reached"
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "://" not in page
    assert "above the best early-stopping path" in page and 'class="blame" style' in page

    summary["policies"][-1]["accuracy"] -= 0.1
    summary["settings"]["seed"] = 1
    monkeypatch.setattr(seeds, "RIVALS", ("ce",))
    common.write_json(tmp_path / "seed1/summary.json", summary)
    runs, best = (run, tmp_path / "seed1"), "student_strong"
    seeds.main(seeds.Args(runs, None, tmp_path / "results.md", best))
    text = (tmp_path / "results.md").read_text()
    middle = summary["policies"][-1]["accuracy"] + 0.05
    assert f"| student: strong | {middle:.3f} ± {0.1 / 2**0.5:.3f} |" in text
    found = common.read_json(tmp_path / "results.json")["seeds"]["1"]
    assert found["above_rivals_at_equal_kl"] is True and found["best_student"] == "student_strong"
    assert found["policies"] == summary["policies"]

    # Seed by seed on two machines: the same results, and no comparisons of the first.
    seeds.main(seeds.Args(runs[:1], None, tmp_path / "first.md", best))
    seeds.main(seeds.Args(runs[1:], tmp_path / "first.json", tmp_path / "both.md", best))
    both = [common.read_json(tmp_path / f"{name}.json") for name in ("results", "both")]
    later = (tmp_path / "both.md").read_text()
    cut = text.index("| signal |")
    assert both[0] == both[1] and later.startswith(text[:cut])
    assert later[cut:].startswith("The tables below are of seed 1 only.")
    with pytest.raises(common.UserError, match="--best student_x: the students .* student_strong"):
        seeds.main(seeds.Args(runs, None, None, "student_x"))
    for key, value, match in [
        ("best_student", "student_mixed", "first.json: seed 0 has the best student student_mixed"),
        ("settings", {"samples": 2}, "seed 0 was judged otherwise: {'samples': 2}"),
    ]:
        first = common.read_json(tmp_path / "first.json")
        first["seeds"]["0"][key] = value
        common.write_json(tmp_path / "broken/first.json", first)
        with pytest.raises(common.UserError, match=match):
            seeds.main(seeds.Args(runs[1:], tmp_path / "broken/first.json", None, best))

    make_evaluation(run / "eval/other", "stage1/other", 0.6, 1.0, temperature=0.7)
    with pytest.raises(common.UserError, match=r"temperature 0\.7, but 1\.0"):
        report.main(report.Args(run))


def test_claims_and_forecasts_over_seeds():
    """On rows by hand: which policies are compared, in which direction, and what is a rival."""

    def row(name, accuracy, kl=1.0, passed=0.9, **more):
        kind = "student" if name.startswith("student_") else "stage1"
        values = {"accuracy": accuracy, "kl": kl, "pass_at_8": passed, "optimum_share": 0.5}
        return {"name": name, "kind": kind} | values | more

    names = ("mixed", "unlearned", "strong", "ruined")
    students = [
        row(f"student_{n}", 0.9 - i / 10, 1 + i, 0.8 + i / 100, forecast_accuracy=i, forecast_kl=2)
        for i, n in enumerate(names)
    ]
    others = [
        row("base", 0.4),
        row("sapo", 0.2),
        row("ce", 0.75, 6.0),
        row("temperature-0.5", 0.43),
    ]
    compared = [
        {"student": student, "kind": "path", "against": against, "accuracy_difference": gain}
        | {"accuracy_difference_ci": [gain - 0.05, gain + 0.05]}
        for student, against, gain in [
            ("student_mixed", "sft", 0.1),
            ("student_mixed", "unlearned", -0.2),  # no rival: it is what the signal is made of
            ("student_strong", "sft", -0.3),
        ]
    ]
    settings = {"seed": 7, "samples": 8}
    summary = {"settings": settings, "policies": others + students, "comparisons": compared}
    found = {
        name: round(value, 3) for name, value in seeds.claims(summary, "student_mixed").items()
    }
    assert found.pop("best temperature: gain") == 0.03
    assert found.pop("above sft at equal KL") == 0.1
    assert found.pop("above sft at equal KL, low end") == 0.05
    assert [*found.values()] == [0.9, 0.5, 0.8, 0.5, 0.2, 0.2, -0.05, 0.5, -0.1]
    assert seeds.result(summary, "student_mixed")["above_rivals_at_equal_kl"]
    compared[0]["accuracy_difference_ci"][0] = -0.01
    assert not seeds.result(summary, "student_mixed")["above_rivals_at_equal_kl"]
    *table, _, last = seeds.forecast_table({"7": {"policies": summary["policies"]}})
    assert table[2] == "| student_mixed | 0.000 at 2.00, 0.900 at 1.00 |"
    assert last == "Rank correlation of the 4 accuracies: -1.00."


# --------------------------------------------------------------------------------------------------
# measured.py of the arithmetic example: what its figures read and average over seeds


def test_lines_are_means_of_neighbouring_steps(tmp_path, monkeypatch):
    runs = tmp_path / "a", tmp_path / "b"
    for offset, run in enumerate(runs):
        rows = [{"epoch": i / 4, "entropy": offset + i} for i in range(1, 5)]
        rows[0]["entropy"] = None if offset else 1
        tiny.write_jsonl(run / "paper/stage1/ce/metrics.jsonl", rows)
    monkeypatch.setattr(measured, "POINTS", 2)
    epochs, entropy = measured.logged(runs, "ce", "entropy")
    assert epochs.tolist() == [0.375, 0.875]
    assert entropy.tolist() == [[1.5, 3.5], [3, 4.5]]  # null is left out of its mean
    spread = measured.spread([0.5, 0.7, math.nan])
    assert (spread["n"], spread["sd"]) == (2, pytest.approx(0.1 * 2**0.5))


@pytest.mark.parametrize("target", ["soft_value", "verdict"])
def test_what_the_targets_ask_of_responses(tmp_path, target):
    """By the formulas: V* = beta log mean exp(R / beta) over the responses to a problem."""
    groups, beta, wanted = [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]], 0.3, {0.0: [], 1.0: []}
    path = tmp_path / "rollouts/rollouts.safetensors"
    pairs, rewards = [([3], [4, 1])] * 6, sum(groups, [])
    tiny.save_rollouts(tiny.make_rollouts(path, pairs, rewards, [0, 0, 0, 1, 1, 1]))
    for group in groups:
        value = beta * math.log(sum(math.exp(r / beta) for r in group) / 3)
        for r in group:
            wanted[r].append((r - value * (target == "soft_value")) / beta)
    args = {"args": {"beta": beta, "mse_target": target}}
    common.write_json(tmp_path / "paper/stage1/mse/args.json", args)
    expected = [np.mean(wanted[1.0]), np.mean(wanted[0.0])]
    assert measured.asked(tmp_path, "mse") == pytest.approx(expected)


def test_the_line_of_a_label_passes_by_the_other_points():
    figure, axes = plt.subplots(figsize=(4, 3))
    axes.set(xlim=(0, 1), ylim=(0, 1))
    row = [(0.44 + 0.06 * i, 0.5, f"point {i}", "black") for i in range(3)]
    drawing.place_labels(axes, row, np.array([[0.5, 0.56], [0.5, 0.44], [0.44, 0.56]]))
    figure.canvas.draw()  # places the labels
    places = axes.transData.transform([label[:2] for label in row])
    for note, place in zip(axes.texts, places, strict=True):
        box = Text.get_window_extent(note, figure.canvas.get_renderer())
        assert drawing.is_clear(place, box, places), note.get_text()
    assert not drawing.is_clear(places[0], Bbox([places[2] - 1, places[2] + 1]), places)
    plt.close(figure)
