"""Sampling: responses stored as they finish, shards, kills; the hf engine (vLLM: test_vllm.py)."""

from __future__ import annotations

import dataclasses
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

import common
import evaluate

ROOT = Path(__file__).resolve().parents[1]


def response(problem, sample, length=3):
    return evaluate.make_response(
        problem, sample, list(range(length)), [-0.1 * i for i in range(length)], sample % 2 == 0
    )


def test_stored_responses_come_back_exactly(tmp_path):
    written = [response(0, 0), response(0, 1, 7), response(3, 0, 1)]
    written[1]["logprobs"][:3] = [-1e-30, -88.123456, 0.1 + 0.2]
    with evaluate.Parts(tmp_path, None) as parts:
        parts.append(written[:2])
        parts.append(written[2:])
        found = parts.read()
    assert list(found) == [(0, 0), (0, 1), (3, 0)]
    for one in written:
        same = found[one["problem"], one["sample"]]
        assert same["truncated"] == one["truncated"]
        for name in ("tokens", "logprobs"):
            assert same[name].dtype == one[name].dtype
            assert np.array_equal(same[name], one[name])


@pytest.mark.parametrize("cut", [1, 2, 40, "line"])
def test_a_torn_last_line_is_dropped_and_the_file_goes_on(tmp_path, cut):
    with evaluate.Parts(tmp_path, None) as parts:
        parts.append([response(0, 0), response(0, 1)])
        path = parts.path
    content = path.read_bytes()
    last = len(content.splitlines(True)[-1])
    path.write_bytes(content[: -(last - 1 if cut == "line" else cut)])
    with evaluate.Parts(tmp_path, None) as parts:
        assert list(parts.read()) == [(0, 0)]
        parts.append([response(0, 1), response(0, 2)])
        assert list(parts.read()) == [(0, 0), (0, 1), (0, 2)]
    assert len(path.read_bytes().splitlines()) == 3


def test_what_cannot_be_read_counts_as_not_drawn(tmp_path):
    """A machine without power may leave zeros, or half a line in the middle."""
    with evaluate.Parts(tmp_path, None) as parts:
        parts.append([response(0, 0)])
        path = parts.path
    good = path.read_bytes()
    bad = [b"\0" * 50, b"[]", b"3", b'{"problem": 1}', b'{"tokens": "AAAA", "logprobs": 3}']
    bad.append(good[:30])
    path.write_bytes(b"\n".join([*bad, good]))
    with evaluate.Parts(tmp_path, None) as parts:
        assert list(parts.read()) == [(0, 0)]


def test_two_processes_on_one_shard_are_refused(tmp_path):
    """A merge waits for no one: it refuses while a shard is at work; other shards do not mind."""
    with evaluate.Parts(tmp_path, "0/2"):
        with evaluate.Parts(tmp_path, "1/2"):
            pass
        for shard in ("0/2", None):
            with pytest.raises(common.UserError, match="0-of-2.*another process"):
                evaluate.Parts(tmp_path, shard).__enter__()
    for shard in ("0/2", None):
        with evaluate.Parts(tmp_path, shard):
            pass


@pytest.mark.parametrize("shard", ["", "1", "2/2", "-1/2", "a/b", "0/0", "1/2/3", "0.5/2"])
def test_malformed_shards(shard, tmp_path):
    with pytest.raises(common.UserError, match="--shard"):
        evaluate.Args(model="m", problems=tmp_path, output=tmp_path, shard=shard).check()


@pytest.mark.parametrize("engine", ["hf", "vllm"])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_shards_are_a_partition(engine, count):
    prompts = [[1] * (1 + i % 4) for i in range(11)]
    args = evaluate.Args(
        model="m", problems=Path("p"), output=Path("o"), n=5, engine=engine, batch_size=4
    )
    units, pairs = [], []
    for i in range(count):
        part = evaluate.plan(prompts, dataclasses.replace(args, shard=f"{i}/{count}"))
        units += part
        pairs += [pair for unit in part.values() for pair in unit]
    assert sorted(units) == sorted(evaluate.plan(prompts, args))  # none twice, none left out
    assert sorted(pairs) == [(p, j) for p in range(11) for j in range(5)]


def test_seeds_of_neighbours_do_not_collide():
    """Not seed + number: then sample 1 of problem 0 would be sample 0 of problem 1."""
    seeds = [evaluate.stream_seed(s, p, j) for s in range(3) for p in range(40) for j in range(40)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert evaluate.stream_seed(1, 23) != evaluate.stream_seed(12, 3)


def test_accuracy_so_far_agrees_with_the_final_one(tokenizer, model_folders):
    """Right, wrong, unboxed, truncated, and an answer that stands before the last tokens."""
    texts = [r"\boxed{2}", r"\boxed{3}", "2", r"\boxed{02}", "1" * 300 + r"\boxed{2}"]
    drawn = []
    for number, text in enumerate(texts):
        tokens = tokenizer.convert_tokens_to_ids([*text, "<eos>"])
        drawn.append(evaluate.make_response(0, number, tokens, [0.0] * len(tokens), False))
    drawn.append(drawn[0] | {"truncated": True})
    problems = [{"id": "a", "problem": "1+1", "answer": "2"}]
    with (
        evaluate.Grader(20.0) as grader,
        evaluate.RunningAccuracy(model_folders[0], problems, grader) as running,
    ):
        running.add(drawn)
        while running.graded < 6:
            time.sleep(0.01)
        assert running.add(drawn) == ", accuracy 0.50"
    assert set(running.known) == {("2", "2"), ("2", "3"), ("2", None), ("2", "02")}


def command(output: Path, **changed: object) -> evaluate.Args:
    folder = tiny.setting()
    given = dict(n=4, max_new_tokens=16, batch_size=3, engine="hf") | changed
    return evaluate.Args(
        model=str(folder / "base"), problems=folder / "test.jsonl", output=output, **given
    )


def start(args: evaluate.Args, file_limit: int = 2**40) -> subprocess.Popen:
    """evaluate.py in a process of its own, whose files may have `file_limit` bytes."""
    flags = [f"--{f.name.replace('_', '-')}={getattr(args, f.name)}"
             for f in dataclasses.fields(args) if getattr(args, f.name) != f.default]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, ROOT / "evaluate.py", *flags], env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, 2**40)),
    )  # fmt: skip


def same_files(a: Path, b: Path) -> None:
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    for name in ("problems.jsonl", "samples.jsonl", "rollouts.safetensors", "metrics.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_shards_started_at_once_and_merged_equal_one_process(tmp_path):
    """Three processes at once on one folder; the merge draws what the shard that never ran left."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    running = [start(command(parts, shard=f"{i}/4")) for i in (0, 1, 3)]
    for process in running:
        printed = process.communicate()[0]
        assert process.returncode == 0, printed
        assert "is sampled" in printed
    assert not (parts / "rollouts.safetensors").exists()
    stored = [line for path in parts.glob("parts/*") for line in path.read_bytes().splitlines()]
    assert 0 < len(stored) < 16
    evaluate.main(command(parts))
    evaluate.main(command(whole))
    same_files(whole, parts)
    evaluate.main(command(parts, shard="2/4"))  # a late one: nothing to do, nothing changed
    same_files(whole, parts)


@pytest.mark.parametrize("room", [1_500, 4_000])  # while responses are stored; rollouts.safetensors
def test_a_full_disk_is_named_and_costs_nothing(tmp_path, room):
    whole, full = tmp_path / "whole", tmp_path / "full"
    evaluate.main(command(whole))
    stopped = start(command(full), file_limit=room)
    printed = stopped.communicate()[0]
    assert stopped.returncode == 2, printed
    assert "error: " in printed and "free space" in printed and "Traceback" not in printed
    assert not (full / "metrics.json").exists()
    evaluate.main(command(full))
    same_files(whole, full)


def test_a_shard_of_another_run_is_refused(tmp_path):
    evaluate.main(command(tmp_path / "run", shard="0/2"))
    with pytest.raises(common.UserError, match="max_new_tokens: 16 -> 8"):
        evaluate.main(command(tmp_path / "run", shard="1/2", max_new_tokens=8))


def test_auto_stays_with_the_engine_a_run_began_with(tmp_path, monkeypatch):
    args = command(tmp_path / "run", engine="auto")
    args.output.mkdir()
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: object())
    for engine in ("hf", "vllm"):
        common.write_json(args.output / "args.json", {"args": {"engine": engine}})
        assert evaluate.choose_engine(args) == engine
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(common.UserError, match="vLLM is not installed"):
        evaluate.choose_engine(args)
    for foreign in ([], {"args": 3}, {}):  # start_run will refuse it, by name
        common.write_json(args.output / "args.json", foreign)
        assert evaluate.choose_engine(args) == "hf"


def test_killed_three_times_at_random(tmp_path):
    """The long form, and what is checked: benchmarks/crash.py."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "crash.py", "--kills", "3"], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "3 kills in" in done.stdout
