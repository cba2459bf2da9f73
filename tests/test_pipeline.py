"""The scripts in sequence: their files, equal bits, kill -9, a KL budget, two ranks."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import annotate
import pytest
import tiny
import torch
from safetensors import safe_open
from scripts import finish

import build_signals
import common
import evaluate
import stage1_extreme
import stage2_distill

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("evaluate", "stage1_extreme", "build_signals", "stage2_distill")
BOMB = r"\dfrac{5^{(5^{(5^{(5^5)})}-4)}-5}{16}"  # one operation on big integers, of many minutes


def evaluate_args(output: Path, model: str | None = None, **changes: Any) -> evaluate.Args:
    folder = tiny.setting()
    settings = {"n": tiny.N_SAMPLES, "max_new_tokens": 24, "batch_size": 2} | changes
    model = model or str(folder / "base")
    return evaluate.Args(model=model, problems=folder / "train.jsonl", output=output, **settings)


def stage1_args(output: Path, **changes: Any) -> stage1_extreme.Args:
    folder = tiny.setting()
    settings = {"epochs": 10, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 2,
                "checkpoint_every": 3, "save_at": (0.5, 10.0), "micro_batch_tokens": 256,
                "rollouts": folder / "rollouts"}  # fmt: skip
    return stage1_extreme.Args(base=str(folder / "base"), output=output, **settings | changes)


def stage2_args(output: Path, signals: Path, **changes: Any) -> stage2_distill.Args:
    folder = tiny.setting()
    settings = {"epochs": 10, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 2,
                "kl_every": 3, "kl_holdout": 0.25, "micro_batch_tokens": 256}  # fmt: skip
    return stage2_distill.Args(
        base=str(folder / "base"), rollouts=folder / "rollouts", output=output, signals=signals,
        **settings | changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline, run once without interruption, in a folder with one entry per stage."""
    folder, base = tmp_path_factory.mktemp("pipeline"), str(tiny.setting() / "base")
    rollouts, teacher = tiny.setting() / "rollouts", str(folder / "teacher")
    evaluate.main(evaluate_args(folder / "samples"))
    annotate.main(annotate.Args(rollouts=rollouts))
    stage1_extreme.main(stage1_args(folder / "teacher"))
    build_signals.main(build_signals.Args(
        rollouts=rollouts, base=base, teachers=(teacher,), output=folder / "signals.safetensors"
    ))  # fmt: skip
    stage2_distill.main(stage2_args(folder / "student", folder / "signals.safetensors"))
    student = str(folder / "student")
    evaluate.main(evaluate_args(folder / "judged", student, base=base, base_run=folder / "samples"))
    return folder


def flags(args: Any) -> list[str]:
    """The command line that gives `args`."""
    words = []
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        name = "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            words += [name] if value else []
        elif value is not None and value != ():
            words += [name, *map(str, value if isinstance(value, tuple) else [value])]
    return words


def start(args: Any, n_ranks: int = 1) -> subprocess.Popen:
    """Starts the script that `args` belong to as a process of its own, in its own session."""
    # The last "--": torchrun takes --signals for one of its own flags before it sees the script.
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(n_ranks), "--standalone", "--"]
    script = str(ROOT / f"{type(args).__module__}.py")
    return subprocess.Popen(
        [sys.executable, *(launch if n_ranks > 1 else []), script, *flags(args)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def lines(path: Path) -> list[dict[str, float]]:
    """metrics.jsonl of a run."""
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------------


def test_files_between_the_stages(done: Path) -> None:
    n = 8 * tiny.N_SAMPLES
    samples = common.read_jsonl(done / "samples" / "samples.jsonl")
    keys = {"id", "sample", "reward", "answer", "gold", "finish_reason", "length", "text"}
    assert len(samples) == n and all(set(row) == keys for row in samples)
    problems = common.read_jsonl(tiny.setting() / "train.jsonl")
    assert common.read_jsonl(done / "samples" / "problems.jsonl") == problems
    assert not (done / "samples" / "parts").exists()
    rollouts = common.load_rollouts(done / "samples")
    assert len(rollouts.rewards) == n and rollouts.sampler_logprobs.shape == rollouts.tokens.shape

    marked = common.load_rollouts(tiny.setting() / "rollouts")
    found = marked.first_wrong_token >= marked.prompt_lens
    assert found[marked.rewards == 0].all() and not found.all()  # two slips may cancel out

    for run, steps in [("teacher", 40), ("student", 30)]:
        assert [row["step"] for row in lines(done / run)] == list(range(1, steps + 1))
        assert all(math.isfinite(row["loss"]) for row in lines(done / run))
        assert json.loads((done / run / "args.json").read_text())["inputs"].keys() >= {"base"}
    assert (done / "teacher" / "checkpoints" / "epoch-000.500" / "config.json").is_file()
    last = lines(done / "teacher")[-1]
    assert last["log_ratio_correct"] > last["log_ratio_wrong"] + 1  # it has told them apart

    arrays, metadata = common.load_tensors(done / "signals.safetensors", {})
    assert {*stage2_distill.ARRAYS, "teacher_0_logprobs", "reference_0_logprobs"} == set(arrays)
    prompt = ~marked.response_mask
    assert all((values[prompt] == 0).all() for values in arrays.values())
    assert metadata["rollouts"] == common.fingerprint(marked.path)
    assert "credit_auc" in common.read_json(done / "signals.json")

    metrics = common.read_json(done / "judged" / "metrics.json")["metrics"]
    assert {"accuracy", "base_accuracy", "pass@1", "pass@4", "kl", "k1", "entropy", "kl_efficiency",
            "mean_length", "truncated"} <= metrics.keys()  # fmt: skip
    assert metrics["kl"][0] > 0 and not (done / "judged" / "base").exists()


@pytest.mark.parametrize("run", ["teacher", "teacher/checkpoints/epoch-000.500", "student"])
def test_models_load_in_transformers(done: Path, run: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm = AutoModelForCausalLM.from_pretrained(done / run)
    tokenizer = AutoTokenizer.from_pretrained(done / run)
    message = [{"role": "user", "content": "17+5=?"}]
    prompt = tokenizer.apply_chat_template(message, return_tensors="pt", return_dict=True)
    assert lm.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > 7
    assert lm.dtype == torch.float32
    # vLLM takes every safetensors file of a folder for weights.
    assert [path.name for path in (done / run).glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("run", ["samples", "teacher", "student"])
def test_complete_run_is_left_alone(
    done: Path, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in (done / run).rglob("*")}
    signals = done / "signals.safetensors"
    commands = {"samples": lambda: evaluate.main(evaluate_args(done / run)),
                "teacher": lambda: stage1_extreme.main(stage1_args(done / run)),
                "student": lambda: stage2_distill.main(stage2_args(done / run, signals)),
    }  # fmt: skip
    commands[run]()
    assert "nothing to do" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (done / run).rglob("*")} == before


def assert_same_files(one: Path, other: Path, names: list[str]) -> None:
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


SAMPLES = ["rollouts.safetensors", "samples.jsonl", "problems.jsonl", "metrics.json"]
RUN = ["model.safetensors", "config.json", "metrics.jsonl"]
TEACHER = [*RUN, "checkpoints/behavior_logprobs.safetensors",
           "checkpoints/epoch-000.500/model.safetensors"]  # fmt: skip


def test_signals_again_are_the_same_bytes(done: Path, tmp_path: Path) -> None:
    build_signals.main(build_signals.Args(
        rollouts=tiny.setting() / "rollouts", base=str(tiny.setting() / "base"),
        teachers=(str(done / "teacher"),), output=tmp_path / "signals.safetensors",
    ))  # fmt: skip
    assert_same_files(done, tmp_path, ["signals.safetensors", "signals.json"])


# --------------------------------------------------------------------------------------------------
# kill -9


def assert_nothing_half_written(folder: Path) -> None:
    """Every file that has its final name is whole; a checkpoint folder too."""
    for path in folder.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue  # temporary names
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = file.keys()  # a safe_open is no container
                assert all(file.get_tensor(name) is not None for name in names)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.name == "metrics.jsonl" or path.parent.name == "parts":
            continue  # these grow by lines: the last may be torn
        elif path.suffix == ".jsonl":
            assert all(json.loads(line) for line in path.read_text().splitlines())
        elif path.name.startswith("resume-"):
            assert (path / "state.json").is_file() and (path / ".metadata").is_file()


def killed_and_finished(args: Any, size: Callable[[], int], moments: list[int]) -> Path:
    """Runs the command, kills it once `size()` reaches each of `moments`, and lets it end."""
    for moment in moments:
        process = start(args)
        while process.poll() is None and size() < moment:
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        printed = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL, f"ended before it was killed:\n{printed}"
        assert_nothing_half_written(args.output)
    finish(start(args))
    assert_nothing_half_written(args.output)
    return args.output


def test_killed_runs_end_with_the_same_bytes(done: Path, tmp_path: Path) -> None:
    draw = random.Random(time.time_ns())  # other moments each time; a failure prints them
    first, second = sorted(draw.sample(range(1, 26), 2))
    print(f"killed at {first} and {second}")

    def n_lines(folder: Path) -> Callable[[], int]:
        path = folder / ("responses-rest.jsonl" if folder.name == "parts" else "metrics.jsonl")
        return lambda: path.read_bytes().count(b"\n") if path.is_file() else 0

    samples, teacher, student = (tmp_path / name for name in ("samples", "teacher", "student"))
    jobs = [
        # A resumed run goes on from its last checkpoint, so its second moment must lie later.
        (stage1_args(teacher), n_lines(teacher), [first, second + 4]),
        (stage2_args(student, done / "signals.safetensors"), n_lines(student), [second]),
        (evaluate_args(samples), n_lines(samples / "parts"), [1 + second % 14]),
    ]  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: killed_and_finished(*job), jobs))
    assert_same_files(done / "samples", samples, SAMPLES)
    assert_same_files(done / "teacher", teacher, TEACHER)
    assert_same_files(done / "student", student, RUN)


# --------------------------------------------------------------------------------------------------
# KL budget


@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_student_stays_within_the_budget(done: Path, tmp_path: Path, action: str) -> None:
    budget = 0.05
    args = stage2_args(
        tmp_path / "student", done / "signals.safetensors", learning_rate=1e-2, signal_scale=4.0,
        signal_clip=4.0, kl_budget=budget, kl_budget_action=action, kl_every=2,
    )  # fmt: skip
    stage2_distill.main(args)
    rows = lines(args.output)
    measured = [row["kl_proxy"] for row in rows if "kl_proxy" in row]
    assert max(measured) > budget  # it was spent
    assert len(rows) < 30 if action == "stop" else len(measured) > 2
    if action == "rollback":
        rates = [row["learning_rate"] for row in rows]
        assert rates[-1] < max(rates)

    ranks, rollouts = common.setup_ranks(), common.load_rollouts(args.rollouts)
    student = common.load_policy(str(args.output), ranks, train=False)
    inputs = common.read_json(args.output / "args.json")["inputs"]
    base = stage2_distill.load_signals(args, rollouts, inputs)[1]
    held_out = stage2_distill.split_problems(rollouts, args.kl_holdout, args.seed)[1]
    spent = stage2_distill.measure_kl_proxy(student, rollouts, held_out, base, 1.0, args, ranks)[0]
    assert 0 <= spent <= budget


# --------------------------------------------------------------------------------------------------
# Two ranks


def weights(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def interrupted(args: Any) -> subprocess.Popen:
    """Starts two ranks, ends them all after five steps, and starts them again."""
    process, path = start(args, 2), args.output / "metrics.jsonl"
    while process.poll() is None and (not path.is_file() or path.read_bytes().count(b"\n") < 5):
        time.sleep(0.001)
    process.terminate()  # torchrun passes it on to its ranks
    printed = process.communicate(timeout=60)[0]
    assert process.returncode != 0, f"ended before it was interrupted:\n{printed}"
    return start(args, 2)


def test_two_ranks_are_one(done: Path, tmp_path: Path) -> None:
    few = {"epochs": 3, "save_at": (3.0,)}
    signals = done / "signals.safetensors"
    one, two, again = (stage1_args(tmp_path / f"teacher{i}", **few) for i in range(3))
    student1, student2 = (stage2_args(tmp_path / f"student{i}", signals, epochs=3) for i in (1, 2))
    scores = build_signals.Args(
        rollouts=tiny.setting() / "rollouts", base=str(tiny.setting() / "base"),
        teachers=(str(done / "teacher"),), output=tmp_path / "signals.safetensors",
    )  # fmt: skip
    jobs = [lambda args=args: finish(start(args, 2)) for args in (two, student2, scores)]
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(job) for job in [*jobs, lambda: finish(interrupted(again))]]
        stage1_extreme.main(one)
        stage2_distill.main(student1)
        for future in running:
            future.result()

    for a, b in [(one, two), (student1, student2)]:
        rows = list(zip(lines(a.output), lines(b.output), strict=True))
        assert len(rows) >= 9
        for x, y in rows:
            assert x["loss"] == pytest.approx(y["loss"], rel=1e-4, abs=1e-7)
            assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-3)
        mine, theirs = weights(a.output), weights(b.output)
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=2e-4)
    mine, theirs = (common.load_tensors(p, {})[0] for p in (signals, scores.output))
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-4)
    assert_same_files(two.output, again.output, RUN)  # resumed at two ranks: the same bits


# --------------------------------------------------------------------------------------------------
# Formats, pages of help, grading


def test_rollouts_round_trip(tmp_path: Path) -> None:
    mine = common.load_rollouts(tiny.setting() / "rollouts")
    n, s = len(mine.tokens), len(mine.rewards)
    mine = dataclasses.replace(
        mine, path=tmp_path / "rollouts.safetensors", sampler_logprobs=-torch.rand(n),
        first_wrong_token=torch.arange(s, dtype=torch.int32),
    )  # fmt: skip
    common.save_rollouts(mine)
    first = mine.path.read_bytes()
    loaded = common.load_rollouts(tmp_path)
    for field in dataclasses.fields(mine):
        if isinstance(getattr(mine, field.name), torch.Tensor):
            assert torch.equal(getattr(mine, field.name), getattr(loaded, field.name)), field.name
    assert loaded.metadata == mine.metadata | {"format": common.FORMAT_VERSION}
    common.save_rollouts(loaded)
    assert mine.path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["rollouts.safetensors"]


def test_equal_tensors_are_equal_bytes(tmp_path: Path) -> None:
    arrays = {"b": torch.arange(6.0).view(2, 3).T, "a": torch.ones(2)}
    common.save_tensors(tmp_path / "1.safetensors", arrays, {"x": 1, "y": 2})
    swapped = {name: arrays[name].clone() for name in ("a", "b")}
    common.save_tensors(tmp_path / "2.safetensors", swapped, {"y": 2, "x": 1})
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    common.write_json(tmp_path / "x.json", 1)
    with pytest.raises(RuntimeError), common.atomic(tmp_path / "x.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert common.read_json(tmp_path / "x.json") == 1 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("script", [*SCRIPTS, "make_base", "annotate"])
def test_help_explains_every_flag(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    module = importlib.import_module(script)
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit) as caught:
        common.run(module.main, module.Args, module.__doc__)
    assert caught.value.code == 0
    page = " ".join(capsys.readouterr().out.replace("│", " ").split())
    source = Path(module.__file__).read_text()
    for field in dataclasses.fields(module.Args):
        assert "--" + field.name.replace("_", "-") in page, field.name
        text = source.split(f"\n    {field.name}: ", 1)[1].split('"""', 2)[1]
        start_of_help = " ".join(text.split()[:4])
        assert len(text) > 10 and start_of_help in page, f"no help for {field.name}"


def test_grading_bomb_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [("7", "7"), ("7", BOMB), ("7", "8"), (r"\frac{1}{2}", "0.5"), ("1", BOMB + "+1")]
    with evaluate.Grader(20.0) as grader:  # workers start first, so that the limit is the bomb's
        assert grader.verdicts([("1", "1")])["1", "1"].correct
    with evaluate.Grader(4.0) as grader:
        began = time.monotonic()
        verdicts = grader.verdicts(pairs)
        assert time.monotonic() - began < 25
    assert [verdicts[pair].correct for pair in pairs] == [True, None, False, True, None]
