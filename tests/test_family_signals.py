"""Constructions of a signal, and the two halves of cross-fitting, against exact values."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import join_signals
import keep_mixed
import pytest
import signals
import split_rollouts
import tiny
import torch

import build_signals
import common
import stage1_extreme
import stage2_distill

X = torch.tensor([[1.0, -2.0, 3.0, 0.0, -1.0], [3.0, -1.0, -1.0, 2.0, -1.0]], dtype=torch.float64)
W = torch.tensor([1.0, 3.0], dtype=torch.float64)


def arguments(output: Path, *files: Path, **changes) -> signals.Args:
    folder = tiny.setting()
    return signals.Args(folder / "rollouts", str(folder / "base"), files, output, **changes)


# --------------------------------------------------------------------------------------------------
# The mathematics


def test_combinations():
    assert signals.weighted_sum(X, W).tolist() == [10, -5, 0, 6, -4]
    assert signals.mean(X, W).tolist() == [2.5, -1.25, 0, 1.5, -1]
    assert signals.agreement(X, W).tolist() == [2.5, -1.25, 0, 0, -1]  # 0 has no sign


@pytest.mark.parametrize("name", ["mean", "agreement"])
def test_teachers_that_are_one_are_one_teacher(name):
    assert torch.allclose(signals.COMBINE[name](X[:1].expand(3, -1), torch.ones(3)), X[0])


def test_agreement_needs_all_not_most():
    terms = torch.tensor([[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [1.0, -9.0, -1.0]])
    assert signals.agreement(terms, torch.ones(3)).tolist() == [1, 0, -1]


def test_sum_is_that_of_build_signals():
    zeros = torch.zeros(5, dtype=torch.float64)
    theirs = build_signals.combine([(1.0, X[0], zeros), (3.0, X[1], zeros)])
    assert torch.equal(signals.weighted_sum(X, W), theirs)


def test_aligned_keeps_the_sign_of_the_verdict():
    signal = torch.tensor([2.0, -2.0, 0.0, 2.0, -2.0])
    verdicts = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    assert signals.aligned(signal, verdicts).tolist() == [2, 0, 0, 0, -2]


def test_scaled_has_the_sign_of_the_advantage_and_bounded_size():
    signal = torch.tensor([0.1, -0.1, 0.1, -0.1, 9.0, -9.0, 1e4, 3.0])
    advantages = torch.tensor([1.5, 1.5, -0.5, -0.5, 1.0, 1.0, -1.0, 0.0])
    values = signals.scaled(signal, advantages, verdict_eps=0.2).tolist()
    up, down = math.exp(0.1), math.exp(-0.1)
    expected = [1.5 * up, 1.5 * down, -0.5 * down, -0.5 * up, 1.2, 0.8, -0.8, 0]
    assert values == pytest.approx(expected)
    plain = signals.scaled(signal, advantages, verdict_eps=0.0)
    assert torch.equal(plain, advantages)  # eps 0: the reward alone


def test_log_mixture_values():
    x = torch.tensor([-20.0, -2.0, 0.0, 2.0, 5.0], dtype=torch.float64, requires_grad=True)
    y = signals.log_mixture(x, alpha=0.2)
    expected = [-0.2231, -0.1899, 0, 0.8232, 3.4172]
    assert y.tolist() == pytest.approx(expected, abs=1e-4)
    assert y.tolist() == pytest.approx([math.log(0.2 * math.exp(v) + 0.8) for v in x.tolist()])
    assert torch.autograd.grad(y[2], x)[0][2].item() == pytest.approx(0.2)  # slope alpha at 0
    assert signals.log_mixture(torch.tensor([-1e4]), alpha=0.2).item() == pytest.approx(
        math.log(0.8)
    )
    far = torch.tensor([1e4])
    assert signals.log_mixture(far, alpha=0.2).item() == pytest.approx(1e4 + math.log(0.2))
    assert torch.allclose(signals.log_mixture(x, alpha=1.0), x)


def test_power_and_clip():
    x = torch.tensor([-4.0, -0.25, 0.0, 9.0])
    assert signals.power(x, power=0.5).tolist() == [-2, -0.5, 0, 3]
    assert torch.equal(signals.power(x, power=1.0), x)
    assert signals.clip(x, clip=1.0).tolist() == [-1, -0.25, 0, 1]


def test_inputs_are_left_unchanged(rollouts):
    terms = torch.randn(2, len(rollouts.tokens))
    before = terms.clone()
    for combine in signals.COMBINE:
        for verdict in ("none", "aligned", "scaled"):
            for bound in signals.BOUND:
                changes = {"combine": combine, "verdict": verdict, "bound": bound}
                args = arguments(Path("o"), **changes)
                signals.construct(terms, torch.ones(2), rollouts, args)
    assert torch.equal(terms, before)


def test_construct_takes_the_steps_in_order_and_leaves_prompts_silent(rollouts):
    torch.manual_seed(0)
    terms = 3 * torch.randn(2, len(rollouts.tokens))  # prompts too: they must not come through
    args = arguments(Path("o"), verdict="aligned", bound="clip", clip=1.0)
    made = signals.construct(terms, torch.tensor([1.0, 0.5]), rollouts, args)
    ids, mask = rollouts.sequence_ids, rollouts.response_mask
    for t in range(len(mask)):
        x = (terms[0, t] + 0.5 * terms[1, t]).item()
        v = 2 * rollouts.rewards[ids[t]].item() - 1
        expected = max(-1.0, min(1.0, x)) if mask[t] and x * v > 0 else 0.0
        assert made[t].item() == pytest.approx(expected, abs=1e-6)
    args = arguments(Path("o"), verdict="scaled")
    scaled = signals.construct(terms, torch.ones(2), rollouts, args)
    solved_by_all = rollouts.problem_index[ids] == 0
    assert not scaled[solved_by_all].any()
    assert not scaled[~mask].any()
    mixed = (rollouts.problem_index[ids] == 2) & mask
    verdicts = 2 * rollouts.rewards[ids] - 1
    assert torch.equal(scaled[mixed].sign(), verdicts[mixed])


def test_compare_equals_brute_force(rollouts):
    torch.manual_seed(0)
    terms = torch.randn(2, len(rollouts.tokens))
    signal = torch.where(terms[0].abs() < 0.3, 0.0, terms[0])
    ids, mask = rollouts.sequence_ids, rollouts.response_mask
    rows = [(signal[t].item(), 2 * rollouts.rewards[ids[t]].item() - 1, *terms[:, t].tolist())
            for t in mask.nonzero()[:, 0].tolist()]  # fmt: skip
    n, agree = len(rows), [abs(s) for s, v, *_ in rows if s * v > 0]
    assert signals.compare(terms, signal, rollouts) == pytest.approx({
        "share_not_zero": sum(s != 0 for s, *_ in rows) / n,
        "share_terms_of_one_sign": sum(a * b > 0 for *_, a, b in rows) / n,
        "share_with_verdict": len(agree) / n,
        "share_of_size_with_verdict": sum(agree) / sum(abs(s) for s, *_ in rows),
    })  # fmt: skip
    silent = signals.compare(terms, torch.zeros_like(signal), rollouts)
    assert silent["share_of_size_with_verdict"] is None


def test_the_scale_leaves_as_many_targets_as_wanted():
    """Two tokens in four hundred are blamed, by 1 and 2; base probability 0.05: no step is dear."""
    signal = torch.zeros(400)
    signal[:3], base = torch.tensor([-1.0, -2.0, 9.0]), torch.full((400,), 0.05).log()
    bounds = {"signal_clip": 3.0, "signal_floor": 1.5, "token_kl": 0.5}

    def scaled(wanted: float, base_logprobs: torch.Tensor = base) -> tuple[float, int]:
        return signals.scale_for_targets(signal, base_logprobs, wanted, **bounds)

    assert scaled(1) == (pytest.approx(2**-0.25), 1)  # 2 x 0.84 is past 1.5
    assert scaled(1.1) == scaled(2) == (pytest.approx(2**0.75), 2)  # 1 x 1.68
    # More than there is: the least scale that leaves most.
    assert scaled(3) == (pytest.approx(2**0.75), 2)
    # Blamed where the base is sure, no token gets a target, however large the signal.
    assert scaled(1, torch.full((400,), 0.9999).log()) == (1.0, 0)


# --------------------------------------------------------------------------------------------------
# The script


def test_stage_2_takes_what_the_script_writes(tmp_path, capsys):
    """The same file twice: agreement of a teacher with itself is its own signal."""
    plain, folder = tiny.signals(), tiny.setting()
    signals.main(arguments(tmp_path / "a.safetensors", plain, plain, combine="agreement"))
    assert "share_with_verdict" in capsys.readouterr().out
    old, theirs = common.load_tensors(plain, {})
    new, metadata = common.load_tensors(tmp_path / "a.safetensors", {})
    assert torch.equal(new["signal"], old["signal"])
    assert metadata["models"] == theirs["models"]
    assert metadata["construction"]["of"] == [common.fingerprint(plain)] * 2
    signals.main(arguments(tmp_path / "a.safetensors", plain, plain, combine="agreement"))
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(common.UserError, match="other inputs"):
        signals.main(arguments(tmp_path / "a.safetensors", plain, combine="mean"))
    # A file made here goes in again, as one term.
    again = arguments(tmp_path / "b.safetensors", tmp_path / "a.safetensors", verdict="aligned",
                      weights=(2.0,))  # fmt: skip
    signals.main(again)
    report = common.read_json(tmp_path / "b.json")
    assert report["share_of_size_with_verdict"] == pytest.approx(1)
    made = common.load_tensors(tmp_path / "b.safetensors", {})[0]["signal"]
    rollouts = common.load_rollouts(folder / "rollouts")
    verdicts = 2 * rollouts.rewards[rollouts.sequence_ids] - 1
    assert torch.equal(made, torch.where(old["signal"] * verdicts > 0, 2 * old["signal"], 0.0))
    # Three tokens blamed for each wrong response, counted in what stage 2 then makes of it.
    wanted = {"targets_per_wrong": 3.0, "signal_clip": 2.0, "signal_floor": 0.5, "token_kl": 0.3}
    signals.main(arguments(tmp_path / "c.safetensors", tmp_path / "b.safetensors", **wanted))
    arrays, wrong = common.load_tensors(tmp_path / "c.safetensors", {})[0], rollouts.rewards == 0
    bounds = {name: wanted[name] for name in signals.BOUNDS} | {"signal_scale": 1.0}
    target = stage2_distill.bounded_target(arrays["signal"], arrays["base_logprobs"], **bounds)
    blamed, report = int((target < 0).sum()), common.read_json(tmp_path / "c.json")
    assert blamed == report["blamed"] >= report["blamed_wanted"] == 3 * int(wrong.sum()) > 0
    stage2_distill.main(stage2_distill.Args(
        base=str(folder / "base"), rollouts=folder / "rollouts", output=tmp_path / "student",
        signals=tmp_path / "b.safetensors", epochs=1, batch_size=16, kl_holdout=0.25,
    ))  # fmt: skip
    assert (tmp_path / "student" / "config.json").is_file()


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"weights": (1.0, 2.0)}, "--weights"), ({"alpha": 0.0}, "--alpha"),
     ({"clip": -1.0}, "--clip"), ({"combine": "mean", "weights": (-1.0,)}, "--weights"),
     ({"power": 0.0}, "--power"), ({"power": math.inf}, "--power"),
     ({"verdict_eps": 2.0}, "--verdict-eps"),
     ({"targets_per_wrong": -1.0}, "--targets-per-wrong"), ({"token_kl": 0.0}, "--token-kl"),
     ({"base": "other"}, "--base")],
)  # fmt: skip
def test_bad_input_is_named(changes, named, tmp_path):
    args = arguments(tmp_path / "a.safetensors", tiny.signals())
    if "base" in changes:
        changes = {"base": str(tiny.setting() / changes["base"])}
    with pytest.raises(common.UserError, match=named):
        signals.main(replace(args, **changes))
    assert not (tmp_path / "a.safetensors").exists()


def test_files_keep_their_own_weights(tmp_path):
    """Two teachers of weights 2 and -1: what is built of that file starts from its signal."""
    folder, file = tiny.setting(), tmp_path / "weighted.safetensors"
    build_signals.main(build_signals.Args(
        rollouts=folder / "rollouts", base=str(folder / "base"), output=file, weights=(2.0, -1.0),
        teachers=(str(folder / "other"), str(folder / "base")), references=(str(folder / "base"),),
    ))  # fmt: skip
    signal = common.load_tensors(file, {})[0]["signal"]
    assert signal.any()
    signals.main(arguments(tmp_path / "a.safetensors", file, bound="clip", clip=1e9))
    made = common.load_tensors(tmp_path / "a.safetensors", {})[0]["signal"]
    assert torch.allclose(made, signal, atol=1e-6)
    # A file made here has them in its signal already; others may be given.
    signals.main(arguments(tmp_path / "b.safetensors", tmp_path / "a.safetensors"))
    assert torch.equal(common.load_tensors(tmp_path / "b.safetensors", {})[0]["signal"], made)
    signals.main(arguments(tmp_path / "c.safetensors", file, weights=(1.0, 1.0)))
    other = common.load_tensors(tmp_path / "c.safetensors", {})[0]["signal"]
    assert torch.allclose(2 * other, signal, atol=1e-5)  # the second term is base minus base
    with pytest.raises(common.UserError, match=r"--weights \[2.0, -1.0\]: must be above 0"):
        signals.main(arguments(tmp_path / "d.safetensors", file, combine="mean"))


def test_targets_per_wrong_needs_a_wrong_response(tmp_path):
    folder = tmp_path / "rollouts"
    shutil.copytree(tiny.setting() / "rollouts", folder)
    whole = common.load_rollouts(folder)
    common.save_rollouts(replace(whole, rewards=torch.ones_like(whole.rewards)))
    file = build(folder, str(tiny.setting() / "other"), tmp_path / "f.safetensors")
    args = arguments(tmp_path / "a.safetensors", file, targets_per_wrong=1.3)
    with pytest.raises(common.UserError, match="--targets-per-wrong: no response"):
        signals.main(replace(args, rollouts=folder))
    assert not args.output.exists()


# --------------------------------------------------------------------------------------------------
# Two halves


def test_parts_have_the_share_asked_for_and_the_seed_decides():
    half = split_rollouts.part_of_problems(9, 0.5, 0)
    assert half.sum() == 4
    assert torch.equal(half, split_rollouts.part_of_problems(9, 0.5, 0))
    others = [split_rollouts.part_of_problems(9, 0.5, s) for s in (1, 2, 3)]
    assert any(not torch.equal(half, other) for other in others)
    assert split_rollouts.part_of_problems(512, 1 / 16, 0).sum() == 32


@pytest.mark.parametrize("share", (0.0, 1.0, 0.01))
def test_a_share_that_leaves_a_part_empty_is_refused(tmp_path, share):
    args = split_rollouts.Args(tiny.setting() / "rollouts", tmp_path / "parts", share)
    with pytest.raises(common.UserError, match="--share|too few"):
        split_rollouts.main(args)


def test_take_keeps_whole_responses(rollouts):
    chosen = torch.isin(rollouts.problem_index, torch.tensor([1, 3]))
    rollouts = replace(rollouts, sampler_logprobs=torch.randn(len(rollouts.tokens)))
    part = split_rollouts.take(rollouts, chosen, Path("p"))
    assert part.first_wrong_token is None
    assert part.problem_index.tolist() == [0] * 4 + [1] * 4
    for i, s in enumerate(chosen.nonzero()[:, 0].tolist()):
        old = slice(*rollouts.cu_seqlens[s : s + 2].tolist())
        new = slice(*part.cu_seqlens[i : i + 2].tolist())
        assert torch.equal(part.tokens[new], rollouts.tokens[old])
        assert torch.equal(part.sampler_logprobs[new], rollouts.sampler_logprobs[old])
        assert part.prompt_lens[i] == rollouts.prompt_lens[s]
        assert part.rewards[i] == rollouts.rewards[s]
    assert part.cu_seqlens[-1] == len(part.tokens)


def test_kept_are_the_problems_with_both_verdicts(rollouts, tmp_path):
    rewards = torch.ones(20)
    rewards[rollouts.problem_index == 2] = 0
    rewards[(rollouts.problem_index == 1).nonzero()[0]] = 0
    rewards[(rollouts.problem_index == 4).nonzero()[-1]] = 0
    chosen = keep_mixed.in_mixed_groups(replace(rollouts, rewards=rewards))
    assert rollouts.problem_index[chosen].tolist() == [1] * 4 + [4] * 4

    folder, whole = tmp_path / "whole", common.load_rollouts(tiny.setting() / "rollouts")
    shutil.copytree(tiny.setting() / "rollouts", folder)
    keep_mixed.main(keep_mixed.Args(folder, tmp_path / "mixed"))
    kept = common.load_rollouts(tmp_path / "mixed")
    problems = common.read_jsonl(tmp_path / "mixed/problems.jsonl")
    known = [row["id"] for row in common.read_jsonl(folder / "problems.jsonl")]
    for number, row in enumerate(problems):
        verdicts = kept.rewards[kept.problem_index == number]
        assert 0 < verdicts.mean() < 1
        assert torch.equal(verdicts, whole.rewards[whole.problem_index == known.index(row["id"])])
    left_out = {i for i in range(len(known)) if known[i] not in {row["id"] for row in problems}}
    assert left_out
    assert all(len(whole.rewards[whole.problem_index == i].unique()) == 1 for i in left_out)
    samples = zip(common.read_jsonl(folder / "samples.jsonl"), whole.problem_index, strict=True)
    assert common.read_jsonl(tmp_path / "mixed/samples.jsonl") == [
        sample for sample, problem in samples if int(problem) not in left_out
    ]
    assert kept.metadata["mixed_from_problems"] == len(known)
    assert kept.metadata["mixed_of"] == common.fingerprint(whole.path)

    common.save_rollouts(replace(whole, rewards=torch.ones_like(whole.rewards),
                                 path=folder / "rollouts.safetensors"))  # fmt: skip
    with pytest.raises(common.UserError, match="none has correct and wrong responses; sample more"):
        keep_mixed.main(keep_mixed.Args(folder, tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def split(tmp_path: Path) -> tuple[Path, Path]:
    split_rollouts.main(split_rollouts.Args(tiny.setting() / "rollouts", tmp_path / "halves"))
    return tmp_path / "halves" / "0", tmp_path / "halves" / "1"


def build(rollouts: Path, teacher: str, output: Path) -> Path:
    build_signals.main(build_signals.Args(
        rollouts=rollouts, base=str(tiny.setting() / "base"), teachers=(teacher,), output=output,
    ))  # fmt: skip
    return output


def test_joined_halves_are_the_whole(tmp_path):
    """One teacher for both halves: what is joined must be what it says of the whole. Scored in
    other rows, so equal up to rounding."""
    folder, halves = tiny.setting(), split(tmp_path)
    samples = [common.read_jsonl(half / "samples.jsonl") for half in halves]
    problems = [common.read_jsonl(half / "problems.jsonl") for half in halves]
    for half, lines, rows in zip(halves, samples, problems, strict=True):
        part = common.load_rollouts(half)
        index = part.problem_index.tolist()
        assert [line["id"] for line in lines] == [rows[i]["id"] for i in index]
    ids = [row["id"] for half in problems for row in half]
    assert sorted(ids) == sorted(r["id"] for r in common.read_jsonl(folder / "train.jsonl"))
    files = tuple(build(half, str(folder / "other"), tmp_path / f"{i}.safetensors")
                  for i, half in enumerate(halves))  # fmt: skip
    args = join_signals.Args(
        folder / "rollouts", str(folder / "base"), halves, files, tmp_path / "joined.safetensors"
    )
    join_signals.main(args)
    joined, metadata = common.load_tensors(args.output, {})
    whole, _ = common.load_tensors(tiny.signals(), {})
    assert joined.keys() == whole.keys()
    for name in whole:
        assert torch.allclose(joined[name], whole[name], atol=1e-5), name
        assert whole[name].any() or name == "reference_0_logprobs", name
    rollouts = common.load_rollouts(folder / "rollouts")
    given = stage2_distill.Args(
        str(folder / "base"), folder / "rollouts", tmp_path / "s", args.output
    )
    inputs = {"rollouts": rollouts.path, "base": folder / "base"}
    inputs = {name: common.fingerprint(path) for name, path in inputs.items()}
    stage2_distill.load_signals(given, rollouts, inputs)  # accepted
    assert len(metadata["crossfit"]) == 2

    for bad, message in [
        ({"signals": files[::-1]}, "order"),
        ({"halves": halves[::-1]}, "order"),
        ({"halves": halves[::-1], "signals": files[::-1]}, "order"),
        ({"halves": (folder / "rollouts", halves[1])}, "not a half"),
    ]:
        with pytest.raises(common.UserError, match=message):
            join_signals.main(replace(args, **bad))


def test_a_teacher_may_not_score_what_it_learnt(tmp_path):
    folder, halves = tiny.setting(), split(tmp_path)
    for i, half in enumerate(halves):
        stage1_extreme.main(stage1_extreme.Args(
            base=str(folder / "base"), rollouts=half, output=tmp_path / f"t{i}", epochs=1,
            batch_size=16,
        ))  # fmt: skip
    teachers = [str(tmp_path / "t0"), str(tmp_path / "t1")]
    checkpoints = [f"{teacher}/checkpoints/epoch-001.000" for teacher in teachers]
    for order, refused in (
        (teachers, True), (teachers[::-1], False), (checkpoints, True), (checkpoints[::-1], False)
    ):  # fmt: skip
        shutil.rmtree(tmp_path / "f", ignore_errors=True)
        files = tuple(
            build(half, teacher, tmp_path / "f" / f"{i}.safetensors")
            for i, (half, teacher) in enumerate(zip(halves, order, strict=True))
        )
        args = join_signals.Args(
            folder / "rollouts", str(folder / "base"), halves, files, tmp_path / "j.safetensors"
        )
        if refused:
            with pytest.raises(common.UserError, match="t0.*: was trained on"):
                join_signals.main(args)
        else:
            join_signals.main(args)
            args.output.unlink()
