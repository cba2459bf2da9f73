"""Verdicts: the quirks of math-verify with the verdict we want, hostile answers, many bombs."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import common
import evaluate
from evaluate import ANSWER_LIMIT, Grader, Verdict, boxed_answer

BOMB = r"\dfrac{5^{(5^{(5^{(5^5)})}-4)}-5}{16}"  # a big-integer step that no signal interrupts


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(20.0) as running:
        yield running


# --------------------------------------------------------------------------------------------------
# The verdict table


class Quirk(NamedTuple):
    """A response, our verdict on it, and why, where it is not what we want (`reason`)."""

    gold: str
    response: str
    verdict: bool
    reason: str = ""


COMPARABLE = "math-verify's verdict is kept: published numbers are made with it"
QUIRKS = [
    # right
    Quirk("7", r"\boxed{7}", True),
    Quirk("7", r"\boxed{ 7.0 }", True),
    Quirk("12", r"\boxed{12.}", True),  # math-verify alone: False
    Quirk("1000", r"\boxed{1,000}", True),
    Quirk("1000", r"\boxed{1{,}000}", True),
    Quirk("1000", r"\boxed{1\,000}", True),  # math-verify alone reads 1 * 0
    Quirk("1/2", r"\boxed{0.5}", True),
    Quirk(r"\frac12", r"\boxed{\dfrac{1}{2}}", True),
    Quirk("1.5", r"\boxed{1\frac{1}{2}}", True),
    Quirk("x+1", r"\boxed{1+x}", True),
    Quirk("x^2+2x+1", r"\boxed{(x+1)^2}", True),
    Quirk("1024", r"\boxed{2^{10}}", True),
    Quirk("5", r"\boxed{5\text{ cm}}", True),
    Quirk("90", r"\boxed{90^\circ}", True),
    Quirk("12", r"\boxed{\$12}", True),
    Quirk("-1", "\\boxed{\u22121}", True),  # a typographic minus
    Quirk(r"\{1,2\}", r"\boxed{\{2,1\}}", True),
    Quirk(r"\{1,2\}", r"\boxed{\left\{2, 1\right\}}", True),
    Quirk("C", r"\boxed{\text{(C)}}", True),
    Quirk("none of these", r"\boxed{\text{None of these}}", True),
    Quirk("3", r"\boxed{x=3}", True),
    Quirk("7", r"<think>\boxed{8}</think>So \boxed{7}", True),
    Quirk("7", r"\boxed{8}, no: \boxed{7}", True),
    # wrong
    Quirk("7", r"\boxed{8}", False),
    Quirk("7", "I tried 5 6 7", False),  # math-verify with its defaults takes the last number
    Quirk("7", "<think> maybe x = 7, wait", False),
    Quirk("8", r"<think>\boxed{8}</think>The answer is 8", False),
    Quirk("7", r"<think> it must be \boxed{7}", False),
    Quirk("7", r"\boxed{7}</think> no <think> \boxed{7}", False),
    Quirk("(1,2)", r"\boxed{(2,1)}", False),
    Quirk("[1,2]", r"\boxed{(1,2)}", False),
    Quirk("7", r"\boxed{7, 8}", False),
    Quirk("7", r"\boxed{7 \text{ or } 8}", False),
    Quirk("2", r"\boxed{\pm 2}", False),
    Quirk("1/3", r"\boxed{0.333}", False),  # three digits are not a third
    Quirk(r"\sqrt{2}", r"\boxed{1.4142}", False),
    # malformed
    Quirk("7", r"\boxed{7", False),
    Quirk("7", r"\boxed{}", False),
    Quirk("7", r"\boxed{\frac{7}{}", False),
    Quirk("7", "\\boxed{\x007}", False),
    Quirk("7", "\\boxed{7\ud800}", False),
    Quirk("7", r"\boxed{\frac{7}{0}}", False),
    Quirk("7", r"\boxed{7}}}", True),
    # not as we want it
    Quirk("7", r"\boxed 7", False, "no braces: rare, and where it ends is a guess"),
    Quirk("7", r"\fbox{7}", False, "the prompt asks for \\boxed"),
    Quirk("7", "\\boxed{\uff17}", False, f"a full-width digit; {COMPARABLE}"),
    Quirk("1011", r"\boxed{1011_2}", True, f"drops the base; {COMPARABLE}"),
    Quirk("1011_2", r"\boxed{1011_3}", True, f"drops the base; {COMPARABLE}"),
    Quirk("(1,2)", r"\boxed{1,2}", True, f"interval or list: golds do not tell; {COMPARABLE}"),
    Quirk("50", r"\boxed{50\%}", True, f"golds leave out the sign; {COMPARABLE}"),
    Quirk("0.5", r"\boxed{50\%}", True, COMPARABLE),
    Quirk("A", r"\boxed{a}", True, f"choice letters come in both; {COMPARABLE}"),
    Quirk("3", r"\boxed{3=3}", True, f"x=3 must count, so must this; {COMPARABLE}"),
    Quirk("3", r"\boxed{2+1}", True, f"an unfinished sum has the value; {COMPARABLE}"),
    Quirk("1<x<2", r"\boxed{(1,2)}", True, COMPARABLE),
    Quirk("(1,2)", r"\boxed{1<x<2}", False, f"not symmetric; {COMPARABLE}"),
    Quirk(r"\emptyset", r"\boxed{\varnothing}", False, COMPARABLE),
    Quirk("1000", r"\boxed{1e3}", False, f"reads e; {COMPARABLE}"),
    Quirk("7", r"\boxed{*7*}", False, f"Markdown in a box; {COMPARABLE}"),
    Quirk("5", r"\boxed{\text{five}}", False, f"words are words; {COMPARABLE}"),
    # hostile
    Quirk("7", rf"\boxed{{{BOMB}}}", False),
    Quirk("7", r"\boxed{10^{10^{10}}}", False),
    Quirk("7", r"\boxed{(10^9)!}", False),
    Quirk("7", r"\boxed{" + "(" * 900 + "7" + ")" * 900 + "}", False),
]  # fmt: skip


@pytest.mark.parametrize(("part", "limit"), [(slice(0, -4), 20.0), (slice(-4, None), 1.5)])
def test_verdict_table(part: slice, limit: float) -> None:
    """The whole path, response by response; only the hostile ones may run out of time."""
    quirks = QUIRKS[part]
    n = len(quirks)
    with Grader(limit) as grader:
        graded = evaluate.grade(
            [q.response for q in quirks], [False] * n, [False] * n, list(range(n)),
            [{"answer": q.gold} for q in quirks], grader, common.Ranks(0, 1, None),
        )  # fmt: skip
    wrong = [q for q, reward in zip(quirks, graded.rewards, strict=True) if reward != q.verdict]
    assert wrong == []
    assert graded.failures == 0 or limit < 20


def test_every_gold_of_the_table_can_be_parsed(grader: Grader) -> None:
    verdicts = grader.verdicts([(q.gold, None) for q in QUIRKS])
    assert [pair for pair, verdict in verdicts.items() if not verdict.correct] == []


def test_the_documented_table_is_this_one() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "evaluate.md").read_text()
    rows = [f"| `{q.gold}` | `{q.response}` |" for q in QUIRKS if q.reason and q.response.isascii()]
    assert [row for row in rows if row not in page] == []


# --------------------------------------------------------------------------------------------------
# Boxes and thoughts


def test_a_prompt_that_opens_the_thought() -> None:
    assert boxed_answer(r"so \boxed{7}", in_thought=True) is None  # it ended within the thought
    assert boxed_answer(r"so \boxed{7}</think> it is \boxed{8}", in_thought=True) == "8"


def test_truncated_is_wrong_whatever_it_says(grader: Grader) -> None:
    graded = evaluate.grade([r"\boxed{7}"] * 2, [True, False], [False] * 2, [0, 0],
                            [{"answer": "7"}], grader, common.Ranks(0, 1, None))  # fmt: skip
    assert graded == ([None, "7"], [False, True], [-1, 0], 0)


def test_escaped_braces_are_characters() -> None:
    assert boxed_answer(r"\boxed{\left\{ x \right.}") == r"\left\{ x \right."


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{" + "1" * ANSWER_LIMIT + "}", "1" * ANSWER_LIMIT),
        ("\\boxed{" + "1" * (ANSWER_LIMIT + 1) + "}", None),
        ("\\boxed{" + "{" * 10_000_000, None),
        ("\\boxed{" * 1_000_000, None),
        ("<think>" * 1_000_000 + "\\boxed{7}", None),
        ("x" * 10_000_000 + "\\boxed{7}", "7"),
        ("</think>" * 1_000_000 + "\\boxed{7}", "7"),
        ("\\" * 10_000_001 + "boxed{7}", "7"),
        ("\ud800\\boxed{\udfff}\x00", "\udfff"),
    ],
    ids=range(9),
)
def test_boxes_of_any_size_are_found_at_once(text: str, answer: str | None) -> None:
    began = time.monotonic()
    assert boxed_answer(text) == answer
    assert time.monotonic() - began < 2


def test_equal_wrong_answers_share_a_class(grader: Grader) -> None:
    texts = [r"\boxed{7}", r"\boxed{\frac12}", r"\boxed{0.5}", r"\boxed{\dfrac{1}{2}}",
             r"\boxed{3}", r"\boxed{7.0}", r"\boxed{}", "none", r"\boxed{3}"]  # fmt: skip
    index = [0] * 8 + [1]  # the last one belongs to another problem, whose numbers start again
    graded = evaluate.grade(texts, [False] * 9, [False] * 9, index, [{"answer": "7"}] * 2, grader,
                            common.Ranks(0, 1, None))  # fmt: skip
    assert graded.classes == [0, 1, 1, 1, 2, 0, -1, -1, 1]


# --------------------------------------------------------------------------------------------------
# Hostile answers


def hostile_answers() -> list[str]:
    """Answers that break parsers: nested, huge, cut, random; none of them is 7."""
    rng = random.Random(0)
    nested = [r"\frac{%s}{2}", r"\sqrt{%s}", "2^{%s}", "(%s)", r"\left(%s\right)", r"\{%s\}",
              r"\text{%s}", r"\begin{pmatrix}%s\end{pmatrix}", "|%s|", r"\log(%s)"]  # fmt: skip
    made = []
    for form in nested:
        text = "1"
        for _ in range(190):
            text = form.replace("%s", text)
        made.append(text)
    made += ["9" * 1999, "9" * 4301, "1." + "0" * 1900 + "1", "10^{10^{10^{10}}}", "10^{-10^{9}}",
             "2^{2^{2^{2^{2^{2}}}}}", "(10^{9})!", "((9!)!)!", r"\binom{10^{9}}{10^{8}}",
             r"\sum_{n=1}^{10^{12}} n^{n}", r"\prod_{n=1}^{10^{9}} n", r"\int_0^1 x^{x^{x}} dx",
             "(x+y+z)^{999}", "x^{x^{x^{x}}}", "1e999999", "1" + "+1" * 990, "1" + ",1" * 990,
             "1" + "/0" * 50, r"\frac{1}{0}", "0^0", "nan", "inf"]  # fmt: skip
    made += ["\x00", "\ud800", "\udfff\ud800", "\u202e7", "\ufffd" * 900, "__import__('os')",
             "}{", "{" * 500, "$" * 500, "\\" * 501, "%" * 500, "&" * 500, "\n" * 500]  # fmt: skip
    alphabet = [*"0123456789+-*/^_(){}[]|!,.=<>xy ", r"\frac", r"\sqrt", r"\left", r"\text"]
    made += ["".join(rng.choices(alphabet, k=rng.randint(5, 60))) for _ in range(20)]
    return made


def test_hostile_answers_cost_no_more_than_their_time() -> None:
    answers = hostile_answers()
    assert len(set(answers)) == len(answers) >= 60
    limit = 0.7
    with Grader(limit) as grader:
        grader.verdicts([("1", "2")])
        began = time.monotonic()
        verdicts = grader.verdicts([("7", answer) for answer in answers] + [("7", "7.0")])
        seconds = time.monotonic() - began
        late = sum(verdict.correct is None for verdict in verdicts.values())
        # 0.5 s a process that is started anew, and as much again for a busy machine.
        assert seconds < 10 + 2 * late * (limit + 0.5)
    assert verdicts.pop(("7", "7.0")) == Verdict(True, None)
    assert [pair for pair, verdict in verdicts.items() if verdict.correct] == []
    json.dumps([verdict.key for verdict in verdicts.values()])


def test_many_bombs_are_each_killed_and_nothing_else_changes() -> None:
    limit = 3.0
    bombs = [("7", f"{BOMB}+{i}") for i in range(6)]
    ordinary = [(str(i), str(i if i % 2 else i + 1)) for i in range(400)]
    mixed = list(spread(bombs, ordinary))
    with Grader(limit) as grader:
        grader.verdicts([("1", "2")])
        began = time.monotonic()
        verdicts = grader.verdicts(mixed)
        assert time.monotonic() - began < 2 * 6 * limit + 20
    assert all(verdicts[bomb].correct is None for bomb in bombs)
    assert [verdicts[pair].correct for pair in ordinary] == [i % 2 == 1 for i in range(400)]


def spread(few: list, many: list) -> Iterator:
    """The few spread evenly among the many."""
    step = len(many) // len(few)
    for i, item in enumerate(many):
        if i % step == 0 and i // step < len(few):
            yield few[i // step]
        yield item


def test_a_lost_worker_loses_nothing() -> None:
    """As when the system kills a process for memory: between two calls, all of them."""
    pairs = [(str(i), str(i)) for i in range(100)] + [("1", "2")]
    with Grader(20.0) as grader:
        grader.verdicts(pairs)
        for worker in grader.workers:
            worker.process.kill()
            worker.process.join()
        verdicts = grader.verdicts(pairs)
    assert [verdicts[pair].correct for pair in pairs] == [True] * 100 + [False]


def test_a_bomb_does_not_outlive_its_parent() -> None:
    """Nobody takes the verdict, nobody kills: as after a kill -9 of evaluate.py."""
    with Grader(1.0) as grader:
        grader.verdicts([("1", "2")])
        worker = grader.workers[0]
        worker.give([("7", BOMB)])
        worker.process.join(90)
        assert worker.process.exitcode not in (None, 0)


def eat_memory(gold: str, answer: str | None) -> Verdict:
    """Stands in for math-verify: asks for as much memory as the answer says."""
    return Verdict(len(bytearray(int(answer))) > 0, None)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit is Linux's")
def test_a_worker_may_take_2_gib_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that runs out of memory ends; its pair is tried once more, the others stay."""
    monkeypatch.setattr(evaluate, "Worker", HungryWorker)
    pairs = [("", "1"), ("", str(2**30)), ("", str(2**31 + 2**20)), ("", "2")]
    with Grader(20.0) as grader:
        verdicts = grader.verdicts(pairs)
    assert [verdicts[pair].correct for pair in pairs] == [True, True, None, True]


def hungry_work(pipe: object, timeout: float) -> None:
    """`work`, but for what a pair costs."""
    real = evaluate.grade_pair
    evaluate.grade_pair = lambda gold, answer: (
        eat_memory(gold, answer) if gold == "" else real(gold, answer)
    )
    evaluate.work(pipe, timeout)


class HungryWorker(evaluate.Worker):
    """A worker whose pairs cost memory."""

    target = staticmethod(hungry_work)


def test_surrogates_reach_the_files(tmp_path: Path) -> None:
    rows = [{"text": "\ud800 \x00", "answer": "\udfff"}]
    common.write_jsonl(tmp_path / "samples.jsonl", rows)
    assert common.read_jsonl(tmp_path / "samples.jsonl") == rows
