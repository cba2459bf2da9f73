"""Fresh problems, plateaus, and the commands of the shell scripts."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import flat
import problems
import pytest
import tiny
import tyro

import evaluate

ROOT = Path(__file__).resolve().parents[1]


def test_fresh_problems_are_none_of_those_taken(tmp_path):
    def make(name, *without):
        problems.main(problems.Args(tmp_path / name, "round", without, n=60))
        return {row["problem"]: row for row in evaluate.read_jsonl(tmp_path / name)}

    first, second = make("first"), make("second", tmp_path / "first")  # from one stream
    assert first == make("again") and len(first) == 60 and not first.keys() & second.keys()
    assert all(int(row["answer"]) == eval(p.removesuffix("=?")) for p, row in second.items())


def test_flat_is_no_gain_over_two_rounds():
    assert not flat.is_flat([0.5, 0.5], 0.01, 2)  # two rounds are needed
    assert flat.is_flat([0.5, 0.9, 0.509], 0.01, 2)  # a gain of 0.01 at most
    assert not flat.is_flat([0.5, 0.4, 0.511], 0.01, 2)


# An interpreter that writes down its command line and makes the folder of what it should write, or
# refuses the student that REFUSED names. One write a line: several run at a time, and each only
# appends.
STUB = """#!/usr/bin/env bash
printf '%s\\n' "$(printf '%q ' "$@")" >> "{log}"
script=$1
while [ $# -gt 1 ]; do if [ "$1" = --output ]; then output=$2; fi; shift; done
if [ "$script" != stage2_distill.py ]; then mkdir -p "$(dirname "${{output:-x/y}}")"
elif [ "${{output#*/run/}}" = "${{REFUSED:-}}" ]; then echo "error: promises nothing" >&2; exit 2
elif [ -n "${{BROKEN:-}}" ]; then echo "error: no such flag" >&2; exit 2
else mkdir -p "$output"; touch "$output/config.json"; fi
"""


def commands(tmp_path, script, **settings):
    """Runs a script of examples/ with the stub. Returns [(module, its parsed arguments)]."""
    log, python = tmp_path / "log", tmp_path / "venv/bin/python"
    tiny.write_jsonl(tmp_path / "run/train.jsonl", [])  # which online.sh copies
    python.parent.mkdir(parents=True)
    python.write_text(STUB.format(log=log))
    python.chmod(0o755)
    texts = [(ROOT / x / "requirements.txt").read_text() for x in ("", "examples")]
    (tmp_path / "venv/requirements-installed.txt").write_text("".join(texts))
    settings |= {"ERPD_VENV": str(tmp_path / "venv"), "RUN": str(tmp_path / "run")}
    settings |= {"PYTHON": str(python), "SAMPLER": str(python)}
    subprocess.run(["bash", ROOT / "examples" / script], env=os.environ | settings, check=True)
    found = []
    for words in map(shlex.split, log.read_text().splitlines()):
        at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if at is not None:
            module = __import__(Path(words[at]).stem)
            args = tyro.cli(module.Args, args=words[at + 1 :])  # exits where a flag is unknown
            if hasattr(args, "check") and module.__name__ != "figures":  # its folders are not there
                args.check()
            found.append((module.__name__, args))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("quick", ["0", "1"])
@pytest.mark.parametrize("name", ["run", "rounds", "plateau", "online", "figures"])
def test_scripts_of_the_arithmetic_example_use_flags_that_exist(tmp_path, name, quick):
    found = commands(tmp_path, f"arithmetic/{name}.sh", QUICK=quick)
    students = [args for module, args in found if module == "stage2_distill"]
    assert students and all(args.output.is_relative_to(tmp_path / "run") for args in students)
    if name == "rounds":  # the student of a round is the base of the next
        assert [Path(s.base) for s in students[1:]] == [s.output for s in students[:-1]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, refused", [("rounds", "rounds/round3/student"), ("plateau", "plateau/erpd")]
)
def test_a_signal_that_promises_nothing_ends_the_rounds_and_not_the_script(tmp_path, name, refused):
    found = commands(tmp_path, f"arithmetic/{name}.sh", ROUNDS="4", REFUSED=refused)
    tables = [args for module, args in found if module == "rounds"]
    judged = [folder.name for folder in tables[-1].judged]
    if name == "rounds":
        assert judged == ["base", "round1", "round2"] and tables[-1].pair == ("round2:round1",)
    else:
        assert judged == ["base", "plateau", "grpo1", "grpo2_same", "grpo2_fresh"]
    assert not any(tmp_path.glob("run/*/logs/said-*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "rounds", "plateau"])
def test_one_lane_does_the_same_jobs_as_two(tmp_path, name):
    both = [
        commands(tmp_path / lanes, f"arithmetic/{name}.sh", LANES=lanes) for lanes in ("1", "2")
    ]
    one, two = ([m for m, _ in found] for found in both)
    assert sorted(one) == sorted(two)


@pytest.mark.slow
def test_any_other_error_of_stage_2_ends_the_script(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        commands(tmp_path, "arithmetic/rounds.sh", BROKEN="1")


@pytest.mark.slow
def test_scripts_of_the_qwen3_example_use_flags_that_exist(tmp_path):
    found = commands(tmp_path, "qwen3_4b/run.sh", GPUS="2", ENGINE="hf", ROUNDS="2")
    students = [args for module, args in found if module == "stage2_distill"]
    assert students[1].base == str(students[0].output) != students[0].base
    judged = [args for module, args in found if module == "evaluate" and args.base]
    assert {args.base for args in judged} == {students[0].base}  # the KL from the very first model
    assert {args.shard for module, args in found if module == "evaluate"} == {"0/2", "1/2", None}
    for script in (ROOT / "examples/qwen3_4b").iterdir():
        subprocess.run(["bash", "-n", script], check=True)
