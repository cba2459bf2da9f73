"""Writes the problems of the example: to train on, for the forecast, to judge on, to warm up on.

The sets are procedural ones of the package reasoning-gym, made so short that a response has 15 to
40 tokens. No problem is in two files, which is checked. Equal seeds give equal files.

Writes  OUTPUT/train.jsonl, OUTPUT/held_out/train.jsonl and OUTPUT/test.jsonl, one
        {"id", "problem", "answer"} per line, and OUTPUT/warm_start.jsonl, whose lines also have a
        worked "solution". All worked solutions are right. What they show is limited: those of
        leg_counting name only a part of the animals (`shown_animals`), so that the model learns
        how to answer, and must know, or guess, the legs of the others.

With --source the problems come from a JSONL file instead, and there is no warm start, unless its
lines have a "solution".

    python examples/smollm2/short_problems.py --output runs/smollm2/seed0 --seed 0
"""

from __future__ import annotations

import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common
import evaluate
from common import UserError

Row = dict[str, str]  # "id", "problem", "answer"; "solution" where there is one
FILES = ("test", "held_out/train", "train", "warm_start")  # in this order problems are handed out
TRIES = 100  # fresh problems looked at for one that is needed, before a set counts as used up


@dataclass
class Args:
    output: Path
    """folder to write into"""
    sets: tuple[str, ...] = ("leg_counting",)
    """sets of reasoning-gym to mix in equal parts: leg_counting, chain_sum, products, small_sums"""
    source: Path | None = None
    """JSONL file of problems to take instead of the sets; "solution" serves the warm start"""
    train: int = 96
    """problems to train on"""
    held_out: int = 48
    """problems for the forecast, which nobody trains on"""
    test: int = 96
    """problems to judge on"""
    warm_start: int = 256
    """problems with a worked solution for the warm start"""
    bare: int = 0
    """further solutions for the warm start, of leg_counting's arithmetic without its animals: the
    model becomes sure of that before it is sure of the legs"""
    shown: float = 0.5
    """leg_counting: share of the animals of each number of legs, and at least one, that the warm
    start may name"""
    seed: int = 0
    """seed of the problems, and of what the warm start shows"""

    def check(self) -> None:
        """Raises UserError on impossible values."""
        common.require(self, "train held_out test", lambda v: v >= 1, "1 or more")
        common.require(self, "warm_start bare", lambda v: v >= 0, "0 or more")
        common.require(self, "shown", lambda v: 0 <= v <= 1, "0 to 1")
        if self.source and self.bare:
            raise UserError(f"--bare {self.bare}: only with --sets; a file has its own solutions")
        known = lambda v: len(v) > 0 and set(v) <= SETS.keys()  # noqa: E731
        common.require(self, "sets", known, f"one or more of {', '.join(SETS)}")

    @property
    def sizes(self) -> dict[str, int]:
        """How many problems each file gets."""
        return dict(
            zip(FILES, (self.test, self.held_out, self.train, self.warm_start), strict=True)
        )


# --------------------------------------------------------------------------------------------------
# The sets. Each is a name of reasoning-gym, its settings, and a worked solution of an entry.


def shown_animals(share: float, seed: int) -> set[str]:
    """Chooses the animals that the warm start may name: a share of each number of legs, rounded up,
    and at least one."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    rng, by_legs = random.Random(f"animals-{seed}"), defaultdict(list)
    for animal, legs in ANIMALS.items():
        by_legs[legs].append(animal)
    sizes = {legs: max(1, math.ceil(share * len(group))) for legs, group in by_legs.items()}
    chosen = (rng.sample(group, sizes[legs]) for legs, group in by_legs.items())
    return {animal for group in chosen for animal in group}


def count_legs(entry: dict[str, Any]) -> list[str]:
    """Returns "3*10+2*6" for 3 crabs and 2 ants, and then the sums."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    animals = entry["metadata"]["animals"]
    products = "+".join(f"{n}*{ANIMALS[animal]}" for animal, n in animals.items())
    return [products, *running_sums([n * ANIMALS[animal] for animal, n in animals.items()])]


def running_sums(terms: list[int]) -> list[str]:
    """Returns "10+20+30", "30+30", "60": in every step the first two terms become one."""
    steps = []
    for i in range(len(terms)):
        left = [sum(terms[: i + 1]), *terms[i + 1 :]]
        steps.append("".join(f"{term:+d}" for term in left).removeprefix("+"))
    return steps


def add_chain(entry: dict[str, Any]) -> list[str]:
    """Returns the running sums of a chain such as "12 + 345 - 67"."""
    return running_sums([int(term) for term in expression(entry).replace("-", "+-").split("+")])


def multiply(entry: dict[str, Any]) -> list[str]:
    """Returns a product as a sum over the digits of its first factor, and then the sums."""
    left, right = expression(entry).split("*")
    parts = [int(digit) * 10**i for i, digit in enumerate(reversed(left)) if digit != "0"][::-1]
    products = "+".join(f"{part}*{right}" for part in parts)
    return [products, *running_sums([part * int(right) for part in parts])]


def expression(entry: dict[str, Any]) -> str:
    """Returns the expression of an entry without spaces."""
    return entry["metadata"]["expression"].replace(" ", "")


class ProblemSet(NamedTuple):
    """Says how entries of a set are made, asked and solved."""

    name: str  # in reasoning-gym
    settings: dict[str, int]  # of reasoning-gym
    solve: Callable[[dict[str, Any]], list[str]]  # steps; the last is the answer
    question: Callable[[dict[str, Any]], str]  # in few words: tokens are what costs


def legs_asked(entry: dict[str, Any]) -> str:
    """Returns the last line of the question, without its first word."""
    text = entry["question"].strip().splitlines()[-1].removeprefix("Now, ")
    return text[0].upper() + text[1:]


def value_asked(entry: dict[str, Any]) -> str:
    """Asks for the value of an expression."""
    return f"What is {entry['metadata']['expression']}?"


def terms(n: int, digits: int) -> dict[str, int]:
    """Returns settings for n terms or factors of so many digits."""
    return {"min_terms": n, "max_terms": n, "min_digits": digits, "max_digits": digits}


SETS = {
    "leg_counting": ProblemSet(
        "leg_counting",
        {"min_animals": 2, "max_animals": 2, "min_instances": 1, "max_instances": 5},
        count_legs,
        legs_asked,
    ),
    "chain_sum": ProblemSet("chain_sum", terms(3, 2), add_chain, value_asked),
    "products": ProblemSet("products", terms(2, 2), multiply, value_asked),
    # As easy as can be: a warm start of a few steps is right sometimes (QUICK=1 of run.sh).
    "small_sums": ProblemSet("chain_sum", terms(2, 1), add_chain, value_asked),
}


def may_be_shown(name: str, entry: dict[str, Any], animals: set[str]) -> bool:
    """Tells whether the warm start may solve an entry."""
    return name != "leg_counting" or set(entry["metadata"]["animals"]) <= animals


def entries(name: str, seed: int, stream: str = "smollm2") -> Iterator[dict[str, Any]]:
    """Yields entries of a set from reasoning-gym without end."""
    import reasoning_gym

    chosen, size = SETS[name], 2**20
    stream_seed = evaluate.stream_seed(stream, name, seed) % 2**31
    made = reasoning_gym.create_dataset(chosen.name, **chosen.settings, size=size, seed=stream_seed)
    yield from (made[i] for i in range(size))


def solution(steps: list[str]) -> str:
    """Joins steps into a worked solution that ends at the boxed answer."""
    return "=".join([*steps[:-1], f"\\boxed{{{steps[-1]}}}"])


def fresh(name: str, seed: int, animals: set[str]) -> Iterator[tuple[Row, bool]]:
    """Yields problems of a set without end, and whether the warm start may solve them."""
    for entry in entries(name, seed):
        row = {"problem": SETS[name].question(entry), "answer": entry["answer"]}
        row["solution"] = solution(SETS[name].solve(entry))
        yield row, may_be_shown(name, entry, animals)


def bare(seed: int) -> Iterator[tuple[Row, bool]]:
    """Yields the arithmetic of leg_counting without its animals, all for the warm start."""
    for entry in entries("leg_counting", seed, "bare"):
        steps = count_legs(entry)
        row = {"problem": f"What is {steps[0]}?", "answer": steps[-1]}
        yield row | {"solution": solution(steps)}, True


# --------------------------------------------------------------------------------------------------
# The files


def hand_out(rows: Iterator[tuple[Row, bool]], sizes: dict[str, int], what: str) -> dict[str, list]:
    """Deals distinct problems to the files; the warm start gets only what it may show.

    Raises UserError if the problems run out."""
    files: dict[str, list[Row]] = {name: [] for name in sizes}
    seen, tries = set(), TRIES * sum(sizes.values())
    for name, size in sizes.items():
        while len(files[name]) < size:
            row, shown = next(rows, (None, False))
            tries -= 1
            if row is None or tries < 0:
                raise UserError(
                    f"{what}: only {len(files[name])} of {size} problems for {name}.jsonl are "
                    "left; ask for fewer"
                )
            key = " ".join(row["problem"].split())
            if key not in seen and (shown or name != "warm_start"):
                seen.add(key)
                files[name].append(row)
    return files


def read_source(path: Path) -> Iterator[tuple[Row, bool]]:
    """Yields the problems of a file; those with a solution can be shown."""
    if not path.is_file():
        raise UserError(f"--source {path}: no such file; examples/problem_sets.py writes one")
    for number, row in enumerate(evaluate.read_jsonl(path), 1):
        names = ("problem", "answer", "solution") if "solution" in row else ("problem", "answer")
        yield {n: evaluate.read_field(row, n, f"{path}:{number}") for n in names}, "solution" in row


def make(args: Args) -> dict[str, list[Row]]:
    """Makes the rows of every file, with ids."""
    if args.source:
        files = hand_out(read_source(args.source), args.sizes, f"--source {args.source}")
    else:
        files, animals = {name: [] for name in FILES}, shown_animals(args.shown, args.seed)
        for i, name in enumerate(args.sets):  # the first sets get what is left over
            part = {
                f: (n + len(args.sets) - 1 - i) // len(args.sets) for f, n in args.sizes.items()
            }
            dealt = hand_out(fresh(name, args.seed, animals), part, f"--sets {name}")
            for file, rows in dealt.items():
                files[file] += rows
        files["warm_start"] += hand_out(bare(args.seed), {"bare": args.bare}, "--bare")["bare"]
    for file, rows in files.items():
        random.Random(f"order-{args.seed}-{file}").shuffle(rows)
        short = file.split("/")[0].replace("_", "-")
        files[file] = [{"id": f"{short}-{i}"} | row for i, row in enumerate(rows)]
    return files


def main(args: Args) -> None:
    args.check()
    for file, rows in make(args).items():
        if file != "warm_start":
            rows = [{name: row[name] for name in ("id", "problem", "answer")} for row in rows]
        evaluate.write_jsonl(args.output / f"{file}.jsonl", rows)
        print(f"{args.output / file}.jsonl: {len(rows)} problems")


if __name__ == "__main__":
    common.run(main, Args, __doc__)
