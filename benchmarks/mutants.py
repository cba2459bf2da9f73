"""Changes the five files in random places, one at a time, and counts what the quick tests notice.

A mutant is one changed operator, comparison, number or truth value. Docstrings, messages, type
annotations and the defaults of Args are left as they are. Each mutant runs in a copy of the
repository, never in the working tree:

    1. All quick tests run once, unchanged, and every test's lines of the five files are recorded.
    2. A mutant meets the tests that reach its line, and after those all others. The first failure
       kills it, and so does a run that takes much longer than it should.

A line that no test reaches counts as survived, and is marked as such. Results are kept in --output;
the same command goes on where it was stopped, until code or tests change.

    python benchmarks/mutants.py                                # 60 mutants, a minute or less each
    python benchmarks/mutants.py --only stage1_extreme.py --n 5
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILES = ("common.py", "stage1_extreme.py", "build_signals.py", "stage2_distill.py", "evaluate.py",
         "verdict.py")  # fmt: skip
TESTS = [sys.executable, "-m", "pytest", "-m", "not slow", "--tb=no", "-p", "no:cacheprovider"]
SWAPS = {"+": "-", "*": "/", "//": "*", "%": "//", "**": "*", "&": "|", "and": "or", "<": "<="}
SWAPS |= {">": ">=", "==": "!=", "is": "is not", "in": "not in"}
SWAPS |= {b: a for a, b in SWAPS.items() if b not in SWAPS}  # and each of them the other way


@dataclass(frozen=True)
class Mutant:
    """One change: the text `original` at byte `start` of a file becomes `changed`."""

    file: str
    line: int
    start: int
    original: str
    changed: str
    lines: range  # of the whole statement, or of the head of a compound one

    def apply(self, source: bytes) -> bytes:
        """Returns the source with the change."""
        end = self.start + len(self.original)
        return source[: self.start] + self.changed.encode() + source[end:]


# --------------------------------------------------------------------------------------------------
# Which changes there are


def children(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the parts of a node in which a mutant may be: no message, no annotation, no field."""
    if isinstance(node, (ast.JoinedStr, ast.Raise, ast.Assert)):
        return
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("print", "warn")):
        return
    if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
        return
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            is_field = isinstance(node, ast.ClassDef) and isinstance(child, ast.AnnAssign)
            # zip(..., strict=True) guards against mistakes that a correct program does not make.
            is_guard = getattr(child, "arg", None) == "strict"
            skipped = name in ("annotation", "returns", "decorator_list") or is_field or is_guard
            if isinstance(child, ast.AST) and not skipped:
                yield child


def operands(node: ast.AST) -> list[ast.AST]:
    """Lists the nodes between which the operators of `node` are written."""
    if isinstance(node, ast.BinOp):
        sides = [node.left, node.right]
        # A path or a dict that is put together in another way fails at once, which shows nothing.
        texts = [x for x in sides if isinstance(x, (ast.JoinedStr, ast.Dict))]
        texts += [x for x in sides if isinstance(getattr(x, "value", None), str)]
        return [] if texts else sides
    if isinstance(node, ast.AugAssign):
        return [node.target, node.value]
    if isinstance(node, ast.BoolOp):
        return node.values
    return [node.left, *node.comparators] if isinstance(node, ast.Compare) else []


def changed_constant(value: Any) -> Any:
    """Returns what a number or truth value becomes; None for other constants."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return (2 * value or 1.0) if isinstance(value, float) else None


def find_mutants(file: str, source: bytes) -> list[Mutant]:
    """Lists every change that can be made to a file."""
    starts = [0, *(found.end() for found in re.finditer(rb"\n", source))]  # of the lines

    def span(node: ast.AST) -> tuple[int, int]:
        first = starts[node.lineno - 1] + node.col_offset
        return first, starts[node.end_lineno - 1] + node.end_col_offset

    def spots(node: ast.AST) -> Iterator[tuple[int, str, str]]:
        """Yields (start, original, changed) of the node itself."""
        sides = operands(node)
        for left, right in zip(sides, sides[1:], strict=False):
            start, end = span(left)[1], span(right)[0]
            gap = re.sub(rb"#[^\n]*", lambda found: b" " * len(found[0]), source[start:end])
            found = re.search(rb"[^\s()]+( not| in)?", gap)
            text = found[0].decode()
            operator = text.removesuffix("=") if isinstance(node, ast.AugAssign) else text
            if operator in SWAPS:
                yield start + found.start(), operator, SWAPS[operator]
        if isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
            start, _ = span(node)
            text = {ast.Not: "not", ast.USub: "-", ast.Invert: "~"}[type(node.op)]
            yield start, text, ""
        if isinstance(node, ast.Constant):
            (start, end), changed = span(node), changed_constant(node.value)
            if changed is not None:
                yield start, source[start:end].decode(), repr(changed)

    def walk(node: ast.AST, lines: range) -> Iterator[Mutant]:
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            last = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno
            lines = range(node.lineno, last + 1)
        for start, original, changed in spots(node):
            line = source.count(b"\n", 0, start) + 1
            yield Mutant(file, line, start, original, changed, lines)
        for child in children(node):
            yield from walk(child, lines)

    return [*walk(ast.parse(source), range(0))]


# --------------------------------------------------------------------------------------------------
# Which tests reach a line. This file is also a pytest plugin, and a hook of every Python process
# that the tests start. All write to one file: "start", "test" and "line", separated by tabs.

SEEN: set[tuple[str, int]] = set()


def note(*words: Any) -> None:
    """Appends a line to the record that all processes share."""
    with open(os.environ["ERPD_REACHED"], "a") as file:
        file.write("\t".join(map(str, words)) + "\n")


def follow() -> None:
    """Starts to record the lines of the five files that this process runs, each once a test."""
    names = {str(ROOT / name): name for name in FILES}

    def on_line(frame: Any, event: str, _: Any) -> Any:
        spot = (names[frame.f_code.co_filename], frame.f_lineno)
        if event == "line" and spot not in SEEN:
            SEEN.add(spot)
            note("line", *spot)
        return on_line

    def on_call(frame: Any, event: str, _: Any) -> Any:
        return on_line if frame.f_code.co_filename in names else None

    sys.settrace(on_call)
    threading.settrace(on_call)


def pytest_runtest_logstart(nodeid: str) -> None:
    """Begins the record of a test."""
    SEEN.clear()
    follow()  # again, in case that a test took the hook for itself
    note("start", nodeid)


def pytest_runtest_logreport(report: Any) -> None:
    """Records how a test ended."""
    note("test", report.nodeid, report.outcome, report.duration)


def run_unchanged(copy: Path) -> tuple[dict[tuple[str, int], set[str]], dict[str, float]]:
    """Runs all quick tests once. Returns the tests that reach each (file, line), "" for its import,
    and the seconds of every test that passes."""
    hook = copy / ".reached"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text("import mutants\n\nmutants.follow()\n")
    (hook / "record").touch()
    folders = os.pathsep.join([str(hook), str(copy / "benchmarks")])
    names = {"PYTHONPATH": folders, "ERPD_REACHED": str(hook / "record")}
    command = [*TESTS, "-p", "mutants"]
    done = subprocess.run(command, cwd=copy, env=os.environ | names, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # 1: some tests fail; else no test was run
        raise SystemExit(f"error: the quick tests do not start:\n{done.stdout[-2000:]}")
    reached, seconds, failed, current = defaultdict(set), Counter(), set(), ""
    for line in (hook / "record").read_text().splitlines():
        kind, name, *rest = line.split("\t")
        if kind == "start":
            current = name
        elif kind == "line":
            reached[name, int(rest[0])].add(current)
        else:
            seconds[name] += float(rest[1])
            failed |= {name} if rest[0] == "failed" else set()
    shutil.rmtree(hook)
    print(f"{len(seconds)} quick tests; left out, as they fail without a change: {len(failed)}")
    print("".join(f"    {name}\n" for name in sorted(failed)), end="", flush=True)
    return reached, {name: value for name, value in seconds.items() if name not in failed}


# --------------------------------------------------------------------------------------------------


def run_tests(copy: Path, names: list[str], limit: float) -> str | None:
    """Runs tests up to the first failure. Returns its name; None where all pass."""
    (copy / ".tests").write_text("\n".join(names))
    command = [*TESTS, "-x", "-rfE", "@.tests"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=copy, start_new_session=True, **pipes)
    try:
        printed, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return f"more than {limit:.0f} s"
    finally:  # also when this script is interrupted; pools of a test that was cut off end too
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", printed, re.M)
    return found[1] if found else f"exit code {process.returncode}"


def judge(mutant: Mutant, copy: Path, reached: dict, seconds: dict[str, float]) -> tuple[str, str]:
    """Returns killed, survived or not reached, and the test that killed."""
    near = set().union(*(reached[mutant.file, line] for line in mutant.lines))
    if not near:
        return "not reached", ""
    cost = Counter()  # of a file of tests: the cheapest goes first, and its tests stay together
    for name, value in seconds.items():
        cost[name.split("::")[0]] += value
    order = sorted(seconds, key=lambda name: (cost[name.split("::")[0]], name))
    source = (copy / mutant.file).read_bytes()
    (copy / mutant.file).write_bytes(mutant.apply(source))
    killer = None
    for is_near in (True, False):
        names = [name for name in order if (name in near) == is_near]
        if names and killer is None:
            killer = run_tests(copy, names, 60 + 3 * sum(seconds[name] for name in names))
    (copy / mutant.file).write_bytes(source)
    return ("killed", killer) if killer else ("survived", "")


def judge_all(chosen: list[Mutant], output: Path) -> Iterator[tuple[Mutant, str, str]]:
    """Yields each mutant with its verdict and its killer; known ones are read from `output`."""
    files = [*(ROOT / name for name in FILES), *sorted(ROOT.glob("tests/*.py"))]
    version = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    rows = output.read_text().splitlines() if output.is_file() else []
    known = {row["mutant"]: row for row in map(json.loads, rows) if row["version"] == version}
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="erpd-mutants-") as folder:
        copy, measured = Path(folder).resolve() / "repository", None
        left_out = shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, copy, ignore=left_out)
        for mutant in chosen:
            name = f"{mutant.file}:{mutant.line} {mutant.original} at byte {mutant.start}"
            if name not in known:
                measured = measured or run_unchanged(copy)
                verdict, killer = judge(mutant, copy, *measured)
                row = {"mutant": name, "verdict": verdict, "killer": killer, "version": version}
                known[name] = row
                with open(output, "a") as file:
                    file.write(json.dumps(row) + "\n")
            yield mutant, known[name]["verdict"], known[name]["killer"]


def main() -> None:
    """Draws the mutants, judges each, and prints the table."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--seed", type=int, default=0, help="seed that chooses the mutants")
    parser.add_argument("--n", type=int, default=60, help="number of mutants")
    parser.add_argument("--only", choices=FILES, help="change only this file")
    results = ROOT / "runs" / "mutants.jsonl"
    parser.add_argument("--output", type=Path, default=results, help="JSONL file of the results")
    args = parser.parse_args()
    sources = {name: (ROOT / name).read_bytes() for name in ([args.only] if args.only else FILES)}
    mutants = [m for name, source in sources.items() for m in find_mutants(name, source)]
    chosen = random.Random(args.seed).sample(mutants, min(args.n, len(mutants)))
    print(f"{len(chosen)} of {len(mutants)} possible mutants", flush=True)
    counts = Counter()
    for mutant, verdict, killer in judge_all(chosen, args.output):
        counts[verdict] += 1
        change = f"{mutant.original} -> {mutant.changed or 'nothing'}"
        line = sources[mutant.file].decode().splitlines()[mutant.line - 1].strip()
        place = f"{mutant.file}:{mutant.line}"
        print(f"| {place} | {change} | {verdict} {killer} | `{line}` |", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))


if __name__ == "__main__":
    main()
