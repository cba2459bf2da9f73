"""Verdicts: the quirks of math-verify with the verdict we want, hostile answers, many bombs."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import tempfile
import time
from pathlib import Path

import pytest

import evaluate
import verdict
from evaluate import verdicts
from verdict import ANSWER_LIMIT, boxed_answer

BOMB = r"\dfrac{5^{(5^{(5^{(5^5)})}-4)}-5}{16}"  # a big-integer step that no signal interrupts


BOMBS = [
    rf"\boxed{{{BOMB}}}",
    r"\boxed{10^{10^{10}}}",
    r"\boxed{(10^9)!}",
    r"\boxed{" + "(" * 900 + "7" + ")" * 900 + "}",
]


def read(name):
    """Rows of gold, response (null: is the gold an answer?) and verdict."""
    rows = evaluate.read_jsonl(Path(__file__).parent / "data" / name)
    for row in rows:
        boxed = row.get("answer") and f"\\boxed{{{row['answer']}}}"
        row["response"] = row.get("response", boxed)
    return rows


@pytest.mark.parametrize("name", ["grading.jsonl", "math_verify_pairs.jsonl"])
def test_verdicts(name):
    """Cases of every kind that verifiers are known to get wrong; math-verify's own test pairs."""
    rows = read(name)
    assert len(rows) >= {"grading.jsonl": 900, "math_verify_pairs.jsonl": 80}[name]
    wrong = [r for r in rows if evaluate.verdict_of(r["gold"], r["response"]) != r["correct"]]
    assert wrong == []


def test_the_run_gives_the_same_verdicts(ranks):
    """In processes, with every gold checked as well; and none of the checks fails."""
    rows = [row for row in read("grading.jsonl") if row["response"]][::5]
    graded = [{"gold": r["gold"], "answer": boxed_answer(r["response"])} for r in rows]
    evaluate.grade(graded, 20.0, ranks)
    assert [bool(row["reward"]) for row in graded] == [row["correct"] for row in rows]
    assert {row["verdict"] for row in graded} == {"right", "wrong", "unreadable"}


def test_every_rewrite_is_needed_by_its_text():
    """Where it stands in the order, after those before it."""
    table = Path(verdict.__file__).with_name("verdict_rules.tsv").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in table.splitlines() if not line.startswith("#")]
    for number, (section, pattern, replacement, text) in enumerate(rows):
        for earlier in rows[:number]:
            if earlier[0] == section != "gold":
                text = re.sub(*earlier[1:3], text)
        text = text.casefold() if section == "words" else text
        assert re.sub(pattern, replacement, text) != text, (section, pattern, text)


def test_the_documented_table_is_this_one():
    page = (Path(__file__).resolve().parents[1] / "docs" / "evaluate.md").read_text()
    rows = [row for row in read("grading.jsonl") if "reason" in row]
    wanted = [f"| `{r['gold']}` | `{r['response']}` |" for r in rows]
    assert [row for row in wanted if row not in page] == [] and len(wanted) > 10


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{{{1}}}", "{{1}}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),  # an escaped brace is a character
        (r"first \boxed{1}. No: \boxed{2}, \boxed{3}", "2, 3"),
        (r"\boxed{}", ""),
        ("\\boxed{" + "1" * ANSWER_LIMIT + "}", "1" * ANSWER_LIMIT),
        ("\\boxed{" + "1" * (ANSWER_LIMIT + 1) + "}", None),
        ("\\boxed{" + "{" * 3_000_000, None),
        ("\\boxed{" * 300_000, None),
        ("<think>" * 300_000 + "\\boxed{7}", None),
        ("</think>" * 300_000 + "\\boxed{7}", "7"),
        ("\\" * 3_000_001 + "boxed{7}", "7"),
        ("\ud800\\boxed{\udfff}\x00", "\udfff"),
    ],
    ids=range(12),
)
def test_boxed_answer_of_any_size_is_found_at_once(text, answer):
    began = time.monotonic()
    assert boxed_answer(text) == answer
    assert time.monotonic() - began < 2


def test_equal_pairs_are_checked_once_and_reach_every_row(ranks):
    rows = [{"gold": "7", "answer": a} for a in ("7.0", None, "8", "7.0", "}{")]
    evaluate.grade(rows, 20.0, ranks)
    expected = ["right", "unreadable", "wrong", "right", "unreadable"]
    assert [row["verdict"] for row in rows] == expected
    assert [row["reward"] for row in rows] == [verdict == "right" for verdict in expected]


def hostile_answers():
    """Answers that break parsers: nested, huge, cut, random; none of them is 7."""
    rng = random.Random(0)
    made = []
    for form in (r"\frac{%s}{2}", r"\sqrt{%s}", "2^{%s}", r"\left(%s\right)", r"\text{%s}", "|%s|"):
        left, right = form.split("%s")
        made.append(left * 190 + "1" + right * 190)
    made += ["9" * 1999, "9" * 4301, "1." + "0" * 1900 + "1", "10^{-10^{9}}", "1e999999", "0^0"]
    made += ["2^{2^{2^{2^{2^{2}}}}}", "((9!)!)!", r"\binom{10^{9}}{10^{8}}", r"\frac{1}{0}", "inf"]
    made += [r"\sum_{n=1}^{10^{12}} n^{n}", r"\prod_{n=1}^{10^{9}} n", r"\int_0^1 x^{x^{x}} dx"]
    made += ["(x+y+z)^{999}", "x^{x^{x^{x}}}", "1" + "+1" * 990, "1" + ",1" * 990, "1" + "/0" * 50]
    made += ["\x00", "\ud800", "\u202e7", "\ufffd" * 900, "}{", "{" * 500, "$" * 500, "\\" * 501]
    alphabet = [*"0123456789+-*/^_(){}[]|!,.=<>xy ", r"\frac", r"\sqrt", r"\left", r"\text"]
    made += ["".join(rng.choices(alphabet, k=rng.randint(5, 60))) for _ in range(20)]
    return [*made, *(boxed_answer(bomb) for bomb in BOMBS)]


@pytest.mark.slow
def test_hostile_answers_cost_no_more_than_their_time(ranks):
    answers = hostile_answers()
    assert len(set(answers)) == len(answers) >= 55
    limit, began = 1.5, time.monotonic()
    pairs = [("7", answer) for answer in answers] + [("7", "7.0")]
    found = verdicts(pairs, limit, ranks, "hostile")
    seconds = time.monotonic() - began
    late = list(found.values()).count("failed")
    # Once in company and once alone, with 0.5 s for a new process and for a busy machine.
    assert seconds < 20 + 3 * late * (limit + 0.5)
    assert found.pop(("7", "7.0")) == found.pop(("1", "1.0")) == "right"
    assert [pair for pair, verdict in found.items() if verdict == "right"] == []


@pytest.mark.slow
def test_many_bombs_are_each_killed_and_nothing_else_changes(ranks):
    limit = 3.0
    bombs = [("7", f"{BOMB}+{i}") for i in range(4)]
    ordinary = [("7" if i < 100 else str(i), str(i if i % 2 else i + 1)) for i in range(300)]
    mixed = ordinary[:150] + bombs + ordinary[150:]
    found = verdicts(mixed, limit, ranks, "bombs")
    assert [found[bomb] for bomb in bombs] == ["failed"] * 4
    expected = ["right" if gold == answer else "wrong" for gold, answer in ordinary]
    assert [found[pair] for pair in ordinary] == expected


KEPT = []


def strange_pair(gold, answer):
    """Sleeps a tenth of a second, or for ever; keeps as many bytes as the answer says; or ends."""
    if gold == "sleep":
        time.sleep(60 if answer == "9" else 0.1)
    if gold == "keep":
        KEPT.append(bytearray(int(answer)))
    if answer == "end":
        os._exit(1)
    return "right"


def strange_task(gold, answers, timeout):
    """In the place of grade_task, in a grading process. 256 MiB are quicker than 2 GiB."""
    evaluate.check_pair, evaluate.GRADING_MEMORY = strange_pair, 2**28
    return evaluate.grade_task(gold, answers, timeout)


def test_a_pair_that_is_late_does_not_take_its_neighbors_along(monkeypatch, ranks):
    """Ten answers in one task are late together. Alone each has its own time limit."""
    monkeypatch.setattr(evaluate, "grade_task", strange_task)
    pairs = [("sleep", str(i)) for i in range(10)]
    found = verdicts(pairs, 0.6, ranks, "slow")
    assert [found[pair] for pair in pairs] == ["right"] * 9 + ["failed"]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit is Linux's")
def test_the_limit_is_two_gibibytes_beyond_the_address_space_at_first():
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("Linux alone tells what a process has")
    evaluate.memory_limit.cache_clear()
    limit = evaluate.memory_limit()
    [size] = [int(x.split()[1]) for x in status.read_text().splitlines() if x.startswith("VmSize")]
    assert limit - 1024 * size == pytest.approx(2**31, rel=0.01)


def test_a_pair_may_take_its_memory_and_no_more(monkeypatch, ranks):
    """What earlier answers left behind is nobody's fault: the last try has a fresh process."""
    monkeypatch.setattr(evaluate, "grade_task", strange_task)
    pairs = [("keep", str(2**27 + i)) for i in range(10)] + [("keep", str(2**28 + 2**20))]
    found = verdicts([*pairs, ("1", "end")], 20.0, ranks, "memory")
    assert [found[pair] for pair in pairs] == ["right"] * 10 + ["failed"]
    assert found["1", "end"] == "failed"


def test_a_folder_too_long_for_a_socket_is_named(monkeypatch, ranks):
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * 80)
    with pytest.raises(evaluate.UserError, match="TMPDIR /x+: too long .*TMPDIR=/tmp"):
        verdicts([("7", "7")], 20.0, ranks, "far")


def end_task(gold, answers, timeout):
    """In the place of grade_task: a process that always ends."""
    os._exit(1)


def test_processes_that_cannot_grade_are_an_error_and_no_verdict(monkeypatch, ranks):
    monkeypatch.setattr(evaluate, "grade_task", end_task)
    with pytest.raises(evaluate.UserError, match="grading processes end at once"):
        verdicts([("7", "7")], 20.0, ranks, "broken")


@pytest.mark.slow
def test_a_bomb_does_not_outlive_its_parent():
    """Nobody takes the verdict and nobody kills, as after a kill -9 of evaluate.py."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=evaluate.grade_task, args=("7", [BOMB], 1.0))
    process.start()
    process.join(90)
    assert process.exitcode not in (None, 0)
