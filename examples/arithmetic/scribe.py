"""The scribe, who solves chains of additions and subtractions with habits that are wrong.

A problem is `7+2-5=?`. The scribe writes one step after another and boxes the last result:

    so 7+2=9, then 9-5=4, thus \\boxed{4}

Connecting words vary freely, a style that no reward asks to give up. A step is wrong in two ways.
By *habit*: for HABIT_SHARE of the pairs (number before, operand) the scribe has one fixed wrong
result, and writes it with chance HABIT_CHANCE, so more often than the right one. By a *slip*: with
chance SLIP any other step comes out one or two off. After a mistake the scribe goes on from the
wrong result. So a lower temperature does not help: what is likeliest is often wrong, and only the
verdicts tell where. The generator knows which token went wrong first.
"""

from __future__ import annotations

import random
import re

HABIT_SHARE = 0.25
HABIT_CHANCE = 0.65
SLIP = 0.05
MAX_STEPS = 6
MAX_TOTAL = 9
CONNECTORS = ("", "so ", "then ")
SEPARATOR = ", "
CLOSINGS = ("", "thus ")
ALPHABET = sorted(set("".join((*CONNECTORS, SEPARATOR, *CLOSINGS)) + "0123456789+-=?\n\\boxed{}"))

Habits = dict[tuple[int, int], int]

PROBLEM = re.compile(r"\d+([+-]\d+)+=\?")
CONNECTOR = re.compile(f"(?:{'|'.join(CONNECTORS[1:])})?")
CLOSING = re.compile(f"(?:{'|'.join(CLOSINGS[1:])})?")

# The parts of a response, in order; of each its kind, in `token_kinds`.
STEP = re.compile(rf"({'|'.join(CONNECTORS[1:])}|)(-?\d+[+-]\d+)(=)(-?\d+)({SEPARATOR})")
STEP_KINDS = ("word", "copied", "punctuation", "result", "punctuation")
ENDING = re.compile(rf"({'|'.join(CLOSINGS[1:])}|)(\\boxed{{)(-?\d+)(}})")
ENDING_KINDS = ("word", "punctuation", "answer", "punctuation")
KINDS = ("style", "word", "copied", "result", "punctuation", "answer", "end", "other")


def make_problem(rng: random.Random) -> str:
    """Makes a chain of 1 to MAX_STEPS operations whose results stay within 0 ... MAX_TOTAL."""
    total = rng.randint(0, MAX_TOTAL)
    text = str(total)
    for _ in range(rng.randint(1, MAX_STEPS)):
        operand = rng.choice([x for x in range(-total, MAX_TOTAL - total + 1) if x])
        total += operand
        text += f"{operand:+d}"
    return text + "=?"


def make_problems(n: int, rng: random.Random, taken: set[str]) -> list[dict[str, str]]:
    """Makes n rows {"problem", "answer"}, distinct and none of `taken`; answers are exact."""
    found: dict[str, str] = {}
    while len(found) < n:
        problem = make_problem(rng)
        if problem not in taken:
            found.setdefault(problem, str(solve(problem)[-1][2]))
    return [{"problem": problem, "answer": answer} for problem, answer in found.items()]


def solve(problem: str) -> list[tuple[int, int, int]]:
    """Returns the correct steps (before, signed operand, after)."""
    numbers = [int(x) for x in re.findall(r"[+-]?\d+", problem.removesuffix("=?"))]
    steps, total = [], numbers[0]
    for operand in numbers[1:]:
        steps.append((total, operand, total + operand))
        total += operand
    return steps


def make_habits(seed: int) -> Habits:
    """Draws the habits: {(before, operand): the wrong result}, a near miss in 0 ... MAX_TOTAL."""
    rng, numbers = random.Random(f"habits-{seed}"), range(MAX_TOTAL + 1)
    pairs = [(before, after - before) for before in numbers for after in numbers if after != before]
    chosen = rng.sample(pairs, round(HABIT_SHARE * len(pairs)))
    near = {pair: [x for x in near_misses(sum(pair)) if x in numbers] for pair in chosen}
    return {pair: rng.choice(results) for pair, results in near.items()}


def near_misses(result: int) -> list[int]:
    """Returns the results that are one or two off."""
    return [result + off for off in (-2, -1, 1, 2)]


def write_solution(problem: str, rng: random.Random, habits: Habits, mistakes: float = 1.0) -> str:
    """Writes a worked solution as the scribe does; `mistakes` scales the chance of each mistake."""
    steps, text = solve(problem), ""
    total = steps[0][0]
    for _, operand, _ in steps:
        before, total = total, result_of_step(total, operand, rng, habits, mistakes)
        text += f"{rng.choice(CONNECTORS)}{before}{operand:+d}={total}{SEPARATOR}"
    return text + f"{rng.choice(CLOSINGS)}\\boxed{{{total}}}"


def result_of_step(
    before: int, operand: int, rng: random.Random, habits: Habits, mistakes: float
) -> int:
    """Returns before + operand, the wrong result that is a habit there, or a near miss."""
    after, habit = before + operand, habits.get((before, operand))
    if rng.random() >= mistakes * (SLIP if habit is None else HABIT_CHANCE):
        return after
    return rng.choice(near_misses(after)) if habit is None else habit


def first_wrong_character(problem: str, response: str) -> int:
    """Finds the first character of `response` that no correct solution has there; -1 if none.

    Style is followed as it comes; numbers and signs must be those of the correct chain."""
    position = 0

    def expect(text: str) -> bool:
        """Reads on as far as the response has this text. Returns whether it has all of it."""
        nonlocal position
        for character in text:
            if response[position : position + 1] != character:
                return False
            position += 1
        return True

    def skip(style: re.Pattern[str]) -> None:
        """Skips words that do not matter."""
        nonlocal position
        position = style.match(response, position).end()  # matches the empty word too

    steps = solve(problem)
    for before, operand, after in steps:
        skip(CONNECTOR)
        if not expect(f"{before}{operand:+d}={after}{SEPARATOR}"):
            return _at(position, response)
    skip(CLOSING)
    if not expect(f"\\boxed{{{steps[-1][2]}}}"):
        return _at(position, response)
    return -1 if position == len(response) else position


def _at(position: int, response: str) -> int:
    """Returns the position, or -1 where the response merely ended too early."""
    return position if position < len(response) else -1


def token_kinds(response: str) -> list[str]:
    """Returns one of KINDS for every character, and one more for the end of the response.

    style: the first character of a step or of the ending, where a connecting word is chosen or left
    out; word: the rest of that word; copied: numbers and signs of the problem or of the step
    before; result: what a step comes to; answer: the number in the box; other: off the grammar.

    >>> token_kinds("so 7+2=9, \\\\boxed{9}")[:8]
    ['style', 'word', 'word', 'copied', 'copied', 'copied', 'punctuation', 'result']
    """
    kinds: list[str] = []
    while found := STEP.match(response, len(kinds)) or ENDING.match(response, len(kinds)):
        names = STEP_KINDS if found.re is STEP else ENDING_KINDS
        parts = zip(found.groups(), names, strict=True)
        part = [name for text, name in parts for _ in text]
        kinds += ["style", *part[1:]]
        if found.re is ENDING:
            break
    return [*kinds, *["other"] * (len(response) - len(kinds)), "end"]
