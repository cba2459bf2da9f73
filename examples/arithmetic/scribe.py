"""The noisy scribe, who solves chains of additions and subtractions step by step, with slips.

A problem is `7+2-5=?`. The scribe writes one step after another and boxes the last result:

    so 7+2=9, then 9-5=4, thus \\boxed{4}

Connecting words vary freely, a style that no reward asks to give up. A step is wrong with chance
SLIP_ADDING or SLIP_SUBTRACTING, and after a slip the scribe goes on from the wrong result. So the
chance of a correct answer falls with the length of the chain, from about 0.9 to about 0.1. The
generator knows which token went wrong first.
"""

from __future__ import annotations

import random
import re

SLIP_ADDING = 0.07
SLIP_SUBTRACTING = 0.28
MAX_STEPS = 6
MAX_TOTAL = 9
CONNECTORS = ("", "so ", "then ")
SEPARATOR = ", "
CLOSINGS = ("", "thus ")
ALPHABET = sorted(set("".join((*CONNECTORS, SEPARATOR, *CLOSINGS)) + "0123456789+-=?\n\\boxed{}"))

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


def write_solution(problem: str, rng: random.Random, slips: float = 1.0) -> str:
    """Writes a worked solution as the scribe does; `slips` scales the chance of each slip."""
    steps, text = solve(problem), ""
    total = steps[0][0]
    for _, operand, _ in steps:
        before, total = total, slip(total, operand, slips, rng)
        text += f"{rng.choice(CONNECTORS)}{before}{operand:+d}={total}{SEPARATOR}"
    return text + f"{rng.choice(CLOSINGS)}\\boxed{{{total}}}"


def slip(before: int, operand: int, slips: float, rng: random.Random) -> int:
    """Returns before + operand, or a near miss."""
    after = before + operand
    chance = slips * (SLIP_ADDING if operand > 0 else SLIP_SUBTRACTING)
    return after + rng.choice((-2, -1, 1, 2)) if rng.random() < chance else after


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
