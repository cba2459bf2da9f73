"""Rounds, plateau and online of the arithmetic example in small; stage 2 started at --init."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import flat
import problems
import pytest
import rounds
import tiny
import torch
from safetensors.torch import load_file
from scripts import ROOT, finish, start

import build_signals
import common
import evaluate
import stage2_distill

# --------------------------------------------------------------------------------------------------
# Stage 2 from another policy than the base


@functools.cache
def setting() -> Path:
    """A folder with base/, other/, rollouts/ of the shared setting and signals of their own (other
    tests mark the shared rollouts, which makes signals of before stale)."""
    folder = Path(tempfile.mkdtemp(prefix="erpd-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in ("base", "other", "rollouts"):
        shutil.copytree(tiny.setting() / name, folder / name)
    build_signals.main(build_signals.Args(
        rollouts=folder / "rollouts", base=str(folder / "base"), teachers=(str(folder / "other"),),
        output=folder / "signals.safetensors",
    ))  # fmt: skip
    return folder


def distil(output: Path, **changes: Any) -> Path:
    """Stage 2 in three steps of one batch each."""
    folder = setting()
    settings = {"signals": folder / "signals.safetensors", "epochs": 3, "batch_size": 99,
                "learning_rate": 1e-3, "warmup_steps": 2, "kl_holdout": 0.25, "kl_every": 1,
                "token_kl": 9.0}  # fmt: skip
    stage2_distill.main(stage2_distill.Args(
        base=str(folder / "base"), rollouts=folder / "rollouts", output=output, **settings | changes
    ))  # fmt: skip
    return output


def same_bytes(one: Path, other: Path) -> bool:
    names = ("model.safetensors", "metrics.jsonl")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_init_at_the_base_changes_nothing(tmp_path: Path) -> None:
    plain = distil(tmp_path / "plain")
    assert same_bytes(plain, distil(tmp_path / "init", init=str(setting() / "base")))


@pytest.mark.parametrize("objective", ["regression", "pg", "forward_kl"])
def test_init_starts_there_and_everything_counts_from_the_base(
    objective: str, tmp_path: Path
) -> None:
    folder, ranks = setting(), common.setup_ranks()
    rollouts, other = common.load_rollouts(folder / "rollouts"), str(folder / "other")
    clone = objective == "forward_kl"
    teacher = {"signals": None, "teacher": str(folder / "base")} if clone else {}
    distil(tmp_path, init=other, objective=objective, **teacher)
    base, start = (
        common.score(common.load_policy(str(folder / name), ranks, train=False), rollouts, 1.0,
                     10**6, ranks, "")
        for name in ("base", "other")
    )  # fmt: skip
    trained, held_out = stage2_distill.split_problems(rollouts, 0.25, 0)
    signal = common.load_tensors(folder / "signals.safetensors", {})[0]["signal"]
    target = stage2_distill.bounded_target(
        signal, base, signal_scale=1.0, signal_clip=2.0, signal_floor=0.0, token_kl=9.0
    )
    first = common.read_jsonl(tmp_path / "metrics.jsonl")[0]
    chosen = torch.isin(rollouts.sequence_ids, trained) & rollouts.response_mask
    log_ratio = (start - base)[chosen]
    assert log_ratio.abs().mean() > 0.1
    assert first["ratio"] == pytest.approx(log_ratio.exp().mean().item(), rel=1e-4)
    if objective == "regression":
        expected = (log_ratio - target[chosen]).square().mean().item()
        assert first["loss"] == pytest.approx(expected, rel=1e-4)
    if clone:  # the teacher is the base here: the start is not what is cloned
        assert first["loss"] > 0.05
    saved = common.read_json(tmp_path / "args.json")["inputs"]
    assert saved["init"] == common.fingerprint(folder / "other")
    assert saved["base"] == common.fingerprint(folder / "base")


def test_interrupted_run_with_init_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = str(setting() / "other")
    whole = distil(tmp_path / "whole", init=other)
    write = common.MetricsLog.write

    def killed(log: Any, values: dict[str, Any]) -> None:
        write(log, values)
        if values["step"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common.MetricsLog, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            distil(tmp_path / "again", init=other)
    assert same_bytes(whole, distil(tmp_path / "again", init=other))
    with pytest.raises(common.UserError, match="init"):
        distil(tmp_path / "again", init=str(setting() / "base"))


def test_budget_goes_back_to_the_init(tmp_path: Path) -> None:
    """A budget that the start meets and the first step does not: the student is the start."""
    other = str(setting() / "other")
    free = distil(tmp_path / "free", init=other, learning_rate=1e-6, warmup_steps=0)
    start = common.read_jsonl(free / "metrics.jsonl")[0]["kl_proxy"]
    # Far beyond where it stands, in the direction from the base to it.
    back = distil(tmp_path / "back", init=other, learning_rate=1e-2, warmup_steps=0,
                  signal_scale=8.0, signal_clip=20.0, kl_budget=start * 1.01)  # fmt: skip
    ours, theirs = (load_file(Path(folder) / "model.safetensors") for folder in (back, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(common.read_jsonl(back / "metrics.jsonl")) == 1
    with pytest.raises(common.UserError, match=r"--kl-budget .* starts past it"):
        distil(tmp_path / "past", init=other, kl_budget=start * 0.99)


# --------------------------------------------------------------------------------------------------
# Fresh problems, the rule, the table


def test_fresh_problems_are_none_of_those_taken(tmp_path: Path) -> None:
    def make(name: str, *without: Path, seed: int = 0) -> list[dict[str, str]]:
        problems.main(problems.Args(tmp_path / name, name, without, n=60, seed=seed))
        return common.read_jsonl(tmp_path / name)

    def texts(rows: list[dict[str, str]]) -> set[str]:
        return {row["problem"] for row in rows}

    first = make("round2")
    assert make("round2") == first != make("round2", seed=1)
    first = make("round2")
    assert len(texts(first)) == 60 and len({row["id"] for row in first}) == 60
    assert all(int(row["answer"]) == eval(row["problem"].removesuffix("=?")) for row in first)
    second = make("round3", tmp_path / "round2")
    # The same stream of problems without and with what it would have drawn.
    shutil.copy(tmp_path / "round3", tmp_path / "taken")
    third = make("round3", tmp_path / "round2", tmp_path / "taken")
    assert not texts(second) & texts(first) and not texts(third) & (texts(first) | texts(second))


def test_flat_is_no_gain_over_two_rounds() -> None:
    assert not flat.is_flat([0.5, 0.5], 0.01, 2)  # two rounds are needed
    assert flat.is_flat([0.5, 0.9, 0.509], 0.01, 2)  # a gain of 0.01 at most, or a fall
    assert not flat.is_flat([0.5, 0.4, 0.511], 0.01, 2)
    assert not flat.is_flat([0.9, 0.9, 0.5, 0.92, 0.6], 0.01, 2)
    assert flat.is_flat([0.1, 0.9, 0.8, 0.9], 0.01, 2)
    for changes in ({"over": 0}, {"gain": -0.1}, {"judged": ()}):
        with pytest.raises(common.UserError, match=f"--{next(iter(changes))}"):
            flat.main(dataclasses.replace(flat.Args((Path("round0"),)), **changes))
    assert not flat.is_flat([0.1, 0.2, 0.2], 0.01, 2) and flat.is_flat([0.1, 0.2, 0.2], 0.01, 1)


# --------------------------------------------------------------------------------------------------
# The scripts


def inputs(folder: Path) -> dict[str, str]:
    """Fingerprints of what a run was made of."""
    return common.read_json(folder / "args.json")["inputs"]


def texts(path: Path) -> set[str]:
    return {row["problem"] for row in common.read_jsonl(path)}


def test_the_student_is_the_base_of_the_next_round(two_rounds: Path) -> None:
    base, here = common.fingerprint(two_rounds / "base"), two_rounds / "rounds"
    student = common.fingerprint(here / "round1/student")
    for round_, origin in [("round1", base), ("round2", student)]:
        folder = here / round_
        drawn_by = common.load_rollouts(folder / "rollouts").metadata["model_fingerprint"]
        trained_on = folder / ("rollouts" if round_ == "round1" else "mixed")
        rollouts = common.fingerprint(trained_on / "rollouts.safetensors")
        for name in ("unlearned", "student"):
            assert inputs(folder / name)["base"] == drawn_by == origin
            assert inputs(folder / name)["rollouts"] == rollouts
        models = common.load_tensors(folder / "signals.safetensors", {})[1]["models"]
        assert models["teacher_0"]["fingerprint"] == origin
        assert models["reference_0"]["fingerprint"] == common.fingerprint(folder / "unlearned")
        assert inputs(here / "judged" / round_)["base"] == base
    fresh, taken = texts(here / "round2/train.jsonl"), texts(two_rounds / "train.jsonl")
    assert len(fresh) == 96 and not fresh & (taken | texts(two_rounds / "test.jsonl"))


def test_table_of_the_rounds(two_rounds: Path, tmp_path: Path) -> None:
    judged = two_rounds / "rounds/judged"
    table = common.read_json(two_rounds / "rounds/rounds.json")
    assert [row["name"] for row in table["rows"]] == ["base", "round1", "round2"]
    for row in table["rows"]:
        folder = two_rounds / "eval/base" if row["name"] == "base" else judged / row["name"]
        metrics = common.read_json(folder / "metrics.json")["metrics"]
        assert row["accuracy"] == metrics["accuracy"] and row["kl"] == metrics.get("kl", [None] * 2)
    # The step's KL is what evaluate.py would have measured against the base of the round.
    evaluate.main(evaluate.Args(
        model=str(two_rounds / "rounds/round2/student"), base_run=judged / "round1", n=4,
        base=str(two_rounds / "rounds/round1/student"), problems=two_rounds / "test.jsonl",
        output=tmp_path / "again", max_new_tokens=128,
    ))  # fmt: skip
    again = common.read_json(tmp_path / "again" / "metrics.json")["metrics"]
    assert table["rows"][2]["step"] == {"from": "round1"} | {
        name: pytest.approx(again[name]) for name in ("kl", "kl_efficiency")
    }
    assert again["kl"][0] > 0
    # The pair is what evaluate.py --compare says.
    evaluate.main(evaluate.Args(
        model=str(two_rounds / "rounds/round2/student"), base_run=judged / "round1", n=4,
        base=str(two_rounds / "rounds/round1/student"), problems=two_rounds / "test.jsonl",
        output=tmp_path / "again", max_new_tokens=128, compare=judged / "round1",
    ))  # fmt: skip
    compared = common.read_json(tmp_path / "again" / "metrics.json")["compare"]["accuracy"]
    assert table["pairs"] == [
        {"policy": "round2", "minus": "round1", "accuracy": pytest.approx(compared)}
    ]
    text = (two_rounds / "rounds/rounds.md").read_text()
    accuracy, error = table["rows"][2]["accuracy"]
    assert f"| round2 | {accuracy:.3f} ± {error:.3f} |" in text and "(from round1)" in text


def test_table_refuses_what_does_not_compare(two_rounds: Path, tmp_path: Path) -> None:
    judged = two_rounds / "rounds/judged"
    with pytest.raises(common.UserError, match="--step round1:nobody"):
        rounds.main(rounds.Args((judged / "round1",), tmp_path / "t", step=("round1:nobody",)))
    with pytest.raises(common.UserError, match="another base"):
        rounds.main(rounds.Args((judged / "round1", judged / "round2"), tmp_path / "t"))


def test_again_leaves_everything_as_it_is(two_rounds: Path, place: Path) -> None:
    def models() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in two_rounds.rglob("*.safetensors")}

    before, text = models(), (two_rounds / "rounds/rounds.md").read_bytes()
    printed = finish(start(place, "rounds", ROUNDS="2"))
    assert models() == before and printed.count("complete; nothing to do") >= 8
    assert (two_rounds / "rounds/rounds.md").read_bytes() == text


def test_an_error_in_front_ends_the_job_in_the_background(place: Path, tmp_path: Path) -> None:
    script = """set -euo pipefail
HERE=x; source examples/arithmetic/steps.sh
job() { "$1" -c 'import time; open("%s", "w"); time.sleep(60); open("%s", "w")'; }
beside log job %s
while [ ! -e %s ]; do sleep 0.05; done
pgrep -P $BESIDE
false"""
    begun, over = tmp_path / "begun", tmp_path / "over"
    script %= (begun, over, sys.executable, begun)
    settings = {"RUN": str(tmp_path / "run"), "ERPD_VENV": str(place / "venv"), "QUICK": "1"}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=os.environ | settings,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1, done.stderr
    job = done.stdout.split()[-1]
    for _ in range(100):  # it takes a moment to die
        if not Path(f"/proc/{job}").exists():
            break
        time.sleep(0.05)
    else:
        pytest.fail("the job in the background lives")
    assert begun.exists() and not over.exists()


def test_plateau(two_rounds: Path, place: Path) -> None:
    printed = finish(start(place, "plateau"))
    here = two_rounds / "plateau"
    # Two rounds of GRPO at most, each from the policy before and on its own rollouts.
    base = common.fingerprint(two_rounds / "base")
    policies = sorted(here.glob("round*/policy"))
    assert len(policies) == 2 and "after 2 GRPO rounds: " in printed
    seen = texts(two_rounds / "test.jsonl") | texts(two_rounds / "train.jsonl")
    watched = texts(here / "watched.jsonl")
    assert not watched & seen
    seen |= watched
    for folder in policies:
        rollouts = common.load_rollouts(folder.parent / "rollouts")
        assert inputs(folder)["base"] == rollouts.metadata["model_fingerprint"] == base
        base = common.fingerprint(folder)
    for number in (2, 3, 4):
        fresh = texts(here / f"round{number}/train.jsonl")
        assert len(fresh) == 48 and not fresh & seen
        seen |= fresh
    # From there all start alike, on the same rollouts; but for the second fresh round.
    same = common.fingerprint(here / "round3/rollouts/rollouts.safetensors")
    for name in ("unlearned", "erpd", "grpo"):
        assert inputs(here / name)["base"] == base and inputs(here / name)["rollouts"] == same
    first = common.fingerprint(here / "grpo/checkpoints/epoch-001.000")
    assert inputs(here / "grpo2_fresh")["base"] == first
    assert inputs(here / "grpo2_fresh")["rollouts"] == common.fingerprint(
        here / "round4/rollouts/rollouts.safetensors"
    )
    table = common.read_json(here / "plateau.json")
    rows = {row["name"]: row for row in table["rows"]}
    assert list(rows) == ["base", "plateau", "erpd", "grpo1", "grpo2_same", "grpo2_fresh"]
    assert inputs(here / "judged/plateau")["model"] == base
    assert inputs(here / "judged/grpo1")["model"] == first
    steps = {name: row["step"]["from"] for name, row in rows.items() if row["step"]}
    assert steps == dict.fromkeys(list(rows)[2:], "plateau")
    ways = list(rows)[2:]
    assert [(p["policy"], p["minus"]) for p in table["pairs"]] == [
        *((way, "plateau") for way in ways), *(("erpd", way) for way in ways[1:])
    ]  # fmt: skip


def test_online(two_rounds: Path, place: Path) -> None:
    finish(start(place, "online"))
    here, base = two_rounds / "online", common.fingerprint(two_rounds / "base")
    first = common.fingerprint(here / "turn1/student")
    second = inputs(here / "turn2/student")
    rollouts = common.load_rollouts(here / "turn2/rollouts")
    assert (second["base"], second["init"]) == (base, first)
    assert second["rollouts"] == common.fingerprint(rollouts.path)
    assert rollouts.metadata["model_fingerprint"] == first
    models = common.load_tensors(here / "turn2/signals.safetensors", {})[1]["models"]
    made_of = {role: model["fingerprint"] for role, model in models.items()}
    unlearned = common.fingerprint(two_rounds / "stage1/unlearned")
    assert made_of == {"behavior": first, "base": base, "teacher_0": base, "reference_0": unlearned}
    # Offline has as many epochs, on the rollouts of the base alone.
    offline = common.read_json(here / "offline/args.json")
    assert offline["args"]["epochs"] == 2 and offline["args"]["init"] is None
    assert offline["inputs"]["rollouts"] == inputs(here / "turn1/student")["rollouts"]
    names = [row["name"] for row in common.read_json(here / "online.json")["rows"]]
    assert names == ["base", "offline", "turn1", "turn2", "alternating"]
    # In small, two turns: alternating goes back to the fixed rollouts after the first.
    last = inputs(here / "alternating")
    assert (last["base"], last["init"]) == (base, first)
    assert last["rollouts"] == inputs(here / "turn1/student")["rollouts"] != second["rollouts"]
