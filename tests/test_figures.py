"""figures.sh in small, killed and continued; figures.py on what it made; the kinds of tokens."""

from __future__ import annotations

import math
import random
import shutil
from pathlib import Path
from typing import Any

import figures
import numpy as np
import pytest
import scribe
from matplotlib.image import imread

import common

# --------------------------------------------------------------------------------------------------
# Kinds of tokens


def test_kinds_of_a_response() -> None:
    text = "so 7+2=9, 9-5=4, thus \\boxed{4}"
    kinds = scribe.token_kinds(text)
    assert len(kinds) == len(text) + 1 and kinds[-1] == "end"
    by_kind = {k: "".join(c for c, x in zip(text, kinds, strict=False) if x == k) for k in kinds}
    assert by_kind == {
        "style": "s9t", "word": "o hus ", "copied": "7+2-5", "result": "94",
        "punctuation": "=, =, \\boxed{}", "answer": "4", "end": "",
    }  # fmt: skip


def test_kinds_off_the_grammar() -> None:
    assert scribe.token_kinds("") == ["end"]
    assert scribe.token_kinds("7+2=9, oh") == [
        "style", "copied", "copied", "punctuation", "result", "punctuation", "punctuation",
        "other", "other", "end",
    ]  # fmt: skip
    kinds = scribe.token_kinds("\\boxed{-12}.")
    assert kinds[0] == "style" and kinds[-6:] == [*["answer"] * 3, "punctuation", "other", "end"]


def test_every_solution_is_on_the_grammar() -> None:
    rng = random.Random(0)
    for _ in range(300):
        problem = scribe.make_problem(rng)
        text = scribe.write_solution(problem, rng)
        kinds = scribe.token_kinds(text)
        steps = len(scribe.solve(problem))
        assert len(kinds) == len(text) + 1 and set(kinds) <= set(scribe.KINDS[:-1])
        assert kinds.count("style") == steps + 1 and kinds.count("end") == 1
        assert kinds.count("result") >= steps
        boxed = "".join(c for c, kind in zip(text, kinds, strict=False) if kind == "answer")
        assert text.endswith(f"\\boxed{{{boxed}}}")


# --------------------------------------------------------------------------------------------------
# Numbers


def test_spread() -> None:
    assert figures.spread([0.5, 0.7]) == {
        "mean": pytest.approx(0.6), "sd": pytest.approx(0.1 * 2**0.5), "n": 2, "values": [0.5, 0.7]
    }  # fmt: skip
    one = figures.spread([0.5, math.nan])
    assert (one["mean"], one["sd"], one["n"]) == (0.5, None, 1)
    assert figures.spread([math.nan])["mean"] is None


def test_lines_are_means_of_neighbouring_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tuple(tmp_path / name for name in "ab")
    for start_, run in enumerate(runs):
        rows = [{"step": i, "epoch": i / 4, "entropy": start_ + i} for i in range(1, 5)]
        rows[0]["entropy"] = None if run.name == "b" else 1
        common.write_jsonl(run / "paper/stage1/ce/metrics.jsonl", rows)
    monkeypatch.setattr(figures, "POINTS", 2)
    x, entropy = figures.logged(runs, "ce", "entropy")
    assert x.tolist() == [0.375, 0.875]
    assert entropy[0].tolist() == [1.5, 3.5] and np.isnan(entropy[1, 0]) and entropy[1, 1] == 4.5
    common.write_jsonl(runs[1] / "paper/stage1/ce/metrics.jsonl", rows[:3])
    with pytest.raises(common.UserError, match=r"b/paper/stage1/ce: 3 steps, 4 in"):
        figures.logged(runs, "ce", "entropy")


# --------------------------------------------------------------------------------------------------
# The script


@pytest.fixture
def seed(quick_run: Path) -> Path:
    """The run folder that figures.sh has filled."""
    return quick_run


def arguments(folder: Path) -> dict[str, Any]:
    return common.read_json(folder / "args.json")["args"]


def test_what_was_run(seed: Path) -> None:
    own = seed / "paper/stage1"
    base, rollouts = (
        common.fingerprint(seed / x) for x in ("base", "rollouts/rollouts.safetensors")
    )
    # Not hidden ones: the kill may have left an empty temporary folder.
    runs = {f.name: arguments(f) for f in own.iterdir() if not f.name.startswith(".")}
    for name in runs:
        inputs = common.read_json(own / name / "args.json")["inputs"]
        assert (inputs["base"], inputs["rollouts"]) == (base, rollouts), name
    assert [runs[name]["kl_coef"] for name in figures.coefficients(seed).values()] == [
        0,
        0.003,
        0.03,
    ]
    for name in figures.coefficients(seed).values():
        assert (runs[name]["loss"], runs[name]["learning_rate"]) == ("sapo", 3e-4)
    assert [runs[name]["mse_target"] for name in figures.MSE_RUNS] == [
        "verdict", "soft_value", "soft_value"
    ]  # fmt: skip
    assert runs["collapsed"]["unlearn"] and not runs["collapsed"]["init"]
    for name, loss in {"recovered_mse": "mse", "recovered_sft": "sft"}.items():
        assert runs[name]["loss"] == loss and not runs[name]["unlearn"]
        started = common.read_json(own / name / "args.json")["inputs"]["init"]
        assert started == common.fingerprint(own / "collapsed")
    students = {f.name: arguments(f) for f in (seed / "paper/students").iterdir()}
    assert {name: args["objective"] for name, args in students.items()} == {
        "regression10": "regression", "pg10": "pg"
    }  # fmt: skip
    assert all(args["kl_budget"] == 10 for args in students.values())
    # All is judged on the same held-out problems, and every GRPO round of plateau.sh too.
    problems = (seed / "eval/base/problems.jsonl").read_bytes()
    judged = [f.parent for f in (seed / "paper").rglob("problems.jsonl")]
    assert all((folder / "problems.jsonl").read_bytes() == problems for folder in judged)
    policies = {f.parent.name for f in seed.glob("plateau/round*/policy")}
    assert policies == {f.name for f in (seed / "paper/judged").iterdir()} and len(policies) == 2


def test_figures_and_numbers_of_two_seeds(seed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"  # the same run twice: means are those of one, deviations 0
    other.symlink_to(seed)
    figures.main(figures.Args((seed, other), tmp_path / "figures"))
    for name in figures.FIGURES:
        path = tmp_path / f"figures/{name}.png"
        assert 10_000 < path.stat().st_size < 120_000, name
        assert imread(path).shape[1] == 1350
    numbers = common.read_json(tmp_path / "figures/numbers.json")
    assert list(numbers) == [*figures.FIGURES]
    assert all(figure["runs"] == [seed.name] * 2 for figure in numbers.values())

    def measured(folder: str, key: str) -> dict[str, Any]:
        value = common.read_json(seed / folder / "metrics.json")["metrics"][key][0]
        value = pytest.approx(value, rel=1e-4)  # five digits
        return {"mean": value, "sd": 0, "n": 2, "values": [value] * 2}

    curve = "paper/curve/{}/epoch-{:07.3f}".format
    assert numbers["dynamics"]["grpo"]["accuracy"]["2"] == measured(curve("grpo", 2), "accuracy")
    tight = numbers["kl_constraint"]["by_coefficient"]["0.03"]
    assert tight["kl"]["1"] == measured(curve("sapo_kl0.03", 1), "kl")
    accuracies = [tight["accuracy"][epoch]["mean"] for epoch in ("1", "2")]
    assert tight["best_accuracy"]["mean"] == max(accuracies)
    assert tight["last_accuracy"]["mean"] == accuracies[1]
    mse = numbers["mse"]["mse_weak"]
    assert mse["accuracy"]["0.5"] == measured(curve("mse_weak", 0.5), "accuracy")
    rows = common.read_jsonl(seed / "paper/stage1/mse_weak/metrics.jsonl")
    lowest = min(row["log_ratio_wrong"] for row in rows)
    assert mse["log_ratio_wrong"]["lowest"]["mean"] == pytest.approx(lowest, rel=1e-4)
    assert numbers["efficiency"]["ends"]["student_ruined"]["kl"] == measured(
        "eval/student_ruined", "kl"
    )
    assert numbers["objectives"]["pg10"]["kl"] == measured("paper/eval/student_pg10", "kl")
    assert numbers["online"]["turn2"]["kl"] == measured("online/judged/turn2", "kl")
    assert numbers["recovery"]["collapsed"]["kl"] == measured(curve("collapsed", 1), "kl")
    assert numbers["samples"]["fixed"]["last"] == measured(curve("grpo", 2), "accuracy")
    assert numbers["samples"]["erpd"]["by_round"]["2"] == measured(
        "rounds/judged/round2", "accuracy"
    )
    assert numbers["samples"]["grpo"]["by_round"]["1"] == measured(
        "paper/judged/round1", "accuracy"
    )
    assert numbers["samples"]["grpo"]["rollouts"]["2"]["mean"] == 2 * 48 * 4
    # What was killed has no time, and its seed is not among those that give the minutes.
    known = "stage1/unlearned" in figures.seconds(seed)
    assert (numbers["samples"]["erpd"]["seconds"]["1"]["mean"] is not None) == known
    assert numbers["samples"]["grpo"]["seconds"]["2"]["n"] == (2 if known else 0)


def test_tokens_of_correct_responses(seed: Path) -> None:
    kinds, probabilities = figures.positive_tokens(seed)
    rollouts = common.load_rollouts(seed / "rollouts")
    right = rollouts.rewards > 0.5
    assert len(kinds) == int(rollouts.response_lens[right].sum()) > 0
    ends = kinds == scribe.KINDS.index("end")
    assert ends.sum() <= int(right.sum())
    eos = rollouts.tokens[rollouts.response_mask & right[rollouts.sequence_ids]].numpy() == 1
    assert eos[ends].all()
    # Under the base they are what the sampler drew them with.
    drawn = rollouts.sampler_logprobs[rollouts.response_mask & right[rollouts.sequence_ids]].exp()
    assert np.allclose(probabilities["base"], drawn.numpy(), atol=1e-3)
    assert all(len(p) == len(kinds) and (p <= 1).all() for p in probabilities.values())


def test_what_the_targets_ask(seed: Path) -> None:
    """By the formulas, response by response."""
    rollouts = common.load_rollouts(seed / "rollouts")
    rewards, index = rollouts.rewards.tolist(), rollouts.problem_index.tolist()
    wanted: dict[float, list[float]] = {0.0: [], 1.0: []}
    for reward, problem in zip(rewards, index, strict=True):
        group = [r for r, i in zip(rewards, index, strict=True) if i == problem]
        value = 0.3 * math.log(sum(math.exp(r / 0.3) for r in group) / len(group))
        wanted[reward].append((reward - value) / 0.3)
    expected = [sum(wanted[r]) / len(wanted[r]) for r in (1.0, 0.0)]
    assert figures.asked(seed, "mse_soft_value") == pytest.approx(expected, rel=1e-4)
    assert figures.asked(seed, "mse_verdict") == pytest.approx((1 / 0.3, 0))


def test_times_add_up(seed: Path, tmp_path: Path) -> None:
    run, left_out = tmp_path / "run", ("seconds.jsonl", "checkpoints", "plateau")
    shutil.copytree(seed, run, symlinks=True, ignore=shutil.ignore_patterns(*left_out))
    names = ("unlearned", "signals.safetensors", "student")
    # The first round is the unlearned student of run.sh.
    steps = ["rollouts", "stage1/unlearned", "signals/unlearned.safetensors", "students/unlearned"]
    steps += [f"rounds/round2/{name}" for name in ("rollouts", *names)] + ["paper/stage1/grpo"]
    rows = [{"output": step, "seconds": 2**i} for i, step in enumerate(steps)]
    common.write_jsonl(run / "paper/seconds.jsonl", rows)
    drawn, accuracy, took = figures.by_rounds(run, "rounds", "rounds/judged", *names)
    assert took.tolist() == [0, 15, 255] and drawn.tolist() == [0, 192, 192 + 384]
    assert len(accuracy) == 3
    assert figures.by_epochs(run)[2].tolist() == [1 + 128, 1 + 256]  # two epochs in 256 s
    common.write_jsonl(run / "paper/seconds.jsonl", rows[1:])
    assert np.isnan(figures.by_epochs(run)[2]).all()


def test_a_missing_file_leaves_the_seed_out_of_its_figure(
    seed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/online").symlink_to(seed / "online")
    (tmp_path / "half").mkdir()
    for needed in ("online", "eval"):
        (tmp_path / "half" / needed).symlink_to(seed / needed)
    chosen = {name: figures.FIGURES[name] for name in ("online", "samples")}
    monkeypatch.setattr(figures, "FIGURES", chosen)
    args = figures.Args((seed, tmp_path / "run"), tmp_path / "out")
    figures.main(args)
    without = [line for line in capsys.readouterr().out.splitlines() if "without" in line]
    assert len(without) == 1 and without[0].startswith("samples.png without run: ")
    assert str(tmp_path / "run/eval/base/metrics.json") in without[0]
    numbers = common.read_json(args.output / "numbers.json")
    assert {name: figure["runs"] for name, figure in numbers.items()} == {
        "online": [seed.name, "run"], "samples": [seed.name]
    }  # fmt: skip
    args = figures.Args((tmp_path / "run", tmp_path / "half"), tmp_path / "none of the second")
    figures.main(args)
    assert {path.name for path in args.output.iterdir()} == {"online.png", "numbers.json"}
    with pytest.raises(common.UserError, match="no such folder"):
        figures.main(figures.Args((tmp_path / "none",), tmp_path / "out"))
    (tmp_path / "run/online").unlink()
    with pytest.raises(common.UserError, match="nothing to draw"):
        figures.main(figures.Args((tmp_path / "run",), tmp_path / "out"))
