"""Judges the responses of a finished evaluation again, by a language model.

The numbers of the paper come from such a judge. It is asked over any server with OpenAI's interface
(vllm serve, llama.cpp, a provider), and sees problem, gold and the response after its thought. Its
verdict is the last CORRECT or INCORRECT that it writes. Without one the verdict is "unclear", which
counts as wrong and is counted. A response that was cut off, or never left its thought, is wrong
without being asked about, as in evaluate.py.

Reads   RUN, a folder of evaluate.py; a prompt with {problem}, {gold} and {response}.
Writes  OUTPUT/ verdicts.jsonl (each verdict with the judge's words, as it comes), then the files of
        evaluate.py: rollouts.safetensors, samples.jsonl, problems.jsonl, metrics.json. Its
        agreement with math-verify is printed, and stands in metrics.json under "judge".

The same command continues after a kill, or where the server gave up. The key is OPENAI_API_KEY.

    vllm serve Qwen/Qwen3-32B &
    python examples/llm_judge.py --run judged/m --output judged/m_llm \\
        --url http://localhost:8000/v1 --model Qwen/Qwen3-32B
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate
import verdict

from common import (  # isort: skip
    Ranks, UserError, load_rollouts, progress, read_json, require, run, start_run, write_json,
)  # fmt: skip

FIELDS = ("problem", "gold", "response")


@dataclass
class Args:
    run: Path
    """folder of a finished evaluation"""
    output: Path
    """folder to write; the same command continues an interrupted run"""
    url: str
    """the server, up to and with /v1; it may change when a run is continued"""
    model: str
    """the judge, by the server's name of it"""
    prompt: Path = Path(__file__).with_suffix(".txt")
    """file with {problem}, {gold} and {response}, which asks for CORRECT or INCORRECT"""
    max_tokens: int = 2048
    """token limit of the judge's words"""
    concurrency: int = 32
    """requests at once"""
    retries: int = 4
    """tries after the first, with longer and longer pauses, before the run ends"""
    timeout: float = 300.0
    """seconds that one request may take"""

    def check(self) -> None:
        """Raises UserError on impossible values."""
        require(self, "max_tokens concurrency", lambda v: v >= 1, "1 or more")
        require(self, "retries", lambda v: v >= 0, "0 or more")
        require(self, "timeout", lambda v: 0 < v <= 86400, "above 0 and at most 86400")
        require(self, "url", lambda v: v.startswith(("http://", "https://")), "http(s)://...")


def fill(template: str, values: dict[str, str]) -> str:
    """Puts the values in the places of their names; braces within them stay."""
    names = "|".join(FIELDS)
    return re.sub(rf"\{{({names})\}}", lambda match: values[match[1]], template)


def read_words(words: str) -> str:
    """Returns the verdict that stands last in the judge's words, after its own thought."""
    found = re.findall(r"\b(IN)?(CORRECT)\b", verdict.rewrite("response", words))
    return "unclear" if not found else "wrong" if found[-1][0] else "right"


def cohens_kappa(table: list[list[int]]) -> float | None:
    """Returns (p - e) / (1 - e) of a two-by-two table: p the agreement, e what two judges that know
    nothing of each other would have; None where e is 1."""
    total = sum(map(sum, table))
    agreed = (table[0][0] + table[1][1]) / total
    chance = sum(sum(table[i]) * (table[0][i] + table[1][i]) for i in (0, 1)) / total**2
    return (agreed - chance) / (1 - chance) if chance < 1 else None


def read_verdicts(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Reads what a run has stored so far, and drops the half line that a kill may have left."""
    if not path.is_file():
        return {}
    with open(path, "r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
    return {(row["id"], row["sample"]): row for row in evaluate.read_jsonl(path)}


def ask_all(args: Args, questions: dict[tuple[str, int], str], path: Path) -> None:
    """Asks the judge, and appends each verdict as it comes. Raises UserError at the first request
    for which the server has no answer after all its tries: what is stored is kept."""
    import openai

    key = os.environ.get("OPENAI_API_KEY") or "none"
    client = openai.OpenAI(
        base_url=args.url, api_key=key, max_retries=args.retries, timeout=args.timeout
    )

    def ask(question: str) -> str:
        messages = [{"role": "user", "content": question}]
        limits = {"temperature": 0, "max_tokens": args.max_tokens}
        reply = client.chat.completions.create(model=args.model, messages=messages, **limits)
        words = reply.choices[0].message.content
        return words if isinstance(words, str) else ""

    bar = progress(Ranks(0, 1, torch.device("cpu")), len(questions), 0, "judge")
    with ThreadPoolExecutor(args.concurrency) as pool, open(path, "a", encoding="ascii") as file:
        asked = {pool.submit(ask, question): key for key, question in questions.items()}
        for future in as_completed(asked):
            if error := future.exception():  # of the client, or of a reply of another shape
                pool.shutdown(wait=False, cancel_futures=True)
                reason = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
                text = f"--url {args.url}: no verdict from the server ({reason}); "
                raise UserError(text + "what it has judged is kept: repeat the command")
            row = dict(zip(("id", "sample"), asked[future], strict=True))
            row |= {"verdict": read_words(future.result()), "words": future.result()}
            file.write(json.dumps(row) + "\n")
            file.flush()
            bar.update()
    bar.close()


def questions_of(args: Args, samples: list[dict[str, Any]]) -> dict[tuple[str, int], str]:
    """Returns what the judge is asked, by id and sample number. Raises UserError."""
    template = args.prompt.read_text(encoding="utf-8")
    if missing := [name for name in FIELDS if f"{{{name}}}" not in template]:
        raise UserError(f"--prompt {args.prompt}: has no {{{missing[0]}}}; add it")
    problems = {row["id"]: row for row in evaluate.read_jsonl(args.run / "problems.jsonl")}
    questions = {}
    for row in samples:
        response = verdict.rewrite("response", row["text"]).strip()
        if row["finish_reason"] == "stop" and response:
            values = {"problem": problems[row["id"]]["problem"], "gold": row["gold"]}
            question = fill(template, values | {"response": response})
            questions[row["id"], row["sample"]] = question
    return questions


def main(args: Args) -> None:
    args.check()
    rollouts, ranks = load_rollouts(args.run), Ranks(0, 1, torch.device("cpu"))
    samples, old = evaluate.read_jsonl(args.run / "samples.jsonl"), args.run / "metrics.json"
    questions, summary = questions_of(args, samples), read_json(old)
    inputs = {"rollouts": rollouts.path, "prompt": args.prompt}
    free = {"url": "", "concurrency": 1, "retries": 0, "timeout": 0.0}
    if not start_run(args.output, dataclasses.replace(args, **free), inputs, ranks, "metrics.json"):
        return
    path = args.output / "verdicts.jsonl"
    known = read_verdicts(path)
    missing = {key: text for key, text in questions.items() if key not in known}
    ask_all(args, missing, path)
    known = read_verdicts(path)

    problems = evaluate.read_jsonl(args.run / "problems.jsonl")
    position = {row["id"]: i for i, row in enumerate(problems)}
    table, unclear = [[0, 0], [0, 0]], [0] * len(problems)  # rows: math-verify; columns: the judge
    for row in samples:
        found = known.get((row["id"], row["sample"]), {"verdict": "unreadable", "words": None})
        if found["words"] is not None:
            table[row["verdict"] != "right"][found["verdict"] != "right"] += 1
        unclear[position[row["id"]]] += found["verdict"] == "unclear"
        row |= {"math_verify": row["verdict"], "verdict": found["verdict"], "words": found["words"]}
        row["reward"] = float(found["verdict"] == "right")
    evaluate.write_jsonl(args.output / "problems.jsonl", problems)
    evaluate.write_jsonl(args.output / "samples.jsonl", samples)
    metadata = rollouts.metadata | {"unparsed": unclear, "judge": args.model}
    rewards = torch.tensor([row["reward"] for row in samples])
    judged = dataclasses.replace(
        rollouts, path=args.output / rollouts.path.name, metadata=metadata, rewards=rewards
    )
    evaluate.save_rollouts(judged)
    kappa = cohens_kappa(table) if questions else None
    summary |= {"base": None, "grading_failures": sum(unclear)}
    summary |= {"metrics": evaluate.collect_metrics(judged, None, None)}
    summary["judge"] = {
        "model": args.model,
        "table": table,
        "kappa": kappa,
        "unclear": sum(unclear),
    }
    write_json(args.output / "metrics.json", summary)
    evaluate.print_table(summary, args.output, ranks)
    ranks.print(f"\n{'':18s} judge right  judge wrong")
    for name, counts in zip(("right", "wrong"), table, strict=True):
        ranks.print(f"math-verify {name:6s} {counts[0]:11d} {counts[1]:12d}")
    shown = "n/a" if kappa is None else f"{kappa:.3f}"
    ranks.print(f"Cohen's kappa {shown}; {sum(unclear)} unclear verdicts, counted as wrong")


if __name__ == "__main__":
    run(main, Args, __doc__)
