"""examples/family: its scripts on a tiny setting, and the tables of its comparison."""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import compare
import join_signals
import keep_mixed
import make_base
import numpy as np
import pytest
import report
import score_topk
import signals
import split_rollouts
import stage1
import stage2
import tiny
import torch
import tyro
import variants
from test_pipeline import assert_same_files

import build_signals
import common
import stage1_extreme
import stage2_distill
from evaluate import read_jsonl, write_jsonl

SHORT = {"batch_size": 8, "micro_batch_tokens": 256, "learning_rate": 1e-3, "warmup_steps": 0}
HELD_OUT = {"kl_holdout": 0.25, "kl_every": 2}
TARGETS = {"objective": "regression", "signal_clip": 1.0, "token_kl": 10.0} | HELD_OUT


@pytest.fixture(autouse=True)
def own_dicts(monkeypatch):
    """stage1.main adds to the dicts of stage 1; other tests must not see it."""
    for name in ("LOSSES", "DIVISORS"):
        monkeypatch.setattr(stage1_extreme, name, dict(getattr(stage1_extreme, name)))


def train(script, output, **changes):
    """Runs a stage on the tiny setting. Returns the lines of its metrics."""
    paths = {"base": str(tiny.setting() / "base"), "rollouts": tiny.setting() / "rollouts"}
    script.main(script.Args(output=output, **SHORT | paths | changes))
    return read_jsonl(output / "metrics.jsonl")


def test_stage_1(tmp_path):
    """What stage 1 has already is unchanged, bit by bit; each token's share of its class is 1 at
    the start; the options see the entropies of the loop."""
    train(stage1_extreme, tmp_path / "own", loss="grpo", epochs=1)
    plain = train(stage1, tmp_path / "family", loss="grpo", epochs=1)
    assert_same_files(tmp_path / "family", tmp_path / "own")
    masked = train(stage1, tmp_path / "masked", loss="grpo", epochs=1, mask_entropy=0.5)
    assert masked[0]["grad_norm"] != plain[0]["grad_norm"]
    assert train(stage1, tmp_path / "nsr", loss="nsr", epochs=1)[0]["loss"] == pytest.approx(1)


@pytest.mark.parametrize("objective", ["gopd", "trrd", "kdrl"])
def test_stage_2(objective, tmp_path):
    flags = {"objective": objective, "signals": tiny.signals(), "epochs": 1} | HELD_OUT
    for row in train(stage2, tmp_path / "run", **flags):
        assert math.isfinite(row["loss"]) and row["grad_norm"] > 0


def test_stored_topk_of_all_but_one_token_is_the_teacher_in_memory(tmp_path):
    folder, path = tiny.setting(), tmp_path / "topk.safetensors"
    score = score_topk.Args(folder / "rollouts", str(folder / "other"), path)
    size = common.read_json(folder / "other/config.json")["vocab_size"]
    score_topk.main(dataclasses.replace(score, k=size - 1))
    topk = {"objective": "topk", "teacher": str(path)} | HELD_OUT
    clone = {"objective": "forward_kl", "teacher": str(folder / "other")} | HELD_OUT
    stored, memory = train(stage2, tmp_path / "s", **topk), train(stage2, tmp_path / "m", **clone)
    for a, b in zip(stored, memory, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)
    assert stored[-1]["loss"] < stored[0]["loss"]
    arrays, metadata = common.load_tensors(path)
    common.save_tensors(path, arrays | {"topk_ids": arrays["topk_ids"] + 1000}, metadata)
    with pytest.raises(common.UserError, match="--teacher"):
        train(stage2, tmp_path / "no", **topk)


def test_state_of_a_resumed_run(tmp_path, monkeypatch):
    """A killed run ends with the same bits; the weight follows PPO's rule; a ratio counted from the
    epoch's student starts at 1; and without these flags the script is stage 2."""
    state = {"kl_coef": 0.01, "kl_target": 1e-4, "reanchor": True, "epochs": 3}
    flags = TARGETS | state | {"signals": tiny.signals()}
    rows, step = train(stage2, tmp_path / "whole", **flags), stage2.optimizer_step
    taken = iter(range(100))

    def dying(*args):
        if next(taken) == 5:
            raise InterruptedError
        return step(*args)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(stage2, "optimizer_step", dying)
        train(stage2, tmp_path / "killed", **flags)
    train(stage2, tmp_path / "killed", **flags)
    assert_same_files(tmp_path / "whole", tmp_path / "killed")
    measured = [row["kl_coef"] for row in rows if "kl_proxy" in row]
    assert measured == [0.01 * 2**k for k in range(1, len(measured) + 1)]
    assert [r["ratio"] for r in rows if r["step"] % 3 == 1] == pytest.approx([1.0] * 3, abs=1e-5)
    own = TARGETS | {"signals": tiny.signals(), "epochs": 1}
    ours, plain = train(stage2, tmp_path / "f", **own), train(stage2_distill, tmp_path / "p", **own)
    assert [row | {"kl_coef": 0.0} for row in plain] == [row | {"kl_coef": 0.0} for row in ours]


CONSTRUCTIONS = {  # x + y / 2 = z: terms and their sum; v: the verdict, a: the advantage
    ("sum", "none", "clip"): lambda x, y, z, v, a: min(max(z, -2), 2),
    ("sum", "scaled", "none"): lambda x, y, z, v, a: (
        a * min(max(math.exp(np.sign(a) * z), 0.8), 1.2)
    ),
    ("mean", "aligned", "log_mixture"): lambda x, y, z, v, a: (
        math.log(0.2 * math.exp(z / 1.5) + 0.8) * (z * v > 0)
    ),
    ("agreement", "none", "power"): lambda x, y, z, v, a: (
        np.sign(x) * abs(z / 1.5) ** 0.5 * (x * y > 0)
    ),
}


@pytest.mark.parametrize("names", CONSTRUCTIONS)
def test_constructions(names, rollouts):
    torch.manual_seed(0)
    terms, weights = 3 * torch.randn(2, len(rollouts.tokens)), torch.tensor([1.0, 0.5])
    before, ids, mask = terms.clone(), rollouts.sequence_ids, rollouts.response_mask
    advantages, _ = stage1_extreme.group_statistics(rollouts.rewards, rollouts.problem_index)
    steps = dict(zip(("combine", "verdict", "bound"), names, strict=True))
    args = signals.Args(Path("r"), "b", (), Path("o"), **steps)
    found = signals.construct(terms, weights, rollouts, args)
    assert torch.equal(terms, before) and not found[~mask].any()
    for t in mask.nonzero()[:, 0].tolist():
        (x, y), v = terms[:, t].tolist(), 2 * rollouts.rewards[ids[t]].item() - 1
        expected = CONSTRUCTIONS[names](x, y, x + y / 2, v, advantages[ids[t]].item())
        assert found[t].item() == pytest.approx(expected, abs=1e-5)


def test_signals_files(tmp_path):
    """A file of one term, of two weighted ones, and one made here."""
    plain, folder = tiny.signals(), tiny.setting()
    base, other, old = *(str(folder / n) for n in ("base", "other")), common.load_tensors(plain)[0]

    def construct(name, *files, **changes):
        path = tmp_path / f"{name}.safetensors"
        signals.main(signals.Args(folder / "rollouts", base, files, path, **changes))
        return common.load_tensors(path)

    made, metadata = construct("a", plain, plain, combine="agreement")
    assert torch.equal(made["signal"], old["signal"])  # of a teacher with itself
    assert metadata["construction"]["of"] == [common.fingerprint(plain)] * 2
    with pytest.raises(common.UserError, match="other inputs"):
        construct("a", plain)
    args = {"teachers": (other, base), "references": (base,), "weights": (2.0, -1.0)}
    two = tmp_path / "two.safetensors"
    build_signals.main(build_signals.Args(folder / "rollouts", base, output=two, **args))
    for file, weights, factor in ((two, (), 2), (two, (1.0, 1.0), 1), (plain, (), 1)):
        made, _ = construct(f"{factor}{len(weights)}", file, weights=weights)
        assert torch.allclose(made["signal"], factor * old["signal"], atol=1e-5)
    with pytest.raises(common.UserError, match=r"--weights \[2.0, -1.0\]"):
        construct("d", two, combine="mean")
    assert torch.equal(construct("e", tmp_path / "a.safetensors")[0]["signal"], old["signal"])


def test_the_forecast_of_a_constructed_signal(tmp_path):
    """It is that of build_signals.py where the construction changes nothing; without policies, or
    with the verdicts of the held-out problems in the signal, there is none."""
    plain, folder = tiny.signals(), tiny.setting()
    base, held = str(folder / "base"), tmp_path / "held"
    held_out = tiny.write_rollouts(held, folder / "test.jsonl", make_base.make_tokenizer())
    metadata = {"model_fingerprint": common.fingerprint(folder / "base")}
    tiny.save_rollouts(dataclasses.replace(held_out, metadata=held_out.metadata | metadata))
    given = {"held_out_rollouts": held, "output": tmp_path / "built.safetensors"}
    data = folder / "rollouts", base
    build_signals.main(build_signals.Args(*data, (str(folder / "other"),), **given))
    given["output"] = tmp_path / "same.safetensors"
    signals.main(signals.Args(*data, (plain,), **given))
    found = [common.read_json(tmp_path / f"{name}.json")["forecast"] for name in ("built", "same")]
    assert found[0] == found[1] and found[0]["held_out"] and found[0]["problems"] == 4
    given["output"] = tmp_path / "again.safetensors"
    with pytest.raises(common.UserError, match="was made from signals and has no policies"):
        signals.main(signals.Args(*data, (tmp_path / "same.safetensors",), **given))
    with pytest.raises(common.UserError, match="no forecast can be made with --verdict"):
        signals.main(signals.Args(*data, (plain,), verdict="aligned", **given))


def test_two_halves(tmp_path):
    """Joined they are the whole; and a teacher may not score what it has learnt."""
    folder, halves = tiny.setting(), (tmp_path / "halves/0", tmp_path / "halves/1")
    base, whole, mixed = str(folder / "base"), folder / "rollouts", tmp_path / "mixed"
    split_rollouts.main(split_rollouts.Args(whole, tmp_path / "halves"))
    problems, rewards = read_jsonl(folder / "train.jsonl"), common.load_rollouts(whole).rewards
    ids = [row["id"] for half in halves for row in read_jsonl(half / "problems.jsonl")]
    assert sorted(ids) == sorted(row["id"] for row in problems)
    keep_mixed.main(keep_mixed.Args(whole, mixed))
    verdicts = zip(problems, rewards.reshape(len(problems), -1).sum(1), strict=True)
    expected = [row for row, n in verdicts if n % tiny.N_SAMPLES]
    assert read_jsonl(mixed / "problems.jsonl") == expected != problems

    def build(half, teacher, name):
        args = build_signals.Args(half, base, (str(teacher),), tmp_path / name)
        build_signals.main(args)
        return args.output

    def join(files, **changes):
        args = join_signals.Args(whole, base, halves, tuple(files), tmp_path / "j.safetensors")
        join_signals.main(dataclasses.replace(args, **changes))
        return args.output

    files = [build(half, folder / "other", f"{i}.safetensors") for i, half in enumerate(halves)]
    joined, expected = (common.load_tensors(f)[0] for f in (join(files), tiny.signals()))
    assert joined.keys() == expected.keys()
    assert all(torch.allclose(joined[k], expected[k], atol=1e-5) for k in expected)
    with pytest.raises(common.UserError, match="its own"):  # whose teacher would it be?
        train(stage2, tmp_path / "s", objective="kdrl", signals=tmp_path / "j.safetensors")
    for changes in ({"signals": tuple(files[::-1])}, {"halves": halves[::-1]}):
        with pytest.raises(common.UserError, match="order"):
            join(files, **changes)
    train(stage1_extreme, tmp_path / "t", rollouts=halves[0], epochs=1)
    learnt = build(halves[0], tmp_path / "t/checkpoints/epoch-001.000", "t.safetensors")
    with pytest.raises(common.UserError, match="was trained on"):
        join([learnt, files[1]])


def test_every_line_of_the_tables_is_a_command(tmp_path):
    """Flags that the script takes, policies and signals that an earlier command writes."""
    made = set()
    waves = [w(variants.Commands(variants.Args(tmp_path))) for w in variants.PARTS.values()]
    for chain in (chain for part in waves for wave in part for chain in wave.values()):
        for script, *words in chain:
            parsed = tyro.cli(importlib.import_module(Path(script).stem).Args, args=words)
            if script.startswith(("examples/family/s", "stage")) and "score" not in script:
                getattr(parsed, "check", int)()
            output = str(getattr(parsed, "output", ""))
            assert {w for w in words if "/stage1/" in w or "/signals/" in w} <= made | {output}
            made.add(output)
    students = {name for table in variants.factors().values() for name in table}
    assert {f"{tmp_path}/students/{name}" for name in students} <= made


def policy(name, accuracy, kl):
    """100 problems x 10 responses of one rate and one KL each: differences without any error."""
    metrics = {"accuracy": [accuracy, 0.0], "kl": [kl, 0.0]}
    count, keys = np.full(100, 10.0), [(str(i), "") for i in range(100)]
    sampling = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 9}
    summary = {"metrics": metrics, "model": name, "sampling": sampling}
    sums = (count * accuracy, count, count * kl, count)
    return report.Evaluation(name, Path(name), summary, keys, *sums)


def test_student_against_the_curves(tmp_path, monkeypatch):
    """By hand: linear between checkpoints, the longer ones behind them, the best where several
    objectives are compared; and who is beyond the end of a curve or past the budget."""
    base, other = policy("base", 0.5, 0.0), policy("epoch-002.000", 0.66, 1.0)
    two = {0.5: policy("epoch-000.500", 0.6, 0.2), 2.0: policy("epoch-002.000", 0.7, 0.4)}
    paths = {"base": {0.0: base}, "mse": two, "nft": {2.0: other}}
    paths["mse_longer"] = {4.0: policy("epoch-004.000", 0.8, 0.8)}
    students = [policy("student_mse", 0.85, 0.6), policy("student_nft", 0.5, 1.5)]
    evaluations = {e.name: e for e in [base, *students]}
    monkeypatch.setattr(report, "load_run", lambda run: (evaluations, paths))
    monkeypatch.setattr(common, "load_rollouts", lambda folder: None)
    for name, budget in {"mse": 2, "nft": 1}.items():
        folder = tmp_path / "students" / name
        common.write_json(folder / "args.json", {"args": {"signals": None, "kl_budget": budget}})
        write_jsonl(folder / "metrics.jsonl", [{"kl_proxy": 1.5}, {"step": 2}])
    args = compare.Args((tmp_path,), tmp_path / "results.md", resamples=40)
    compare.main(args)
    seed = compare.load_seed(tmp_path, args)
    assert seed.students["mse"]["gain"] == pytest.approx(0.85 - 0.75)
    assert seed.students["nft"]["gain"] == pytest.approx(0.5 - 0.8)
    assert [seed.students[n]["over_budget"] for n in ("mse", "nft")] == [False, True]
    text = args.output.read_text()
    assert "| 0.700 | 0.40 | 0.850 | 0.60 | +0.100 | [+0.100, +0.100] | 1 / 0 |  | never" in text
    assert "| 0.660 | 1.00 | 0.500 | 1.50 | -0.160 | [-0.160, -0.160] | 0 / 1 | 1 |" in text
    assert all(f.stat().st_size > 10_000 for f in tmp_path.glob("results_*.png"))


@pytest.mark.slow
def test_two_ranks_end_where_one_does(tmp_path):
    """A teacher in memory, an adaptive penalty and a moving anchor, shared out over ranks."""
    folder, state = tiny.setting(), {"kl_coef": 0.01, "kl_target": 1e-4} | HELD_OUT
    flags = {"objective": "jsd", "teacher": str(folder / "other")} | state | SHORT
    one = train(stage2, tmp_path / "one", reanchor=True, **flags)
    flags |= {n: folder / n for n in ("base", "rollouts")} | {"output": tmp_path / "two"}
    words = [str(w) for k, v in flags.items() for w in (f"--{k.replace('_', '-')}", v)]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--"]
    command = [sys.executable, *launch, stage2.__file__, "--reanchor", *words]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    for a, b in zip(one, read_jsonl(tmp_path / "two/metrics.jsonl"), strict=True):
        known = {key: value for key, value in a.items() if value is not None}
        assert {key: b[key] for key in known} == pytest.approx(known, rel=2e-3, abs=2e-4)
