"""Every command of README and pages: run here in small, or named with the test that runs it.

A block of commands runs in an empty folder, in its order, each command with the words the page has
and SMALL sizes. What a command reads and none before it in the block has made, is lent: a policy
that is right half the time, another one, rollouts, signals. `torchrun` is parsed by torchrun, and
its script runs in one process."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import make_base
import pytest
import tiny
import torch
import tyro
import warm
from torch.distributed.run import get_args_parser

import build_signals
import common
import evaluate
import stage1_extreme
import stage2_distill

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("C*.md")), *sorted((ROOT / "docs").glob("*.md"))]

RUN_HERE = (
    "evaluate.py", "stage1_extreme.py", "build_signals.py", "stage2_distill.py",
    *(f"examples/family/{name}.py" for name in
      ("stage1", "stage2", "signals", "score_topk", "split_rollouts", "join_signals",
       "keep_mixed")),
)  # fmt: skip
SMALL = {"n": 4, "max_new_tokens": 10, "epochs": 1, "batch_size": 16, "kl_holdout": 0.25, "k": 4,
         "shard_size": None}  # fmt: skip

# Script -> the test that runs it, whole or in small.
ELSEWHERE = {
    "examples/arithmetic/run.sh": "test_commands.py::test_arithmetic_example_in_small",
    "examples/arithmetic/seeds.py": "test_report.py::test_seeds_table",
    "examples/arithmetic/rounds.sh": "test_rounds.py::test_table_of_the_rounds",
    "examples/arithmetic/rounds.py": "test_rounds.py::test_table_of_the_rounds",
    "examples/arithmetic/plateau.sh": "test_rounds.py::test_plateau",
    "examples/arithmetic/online.sh": "test_rounds.py::test_online",
    "examples/arithmetic/figures.sh": "test_figures.py::test_what_was_run",
    "examples/arithmetic/figures.py": "test_figures.py::test_what_was_run",
    "examples/family/run.sh": "test_commands.py::test_family_run_starts_its_two_scripts",
    "examples/family/compare.py": "test_family_run.py::test_run_and_its_comparison",
    "benchmarks/memory.py": "test_docs.py::test_commands_of_torchrun_and_the_memory_table",
    "benchmarks/memory_cpu.py": "test_memory.py::test_memory_of_a_real_run",
    "benchmarks/training.py": "test_benchmarks.py::test_quick_run_ends_in_a_table",
    "benchmarks/grading.py": "test_benchmarks.py::test_grading_in_small",
    "benchmarks/sampling.py": "test_vllm.py::test_sampling_benchmark_in_small",
    "benchmarks/crash.py": "test_sampling.py::test_killed_three_times_at_random",
    "tests/link_lines.py": "test_docs.py::test_names_link_to_the_line_that_defines_them",
}
IN_CI = ("tests/run.sh", "tests/vllm.sh", "tests/trl.sh")  # these run the tests


# --------------------------------------------------------------------------------------------------
# What the pages say


def commands(text: str) -> list[list[str]]:
    """The words of each call of python, torchrun or bash in a block of shell."""
    lines = re.sub(r"(^|\s)#.*", "", text.replace("\\\n", " "), flags=re.MULTILINE)
    calls = re.findall(r"(?<!\S)(?:python|torchrun|bash) [^\n;&]+", lines)
    return [shlex.split(call.replace("$i", "0")) for call in calls]


def blocks(page: Path) -> list[tuple[str, list[list[str]]]]:
    """(name, its commands) of every block of a page; of the README's, which are indented, too."""
    text, found = page.read_text(), []
    fenced = list(re.finditer(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    indented = re.finditer(r"^(?:    (?:python|bash) .*\n)+", text, re.MULTILINE)
    for match in [*fenced, *indented]:
        line = text[: match.start()].count("\n") + 1
        found.append((f"{page.name}:{line}", commands(match[0].replace("```", ""))))
    return found


def inline(page: Path) -> list[list[str]]:
    """Commands within a sentence; those with ... in them say where flags go."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    calls = re.findall(r"`((?:python|bash) [^`]+)`", text)
    return [shlex.split(" ".join(call.split())) for call in calls if "..." not in call]


def script_and_flags(words: list[str]) -> tuple[str, list[str]]:
    """`torchrun FLAGS -- script flags` and `python script flags` alike."""
    start = words.index("--") + 1 if words[0] == "torchrun" else 1
    return words[start], words[start + 1 :]


BLOCKS = [block for page in PAGES for block in blocks(page)]
BLOCKS += [(f"{page.name}:inline", calls) for page in PAGES if (calls := inline(page))]
ALL = [words for _, calls in BLOCKS for words in calls]


def test_commands_are_found() -> None:
    assert commands("# python a.py\nFOO=1 python \\\n  b.py --x 'y z' & done; bash c.sh  # d") == [
        ["python", "b.py", "--x", "y z"], ["bash", "c.sh"]
    ]  # fmt: skip
    scripts = {script_and_flags(words)[0] for words in ALL}
    assert scripts >= {*RUN_HERE, *IN_CI, "examples/arithmetic/run.sh"}
    assert len(BLOCKS) > 20


def test_every_command_is_run_somewhere() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    for words in ALL:
        script, flags = script_and_flags(words)
        assert (ROOT / script).is_file(), words
        if script in RUN_HERE:  # below
            continue
        if flags and script.endswith(".py"):
            tyro.cli(importlib.import_module(Path(script).stem).Args, args=flags)
        if script in IN_CI:
            assert f"bash {script}" in ci
        else:
            assert script in ELSEWHERE, f"{words}: name the test that runs it in ELSEWHERE"
            file, test = ELSEWHERE[script].split("::")
            text = (ROOT / "tests" / file).read_text()
            assert Path(script).stem in text
            tree = ast.parse(text)
            assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


# --------------------------------------------------------------------------------------------------
# In small


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What forks change in the stages, and SIGTERM's handler, are as before after each test."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(stage1_extreme, "LOSSES", stage1_extreme.LOSSES)
    for name in ("CLONES", "OBJECTIVES"):
        monkeypatch.setattr(stage2_distill, name, dict(getattr(stage2_distill, name)))
    for name in ("more_arrays", "next_kl_coef", "epoch_anchor"):
        monkeypatch.setattr(stage2_distill, name, getattr(stage2_distill, name))
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def lent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ (right half the time), other/ (nearly always), problems.jsonl, rollouts/, and
    signals.safetensors of the second against the first."""
    folder = tmp_path_factory.mktemp("lent")
    tokenizer = make_base.make_tokenizer()
    rows = [{"id": f"p{i}", "problem": f"{i}+{i}", "answer": "1"} for i in range(8)]
    for name, answers in {"base": "12", "other": "1112"}.items():
        torch.manual_seed(0)
        args = make_base.Args(output=folder, hidden_size=32, layers=2)
        lm = make_base.make_model(args, tokenizer)
        responses = [f"\\boxed{{{answer}}}" for answer in answers]
        tiny.teach(lm, tokenizer, [row["problem"] + "\n" for row in rows], responses)
        lm.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    common.write_jsonl(folder / "problems.jsonl", rows)
    base = str(folder / "base")
    evaluate.main(evaluate.Args(
        model=base, problems=folder / "problems.jsonl", output=folder / "rollouts", n=4,
        max_new_tokens=10,
    ))  # fmt: skip
    build_signals.main(build_signals.Args(
        rollouts=folder / "rollouts", base=base, teachers=(str(folder / "other"),),
        output=folder / "signals.safetensors",
    ))  # fmt: skip
    return folder


LENT = dict.fromkeys(("model", "teacher", "teachers", "references", "init", "behavior"), "other")
LENT |= {"base": "base", "problems": "problems.jsonl", "rollouts": "rollouts",
         "signals": "signals.safetensors"}  # fmt: skip


def lend(args: Any, lent: Path) -> None:
    """Links to what the command reads and nothing has made."""
    for field, source in LENT.items():
        values = getattr(args, field, None) or ()
        for name in values if isinstance(values, tuple) else (values,):
            if not Path(name).exists():
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                Path(name).symlink_to(lent / source)


@pytest.mark.parametrize(("name", "calls"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_block(
    name: str, calls: list[list[str]], lent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in calls:
        script, flags = script_and_flags(words)
        if script not in RUN_HERE:
            continue
        if words[0] == "torchrun":
            theirs = get_args_parser().parse_args(words[1:])
            assert (theirs.training_script, theirs.training_script_args) == (script, flags)
        module = importlib.import_module(Path(script).stem)
        args = tyro.cli(module.Args, args=flags)
        small = {name: value for name, value in SMALL.items() if hasattr(args, name)}
        if hasattr(args, "save_at"):  # one place: the few steps of SMALL have not many
            small["save_at"] = args.save_at and (small["epochs"],)
        args = dataclasses.replace(args, **small)
        while module is not evaluate and args.output.exists():  # by torchrun, or with other flags
            args = dataclasses.replace(args, output=args.output.with_name(f"2{args.output.name}"))
        lend(args, lent)
        assert not args.output.is_symlink()
        module.main(args)
        last = {"evaluate": "parts" if getattr(args, "shard", None) else "metrics.json",
                "split_rollouts": "1/rollouts.safetensors",
                "keep_mixed": "rollouts.safetensors"}  # fmt: skip
        made = args.output / last.get(module.__name__, "config.json")
        assert args.output.is_file() or made.exists(), words


# --------------------------------------------------------------------------------------------------
# Shell scripts


def run_script(script: str, place: Path, **changes: str) -> None:
    environment = os.environ | warm.CPU | {"ERPD_VENV": str(place / "venv"), "QUICK": "1"} | changes
    done = subprocess.run(["bash", ROOT / script], env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_arithmetic_example_in_small(quick_run: Path) -> None:
    """The one command of the README, called by figures.sh."""
    named = {row["name"] for row in common.read_json(quick_run / "summary.json")["policies"]}
    assert {"base", "ce", "sapo", "student_strong"} <= named
    assert (quick_run / "report.html").stat().st_size > 10_000


def test_family_run_starts_its_two_scripts(tmp_path: Path) -> None:
    """A Python that writes its words down; tests/test_family_run.py runs the scripts themselves."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "requirements.txt", tmp_path / "venv" / "requirements-installed.txt")
    python, log = tmp_path / "venv" / "bin" / "python", tmp_path / "log"
    python.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\n')
    python.chmod(0o755)
    run_script("examples/family/run.sh", tmp_path, SEED="3", SEEDS="1 3")
    called = [line.split() for line in log.read_text().splitlines() if ".py " in line]
    parsed = [
        tyro.cli(importlib.import_module(Path(script).stem).Args, args=flags)
        for script, *flags in called
    ]
    assert [Path(script).name for script, *_ in called] == ["variants.py", "compare.py"]
    assert (parsed[0].seed, parsed[0].quick, parsed[0].part) == (3, True, "all")
    assert [run.name for run in parsed[1].runs] == ["seed1", "seed3"]
