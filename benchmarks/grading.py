"""Compares our grading with plain math-verify, on one core, and with bombs among the answers.

    speed   responses graded per second of CPU time, all processes together, ours over plain (bar:
            at least 0.7). Both get the same texts and the same extraction; plain is math-verify in
            a loop, with its own timeouts. In turns, the median of the rounds. Two sets: 16
            responses to a problem, as sampled for training; and one response to each, where nothing
            repeats
    bombs   5 answers that never end among the responses: the seconds they cost beyond the same
            responses without them, by the wall clock (bar: 1.5 of their own limits, as if on one
            core; each is late twice, in company and alone), and whether another verdict changed

CPU time, because on a busy machine two processes get more of a core than one. Linux only.

    python benchmarks/grading.py
"""

from __future__ import annotations

import logging
import multiprocessing.forkserver
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import evaluate

TIMEOUT = 5.0  # seconds that one answer may take
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


def expression(rng: random.Random) -> tuple[str, str]:
    """Makes an answer as problem sets have them (three in five are integers), in two forms."""
    a, b, c = rng.randint(2, 999), rng.randint(2, 40), rng.randint(2, 30)
    integer = (str(a), f"{a}.0")
    forms = [integer] * 9 + [
        (rf"\frac{{{a}}}{{{b}}}", rf"\dfrac{{{2 * a}}}{{{2 * b}}}"),
        (rf"{b}\sqrt{{{c}}}", rf"\sqrt{{{b * b * c}}}"),
        (f"({b}, {c})", f"({b}.0,{c})"),
        (f"{b}x + {c}", f"{c} + {b}x"),
        (f"2^{{{c}}}", str(2**c)),
        (f"{a}.{b}", f"{a}.{b}0"),
    ]
    return rng.choice(forms)


def ordinary(n: int, samples: int, length: int, seed: int) -> list[tuple[str, str]]:
    """Makes n pairs of a gold and a response: `samples` to a problem, half of them right, of these
    a third in another form than the gold."""
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
    """Grades with math-verify as its README says, with the strict extraction of evaluate.py."""
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]

    def read(text: str) -> list:
        return parse(text, config, extraction_mode="first_match")

    return [verify(read(f"\\boxed{{{gold}}}"), read(text)) for gold, text in pairs]


def ours(pairs: list[tuple[str, str]]) -> list[bool]:
    """Grades as evaluate.py does, from texts to rewards."""
    rows = [{"gold": gold, "answer": evaluate.boxed_answer(text)} for gold, text in pairs]
    evaluate.grade(rows, TIMEOUT, common.Ranks(1, 1, torch.device("cpu")))
    return [row["reward"] == 1.0 for row in rows]


def cpu_seconds() -> float:
    """Returns the CPU time so far of this process and of all grading processes that have ended."""
    server = multiprocessing.forkserver._forkserver._forkserver_pid
    stat = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()
    return time.process_time() + sum(map(int, stat[13:15])) / os.sysconf("SC_CLK_TCK")


def timed(clock: Callable[[], float], grader: Callable, pairs: list) -> tuple[float, list[bool]]:
    """Returns the seconds that a grader takes, and its verdicts."""
    began = clock()
    result = grader(pairs)
    return clock() - began, result


def measure_speed(name: str, pairs: list[tuple[str, str]], rounds: int) -> bool:
    """Prints the speed of both graders on one set; returns whether a bar is missed."""
    results = [
        (timed(cpu_seconds, ours, pairs), timed(cpu_seconds, plain, pairs)) for _ in range(rounds)
    ]
    ratio = statistics.median(b / a for (a, _), (b, _) in results)
    speeds = [len(pairs) / statistics.median(r[side][0] for r in results) for side in (0, 1)]
    (_, verdicts), (_, expected) = results[0]
    differ = sum(x != y for x, y in zip(verdicts, expected, strict=True))
    print(
        f"{name}: ours {speeds[0]:.0f}, plain {speeds[1]:.0f} responses per CPU second, "
        f"ratio {ratio:.2f}; {differ} of {len(pairs)} verdicts differ"
    )
    return ratio < 0.7 or differ > 0


def measure_bombs(pairs: list[tuple[str, str]], n_bombs: int, rounds: int) -> bool:
    """Prints what bombs cost; returns whether a bar is missed."""
    at = set(random.Random(0).sample(range(len(pairs)), n_bombs))
    spoiled = [
        (gold, f"\\boxed{{{BOMB} + {i}}}") if i in at else (gold, text)
        for i, (gold, text) in enumerate(pairs)
    ]
    results = [
        [timed(time.monotonic, ours, texts) for texts in (pairs, spoiled)] for _ in range(rounds)
    ]
    extra = statistics.median(b - a for (a, _), (b, _) in results)
    (_, verdicts), (_, with_bombs) = results[0]
    changed = sum(verdicts[i] != with_bombs[i] for i in range(len(pairs)) if i not in at)
    limit = n_bombs * TIMEOUT
    print(
        f"{n_bombs} bombs: {extra:.1f} s more than without; their own limits are {limit:.1f} s; "
        f"{changed} other verdicts changed"
    )
    return changed > 0 or extra > 1.5 * limit


def main(args: Args) -> None:
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    ours([("1", "2")])  # the start of the server is not what is measured
    sets = {
        f"{samples} per problem": ordinary(args.responses, samples, args.length, seed=samples)
        for samples in (16, 1)
    }
    missed = [measure_speed(name, pairs, args.rounds) for name, pairs in sets.items()]
    missed.append(measure_bombs(sets["16 per problem"], args.bombs, args.rounds))
    print("FAILED" if any(missed) else "ok")
    sys.exit(any(missed))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
