"""Writes a problem set of another shape as the JSONL file that evaluate.py reads.

evaluate.py takes one {"id", "problem", "answer"} per line and nothing else. This script makes such
a file from a set on the Hugging Face hub, or from a local file with other columns or nested fields.
Rows that evaluate.py would refuse are counted by reason and left out:

    unreadable         the problem or the answer is missing, empty, far too long, or not text
    duplicate_id       an earlier row has the same id
    duplicate_problem  an earlier row has the same text, up to spaces and Unicode normal form
    unparseable_gold   no response could equal the answer: "proof", "N/A", half a formula

The problem may be a list of chat messages with one of the user, the answer a list of one element,
or a worked solution that ends with #### and its value.

Reads   a set on the hub, or a local .parquet, .csv, .json or .jsonl file, which may end in .gz.
Writes  OUTPUT, and beside it a report with the suffix .json (source, counts and settings).

The short names were written down without access to the hub. Where a set has moved or has other
columns, the error says what was found, and OWNER/NAME with the column flags reads it all the same.

    python examples/problem_sets.py --source aime24 --output aime24.jsonl
    python examples/problem_sets.py --source train.parquet --output train.jsonl \\
        --problem-column prompt --answer-column reward_model.ground_truth
"""

from __future__ import annotations

import dataclasses
import random
import sys
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate
from common import NO_LOCKS, Ranks, UserError, require, run, write_json

FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}


@dataclass
class Args:
    source: str
    """gsm8k, aime24, aime25, hmmt-feb25, hmmt-nov25, math500, imo-answerbench, olympiadbench,
    polaris or dapo-math, each also as NAME:SPLIT; OWNER/NAME, OWNER/NAME:SPLIT or
    OWNER/NAME:CONFIG:SPLIT on the hub; or a local file"""
    output: Path
    """JSONL file to write; its name must end in .jsonl"""
    problem_column: str | None = None
    """field with the problem's text; dots reach into nested fields, as in prompt.0.content;
    default: what the short name says, else problem"""
    answer_column: str | None = None
    """field with the gold answer; default: what the short name says, else answer"""
    id_column: str | None = None
    """field with the id; default: what the short name says, else id; a row without an id gets its
    row number, counted from 1"""
    limit: int = 0
    """keep only the first so many usable problems, after the shuffle; 0 keeps all"""
    shuffle_seed: int | None = None
    """shuffle the problems with this seed; default: the order of the source"""
    grading_timeout: float = 10.0
    """seconds after which the attempt to read one gold answer is ended"""

    def check(self) -> None:
        """Raises UserError where a value is impossible or the source would be overwritten."""
        require(self, "limit", lambda v: v >= 0, "0 or more")
        require(self, "grading_timeout", lambda v: 0 < v <= 86400, "above 0 and at most 86400")
        if self.output.suffix != ".jsonl":
            raise UserError(f"--output {self.output}: must end in .jsonl (the report: .json)")
        written = self.output.resolve(), self.output.with_suffix(".json").resolve()
        if Path(self.source).resolve() in written:
            raise UserError(f"--output {self.output}: would overwrite --source; rename one of them")


@dataclass(frozen=True)
class ProblemSet:
    """Says where a set is, and how its columns are called."""

    name: str  # on the hub; of a local file: its format
    config: str | None = None
    split: str | None = None  # None: the only one
    problem: str = "problem"
    answer: str = "answer"
    id: str = "id"


# Unverified: written down without access to the hub.
PROBLEM_SETS = {
    "gsm8k": ProblemSet("openai/gsm8k", "main", "train", problem="question"),
    "aime24": ProblemSet("HuggingFaceH4/aime_2024", split="train"),
    "aime25": ProblemSet("MathArena/aime_2025", split="train", id="problem_idx"),
    "hmmt-feb25": ProblemSet("MathArena/hmmt_feb_2025", split="train", id="problem_idx"),
    "hmmt-nov25": ProblemSet("MathArena/hmmt_nov_2025", split="train", id="problem_idx"),
    "math500": ProblemSet("HuggingFaceH4/MATH-500", split="test", id="unique_id"),
    "imo-answerbench": ProblemSet(
        "Hwilner/imo-answerbench", problem="Problem", answer="Short Answer", id="Problem ID"
    ),
    "olympiadbench": ProblemSet(
        "Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", "question", "final_answer"
    ),
    "polaris": ProblemSet("POLARIS-Project/Polaris-Dataset-53K", split="train"),
    "dapo-math": ProblemSet(
        "open-r1/DAPO-Math-17k-Processed", "en", "train", problem="prompt", answer="solution"
    ),
}


# --------------------------------------------------------------------------------------------------
# Rows of a source


def find_set(args: Args) -> ProblemSet:
    """Returns what --source names, with the columns of the flags. Raises UserError."""
    name, *rest = args.source.split(":")
    suffix = Path(args.source.removesuffix(".gz")).suffix
    if suffix in FORMATS and not Path(args.source).is_file():
        raise UserError(f"--source {args.source}: no such file")
    if suffix in FORMATS:
        found = ProblemSet(FORMATS[suffix])
    elif name in PROBLEM_SETS and len(rest) < 2:
        found = PROBLEM_SETS[name]
        found = dataclasses.replace(found, split=rest[0] if rest else found.split)
    elif "/" in name and len(rest) <= 2 and not Path(args.source).is_file():
        found = ProblemSet(name, *[None, None, *rest][-2:])
    else:
        raise UserError(
            f"--source {args.source}: give OWNER/NAME, OWNER/NAME:SPLIT, OWNER/NAME:CONFIG:SPLIT, "
            f"a file ({' '.join(FORMATS)}, or these with .gz), or one of {', '.join(PROBLEM_SETS)}"
        )
    columns = {name: getattr(args, f"{name}_column") for name in ("problem", "answer", "id")}
    return dataclasses.replace(found, **{name: c for name, c in columns.items() if c})


def read_rows(source: str, wanted: ProblemSet) -> list[dict[str, Any]]:
    """Reads all rows by the `datasets` library. Raises UserError that says what it found."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    options: dict[str, Any] = {"name": wanted.config}
    if Path(source).is_file():
        options = {"data_files": source, "streaming": True}  # leaves nothing in the cache
    if wanted.name == "csv":  # cells as they are: 007 and 0.10 are text, NA is not an empty cell
        texts = dict.fromkeys((wanted.problem, wanted.answer, wanted.id), str)
        options |= {"converters": texts, "keep_default_na": False}
    try:
        splits = datasets.load_dataset(wanted.name, **options)
        names = [wanted.split] if wanted.split else list(splits)
        rows = list(splits[names[0]]) if len(names) == 1 and names[0] in splits else None
    except Exception as error:  # offline, no such set, a damaged file: the library has many kinds
        if getattr(error, "errno", None) in NO_LOCKS:
            raise  # `run` names the remedy
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        raise UserError(
            f"--source {source}: the datasets library cannot load {wanted.name} ({reason}); check "
            "the name, the file's format and the network"
        ) from None
    if rows is None:
        raise UserError(
            f"--source {source}: no split '{wanted.split or ''}'; it has {', '.join(splits)}; name "
            f"one, as in OWNER/NAME:SPLIT"
        )
    return rows


def lookup(row: dict[str, Any], column: str) -> Any:
    """Returns a field of a row, or None where it is absent; `a.0.b` reaches into nested fields."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return value


def bare_text(value: Any, name: str) -> Any:
    """Returns the text in a field: of chat messages the user's, of a list its only element, of a
    worked solution with #### (GSM8K) what follows it. Raises UserError where there are several."""
    if isinstance(value, list) and value and all(isinstance(x, dict) for x in value):
        roles = [message.get("role") for message in value]
        if roles not in (["user"], ["system", "user"]):
            raise UserError(f"field '{name}' is a chat of {', '.join(map(str, roles))}")
        value = value[-1].get("content")
    if isinstance(value, list):
        if len(value) != 1:
            raise UserError(f"field '{name}' is a list of {len(value)}")
        value = value[0]
    if name == "answer" and isinstance(value, str) and "####" in value:
        value = value.rpartition("####")[2].strip()
    return value


def field_names(value: Any, prefix: str = "") -> list[str]:
    """Returns the names of all fields of a row as `lookup` takes them; of a list, the first's."""
    if isinstance(value, list):
        value = dict(enumerate(value[:1]))
    if not isinstance(value, dict) or not value:
        return [prefix[1:]]
    return [name for key, part in value.items() for name in field_names(part, f"{prefix}.{key}")]


# --------------------------------------------------------------------------------------------------
# Problems that can be used


def distinct_problems(
    rows: list[dict[str, Any]], columns: dict[str, str], dropped: dict[str, list[str]]
) -> list[dict[str, str]]:
    """Returns the problems with a text, an answer and an id of their own; notes the others."""
    problems, texts, ids = [], {}, {}
    for number, row in enumerate(rows, 1):
        values = {name: lookup(row, column) for name, column in columns.items()}
        if values["id"] is None:
            values["id"] = number
        try:
            where = f"row {number}"
            values = {name: bare_text(value, name) for name, value in values.items()}
            problem = {name: evaluate.read_field(values, name, where) for name in values}
        except UserError as error:
            dropped["unreadable"].append(f"{where}: {str(error).removeprefix(f'{where}: ')}")
            continue
        text = " ".join(unicodedata.normalize("NFC", problem["problem"]).split())
        if (first := ids.setdefault(problem["id"], number)) != number:
            dropped["duplicate_id"].append(f"row {number}: id '{problem['id']}' of row {first}")
        elif (first := texts.setdefault(text, number)) != number:
            dropped["duplicate_problem"].append(f"row {number}: the problem of row {first}")
        else:
            problems.append(problem)
    return problems


def readable_golds(
    candidates: list[dict[str, str]], limit: int, timeout: float, dropped: dict[str, list[str]]
) -> list[dict[str, str]]:
    """Returns the first `limit` problems that a response could solve; notes the others."""
    ranks = Ranks(0, 1, torch.device("cpu"))
    kept: list[dict[str, str]] = []
    while candidates and len(kept) < limit:  # again where some of the wanted were dropped
        missing = limit - len(kept)
        chosen, candidates = candidates[:missing], candidates[missing:]
        golds = [(problem["answer"], None) for problem in chosen]  # None: can it be read?
        verdicts = evaluate.verdicts(golds, timeout, ranks, "read answers")
        for problem, gold in zip(chosen, golds, strict=True):
            if verdicts[gold] == "right":
                kept.append(problem)
            else:
                example = f"id '{problem['id']}': {problem['answer'][:60]!r}"
                dropped["unparseable_gold"].append(example)
    return kept


def main(args: Args) -> None:
    args.check()
    wanted = find_set(args)
    rows = read_rows(args.source, wanted)
    columns = {name: getattr(wanted, name) for name in ("id", "problem", "answer")}
    for name, column in columns.items():
        absent = all(lookup(row, column) is None for row in rows)
        if rows and absent and (name != "id" or args.id_column):
            fields = ", ".join(field_names(rows[0]))
            raise UserError(f"--{name}-column {column}: no row has it; the fields are {fields}")

    first = [lookup(row, f"{wanted.problem}.0.role") for row in rows]
    if systems := first.count("system"):
        print(f"note: {systems} system messages are left out; name one in --prompt-template")
    dropped: dict[str, list[str]] = defaultdict(list)  # messages by reason
    candidates = distinct_problems(rows, columns, dropped)
    if args.shuffle_seed is not None:
        random.Random(args.shuffle_seed).shuffle(candidates)
    limit = args.limit or len(candidates)
    problems = readable_golds(candidates, limit, args.grading_timeout, dropped)
    for reason, messages in dropped.items():
        print(f"dropped {len(messages)} ({reason}), for example {messages[0]}")
    if not problems:
        raise UserError(f"--source {args.source}: no usable problem is in it")
    evaluate.write_jsonl(args.output, problems)
    settings = {"columns": columns, "limit": args.limit, "shuffle_seed": args.shuffle_seed}
    report = {"source": args.source, "kept": len(problems), "settings": settings}
    report["dropped"] = {reason: len(messages) for reason, messages in dropped.items()}
    write_json(args.output.with_suffix(".json"), report)
    print(f"{args.output}: kept {len(problems)} of {len(rows)} rows")


if __name__ == "__main__":
    run(main, Args, __doc__)
