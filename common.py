"""Plumbing shared by the four scripts: errors, ranks, files, models, packing, token log-probs.

Nothing here teaches the algorithm: what an objective, a signal or a trust region *is* stands in
the stage files.

Alignment, everywhere: entry t of a per-token array belongs to token t and is computed from the
logits at t-1. Prompt tokens carry zero and are masked. Shape legend: N tokens of a rollouts file,
S responses, T tokens of one packed row, R response tokens of that row, D hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
LOG_RATIO_CLAMP = 20.0  # inside exp only: exp(20) is finite in float32; beyond it no gradient


class UserError(Exception):
    """Bad input. `run` prints it without a traceback and ends with exit code 2."""


NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota, file-size limit


def run(main: Callable[[Any], None], args_type: type, doc: str | None) -> None:
    """Parses the command line and calls `main`; bad input ends with exit code 2."""
    try:
        main(tyro.cli(args_type, description=doc))
    except UserError as error:
        sys.exit(_fail(str(error)))
    except OSError as error:  # a full disk, an unwritable folder, a vanished file
        if error.filename is None and error.errno not in NO_SPACE:
            raise
        where, why = error.filename or "disk", error.strerror
        sys.exit(_fail(f"{where}: {why}; check the path, its permissions and the free space"))
    except SafetensorError as error:  # in writing: what cannot be read is a UserError
        sys.exit(_fail(f"{error}; check the free space, and run the same command again"))
    finally:
        if dist.is_initialized():
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
        dist.init_process_group("nccl" if cuda else "gloo")
    elif cuda and not dist.is_initialized():  # FSDP's mixed precision, with one GPU too
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    return Ranks(int(os.environ.get("RANK", "0")), world_size, device)


def progress(ranks: Ranks, total: int, initial: int, what: str) -> tqdm:
    """Progress bar with rate and time left, on rank 0; in a log file a line every ten seconds."""
    log_file = not sys.stderr.isatty()
    return tqdm(total=total, initial=initial, desc=what, disable=ranks.rank != 0,
                mininterval=10 if log_file else 0.2, ncols=100 if log_file else None)  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Files: written under a temporary name, then renamed


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary name; what was written there becomes `path` at once, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    tensors, metadata = load_tensors(path, ROLLOUT_DTYPES)
    known = {field.name for field in dataclasses.fields(Rollouts)}
    rollouts = Rollouts(path, metadata, **{k: v for k, v in tensors.items() if k in known})
    cu, n = rollouts.cu_seqlens, len(rollouts.rewards)
    if n == 0 or len(cu) != n + 1 or cu[0] != 0 or cu[-1] != len(rollouts.tokens):
        raise UserError(f"{path}: cu_seqlens does not fit {n} responses and its tokens")
    sizes = {"prompt_lens": n, "problem_index": n, "truncated": n, "first_wrong_token": n,
             "answer_class": n, "sampler_logprobs": len(rollouts.tokens)}  # fmt: skip
    for name, size in sizes.items():
        if name in tensors and (found := len(tensors[name])) != size:
            raise UserError(f"{path}: '{name}' has {found} entries, expected {size}")
    for name, dtype in OPTIONAL_DTYPES.items():
        if name in tensors and tensors[name].dtype != dtype:
            raise UserError(f"{path}: array '{name}' is {tensors[name].dtype}, expected {dtype}")
    if (lowest := int(rollouts.tokens.min())) < 0:
        raise UserError(f"{path}: token {lowest} is below 0; make the file again")
    for bad, what in [
        (rollouts.prompt_lens < 1, "has an empty prompt"),
        (rollouts.response_lens < 1, "has an empty response; drop it and write the file again"),
        (rollouts.problem_index < 0, "belongs to no problem"),
        ((rollouts.rewards != 0) & (rollouts.rewards != 1), "has a reward that is not 0 or 1"),
    ]:
        if bad.any():
            first = int(bad.nonzero()[0])
            raise UserError(f"{path}: response {first} {what} ({int(bad.sum())} such)")
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


@dataclass(frozen=True)
class Row:
    """One packed row: whole sequences end to end, no padding."""

    tokens: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, from 0 in each sequence
    lengths: list[int]  # of the sequences; on the host, so that attention splits without a sync
    response_index: Tensor  # [R] int64: where the response tokens stand in the row
    response_mask: Tensor  # [T] bool
    sequence_ids: Tensor  # [T] int64: which sequence of the row, 0 ... len(lengths)-1
    sequences: Tensor  # [len(lengths)] int64: their numbers in the rollouts file
    flat: Tensor  # [T] int64: where the row's tokens stand in the file's flat arrays


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """Response numbers of each step of an epoch, in an order that (seed, epoch) alone decide."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    return torch.randperm(n, generator=generator).split(batch_size)


def pack(lengths: list[int], budget: int, world_size: int) -> list[list[list[int]]]:
    """Distributes sequences over rows of at most `budget` tokens (a longer one gets its own row).

    Returns [rank][micro-batch] -> indices into `lengths`. All ranks get the same number of rows, so
    that collectives stay in step. Longest first, each into the emptiest row: that balances them."""
    needed = max(1, -(-sum(lengths) // budget))
    while True:
        n_rows = -(-needed // world_size) * world_size
        rows: list[list[int]] = [[] for _ in range(n_rows)]
        filled = [0] * n_rows
        for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            row = filled.index(min(filled))
            rows[row].append(index)
            filled[row] += lengths[index]
        if all(size <= budget or len(r) == 1 for r, size in zip(rows, filled, strict=True)):
            return [rows[rank::world_size] for rank in range(world_size)]
        needed = n_rows + 1


def make_row(rollouts: Rollouts, sequences: list[int], device: torch.device) -> Row:
    """Packs `sequences` of the rollouts into one row. Prompts of 2 and 1, responses of 2 and 3:

        tokens        p p y y | p y y y
        position_ids  0 1 2 3 | 0 1 2 3        response_index  2 3 5 6 7

    An empty list (a rank without work) gives one sequence with its response masked out: it takes
    part in every collective and adds exactly zero."""
    chosen = torch.tensor(sequences or [0])
    lengths = rollouts.lengths[chosen]
    ids = torch.repeat_interleave(torch.arange(len(chosen)), lengths)
    position_ids = torch.arange(len(ids)) - (lengths.cumsum(0) - lengths)[ids]
    flat = rollouts.cu_seqlens[chosen][ids] + position_ids
    mask = (position_ids >= rollouts.prompt_lens[chosen][ids]) & bool(sequences)
    tensors = (rollouts.tokens[flat].long(), position_ids, mask.nonzero()[:, 0], mask, ids)
    tokens, position_ids, index, mask, ids = (t.to(device, non_blocking=True) for t in tensors)
    return Row(tokens, position_ids, lengths.tolist(), index, mask, ids, chosen, flat)


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


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, segment_lengths: list[int] | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention inside each sequence of a packed row: cost is linear in their number.

    query [1, heads, T, head_dim], key and value [1, kv_heads, ...] -> [1, T, heads, head_dim]."""
    assert segment_lengths is not None, "Policy.forward passes the lengths of the sequences"
    segments = zip(*(x.split(segment_lengths, dim=2) for x in (query, key, value)), strict=True)
    grouped = query.shape[1] != key.shape[1]
    attend = functools.partial(
        F.scaled_dot_product_attention, is_causal=True, scale=scaling, enable_gqa=grouped
    )
    return torch.cat([attend(q, k, v) for q, k, v in segments], dim=2).transpose(1, 2), None


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
    name: str, device: torch.device, dtype: torch.dtype, attention: str = "packed"
) -> nn.Module:
    """A transformers causal LM in evaluation mode: no dropout, so ratios start at exactly 1.

    Raises UserError where the architecture has what our forward does not compute."""
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    AttentionInterface.register("packed", packed_attention)
    lm = _from_pretrained(AutoModelForCausalLM, name, attn_implementation=attention, dtype=dtype)
    unsupported = [k for k in ("final_logit_softcapping", "logit_scale") if hasattr(lm.config, k)]
    if "sliding_attention" in (getattr(lm.config, "layer_types", None) or ()):
        unsupported.append("sliding_attention")
    if attention == "packed" and unsupported:
        raise UserError(f"model '{name}': the packed forward has no {', '.join(unsupported)}")
    return lm.to(device).eval()


class Policy(nn.Module):
    """A causal LM whose forward takes a packed row and a head, and returns what the head makes of
    the hidden states. The head runs inside the forward, where FSDP has gathered the output matrix;
    [T, V] logits never exist."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, row: Row, head: Callable[[Tensor, Tensor], Any]) -> Any:
        """head(hidden [R, D], weight [V, D]); hidden[i] is the state that predicts token i of R."""
        body = self.lm.base_model(
            input_ids=row.tokens[None], position_ids=row.position_ids[None],
            use_cache=False,  # a cache, even unused, makes transformers attend across sequences
            segment_lengths=row.lengths,
        )  # fmt: skip
        # A response token is predicted by the token before it; there is one: no prompt is empty.
        return head(body.last_hidden_state[0][row.response_index - 1], self.lm.lm_head.weight)


def load_policy(name: str, ranks: Ranks, train: bool) -> Policy:
    """Loads a model; to train it on GPUs or several ranks sharded by FSDP2: float32 masters, bf16
    compute on a GPU, which is also the precision that a policy is scored in."""
    cuda = ranks.device.type == "cuda"
    dtype = torch.bfloat16 if cuda and not train else torch.float32
    policy = Policy(load_lm(name, ranks.device, dtype)).requires_grad_(train)
    if train and dist.is_initialized():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        bf16 = (torch.bfloat16, torch.float32) if cuda else ()  # compute, reduce
        n_layers = policy.lm.config.num_hidden_layers
        stacks = (m for m in policy.modules() if isinstance(m, nn.ModuleList))
        blocks = next(stack for stack in stacks if len(stack) == n_layers)
        for unit in [*blocks, policy]:  # every decoder block, then embedding, norm and head
            # The root too gives its weights back after a forward: one without a backward (scoring)
            # would else leave it unsharded, and the optimiser would be built on what is temporary.
            precision = MixedPrecisionPolicy(*bf16)
            fully_shard(unit, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    return policy


def save_model(policy: Policy, tokenizer: Any, folder: Path, ranks: Ranks) -> None:
    """Writes a Hugging Face folder, tokenizer included; all ranks call it. `config.json` comes
    last: a folder that has one is complete."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(policy, options=options)
    if ranks.rank == 0:
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        weights = {name.removeprefix("lm."): tensor for name, tensor in weights.items()}
        policy.lm.save_pretrained(temporary, state_dict=weights)
        tokenizer.save_pretrained(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(temporary.iterdir(), key=lambda f: f.name == "config.json"):
            os.replace(file, folder / file.name)
        temporary.rmdir()
    ranks.barrier()


# --------------------------------------------------------------------------------------------------
# Token log-probs without logits


def head_logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """[R, V] logits of one chunk in float32 (float64 stays float64)."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (hidden.to(wide) @ weight.to(wide).T) / temperature


def head_chunks(vocabulary: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Splits along tokens so that the logits of a chunk stay under HEAD_CHUNK_ELEMENTS."""
    size = max(1, HEAD_CHUNK_ELEMENTS // vocabulary)
    return zip(*(x.split(size) for x in tensors), strict=True)


class _HeadLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature)[target] and the entropy, in chunks of tokens.

    Keeps logZ only; backward makes each chunk's logits again. The entropy has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropies, log_zs = [], [], []
        for h, y in head_chunks(len(weight), hidden, targets):
            logits = head_logits(h, weight, temperature)
            log_z = logits.logsumexp(-1)
            logprobs.append(logits.gather(-1, y[:, None])[:, 0] - log_z)
            probs = (logits - log_z[:, None]).exp_()
            entropies.append(log_z - torch.linalg.vecdot(probs, logits))
            log_zs.append(log_z)
        ctx.save_for_backward(hidden, weight, targets, torch.cat(log_zs))
        ctx.temperature = temperature
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_z = ctx.saved_tensors
        grad_weight = torch.zeros_like(weight, dtype=log_z.dtype)
        grad_hidden = []
        for h, y, z, g in head_chunks(len(weight), hidden, targets, log_z, grad):
            # d logprob / d logits = onehot - softmax
            grad_logits = (head_logits(h, weight, ctx.temperature) - z[:, None]).exp_().neg_()
            grad_logits.scatter_add_(-1, y[:, None], torch.ones_like(z)[:, None])
            grad_logits *= (g / ctx.temperature)[:, None]
            grad_hidden.append((grad_logits @ weight.to(grad_logits.dtype)).to(hidden.dtype))
            grad_weight.addmm_(grad_logits.T, h.to(grad_logits.dtype))
        return torch.cat(grad_hidden), grad_weight.to(weight.dtype), None, None


def row_logprobs(
    policy: Policy, row: Row, temperature: float,
    extra: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Log-prob of each token, entropy of the distribution it came from: float32 [T], 0 on prompts.

    `extra(hidden [R, D], weight [V, D]) -> [R]` adds a third, computed in the same forward."""
    targets = row.tokens[row.response_index]

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
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
        for sequences in pack(rollouts.lengths.tolist(), budget, ranks.world_size)[ranks.rank]:
            row = make_row(rollouts, sequences, ranks.device)
            logprobs = row_logprobs(policy, row, temperature)[0]
            if sequences:  # a rank without work has scored a stand-in
                result[row.flat] = logprobs.float().cpu()
            bar.update(len(sequences) * ranks.world_size)
    return ranks.sum(result.to(ranks.device)).cpu()


# --------------------------------------------------------------------------------------------------
# Run folders, optimiser, checkpoints, metrics


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
            if old[part].get(name) != value and name != "output"  # a moved folder is the same run
        ]  # fmt: skip
        if changed:
            raise UserError(f"--output {output}: a run with other settings ({'; '.join(changed)}); "
                            "repeat its command, or choose another folder")  # fmt: skip
        if (output / last_file).is_file():
            ranks.print(f"{output} is complete; nothing to do")
            return False
    elif foreign:
        raise UserError(f"--output {output}: exists and is not a run folder; choose another")
    ranks.barrier()
    if ranks.rank == 0:
        write_json(path, record | {"torch": torch.__version__, "world_size": ranks.world_size})
    ranks.barrier()
    return True


def make_optimizer(policy: Policy, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW with torch's betas (0.9, 0.999)."""
    parameters = policy.parameters()
    return torch.optim.AdamW(parameters, learning_rate, weight_decay=weight_decay, fused=True)


def optimizer_step(
    policy: Policy, optimizer: torch.optim.Optimizer, learning_rate: float, max_grad_norm: float
) -> float:
    """Clips the global gradient norm, steps, clears; returns the norm before clipping.

    A step whose gradient is not finite is left out, on all ranks alike; its norm tells."""
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    optimizer.zero_grad()
    return norm


def save_checkpoint(
    output: Path, state: dict[str, Any], policy: Policy, optimizer: torch.optim.Optimizer,
    ranks: Ranks,
) -> None:  # fmt: skip
    """Writes weights and optimiser by torch.distributed.checkpoint and `state` as JSON to
    checkpoints/resume-STEP, then removes older ones. The folder gets its name when it is whole."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    final = output / "checkpoints" / f"resume-{state['step']:07d}"
    temporary = final.with_name(f".{final.name}.tmp")
    if ranks.rank == 0:
        for folder in (temporary, final):
            shutil.rmtree(folder, ignore_errors=True)
    ranks.barrier()
    contents = dict(zip(("model", "optimizer"), get_state_dict(policy, optimizer), strict=True))
    dcp.save(contents, checkpoint_id=temporary, no_dist=ranks.world_size == 1)
    if ranks.rank == 0:
        write_json(temporary / "state.json", state)
        os.replace(temporary, final)
        for old in sorted(final.parent.glob("resume-*"))[:-1]:
            shutil.rmtree(old)
    ranks.barrier()


def load_checkpoint(
    output: Path, policy: Policy, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> dict[str, Any]:
    """Loads the last whole checkpoint, at any world size. Returns its state, {} where none is."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    folders = sorted((output / "checkpoints").glob("resume-*"))
    if not folders:
        return {}
    contents = dict(zip(("model", "optimizer"), get_state_dict(policy, optimizer), strict=True))
    dcp.load(contents, checkpoint_id=folders[-1], no_dist=ranks.world_size == 1)
    weights, moments = contents["model"], contents["optimizer"]
    set_state_dict(policy, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return read_json(folders[-1] / "state.json")


class MetricsLog:
    """metrics.jsonl: one line a step. On resume the lines of steps taken again are dropped."""

    def __init__(self, output: Path, step: int, ranks: Ranks) -> None:
        self.path, self.ranks = output / "metrics.jsonl", ranks
        if ranks.rank == 0:
            lines = self.path.read_text().splitlines() if self.path.is_file() else []
            # A killed run may have left half a last line.
            kept = [x for x in lines if x.endswith("}") and json.loads(x)["step"] <= step]
            with atomic(self.path) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept))

    def write(self, values: dict[str, float]) -> None:
        """Appends one line, on rank 0."""
        if self.ranks.rank == 0:
            with open(self.path, "a") as file:
                finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
                file.write(json.dumps(finite) + "\n")


def mean_metrics(sums: dict[str, Tensor], ranks: Ranks) -> dict[str, float]:
    """{name: [sum, count]} of this rank's micro-batches -> means over the global batch."""
    table = ranks.sum(torch.stack(list(sums.values()))).tolist()  # [metrics, 2], one reduction
    pairs = zip(sums, table, strict=True)
    return {name: total / count if count else math.nan for name, (total, count) in pairs}
