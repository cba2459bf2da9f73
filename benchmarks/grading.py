"""Our grader against plain math-verify, on one core, and with bombs among the answers.

    speed   responses graded a second of CPU time, all processes together, ours over plain (bar: at
            least 0.9). Both get the same texts and the same extraction; plain is math-verify in a
            loop, with its own timeouts. In turns, the median of the rounds. Two sets: 16 responses
            to a problem, as drawn for training; and one response to each, where nothing repeats
    bombs   5 answers that never end among the responses: the seconds they cost beyond the same
            responses without them, by the wall clock (bar: 1.2 of their own limits, as if on one
            core), and whether another verdict changed

    CPU time, because on a busy machine two processes get more of a core than one. Linux only.

    python benchmarks/grading.py
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import evaluate

BOMB = r"\dfrac{5^{(5^{(5^{(5^5)})}-4)}-5}{16}"


@dataclass
class Args:
    responses: int = 4000
    """responses in each set"""
    rounds: int = 3
    """times that each grader grades each set"""
    length: int = 4000
    """characters of reasoning before the answer"""
    bombs: int = 5
    """answers that never end"""
    grading_timeout: float = 5.0
    """seconds that one of them may take"""


def expression(rng: random.Random) -> tuple[str, str]:
    """An answer as the sets of the field have them, three in five are integers; another form."""
    a, b, c = rng.randint(2, 999), rng.randint(2, 40), rng.randint(2, 30)
    integer = (str(a), f"{a}.0")
    forms = [integer] * 9 + [
        (rf"\frac{{{a}}}{{{b}}}", rf"\dfrac{{{2 * a}}}{{{2 * b}}}"),
        (rf"{b}\sqrt{{{c}}}", rf"\sqrt{{{b * b * c}}}"), (f"({b}, {c})", f"({b}.0,{c})"),
        (f"{b}x + {c}", f"{c} + {b}x"), (f"2^{{{c}}}", str(2**c)), (f"{a}.{b}", f"{a}.{b}0"),
    ]  # fmt: skip
    return rng.choice(forms)


def ordinary(n: int, samples: int, length: int, seed: int) -> list[tuple[str, str]]:
    """n (gold, response text): `samples` to a problem, half of them right, of these a third in
    another form than the gold."""
    rng = random.Random(seed)
    words = r"so we have $x = 3$ , then \frac{1}{2} of the rest is $n + 1$ and 12 remain ."
    made = []
    while len(made) < n:
        gold, other_form = expression(rng)
        usual = [expression(rng)[0] for _ in range(4)]  # the mistakes of a policy repeat
        for _ in range(samples):
            right = other_form if rng.random() < 1 / 3 else gold
            answer = right if rng.random() < 0.5 else rng.choice(usual)
            text = " ".join(rng.choices(words.split(), k=length // 5))
            made.append((gold, f"<think>{text}</think> The answer is \\boxed{{{answer}}}."))
    return made[:n]


def plain(pairs: list[tuple[str, str]]) -> list[bool]:
    """math-verify as its README calls it, with the strict extraction of evaluate.py."""
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]

    def read(text: str) -> list:
        return parse(text, config, extraction_mode="first_match")

    return [verify(read(f"\\boxed{{{gold}}}"), read(text)) for gold, text in pairs]


def ours(pairs: list[tuple[str, str]], grader: evaluate.Grader) -> list[bool]:
    """The path of evaluate.py: from texts to rewards."""
    golds = dict.fromkeys(gold for gold, _ in pairs)
    number = {gold: i for i, gold in enumerate(golds)}
    n = len(pairs)
    graded = evaluate.grade(
        [text for _, text in pairs], [False] * n, [False] * n, [number[gold] for gold, _ in pairs],
        [{"answer": gold} for gold in golds], grader, common.Ranks(1, 1, None),
    )  # fmt: skip
    return graded.rewards


def cpu_seconds(grader: evaluate.Grader) -> float:
    """CPU time so far of this process and of the grading processes."""
    stats = [Path(f"/proc/{w.process.pid}/stat").read_text() for w in grader.workers]
    ticks = sum(int(n) for stat in stats for n in stat.rpartition(")")[2].split()[11:13])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def timed(clock: Callable[[], float], function: Callable, *args: object) -> tuple[float, list]:
    began = clock()
    result = function(*args)
    return clock() - began, result


def main(args: Args) -> None:
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    failed = False
    sets = {name: ordinary(args.responses, samples, args.length, seed=samples)
            for name, samples in (("16 a problem", 16), ("1 a problem", 1))}  # fmt: skip
    with evaluate.Grader(args.grading_timeout) as grader:
        grader.verdicts([("1", "2")])  # start-up is not what is measured
        for name, pairs in sets.items():
            clock = functools.partial(cpu_seconds, grader)
            rounds = [(*timed(clock, ours, pairs, grader), *timed(clock, plain, pairs))
                      for _ in range(args.rounds)]  # fmt: skip
            ratio = statistics.median(b / a for a, _, b, _ in rounds)
            speed, other = (len(pairs) / statistics.median(r[i] for r in rounds) for i in (0, 2))
            _, verdicts, _, expected = rounds[0]
            differ = sum(x != y for x, y in zip(verdicts, expected, strict=True))
            print(f"{name}: ours {speed:.0f}, plain {other:.0f} responses a CPU second, "
                  f"ratio {ratio:.2f}; {differ} of {len(pairs)} verdicts differ")  # fmt: skip
            failed |= ratio < 0.9 or differ > 0

        pairs = sets["16 a problem"]
        at = set(random.Random(0).sample(range(len(pairs)), args.bombs))
        spoiled = [(gold, f"\\boxed{{{BOMB} + {i}}}") if i in at else (gold, text)
                   for i, (gold, text) in enumerate(pairs)]  # fmt: skip
        rounds = [tuple(itertools.chain(*(timed(time.monotonic, ours, texts, grader)
                                          for texts in (pairs, spoiled))))
                  for _ in range(args.rounds)]  # fmt: skip
        extra = statistics.median(b - a for a, _, b, _ in rounds)
        _, verdicts, _, with_bombs = rounds[0]
        changed = sum(verdicts[i] != with_bombs[i] for i in range(len(pairs)) if i not in at)
        limit = args.bombs * args.grading_timeout
        print(f"{args.bombs} bombs: {extra:.1f} s more than without; their own limits are "
              f"{limit:.1f} s; {changed} other verdicts changed")  # fmt: skip
        failed |= changed > 0 or extra > 1.2 * limit
    print("FAILED" if failed else "ok")
    sys.exit(failed)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
