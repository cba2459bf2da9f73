"""Plumbing shared by the four scripts: errors, ranks, files, models, packing, token log-probs.

Nothing here teaches the algorithm: what an objective, a signal or a trust region *is* stands in
the stage files.

Alignment, everywhere: entry t of a per-token array belongs to token t and is computed from the
logits at t-1. Prompt tokens carry zero and are masked. Shape legend: N tokens of a rollouts file,
S responses, T tokens of one packed row, R response tokens of that row, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import gc
import hashlib
import heapq
import importlib.util
import inspect
import json
import math
import os
import shutil
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

# One process without a process group is a way to run, not an oversight.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

FORMAT_VERSION = 1
HEAD_CHUNK_ELEMENTS = 2**27  # logits held at once by the chunked head: 512 MiB in float32
CPU_TILE_ELEMENTS = 2**21  # on a CPU: 8 MiB, which stays in the cache between passes
LOG_INTERVAL = 10.0  # seconds between the lines of a progress bar in a log file
SCORE_BLOCK = 2048  # sequences packed at once for scoring: packing time grows with the square
LOG_RATIO_CLAMP = 20.0  # inside exp only: exp(20) is finite in float32; beyond it no gradient


class UserError(Exception):
    """Bad input. `run` prints it without a traceback and ends with exit code 2."""


NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota, file-size limit


# What helps when memory runs out, where a script has the flag
MEMORY_FLAGS = {
    "micro_batch_tokens": "halve it: the objective does not change",
    "activation_checkpointing": "on: each block keeps its input only",
    "defer_gradient_sync": "off: gradients stay sharded between micro-batches",
    "shard": "on: the policies are split over the ranks",
}  # fmt: skip


def run(main: Callable[[Any], None], args_type: type, doc: str | None) -> None:
    """Parses the command line and calls `main`; bad input ends with exit code 2."""
    args, done = None, False
    try:
        args = tyro.cli(args_type, description=doc)
        main(args)
        done = True
    except UserError as error:
        sys.exit(_fail(str(error)))
    except (MemoryError, RuntimeError) as error:  # CUDA's is a RuntimeError of a kind of its own
        gpu = isinstance(error, torch.OutOfMemoryError)
        if not (gpu or isinstance(error, MemoryError) or "t allocate memory" in str(error)):
            raise
        # Numbers and switches alone: evaluate.py's --shard is another flag, a text.
        flags = {n: why for n, why in MEMORY_FLAGS.items() if isinstance(getattr(args, n, ""), int)}
        hints = [f"--{name.replace('_', '-')} (now {getattr(args, name)}): {why}"
                 for name, why in flags.items()]  # fmt: skip
        hints += ["more ranks"] if "shard" in flags or "defer_gradient_sync" in flags else []
        helps = f". What helps: {'; '.join(hints)}" if hints else ""
        sys.exit(_fail(f"out of {'GPU' if gpu else 'host'} memory{helps}. Started again, the "
                       "command goes on from what it has saved"))  # fmt: skip
    except OSError as error:  # a full disk, an unwritable folder, a vanished file
        if error.filename is None and error.errno not in NO_SPACE:
            raise
        where, why = error.filename or "disk", error.strerror
        sys.exit(_fail(f"{where}: {why}; check the path, its permissions and the free space"))
    except SafetensorError as error:  # in writing: what cannot be read is a UserError
        sys.exit(_fail(f"{error}; check the free space, and run the same command again"))
    finally:
        # Not after an error, which may be this rank's alone: NCCL would wait here for the others,
        # and the launcher would not see that this one is gone.
        if dist.is_initialized() and (done or dist.get_world_size() == 1):
            dist.destroy_process_group()


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def require(args: Any, flags: str, allowed: Callable[[Any], bool], what: str) -> None:
    """Raises UserError naming the first of `flags` (space-separated) with a value not allowed."""
    for flag in flags.split():
        if not allowed(getattr(args, flag)):
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be {what}")


# --------------------------------------------------------------------------------------------------
# Ranks


@dataclass(frozen=True)
class Ranks:
    """This process among all: set by `torchrun`, or one process without it."""

    rank: int
    world_size: int
    device: torch.device

    def print(self, text: str) -> None:
        """Prints on rank 0 only, above a running progress bar."""
        if self.rank == 0:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.world_size > 1:
            dist.barrier()


def setup_ranks() -> Ranks:
    """Reads torchrun's environment; without it this is rank 0 of 1 on the first GPU, or the CPU."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    if world_size > 1 and not dist.is_initialized():
        # NCCL's own 10 minutes are short for ranks that wait while rank 0 writes a model.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
    elif cuda and not dist.is_initialized():  # FSDP's mixed precision, with one GPU too
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    return Ranks(int(os.environ.get("RANK", "0")), world_size, device)


class _Lines:
    """stderr without a terminal: each state of a bar is a line; tqdm would rewrite one by "\\r"."""

    last = ""

    def write(self, text: str) -> None:
        """A line, unless it is the one before: tqdm draws once more as it closes."""
        state = text.strip()
        if state and state != self.last:
            sys.stderr.write(state + "\n")
            self.last = state

    def flush(self) -> None:
        """Of stderr."""
        sys.stderr.flush()


def progress(ranks: Ranks, total: int, initial: int, what: str) -> tqdm:
    """Progress bar with rate and time left, on rank 0. In a log file: a line at the start, one at
    the end, and between them one each LOG_INTERVAL at most."""
    bar = functools.partial(tqdm, total=total, initial=initial, desc=what, disable=ranks.rank != 0)
    if sys.stderr.isatty():
        return bar(mininterval=0.2)
    line = "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left"
    return bar(file=_Lines(), mininterval=LOG_INTERVAL, bar_format=line + ", {rate_fmt}{postfix}")


# --------------------------------------------------------------------------------------------------
# Files: written under a temporary name, then renamed


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary name; what was written there becomes `path` at once, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another node may write the same file, under the same number of a process.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises UserError where it is missing or malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Reads one JSON object a line. Raises UserError that names file and line."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:  # the latter: ten thousand brackets
                raise UserError(f"{path}:{number}: not a line of JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: expected an object, found {type(row).__name__}")
            rows.append(row)
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes one JSON object a line, atomically. ASCII escapes keep lone surrogates legal."""
    with atomic(path) as temporary, open(temporary, "w", encoding="ascii") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes a safetensors file, atomically; `metadata` as one JSON string: equal content is equal
    bytes (safetensors itself does not keep the order of several entries)."""
    text = json.dumps({"format": FORMAT_VERSION} | metadata, sort_keys=True)
    with atomic(path) as temporary:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata={"erpd": text})


def load_tensors(
    path: Path, needed: dict[str, torch.dtype]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads all arrays of a safetensors file of ours, and its metadata.

    Raises UserError where it is missing, truncated, foreign, or lacks a `needed` array."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("erpd", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        message = f"{path}: truncated or not a safetensors file ({error}); make it again"
        raise UserError(message) from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT_VERSION:
        raise UserError(f"{path}: not of these scripts (metadata lacks format {FORMAT_VERSION})")
    for name, dtype in needed.items():
        if name not in tensors:
            raise UserError(f"{path}: array '{name}' is missing; it has {', '.join(tensors)}")
        if tensors[name].dtype != dtype:
            raise UserError(f"{path}: array '{name}' is {tensors[name].dtype}, expected {dtype}")
    return tensors, metadata


def fingerprint(path: Path) -> str:
    """First 16 hex digits of the SHA-256 of a file, or of a model folder's config and weights."""
    files = [path]
    if path.is_dir():
        files = sorted([*path.glob("*.safetensors"), path / "config.json"])
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as handle:
            while block := handle.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# Rollouts


@dataclass(frozen=True)
class Rollouts:
    """S responses as flat arrays of N tokens, without padding (`rollouts.safetensors`)."""

    path: Path
    metadata: dict[str, Any]
    tokens: Tensor  # [N] int32
    cu_seqlens: Tensor  # [S+1] int64: response s is tokens[cu[s]:cu[s+1]], its prompt included
    prompt_lens: Tensor  # [S] int32
    rewards: Tensor  # [S] float32, 0 or 1
    problem_index: Tensor  # [S] int32, line of problems.jsonl
    truncated: Tensor  # [S] bool
    sampler_logprobs: Tensor | None = None  # [N] float32
    first_wrong_token: Tensor | None = None  # [S] int32, counted from the prompt's start; -1: none
    answer_class: Tensor | None = None  # [S] int32: equal answers to a problem share it; -1: none

    @property
    def lengths(self) -> Tensor:
        """[S] int64: tokens of each sequence, prompt included."""
        return self.cu_seqlens.diff()

    @property
    def response_lens(self) -> Tensor:
        """[S] int64."""
        return self.lengths - self.prompt_lens

    @property
    def sequence_ids(self) -> Tensor:
        """[N] int64: the sequence each token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self.rewards)), self.lengths)

    @property
    def response_mask(self) -> Tensor:
        """[N] bool: True on response tokens."""
        ids = self.sequence_ids
        return torch.arange(len(ids)) - self.cu_seqlens[ids] >= self.prompt_lens[ids]


ROLLOUT_DTYPES = {
    "tokens": torch.int32, "cu_seqlens": torch.int64, "prompt_lens": torch.int32,
    "rewards": torch.float32, "problem_index": torch.int32, "truncated": torch.bool,
}  # fmt: skip
OPTIONAL_DTYPES = {
    "sampler_logprobs": torch.float32, "first_wrong_token": torch.int32,
    "answer_class": torch.int32,
}  # fmt: skip


def save_rollouts(rollouts: Rollouts) -> None:
    """Writes the file `rollouts.path`, leaving out optional arrays that are None."""
    names = [f.name for f in dataclasses.fields(Rollouts) if f.name not in ("path", "metadata")]
    arrays = {name: getattr(rollouts, name) for name in names}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    save_tensors(rollouts.path, arrays, rollouts.metadata)


def load_rollouts(folder: Path) -> Rollouts:
    """Reads and checks `folder/rollouts.safetensors`. Raises UserError naming array or response."""
    path = Path(folder) / "rollouts.safetensors"
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the folder of a finished evaluate.py")
    tensors, metadata = load_tensors(path, ROLLOUT_DTYPES)
    known = {field.name for field in dataclasses.fields(Rollouts)}
    rollouts = Rollouts(path, metadata, **{k: v for k, v in tensors.items() if k in known})
    cu, n = rollouts.cu_seqlens, len(rollouts.rewards)
    if n == 0 or len(cu) != n + 1 or cu[0] != 0 or cu[-1] != len(rollouts.tokens):
        raise UserError(f"{path}: cu_seqlens does not fit {n} responses and its tokens; "
                        "make the file again")  # fmt: skip
    sizes = {"prompt_lens": n, "problem_index": n, "truncated": n, "first_wrong_token": n,
             "answer_class": n, "sampler_logprobs": len(rollouts.tokens)}  # fmt: skip
    for name, size in sizes.items():
        if name in tensors and (found := len(tensors[name])) != size:
            raise UserError(f"{path}: '{name}' has {found} entries, expected {size}; "
                            "make the file again")  # fmt: skip
    for name, dtype in OPTIONAL_DTYPES.items():
        if name in tensors and tensors[name].dtype != dtype:
            raise UserError(f"{path}: array '{name}' is {tensors[name].dtype}, expected {dtype}; "
                            "make the file again")  # fmt: skip
    if (lowest := int(rollouts.tokens.min())) < 0:
        raise UserError(f"{path}: token {lowest} is below 0; make the file again")
    for bad, what in [
        (rollouts.prompt_lens < 1, "has an empty prompt"),
        (rollouts.response_lens < 1, "has an empty response: drop it"),
        (rollouts.problem_index < 0, "belongs to no problem"),
        ((rollouts.rewards != 0) & (rollouts.rewards != 1), "has a reward that is not 0 or 1"),
    ]:
        if bad.any():
            first = int(bad.nonzero()[0])
            raise UserError(f"{path}: response {first} {what} ({int(bad.sum())} such); "
                            "make the file again")  # fmt: skip
    return rollouts


def check_sampling(rollouts: Rollouts, force: bool) -> float:
    """Temperature the rollouts were drawn at. Raises UserError where they are not the policy's own:
    greedy, or cut by top-p or top-k."""
    sampling = rollouts.metadata.get("sampling", {})
    temperature = float(sampling.get("temperature", 1.0))
    top_p, top_k = sampling.get("top_p", 1.0), sampling.get("top_k", 0)
    if temperature == 0:
        raise UserError(f"{rollouts.path}: greedy samples; sample again with --temperature 1")
    if not force and (top_p != 1 or top_k != 0):
        raise UserError(f"{rollouts.path}: sampled at top-p {top_p}, top-k {top_k}, so ratios "
                        "would be off; sample again with --top-p 1, or use --force")  # fmt: skip
    return temperature


# --------------------------------------------------------------------------------------------------
# Packing


@dataclass(frozen=True, eq=False)  # eq off: tensors have no one truth value
class Row:
    """One packed row: whole sequences end to end, no padding."""

    tokens: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, from 0 in each sequence
    lengths: list[int]  # of the sequences; on the host, so that attention splits without a sync
    cu_seqlens: Tensor  # [len(lengths)+1] int32: where each sequence starts, and the end
    response_index: Tensor  # [R] int64: where the response tokens stand in the row
    response_mask: Tensor  # [T] bool
    sequence_ids: Tensor  # [T] int64: which sequence of the row, 0 ... len(lengths)-1
    sequences: Tensor  # [len(lengths)] int64: their numbers in the rollouts file
    flat: Tensor  # [T] int64: where the row's tokens stand in the file's flat arrays


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """Response numbers of each step of an epoch, in an order that (seed, epoch) alone decide."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    return torch.randperm(n, generator=generator).split(batch_size)


def pack(
    lengths: list[int], budget: int, world_size: int, quadratic: float = 0.0
) -> list[list[list[int]]]:
    """Distributes sequences over rows of at most `budget` tokens (a longer one gets its own row).

    The budget bounds memory; time is n + quadratic n^2 for a sequence of n tokens, the second term
    being attention's (Policy.attention_cost). Costliest first, each into the cheapest row that has
    room; then rows alike in cost go to the ranks as one step, for a step lasts as long as its
    slowest rank. Returns [rank][micro-batch] -> indices into `lengths`, the same number of rows on
    every rank, so that collectives stay in step."""
    costs = [n + quadratic * n * n for n in lengths]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    n_rows = -(-max(1, -(-sum(lengths) // budget)) // world_size) * world_size
    while (packed := _fill_rows(lengths, costs, order, budget, n_rows)) is None:
        n_rows += max(1, n_rows // (50 * world_size)) * world_size
    rows = [row for _, _, row in sorted(packed, key=lambda r: -r[0])]
    # Dealt in turns that change direction, so that no rank gets the costliest row of every step.
    steps = [rows[i : i + world_size] for i in range(0, n_rows, world_size)]
    dealt = [step if i % 2 == 0 else step[::-1] for i, step in enumerate(steps)]
    return [[step[rank] for step in dealt] for rank in range(world_size)]


def _fill_rows(
    lengths: list[int], costs: list[float], order: list[int], budget: int, n_rows: int
) -> list[tuple[float, int, list[int]]] | None:
    """(cost, row number, indices) of every row; None where they do not fit into `n_rows`."""
    heap: list[tuple[float, int, list[int]]] = [(0.0, row, []) for row in range(n_rows)]
    room = [budget] * n_rows
    for index in order:
        full = []  # the cheapest rows, if they lack room
        while heap and heap[0][2] and room[heap[0][1]] < lengths[index]:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, row, members = heapq.heappop(heap)
        room[row] -= lengths[index]
        for entry in [*full, (cost + costs[index], row, [*members, index])]:
            heapq.heappush(heap, entry)
    return heap


def make_row(rollouts: Rollouts, sequences: list[int], device: torch.device) -> Row:
    """Packs `sequences` of the rollouts into one row. Prompts of 2 and 1, responses of 2 and 3:

        tokens        p p y y | p y y y
        position_ids  0 1 2 3 | 0 1 2 3        response_index  2 3 5 6 7

    An empty list (a rank without work) gives one sequence with its response masked out: it takes
    part in every collective and adds exactly zero."""
    chosen = torch.tensor(sequences or [0])
    lengths = rollouts.lengths[chosen]
    starts = F.pad(lengths.cumsum(0), (1, 0))
    ids = torch.repeat_interleave(torch.arange(len(chosen)), lengths)
    position_ids = torch.arange(len(ids)) - starts[ids]
    flat = rollouts.cu_seqlens[chosen][ids] + position_ids
    mask = (position_ids >= rollouts.prompt_lens[chosen][ids]) & bool(sequences)
    tokens, index = rollouts.tokens[flat].long(), mask.nonzero()[:, 0]
    on_device = (tokens, position_ids, starts.int(), index, mask, ids)
    tokens, position_ids, starts, index, mask, ids = (to_device(t, device) for t in on_device)
    return Row(tokens, position_ids, lengths.tolist(), starts, index, mask, ids, chosen, flat)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies to a GPU through pinned memory: the host does not wait for the work queued there."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def sequence_sum(values: Tensor, sequence_ids: Tensor, n_sequences: int) -> Tensor:
    """Sums per-token `values` [T] over each sequence -> [n_sequences]."""
    return values.new_zeros(n_sequences).index_add(0, sequence_ids, values)


# --------------------------------------------------------------------------------------------------
# Ratios


def safe_exp(log_ratio: Tensor) -> Tensor:
    """exp of the argument clamped to +-20: finite; its gradient is zero beyond the clamp."""
    return log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()


def kl_penalty(log_ratio: Tensor, direction: str) -> Tensor:
    """KL between base and policy per token [T], on tokens the *base* drew; log_ratio policy - base.

    forward: r - 1 - log r, whose mean is KL(base || policy); reverse: r log r - r + 1, whose mean
    is KL(policy || base). Never negative, zero with zero gradient at r = 1, exact in mean."""
    ratio = safe_exp(log_ratio)
    return ratio - 1 - log_ratio if direction == "forward" else ratio * log_ratio - ratio + 1


# --------------------------------------------------------------------------------------------------
# Models


# Attention inside each sequence of a packed row. All have the signature that transformers'
# AttentionInterface asks for: query [1, heads, T, head_dim], key and value [1, kv_heads, T,
# head_dim] -> [1, T, heads, head_dim]; `packed` is the Row itself. Cost is linear in the number of
# sequences, and no [T, T] mask exists.


def loop_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    *, packed: Row, scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Sequence by sequence with torch's fused attention: the way on the CPU."""
    segments = zip(*(x.split(packed.lengths, dim=2) for x in (query, key, value)), strict=True)
    grouped = query.shape[1] != key.shape[1]
    attend = functools.partial(
        F.scaled_dot_product_attention, is_causal=True, scale=scaling, enable_gqa=grouped
    )
    return torch.cat([attend(q, k, v) for q, k, v in segments], dim=2).transpose(1, 2), None


def varlen_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    *, packed: Row, scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """torch.nn.attention.varlen: FlashAttention as torch brings it, bf16 or fp16, CUDA."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, head_dim]
    grouped = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            grouped = {"enable_gqa": True}
        else:  # torch 2.11 wants as many heads of keys as of queries
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    cu, longest = packed.cu_seqlens, max(packed.lengths)
    out = varlen_attn(
        q, k, v, cu, cu, longest, longest, scale=scaling, window_size=(-1, 0), **grouped
    )
    return out[None], None


def flash_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    *, packed: Row, scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The flash-attn package, where it is installed."""
    from flash_attn import flash_attn_varlen_func

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    cu, longest = packed.cu_seqlens, max(packed.lengths)
    out = flash_attn_varlen_func(
        q, k, v, cu, cu, longest, longest, softmax_scale=scaling, causal=True
    )
    return out[None], None


def flex_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    *, packed: Row, scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """torch's flex_attention, compiled on CUDA, with a mask of blocks; the last resort there."""
    from torch.nn.attention import flex_attention as flex

    attend = flex.flex_attention
    if query.is_cuda:
        attend = _compiled(flex.flex_attention)
    grouped = query.shape[1] != key.shape[1]
    mask = _block_mask(packed.sequence_ids)
    out = attend(query, key, value, block_mask=mask, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2), None


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


@functools.lru_cache(maxsize=1)  # one row, all layers; not by the Row: FSDP gives each a copy of it
def _block_mask(ids: Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def causal_within(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Whether position q sees position k; alike in all batches and heads."""
        return (ids[q] == ids[k]) & (q >= k)

    n = len(ids)
    return create_block_mask(causal_within, None, None, n, n, device=ids.device)


ATTENTION: dict[str, Callable[..., tuple[Tensor, None]]] = {
    "loop": loop_attention, "varlen": varlen_attention, "flash_attn": flash_attention,
    "flex": flex_attention,
}  # fmt: skip


def register_attention() -> None:
    """Makes ATTENTION known to transformers, as attn_implementation="packed_loop" and so on."""
    from transformers import AttentionInterface

    for key, function in ATTENTION.items():
        AttentionInterface.register(f"packed_{key}", function)


def choose_attention(device: torch.device) -> str:
    """The key of ATTENTION for this machine: what needs no extra package comes first."""
    if device.type == "cpu":
        return "loop"
    with contextlib.suppress(ImportError):
        from torch.nn.attention import varlen

        if "window_size" in inspect.signature(varlen.varlen_attn).parameters:
            return "varlen"
    return "flash_attn" if importlib.util.find_spec("flash_attn") else "flex"


@functools.cache
def model_folder(name: str) -> Path:
    """The local folder of a model: a folder as it is, a hub name by download.

    Raises UserError where there is none, or its config or weights are visibly damaged."""
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or name.count("/") != 1 or name.startswith("."):
            raise UserError(f"model '{name}': no such folder, nor a hub name of form owner/name")
        from huggingface_hub import snapshot_download

        try:
            patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
            folder = Path(snapshot_download(name, allow_patterns=patterns))
        except Exception as error:  # the hub client has a dozen kinds, and those of its transport
            why = f"no such folder, nor had from the hub ({type(error).__name__})"
            raise UserError(f"model '{name}': {why}") from None
    if not (folder / "config.json").is_file():
        raise UserError(f"model '{name}': no config.json; an unfinished run, or no model folder")
    read_json(folder / "config.json")
    for file in folder.glob("*.safetensors"):
        try:
            safe_open(file, framework="pt").__enter__()  # reads the header, and checks the length
        except SafetensorError as error:
            raise UserError(f"{file}: truncated or damaged ({error}); copy it again") from None
    return folder


def check_vocabulary(names: list[str], rollouts: Rollouts | None = None) -> None:
    """Raises UserError where models do not share one vocabulary, or a token lies outside it."""
    configs = {name: read_json(model_folder(name) / "config.json") for name in names}
    sizes, first = {name: c.get("vocab_size") for name, c in configs.items()}, names[0]
    for name, size in sizes.items():
        if size != sizes[first]:
            raise UserError(f"model '{name}': its vocabulary differs from that of '{first}' "
                            f"({size} tokens, {sizes[first]}); use one family")  # fmt: skip
    highest = int(rollouts.tokens.max()) if rollouts else 0
    if sizes[first] is not None and highest >= sizes[first]:
        raise UserError(f"{rollouts.path}: token {highest}, but the vocabulary of '{first}' has "
                        f"{sizes[first]}; were they drawn by another model?")  # fmt: skip


def _from_pretrained(loader: Any, name: str, **kwargs: Any) -> Any:
    """Calls `loader.from_pretrained`, turning its many errors into one that names the model."""
    try:
        return loader.from_pretrained(model_folder(name), **kwargs)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model '{name}': cannot be loaded ({first[:200]})") from None


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model. Raises UserError."""
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, name)


def load_lm(
    name: str, device: torch.device, dtype: torch.dtype, attention: str | None = None,
    weights: bool = True,
) -> nn.Module:  # fmt: skip
    """A transformers causal LM in evaluation mode: no dropout, so ratios start at exactly 1.

    attention: a key of ATTENTION (default: choose_attention), or transformers' own "sdpa" ...
    weights: False gives shapes only (on the meta device), for _load_shards to fill.
    Raises UserError where the architecture has what our forward does not compute."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    register_attention()
    packed = attention is None or attention in ATTENTION
    how = f"packed_{attention or choose_attention(device)}" if packed else attention
    kwargs = {"attn_implementation": how, "dtype": dtype}
    if weights:
        lm = _from_pretrained(AutoModelForCausalLM, name, **kwargs)
    else:
        config = _from_pretrained(AutoConfig, name)
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config, **kwargs)
        if (model_folder(name) / "generation_config.json").is_file():  # every EOS of the model
            lm.generation_config = _from_pretrained(GenerationConfig, name)
    after_head = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
    unsupported = [k for k in after_head if hasattr(lm.config, k)]
    if getattr(lm.get_output_embeddings(), "bias", None) is not None:
        unsupported.append("bias of the output matrix")
    if "sliding_attention" in (getattr(lm.config, "layer_types", None) or ()):
        unsupported.append("sliding_attention")
    if packed and unsupported:
        raise UserError(f"model '{name}': the packed forward has no {', '.join(unsupported)}")
    return (lm.to(device) if weights else lm).eval()


class Policy(nn.Module):
    """A causal LM whose forward takes a packed row and a head, and returns what the head makes of
    the hidden states. The head runs inside the forward, where FSDP has gathered the output matrix;
    [T, V] logits never exist."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks: the list of modules that is as long as the config says."""
        n_layers = self.lm.config.num_hidden_layers
        stacks = (m for m in self.modules() if isinstance(m, nn.ModuleList))
        return next(stack for stack in stacks if len(stack) == n_layers)

    @functools.cached_property
    def attention_cost(self) -> float:
        """Cost of attention against all else: a sequence of n tokens costs n + attention_cost n^2.

        Forward: 2 P FLOPs a token in the blocks' matrices, 4 d t at position t in attention (d all
        heads' width), so n (2 P + 2 L d n) a sequence."""
        config = self.lm.config
        width = config.num_attention_heads * self.blocks[0].self_attn.head_dim
        return config.num_hidden_layers * width / sum(p.numel() for p in self.blocks.parameters())

    def forward(self, row: Row, head: Callable[[Tensor, Tensor], Any]) -> Any:
        """head(hidden [R, D], weight [V, D]); hidden[i] is the state that predicts token i of R."""
        body = self.lm.base_model(
            input_ids=row.tokens[None], position_ids=row.position_ids[None], packed=row,
            use_cache=False,  # a cache, even unused, makes transformers attend across sequences
        )  # fmt: skip
        # A response token is predicted by the token before it; there is one: no prompt is empty.
        return head(body.last_hidden_state[0][row.response_index - 1], self.lm.lm_head.weight)


def compute_dtype(device: torch.device) -> torch.dtype:
    """What policies are computed, scored and saved in; masters and reductions are float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_policy(
    name: str, ranks: Ranks, train: bool, *, shard: bool = False, shard_size: int | None = None,
    activation_checkpointing: bool = False, **_: Any,
) -> Policy:  # fmt: skip
    """Loads a model to be trained, or scored.

    To train on GPUs or several ranks it is sharded by FSDP2, as it is to be scored with `shard`:
    float32 masters, compute_dtype for compute, float32 for reductions; every rank reads its own
    shard from the files, so no rank ever holds the whole model.
    shard_size: ranks that share one copy (default: all); gradients are summed over the copies.
    activation_checkpointing: each block keeps its input only and runs again in the backward."""
    gc.collect()  # a policy that the caller has dropped: FSDP's modules hold each other
    device, dtype = ranks.device, compute_dtype(ranks.device)
    if not dist.is_initialized() or not (train or (shard and ranks.world_size > 1)):
        policy = Policy(load_lm(name, device, torch.float32 if train else dtype))
        _checkpoint_blocks(policy, activation_checkpointing)
        return policy.requires_grad_(train)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    size = shard_size or ranks.world_size
    if ranks.world_size % size:
        raise UserError(f"--shard-size {size}: must divide the {ranks.world_size} ranks")
    names, shape = ("copy", "shard"), (ranks.world_size // size, size)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    policy = Policy(load_lm(name, device, torch.float32, weights=False)).requires_grad_(train)
    _checkpoint_blocks(policy, activation_checkpointing)
    units = [*policy.blocks]
    if not policy.lm.config.tie_word_embeddings:  # else the root's output matrix is the same
        units.append(policy.lm.get_input_embeddings())
    for unit in [*units, policy]:  # the root: what is left, norm and output matrix
        # The root too gives its weights back after a forward: one without a backward (scoring)
        # would else leave it unsharded, and the optimiser would be built on what is temporary.
        precision = MixedPrecisionPolicy(dtype, torch.float32)
        fully_shard(
            unit, mesh=mesh if shape[0] > 1 else mesh["shard"], mp_policy=precision,
            reshard_after_forward=True,
        )  # fmt: skip
    policy.to_empty(device=device)
    _load_shards(policy, name, ranks.rank % size, size)
    return policy


def _checkpoint_blocks(policy: Policy, wanted: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    for block in policy.blocks if wanted else ():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


@torch.no_grad()
def _load_shards(policy: Policy, name: str, position: int, size: int) -> None:
    """Fills the shards of a model from its files, reading no more than this rank's part.

    FSDP2 splits along the first dimension into `size` equal parts, the last ones shorter or empty.
    Raises UserError where the files' names are not those of transformers' module."""
    files: dict[str, Any] = {}
    for path in sorted(model_folder(name).glob("*.safetensors")):
        file = safe_open(path, framework="pt")
        files |= dict.fromkeys(file.keys(), file)
    parameters = dict(policy.lm.named_parameters())  # a tied output matrix is there once
    if missing := parameters.keys() - files.keys():
        raise UserError(f"model '{name}': its files have no {min(missing)} ({len(missing)} missing "
                        "of transformers' names), so ranks cannot read their shards; "
                        "convert it by save_pretrained, or train in one process")  # fmt: skip
    for key, parameter in parameters.items():
        part, rows = parameter.to_local(), -(-parameter.shape[0] // size)
        stored = files[key].get_slice(key)
        if stored.get_shape() != list(parameter.shape):
            raise UserError(f"model '{name}': {key} has shape {stored.get_shape()} in its files, "
                            f"{list(parameter.shape)} by its config")  # fmt: skip
        if len(part):
            part.copy_(stored[position * rows : position * rows + len(part)])
    if stored := policy.lm.state_dict().keys() - dict(
        policy.lm.named_parameters(remove_duplicate=False)
    ).keys():
        raise UserError(f"model '{name}': has buffers in its files ({min(stored)}), which ranks do "
                        "not read; train in one process")  # fmt: skip
    for module in policy.modules():  # frequencies of rotary embeddings are computed, not stored
        if module._non_persistent_buffers_set:
            policy.lm._init_weights(module)


def save_model(policy: Policy, tokenizer: Any, folder: Path, ranks: Ranks) -> None:
    """Writes a Hugging Face folder, tokenizer included; all ranks call it. `config.json` comes
    last: a folder that has one is complete. Weights are stored in compute_dtype."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(policy, options=options)
    if ranks.rank == 0:
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        dtype = compute_dtype(ranks.device)
        # A tied matrix once: transformers knows the second by its address, which is its own by now.
        names = [name for name, _ in policy.named_parameters(remove_duplicate=False)]
        for name in set(names) - dict(policy.named_parameters()).keys():
            del weights[name]
        weights = {name.removeprefix("lm."): w.to(dtype) for name, w in weights.items()}
        policy.lm.save_pretrained(temporary, state_dict=weights)
        config = read_json(temporary / "config.json")
        config["dtype"] = str(dtype).removeprefix("torch.")  # not that of the masters
        write_json(temporary / "config.json", config)
        tokenizer.save_pretrained(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(temporary.iterdir(), key=lambda f: f.name == "config.json"):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(file, folder / file.name)
        sync_folder(folder)  # on disk before the last checkpoint goes
        temporary.rmdir()
    ranks.barrier()


# --------------------------------------------------------------------------------------------------
# Token log-probs without logits


def head_logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """[R, V] logits of one chunk in float32 (float64 stays), for autograd to go through."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (hidden.to(wide) @ weight.to(wide).T) / temperature


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and returned in float32 (float64 stays). bf16 on CUDA goes to the tensor
    cores as it is: a product of two bf16 numbers is exact in float32. Has no gradient there."""
    if a.is_cuda and a.dtype == b.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) @ b.to(wide)


def head_chunks(vocabulary: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Splits along tokens so that the logits of a chunk stay under HEAD_CHUNK_ELEMENTS."""
    size = max(1, HEAD_CHUNK_ELEMENTS // vocabulary)
    return zip(*(x.split(size) for x in tensors), strict=True)


def head_tiles(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Walks the vocabulary -> (columns, rows of the weight, their logits [R, columns], float32).

    On a CPU a tile stays in the cache: there a pass over it costs a hundredth of a product, from
    memory a third. And each part of the weight's gradient is made at once, in one product."""
    limit = HEAD_CHUNK_ELEMENTS if hidden.is_cuda else min(HEAD_CHUNK_ELEMENTS, CPU_TILE_ELEMENTS)
    size = max(1, limit // max(1, len(hidden)))
    size = size // 64 * 64 or size  # tensor cores want rows of whole 16 bytes
    for start in range(0, len(weight), size):
        rows = weight[start : start + size]
        yield slice(start, start + len(rows)), rows, wide_product(hidden, rows.T)


class _HeadLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature)[target] and the entropy, in tiles of vocabulary.

    Keeps logZ only; backward makes each tile's logits again. The entropy has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        # Over the tiles so far: the largest logit, sum exp(logit - top), that sum weighted by
        # logit - top, and the target's logit.
        top = hidden.new_full((len(hidden),), torch.finfo(wide).min, dtype=wide)
        total, weighted, chosen = (torch.zeros_like(top) for _ in range(3))
        for columns, _, logits in head_tiles(hidden, weight):
            logits.div_(temperature)
            at, inside = _in_tile(targets, columns)
            chosen = torch.where(inside, logits.gather(-1, at)[:, 0], chosen)
            new_top = torch.maximum(top, logits.amax(-1))
            fall, top = top - new_top, new_top
            shifted = logits.sub_(top[:, None])  # the largest is 0: exp is at most 1
            exps = shifted.exp()
            weighted = fall.exp() * (weighted + total * fall)
            total = fall.exp() * total + exps.sum(-1)
            weighted += exps.mul_(shifted).sum(-1)
        log_total = total.log()
        ctx.save_for_backward(hidden, weight, targets, top + log_total)
        ctx.temperature = temperature
        entropy = log_total - weighted / total
        ctx.mark_non_differentiable(entropy)
        return (chosen - top) - log_total, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_z = ctx.saved_tensors
        grad_weight = torch.empty_like(weight)
        grad_hidden = torch.zeros_like(hidden, dtype=log_z.dtype)
        scale = (grad / ctx.temperature)[:, None]
        for columns, rows, logits in head_tiles(hidden, weight):
            # d logprob / d logits = (onehot - softmax) / temperature
            at, inside = _in_tile(targets, columns)
            grad_logits = logits.div_(ctx.temperature).sub_(log_z[:, None]).exp_()
            grad_logits.mul_(-scale).scatter_add_(-1, at, scale * inside[:, None])
            if hidden.is_cuda:  # back to the tensor cores
                grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden += wide_product(grad_logits, rows)
            grad_weight[columns] = wide_product(grad_logits.T, hidden)
        return grad_hidden.to(hidden.dtype), grad_weight, None, None


def _in_tile(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Where each target stands in a tile ([R, 1], 0 where it does not), and whether ([R])."""
    inside = (targets >= columns.start) & (targets < columns.stop)
    return torch.where(inside, targets - columns.start, 0)[:, None], inside


def row_logprobs(
    policy: Policy, row: Row, temperature: float,
    extra: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Log-prob of each token, entropy of the distribution it came from: float32 [T], 0 on prompts.

    `extra(hidden [R, D], weight [V, D]) -> [R]` adds a third, computed in the same forward."""
    targets = row.tokens[row.response_index]

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        """In the place of the logits, whose [T, V] never exists."""
        values = _HeadLogprobs.apply(hidden, weight, targets, temperature)
        return values if extra is None else (*values, extra(hidden, weight))

    values = policy(row, head)
    zeros = values[0].new_zeros(len(row.tokens))
    return tuple(zeros.index_put((row.response_index,), v) for v in values)


def chunked_kl(
    p_hidden: Tensor, p_weight: Tensor, q_hidden: Tensor, q_weight: Tensor, temperature: float
) -> Tensor:
    """Whole-vocabulary KL(p || q) at R positions -> [R]; backward makes the logits again."""
    from torch.utils.checkpoint import checkpoint

    def chunk(p: Tensor, q: Tensor) -> Tensor:
        """KL at some positions."""
        log_p = head_logits(p, p_weight, temperature).log_softmax(-1)
        log_q = head_logits(q, q_weight, temperature).log_softmax(-1)
        return torch.linalg.vecdot(log_p.exp(), log_p - log_q)

    parts = head_chunks(len(p_weight), p_hidden, q_hidden)
    return torch.cat([checkpoint(chunk, p, q, use_reentrant=False) for p, q in parts])


@torch.no_grad()
def score(
    policy: Policy, rollouts: Rollouts, temperature: float, budget: int, ranks: Ranks, what: str
) -> Tensor:
    """Log-prob of every token of the rollouts -> [N] float32 on the CPU, zero on prompts.

    The forward, dtype and temperature of training, so that ratios start at exactly 1."""
    result = torch.zeros(len(rollouts.tokens))
    with progress(ranks, len(rollouts.rewards), 0, what) as bar:
        for block in torch.arange(len(rollouts.rewards)).split(SCORE_BLOCK):
            lengths = rollouts.lengths[block].tolist()
            rows = pack(lengths, budget, ranks.world_size, policy.attention_cost)[ranks.rank]
            for members in rows:
                row = make_row(rollouts, block[members].tolist(), ranks.device)
                logprobs = row_logprobs(policy, row, temperature)[0]
                if members:  # a rank without work has scored a stand-in
                    result[row.flat] = logprobs.float().cpu()
                bar.update(len(members) * ranks.world_size)
    return ranks.sum(result.to(ranks.device)).cpu()


def noise_sums(gap: Tensor, where: Tensor) -> Tensor:
    """[gap, gap^2, outside [0.9, 1.1], tokens] summed where `where`; gap [T] of log-probs, nats."""
    ratio = gap.exp()
    outside = ~((ratio > 0.9) & (ratio < 1.1))  # so that nan is outside
    return torch.stack([(x * where).sum() for x in (gap, gap.square(), outside.float(), where)])


def check_noise(sums: Tensor, what: str, max_noise: float, ranks: Ranks) -> None:
    """Prints the noise floor of every ratio, from noise_sums of log-probs that should be equal.

    Raises UserError where a larger share of tokens than `max_noise` lies outside [0.9, 1.1]."""
    mean, square, outside = (sums[:3] / sums[3]).tolist()
    text = (f"{what}: mean {mean:+.1e}, sd {max(0.0, square - mean**2) ** 0.5:.1e} nats, "
            f"{outside:.2%} of tokens outside [0.9, 1.1]")  # fmt: skip
    ranks.print(text)
    if outside > max_noise:
        raise UserError(f"{text}, more than --max-noise {max_noise:g}: another policy, temperature "
                        "or precision? Sample or score again, or raise it")  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Run folders, optimiser, checkpoints, metrics


def wait_for(path: Path, seconds: float = 90) -> bool:
    """Whether a file that another node has written can be seen here; NFS remembers for up to a
    minute (acdirmax) that there was none."""
    end = time.monotonic() + seconds
    while not (there := path.is_file()) and time.monotonic() < end:
        time.sleep(0.5)
    return there


# May change between a run and its continuation: memory, speed and guards, not what is computed
FREE_FLAGS = {
    "output", "micro_batch_tokens", "activation_checkpointing", "defer_gradient_sync", "shard_size",
    "checkpoint_every", "max_noise", "tensorboard",
}  # fmt: skip


def start_run(
    output: Path, args: Any, inputs: dict[str, str], ranks: Ranks, last_file: str = "config.json"
) -> bool:
    """Opens a run folder and writes args.json. False where the run is complete (has `last_file`).

    Raises UserError where it holds a run with other arguments or inputs, and lists them."""
    # Through JSON, so that what is compared is what is stored (tuples become lists).
    record = {"args": dataclasses.asdict(args), "inputs": inputs}
    record = json.loads(json.dumps(record, default=str))
    path = output / "args.json"
    # Listed before args.json is looked for: another shard of the same run may be writing it now.
    foreign = output.exists() and not (
        output.is_dir() and all(file.name.startswith(".") for file in output.iterdir())
    )
    if path.is_file():
        old = read_json(path)
        if not isinstance(old, dict) or not record.keys() <= old.keys():
            raise UserError(f"{path}: not of these scripts; choose another --output")
        changed = [
            f"{name}: {old[part].get(name)!r} -> {value!r}"
            for part in record for name, value in record[part].items()
            if old[part].get(name) != value and name not in FREE_FLAGS
        ]  # fmt: skip
        if changed:
            raise UserError(f"--output {output}: a run with other settings ({'; '.join(changed)}); "
                            "repeat its command, or choose another folder")  # fmt: skip
        if (output / last_file).is_file():
            remove_checkpoint(output, ranks)  # a kill may have come between it and the last file
            ranks.print(f"{output} is complete; nothing to do")
            return False
    elif foreign:
        raise UserError(f"--output {output}: exists and is not a run folder; choose another")
    ranks.barrier()
    if ranks.rank == 0:
        write_json(path, record | {"torch": torch.__version__, "world_size": ranks.world_size})
    ranks.barrier()
    if not wait_for(path):  # else ranks would part ways: some find a checkpoint, some do not
        raise UserError(f"--output {output}: rank {ranks.rank} does not see what rank 0 wrote; "
                        "choose a folder that all nodes share")  # fmt: skip
    return True


def make_optimizer(policy: Policy, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW with torch's betas (0.9, 0.999)."""
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=weight_decay, fused=True)
    # Its state at once: get_state_dict would else make it by a step of its own, which AdamW counts.
    for p in parameters:
        optimizer.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p),
        }  # fmt: skip
    return optimizer


def sync_gradients(policy: Policy, last: bool, defer: bool) -> None:
    """With `defer`, FSDP reduces gradients once a step, after the last micro-batch, instead of
    after each: less traffic, but until then every rank holds them whole, in float32.

    Between copies of the model (--shard-size) they are summed once a step in any case: what waits
    is sharded."""
    if not hasattr(policy, "set_requires_gradient_sync"):  # not sharded
        return
    policy.set_requires_all_reduce(last)
    if defer:
        policy.set_requires_gradient_sync(last)


def clip_gradients(policy: Policy, max_grad_norm: float) -> Tensor:
    """Scales the gradient to a global norm of at most max_grad_norm; returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


MAX_SKIPPED = 3  # steps in a row with a non-finite loss or gradient that end a run


def optimizer_step(
    optimizer: torch.optim.Optimizer, learning_rate: float, values: dict[str, float],
    state: dict[str, Any], output: Path,
) -> None:  # fmt: skip
    """Steps and clears the gradients. `values` are the step's, equal on all ranks.

    A step whose loss or gradient norm is not finite is left out and counted in `state`; the
    MAX_SKIPPED-th in a row raises UserError, with the last checkpoint in place."""
    bad = not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]))
    state["skipped"] = state.get("skipped", 0) + bad
    state["skipped_in_a_row"] = state.get("skipped_in_a_row", 0) + 1 if bad else 0
    values["skipped"] = state["skipped"]
    if state["skipped_in_a_row"] == MAX_SKIPPED:
        raise UserError(f"step {state['step'] + 1}: loss {values['loss']}, gradient norm "
                        f"{values['grad_norm']}, the {MAX_SKIPPED}rd step in a row that is not "
                        "finite; lower --learning-rate, in another --output (the last good "
                        f"checkpoint is in {output / 'checkpoints'})")  # fmt: skip
    if not bad:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    optimizer.zero_grad()


def catch_sigterm() -> list[int]:
    """From now on SIGTERM fills the returned list; the loop saves, and ends with exit_by_sigterm.

    One rank may get the signal before the others: they tell each other in mean_metrics. No Event:
    its lock would hold the process for ever if a second signal came while the first is noted, and
    two come where a scheduler signals torchrun and its ranks."""
    caught: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: caught.append(number))
    return caught


def exit_by_sigterm(output: Path, ranks: Ranks) -> NoReturn:
    """Ends with 143, as a process that SIGTERM kills: schedulers requeue, shell scripts stop. All
    ranks call it."""
    if ranks.rank == 0:
        saved = read_json(output / "checkpoints" / "last.json")["folder"].removeprefix("resume-")
        ranks.print(f"SIGTERM: saved step {int(saved)}; the same command goes on from there")
    if dist.is_initialized():
        dist.destroy_process_group()
    raise SystemExit(128 + signal.SIGTERM)


def save_checkpoint(
    output: Path, state: dict[str, Any], policy: Policy, optimizer: torch.optim.Optimizer,
    ranks: Ranks,
) -> None:  # fmt: skip
    """Writes weights, optimiser and random states by torch.distributed.checkpoint, `state` as
    JSON, to checkpoints/resume-STEP; all ranks call it.

    The folder gets its name when it is whole and on disk (DCP syncs its files); only then
    checkpoints/last.json names it, and only then older ones go. The data's order needs no state:
    (seed, epoch) decide it, and the step says how far."""
    import torch.distributed.checkpoint as dcp

    folder, name = output / "checkpoints", f"resume-{state['step']:07d}"
    temporary, final = folder / f".{name}.tmp", folder / name
    if ranks.rank == 0:
        for leftover in (temporary, final):  # of a run that was killed before last.json named it
            shutil.rmtree(leftover, ignore_errors=True)
    ranks.barrier()
    contents = _checkpoint_contents(policy, optimizer) | {"rng": _random_states(ranks)}
    dcp.save(contents, checkpoint_id=temporary, no_dist=ranks.world_size == 1)
    if ranks.rank == 0:
        write_json(temporary / "state.json", state | {"world_size": ranks.world_size})
        os.replace(temporary, final)
        sync_folder(folder)
        write_json(folder / "last.json", {"folder": name})
        for old in folder.glob("resume-*"):
            if old != final:
                shutil.rmtree(old)
    ranks.barrier()


def load_checkpoint(
    output: Path, policy: Policy, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> dict[str, Any]:
    """Loads the checkpoint that checkpoints/last.json names, at any world size. Returns its state,
    {} where none is. Raises UserError where it is gone or damaged."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    pointer = output / "checkpoints" / "last.json"
    names = [read_json(pointer)["folder"] if ranks.rank == 0 and pointer.is_file() else None]
    if ranks.world_size > 1:  # a file system may show other nodes an older one
        dist.broadcast_object_list(names, device=ranks.device)
    if names[0] is None:
        return {}
    folder = pointer.parent / names[0]
    if not (folder / ".metadata").is_file():
        raise UserError(f"{pointer}: names {folder.name}, which is gone or damaged; bring it back, "
                        "or start again in another --output")  # fmt: skip
    state = read_json(folder / "state.json")
    contents = _checkpoint_contents(policy, optimizer)
    same_ranks = state.pop("world_size") == ranks.world_size
    if same_ranks:
        contents["rng"] = _random_states(ranks)
    try:
        dcp.load(contents, checkpoint_id=folder, no_dist=ranks.world_size == 1)
    except (dcp.CheckpointException, OSError, EOFError) as error:
        raise UserError(f"{folder}: cannot be read ({type(error).__name__}); bring it back, or "
                        "start again in another --output") from None  # fmt: skip
    weights, moments = contents["model"], contents["optimizer"]
    set_state_dict(policy, optimizer, model_state_dict=weights, optim_state_dict=moments)
    if same_ranks:
        for kind, value in contents["rng"][str(ranks.rank)].items():
            getattr(torch, kind).set_rng_state(value)
    return state


def remove_checkpoint(output: Path, ranks: Ranks) -> None:
    """Of a run whose final model is written: three times the weights that nobody will read."""
    if ranks.rank == 0:
        (output / "checkpoints" / "last.json").unlink(missing_ok=True)
        for folder in [*output.glob("checkpoints/resume-*"), *output.glob("checkpoints/.resume-*")]:
            shutil.rmtree(folder)
        with contextlib.suppress(OSError):  # it holds the models of --save-at
            (output / "checkpoints").rmdir()


def _checkpoint_contents(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    return dict(zip(("model", "optimizer"), get_state_dict(policy, optimizer), strict=True))


def _random_states(ranks: Ranks) -> dict[str, dict[str, Tensor]]:
    """This rank's, by module of torch. Nothing here draws in training; a fork may (dropout)."""
    kinds = ["random"] + ["cuda"] * (ranks.device.type == "cuda")
    return {str(ranks.rank): {kind: getattr(torch, kind).get_rng_state() for kind in kinds}}


TENSORBOARD = "tensorboard==2.21.0"  # as requirements.txt has it


def check_tensorboard() -> None:
    """Raises UserError where the package of --tensorboard is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(f"--tensorboard needs the package tensorboard: pip install {TENSORBOARD}")


class MetricsLog:
    """metrics.jsonl: one line a step; with --tensorboard OUTPUT/tensorboard has the same numbers.

    On resume the lines of steps taken again are dropped, and the events are made again from the
    others: no step twice, and none missing where the flag was not given before."""

    def __init__(self, output: Path, step: int, ranks: Ranks, tensorboard: bool = False) -> None:
        self.path, self.ranks, self.events = output / "metrics.jsonl", ranks, None
        if ranks.rank == 0:
            lines = self.path.read_text().splitlines() if self.path.is_file() else []
            # A killed run may have left half a last line.
            kept = [x for x in lines if x.endswith("}") and json.loads(x)["step"] <= step]
            with atomic(self.path) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept))
        if ranks.rank == 0 and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            shutil.rmtree(output / "tensorboard", ignore_errors=True)
            # A TensorBoard that shows the run now forgets what it has read from step 0 on.
            self.events = SummaryWriter(str(output / "tensorboard"), purge_step=0)
            for line in kept:
                self._draw(json.loads(line))
            self.events.flush()

    def write(self, values: dict[str, float]) -> None:
        """Appends one line, on rank 0."""
        if self.ranks.rank == 0:
            finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
            with open(self.path, "a") as file:
                file.write(json.dumps(finite) + "\n")
            if self.events:
                self._draw(finite)
                self.events.flush()

    def _draw(self, values: dict[str, float | None]) -> None:
        for name, value in values.items():
            if name != "step" and value is not None:
                self.events.add_scalar(name, value, values["step"])


def sum_and_count(values: Tensor, where: Tensor) -> Tensor:
    """[sum of the values where `where` (bool) holds, how often it holds]: for mean_metrics."""
    return torch.stack([(values * where).sum(), where.sum()])


def mean_metrics(sums: dict[str, Tensor], ranks: Ranks) -> dict[str, float]:
    """{name: [sum, count]} of this rank's micro-batches -> means over the global batch. This is the
    one place where a step waits for the GPU."""
    table = ranks.sum(torch.stack(list(sums.values()))).tolist()  # [metrics, 2], one reduction
    pairs = zip(sums, table, strict=True)
    return {name: total / count if count else math.nan for name, (total, count) in pairs}
