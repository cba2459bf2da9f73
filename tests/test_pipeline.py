"""The scripts one after the other in this process: what they leave, refuse, and go on from."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_evaluate import WITH_BOS, byte_tokenizer

import build_signals
import common
import evaluate
import stage1_extreme
import stage2_distill

RANKS = [common.Ranks(rank, 2, tiny.CPU) for rank in (0, 1)]
SAMPLES = ["rollouts.safetensors", "samples.jsonl", "problems.jsonl", "metrics.json"]
RUN = ["model.safetensors", "config.json", "metrics.jsonl"]  # equal for equal runs


def evaluate_args(output, **changes):
    folder = tiny.setting()
    given = dict(model=str(folder / "base"), problems=folder / "train.jsonl", engine="hf")
    given |= dict(n=tiny.N_SAMPLES, max_new_tokens=24, batch_size=2)
    return evaluate.Args(output=output, **given | changes)


def stage1_args(output, **changes):
    """Twelve steps on the 32 responses of the tiny setting, a checkpoint at every third."""
    folder = tiny.setting()
    given = dict(base=str(folder / "base"), rollouts=folder / "rollouts", epochs=3, batch_size=8)
    given |= dict(learning_rate=1e-3, warmup_steps=4, checkpoint_every=3, save_at=(3.0,))
    return stage1_extreme.Args(output=output, micro_batch_tokens=256, **given | changes)


def stage2_args(output, **changes):
    """Nine steps on 24 responses; two of the eight problems are held out."""
    folder = tiny.setting()
    given = dict(base=str(folder / "base"), rollouts=folder / "rollouts", signals=tiny.signals())
    given |= dict(epochs=3, batch_size=8, learning_rate=1e-3, kl_every=4, kl_holdout=0.25)
    return stage2_distill.Args(output=output, micro_batch_tokens=256, **given | changes)


def flags(args):
    """The command line that gives `args`."""
    words = []
    for field in dataclasses.fields(args):
        name, value = "--" + field.name.replace("_", "-"), getattr(args, field.name)
        values = value if isinstance(value, tuple) else (value,)
        if value != field.default:
            words += [name] if value is True else [name, *map(str, values)]
    return words


def lines(output):
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_same_files(one, other, names=RUN):
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def assert_close_runs(one, other):
    """Compares two runs whose sums were taken in another order."""
    for ours, theirs in zip(lines(one), lines(other), strict=True):
        assert ours == {k: v and pytest.approx(v, rel=2e-3, abs=2e-4) for k, v in theirs.items()}
    weights = load_file(other / "model.safetensors")
    for name, weight in load_file(one / "model.safetensors").items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=2e-4)


class Killed(BaseException):
    """Ends a run in this process as kill -9 would: nothing of ours catches it."""


def run_until(step, main, args, monkeypatch):
    """Runs `main` until the line of `step` is in metrics.jsonl, and no further."""
    write = common.MetricsLog.write

    def killed(log, values):
        write(log, values)
        if values["step"] == step:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(common.MetricsLog, "write", killed)
        main(args)


def error_of(args, monkeypatch, capsys):
    """Runs the command of stage 1, which must fail by exit code 2; returns its message."""
    monkeypatch.setattr("sys.argv", ["stage1_extreme.py", *flags(args)])
    with pytest.raises(SystemExit, match="^2$"):
        common.run(stage1_extreme.main, stage1_extreme.Args, None)
    return capsys.readouterr().err.partition("error: ")[2]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run of stage 1 without interruption."""
    args = stage1_args(tmp_path_factory.mktemp("whole") / "teacher")
    stage1_extreme.main(args)
    return args.output


# --------------------------------------------------------------------------------------------------
# The whole method, on problems that the base solves half of the time


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def chain(request, tmp_path_factory, tokenizer):
    """A folder with the output of every stage. The base answers 2 and 3 equally often.

    The Llama has an output matrix of its own, byte-level tokens, and a BOS in its chat template."""
    folder = tmp_path_factory.mktemp("chain")
    if request.param == "llama":
        tokenizer = byte_tokenizer(WITH_BOS, bos=True)
    problems = [{"id": x, "problem": x, "answer": "2"} for x in ("1+1", "3-1", "4-2", "6-4")]
    tiny.write_jsonl(folder / "problems.jsonl", problems)
    base, rollouts, teacher = str(folder / "base"), folder / "rollouts", folder / "teacher"
    data, rates = dict(base=base, rollouts=rollouts), dict(learning_rate=3e-3, warmup_steps=2)
    sampling = dict(problems=folder / "problems.jsonl", n=16, batch_size=64)
    first = evaluate_args(rollouts, model=base, **sampling)
    lm = tiny.make_lm(0, len(tokenizer), request.param, spread=0.05)
    lm.config.eos_token_id = lm.generation_config.eos_token_id = tokenizer.eos_token_id
    prompts = map(tokenizer.decode, evaluate.encode_prompts(tokenizer, problems, first))
    tiny.teach(lm, tokenizer, prompts, [r"\boxed{2}", r"\boxed{3}"])
    lm.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")

    evaluate.main(first)
    stage1_extreme.main(stage1_args(teacher, epochs=6, save_at=(0.5, 6.0), **data, **rates))
    signals, student = folder / "signals.safetensors", folder / "student"
    build_signals.main(build_signals.Args(teachers=(str(teacher),), output=signals, **data))
    bounds = dict(token_kl=2.0, kl_holdout=0.25, kl_budget=3.0)
    stage2_distill.main(stage2_args(student, signals=signals, **bounds, **data, **rates))
    judged = evaluate_args(folder / "judged", model=str(student), **sampling)
    evaluate.main(dataclasses.replace(judged, base=base, base_run=rollouts))
    return folder


def test_the_student_solves_more_than_the_base(chain):
    before = common.read_json(chain / "rollouts" / "metrics.json")["metrics"]
    after = common.read_json(chain / "judged" / "metrics.json")["metrics"]
    assert 0.3 < before["accuracy"][0] < 0.7
    assert after["base_accuracy"] == before["accuracy"]
    assert after["accuracy"][0] > before["accuracy"][0] + 0.2
    assert 0 < after["kl"][0] < 3 and after["kl_efficiency"][0] > 0
    teacher = lines(chain / "teacher")[-1]
    assert teacher["log_ratio_correct"] > teacher["log_ratio_wrong"] + 10  # it tells them apart


def test_files_between_the_stages(chain):
    assert not [path for path in chain.rglob("*") if path.name.endswith(".tmp")]
    assert not (chain / "rollouts" / "parts").exists()
    rollouts = common.load_rollouts(chain / "rollouts")
    samples = evaluate.read_jsonl(chain / "rollouts" / "samples.jsonl")
    assert [row["reward"] for row in samples] == rollouts.rewards.tolist()
    tokenizer = common.load_tokenizer(str(chain / "base"))
    if tokenizer.bos_token:  # one, where a prompt begins
        places = (rollouts.tokens == tokenizer.bos_token_id).nonzero()[:, 0]
        assert torch.equal(places, rollouts.cu_seqlens[:-1])
    kept = [common.load_tensors(p)[1]["name"] for p in (chain / "rollouts/logprobs").iterdir()]
    assert sorted(kept) == [str(chain / "base"), str(chain / "teacher")]
    arrays, metadata = common.load_tensors(chain / "signals.safetensors")
    assert arrays.keys() == {"signal", "behavior_logprobs", "base_logprobs"}
    assert all((array[~rollouts.response_mask] == 0).all() for array in arrays.values())
    assert metadata["rollouts"] == common.fingerprint(rollouts.path)
    for run, steps in [("teacher", 48), ("student", 18)]:
        rows = lines(chain / run)
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        assert all(math.isfinite(row["loss"]) for row in rows)


@pytest.mark.parametrize("run", ["teacher", "teacher/checkpoints/epoch-000.500", "student"])
def test_models_load_in_transformers(chain, run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm = AutoModelForCausalLM.from_pretrained(chain / run)
    assert lm.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(chain / run)
    assert tokenizer.decode([lm.config.eos_token_id]) == tokenizer.eos_token
    # vLLM takes every safetensors file for weights; a tied output matrix is stored once.
    assert [path.name for path in (chain / run).glob("*.safetensors")] == ["model.safetensors"]
    stored, base = (load_file(chain / name / "model.safetensors") for name in (run, "base"))
    assert stored.keys() == base.keys()
    assert not any(torch.equal(stored[name], base[name]) for name in base)  # all were trained


def test_a_complete_run_is_left_alone(teacher, capsys):
    before = {path: path.stat().st_mtime_ns for path in teacher.rglob("*")}
    stage1_extreme.main(stage1_args(teacher))
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in teacher.rglob("*")} == before


# --------------------------------------------------------------------------------------------------
# The bound on the whole policy, steps that fail, and checkpoints


def test_a_run_past_its_budget_ends_with_its_last_model_within(tmp_path, capsys):
    short = stage2_args(tmp_path / "short", batch_size=6, epochs=1, kl_every=2, token_kl=math.inf)
    stage2_distill.main(short)
    budget = lines(short.output)[-1]["kl_proxy"]  # a model that spends exactly this is within it
    args = dataclasses.replace(short, output=tmp_path / "student", epochs=3, kl_budget=budget)
    stage2_distill.main(args)
    *within, _, past = lines(args.output)
    assert within == lines(short.output) and past["step"] == 6 and past["kl_proxy"] > budget
    assert "past the budget; back to 4" in capsys.readouterr().out
    assert_same_files(short.output, args.output, ["model.safetensors"])


def test_a_start_past_the_budget_is_refused(tmp_path):
    args = stage2_args(tmp_path / "student", init=str(tiny.setting() / "other"), kl_budget=0.5)
    with pytest.raises(common.UserError, match=r"--kl-budget 0\.5: .*other starts at \d"):
        stage2_distill.main(args)
    assert not (args.output / "config.json").exists()


def test_bounds_that_a_forecast_is_to_choose(tmp_path):
    """The whole stage asks the signals' own forecast: so few nats leave the base alone."""
    args = stage2_args(tmp_path / "student", within_kl=1e-6)
    with pytest.raises(common.UserError, match="--within-kl 1e-06: the base itself"):
        stage2_distill.main(args)
    assert not args.output.exists()


def test_a_step_that_is_not_finite_ends_the_run(teacher, tmp_path, monkeypatch, capsys):
    """Exit code 2, one line, and the last checkpoint stays; without the fault the run goes on."""
    args = stage1_args(tmp_path / "teacher")
    calls = iter(range(1, 1000))

    def poisoned(x, args):
        loss, metrics = stage1_extreme.ce_loss(x, args)
        return loss * (math.nan if next(calls) == 8 else 1.0), metrics

    with monkeypatch.context() as patch:
        patch.setitem(stage1_extreme.LOSSES, "ce", poisoned)
        assert "--learning-rate" in error_of(args, monkeypatch, capsys)
    assert not (args.output / "config.json").exists()
    assert len(list((args.output / "checkpoints").glob("resume-*"))) == 1
    stage1_extreme.main(args)
    assert_same_files(teacher, args.output)


@pytest.mark.parametrize(
    "module, name, path, call, from_step",
    [
        (common, "write_json", ".resume-0000006.tmp/state.json", 1, 3),  # it lacks its state
        (os, "replace", "/.resume-0000006.tmp", 1, 3),  # it is whole, and lacks its name
        (shutil, "rmtree", "/resume-0000003", 2, 6),  # the older one is still there
        (os, "replace", "/.teacher.tmp/model.safetensors", 1, 12),  # the final model lacks files
    ],
)
def test_a_run_cut_while_it_saves_goes_on_from_the_last_whole_checkpoint(
    module, name, path, call, from_step, teacher, tmp_path, monkeypatch
):
    args, real, calls = stage1_args(tmp_path / "teacher"), getattr(module, name), []

    def cut(first, *others, **options):
        calls.extend([first] * str(first).endswith(path))
        if len(calls) == call:
            raise Killed
        return real(first, *others, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, name, cut)
        stage1_extreme.main(args)
    found, load = [], common.load_checkpoint
    monkeypatch.setattr(
        stage1_extreme, "load_checkpoint", lambda *given: found.append(load(*given)) or found[0]
    )
    stage1_extreme.main(args)
    assert found == [{"step": from_step}]
    assert_same_files(teacher, args.output, [*RUN, "checkpoints/epoch-003.000/model.safetensors"])
    left = sorted(path.name for path in (args.output / "checkpoints").iterdir())
    assert left == ["epoch-003.000", "resume-0000012"]


@pytest.mark.parametrize("damaged", ["*.distcp", "state.json"])
def test_a_damaged_checkpoint_is_named(damaged, tmp_path, monkeypatch):
    args = stage1_args(tmp_path / "teacher")
    run_until(8, stage1_extreme.main, args, monkeypatch)
    (file,) = (args.output / "checkpoints" / "resume-0000006").glob(damaged)
    file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(common.UserError, match="resume-0000006"):
        stage1_extreme.main(args)


# --------------------------------------------------------------------------------------------------
# What a run tells while it goes on


def test_a_resumed_log_has_every_step_once(tmp_path):
    log = common.MetricsLog(tmp_path, 0, RANKS[0])
    for step in range(1, 6):
        log.write({"step": step, "loss": 1 / step, "clip_share": math.nan, "ratio": math.inf})
    with open(log.path, "a") as file:
        file.write('{"step": 6, "lo')  # the run was killed here
    common.MetricsLog(tmp_path, 2, RANKS[0]).write({"step": 3, "loss": 9.0})
    second = {"step": 2, "loss": 0.5, "clip_share": None, "ratio": None}
    assert lines(tmp_path)[1:] == [second, {"step": 3, "loss": 9.0}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_has_every_step_once(tmp_path):
    pytest.importorskip("tensorboard", reason="it is optional")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in [(1, 4), (3, 5)]:  # killed after step 4; the checkpoint was of step 2
        log = common.MetricsLog(tmp_path, first - 1, RANKS[0], tensorboard=True)
        for step in range(first, last + 1):
            log.write({"step": step, "loss": step * first, "ratio": math.nan})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = [(event.step, event.value) for event in events.Scalars("loss")]
    assert points == [(1, 1), (2, 2), (3, 9), (4, 12), (5, 15)]
    assert "ratio" not in events.Tags()["scalars"]


def test_tensorboard_is_optional(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were missing
    args = stage1_args(tmp_path / "run", tensorboard=True)
    assert "tensorboard" in error_of(args, monkeypatch, capsys)


def test_only_rank_0_looks_and_tells(tmp_path, capsys):
    for rank, ranks in enumerate(RANKS):
        assert ranks.decide(lambda: "seen") == ("seen" if rank == 0 else None)
        ranks.print(f"from {rank}")
        common.MetricsLog(tmp_path / str(rank), 0, ranks, tensorboard=rank == 1).write({"step": 1})
        with common.progress(ranks, 40, 4, "stage 1") as bar:
            assert bar.disable == (rank == 1)
    printed = capsys.readouterr()
    assert printed.out == "from 0\n" and "stage 1:  10%" in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
