"""Sampling by the hf engine: stored units, shards, kills, and the whole script."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_pipeline as pipeline
import tiny
import torch

import common
import evaluate
from common import UserError

ROOT = Path(__file__).resolve().parents[1]


def command(output, **changed):
    folder = tiny.setting()
    given = dict(n=4, max_new_tokens=16, batch_size=3, engine="hf") | changed
    model, problems = str(folder / "base"), folder / "test.jsonl"
    return evaluate.Args(**dict(model=model, problems=problems, output=output) | given)


def start(args, **environment):
    """evaluate.py in a process of its own."""
    return subprocess.Popen(
        [sys.executable, ROOT / "evaluate.py", *pipeline.flags(args)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def same_files(a, b):
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    pipeline.assert_same_files(a, b, pipeline.SAMPLES)


def grade_here(checks, *_):
    return {check: evaluate.check_pair(*check) for check in checks}


@pytest.fixture(scope="module", autouse=True)
def grading_in_this_process():
    """Grading processes have tests of their own, and so have processes of the whole script."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "verdicts", grade_here)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, grading_in_this_process):
    """A run that nothing has interrupted."""
    output = tmp_path_factory.mktemp("sampling") / "whole"
    evaluate.main(command(output))
    return output


# --------------------------------------------------------------------------------------------------
# Units, shards and seeds


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_shards_are_a_partition(engine):
    prompts = [[1] * (1 + i % 4) for i in range(11)]
    args = command(Path("o"), n=5, engine=engine, batch_size=4)
    whole = evaluate.plan(prompts, args)
    for count in (1, 2, 3, 7, 40):
        units, pairs = [], []
        for i in range(count):
            part = evaluate.plan(prompts, dataclasses.replace(args, shard=f"{i}/{count}"))
            units += part
            pairs += [pair for unit in part.values() for pair in unit]
        assert sorted(units) == sorted(whole)  # none twice, none left out
        assert sorted(pairs) == [(p, j) for p in range(11) for j in range(5)]
    if engine == "vllm":  # a unit is a problem
        assert all(len({p for p, _ in unit}) == 1 and len(unit) == 5 for unit in whole.values())


def test_seeds_of_neighbors_do_not_collide():
    seeds = [evaluate.stream_seed(s, p) + j for s in range(3) for p in range(40) for j in range(40)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert evaluate.stream_seed(1, 23) != evaluate.stream_seed(12, 3)


def test_the_stored_log_probs_are_those_of_our_forward(whole, ranks):
    """At the sampling temperature; every response ends with its first EOS, or at the limit."""
    rollouts = common.load_rollouts(whole)
    scored = common.score(command(whole).model, rollouts, 8192, ranks)
    assert torch.allclose(rollouts.sampler_logprobs, scored, atol=1e-4)
    shutil.rmtree(whole / "logprobs")
    ends = rollouts.tokens[rollouts.cu_seqlens[1:] - 1]
    assert torch.equal(rollouts.truncated, ends != 1)
    assert (rollouts.response_lens[rollouts.truncated] == 16).all()
    assert int((rollouts.tokens == 1).sum()) == int((~rollouts.truncated).sum())
    assert rollouts.problem_index.tolist() == [i for i in range(4) for _ in range(4)]


def test_rows_that_have_ended_leave_the_batch(monkeypatch):
    """The others go on with their part of the cache: greedy responses are those of a row alone."""
    model, args = command(Path("o")).model, command(Path("o"), temperature=0.0, max_new_tokens=24)
    lm = common.load_lm(model, torch.device("cpu"), torch.float32, attention="sdpa")
    tokenizer, eos = common.load_tokenizer(model), [1, *range(20, 90, 4)]  # many ends
    prompts = [tokenizer(f"{i}+{i + 1}-{9 - i}=?" * (1 + i % 3)).input_ids for i in range(9)]
    alone = [evaluate.sample_batch(lm, [prompt], eos, 0, args)[0] for prompt in prompts]
    rows, generate = [], lm.generate
    monkeypatch.setattr(lm, "generate", lambda x, **k: rows.append(len(x)) or generate(x, **k))
    together = evaluate.sample_batch(lm, prompts, eos, 0, args)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.tokens, other.tokens) and one.truncated == other.truncated
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-5, rtol=1e-5)
    assert len({len(response.tokens) for response in alone}) > 2
    assert rows[0] == 9 and len(rows) > 2
    assert all(3 * a >= 4 * b for a, b in itertools.pairwise(rows))


def test_finished_units_are_not_sampled_again(tmp_path, whole, monkeypatch):
    """A shard ends, the merge samples only what is missing, and the bits are those of one run."""
    run, calls = tmp_path / "run", []
    evaluate.main(command(run, shard="0/2"))
    assert not (run / "rollouts.safetensors").exists()
    stored = sorted(path.name for path in (run / "parts").iterdir())
    assert stored == [f"unit-{i:07d}.safetensors" for i in (0, 2, 4)]
    sample_batch = evaluate.sample_batch
    monkeypatch.setattr(
        evaluate, "sample_batch", lambda *args: calls.append(len(args[1])) or sample_batch(*args)
    )
    evaluate.main(command(run))
    assert calls == [2, 1, 3, 3, 1]  # 2 and 1 to see whether padding matters; then the last
    same_files(whole, run)
    evaluate.main(command(run, shard="1/2"))  # a late one: nothing to do, nothing changed
    same_files(whole, run)


def test_the_models_own_generation_config_is_replaced_but_for_its_eos(tmp_path):
    """With its top-k 1 all samples would be equal; each of its EOS tokens ends a response."""
    model = tmp_path / "model"
    shutil.copytree(command(tmp_path).model, model)
    config = {"do_sample": True, "top_k": 1, "eos_token_id": [1, 5]}
    (model / "generation_config.json").write_text(json.dumps(config))
    evaluate.main(command(tmp_path / "run", model=str(model), max_new_tokens=64))
    rollouts = common.load_rollouts(tmp_path / "run")
    ends = rollouts.tokens[rollouts.cu_seqlens[1:] - 1][~rollouts.truncated].tolist()
    assert set(ends) == {1, 5}
    texts = {row["text"] for row in evaluate.read_jsonl(tmp_path / "run" / "samples.jsonl")}
    assert len(texts) > 4  # of 16, to 4 problems


def test_auto_is_vllm_where_it_is_installed(tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(evaluate, "start_run", lambda _, args, *a, **k: chosen.append(args.engine))
    monkeypatch.setattr(evaluate, "print_table", lambda *_: None)
    monkeypatch.setattr(evaluate, "read_json", lambda _: None)
    for found in (None, object()):
        monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda _, found=found: found)
        evaluate.main(command(tmp_path / "run", engine="auto"))
    assert chosen == ["hf", "vllm"]
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--engine vllm: not installed"):
        command(tmp_path, engine="vllm").check()


# --------------------------------------------------------------------------------------------------
# The base


def judged(output, whole, **changed):
    folder = tiny.setting()
    given = dict(model=str(folder / "other"), base=str(folder / "base"), base_run=whole) | changed
    return command(output, **given)


def test_metrics_with_a_base(tmp_path, whole, capsys):
    evaluate.main(judged(tmp_path / "run", whole))
    table = common.read_json(tmp_path / "run" / "metrics.json")
    keys = {"model", "base", "problems", "sampling", "unanswered", "grading_failures", "metrics"}
    assert table.keys() == keys
    names = ["accuracy", "pass@1", "pass@2", "pass@4", "unparsed", "truncated", "mean_length"]
    names += ["length_correct", "length_wrong", "kl", "k1", "entropy", "base_accuracy"]
    assert list(table["metrics"]) == [*names, "kl_efficiency"]
    assert table["metrics"]["kl"][0] > 0
    rows = evaluate.read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert table["unanswered"] == sum(row["answer"] is None for row in rows)
    stopped = [
        row["verdict"] in ("unreadable", "failed") for row in rows if row["finish_reason"] == "stop"
    ]
    assert table["metrics"]["unparsed"][0] == pytest.approx(sum(stopped) / len(rows))
    page = (ROOT / "docs" / "evaluate.md").read_text()
    assert all(f"`{name}`" in page for name in (*keys, *names) if "@" not in name)
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in names)
    # The tiny model answers nothing; that is said, with answers beside golds.
    note = printed.partition("\nnote: ")[2].splitlines()
    assert len(note) == 4 and f"gold {rows[0]['gold']!r}" in note[1]


def test_the_model_may_be_its_own_base(tmp_path, whole):
    evaluate.main(judged(tmp_path / "run", None, model=command(whole).model))
    metrics = common.read_json(tmp_path / "run" / "metrics.json")["metrics"]
    assert metrics["base_accuracy"] == metrics["accuracy"]
    assert abs(metrics["kl"][0]) < 1e-6


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (dict(base_run=None), "--base .*evaluate it first.*--base-run"),
        (dict(base="other"), "--base-run .*made by .*base, not by --base"),
        (dict(base="small"), "--base .*vocabulary"),
        (dict(max_new_tokens=8), "--base-run .*max_new_tokens is 16, not 8"),
        (dict(prompt_template="{problem} ="), "--base-run .*other prompts"),
        (dict(problems="train.jsonl"), "--base-run .*other problems"),
    ],
)
def test_a_base_run_that_is_not_comparable(tmp_path, whole, changed, words):
    if "base" in changed:
        changed = {"base": str(tiny.setting() / changed["base"])}
    if "problems" in changed:
        changed = {"problems": tiny.setting() / changed["problems"]}
    with pytest.raises(UserError, match=words):
        evaluate.main(judged(tmp_path / "run", whole, **changed))
    assert not (tmp_path / "run").exists()


def test_torchrun_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        evaluate.main(command(tmp_path / "run"))


@pytest.mark.slow
def test_shards_started_at_once_and_merged_equal_one_process(tmp_path, whole):
    """The merge samples what the shard that never ran has left."""
    run = tmp_path / "run"
    running = [start(command(run, shard=f"{i}/4")) for i in (0, 1, 3)]
    for process in running:
        printed = process.communicate()[0]
        assert process.returncode == 0, printed
        assert "is sampled" in printed
    evaluate.main(command(run))
    same_files(whole, run)
