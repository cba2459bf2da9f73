"""Plumbing shared by the four scripts: ranks, files, packed rows, models, log-probs, checkpoints.

Nothing here teaches the algorithm: objectives, signals and trust regions are in the stage files.

One convention holds everywhere. Entry t of a per-token array belongs to token t and is computed
from the logits at position t-1. On disk, arrays cover all N tokens of the S rollouts, and are zero
on the prompts. In memory, everything that a loss sees covers only the R response tokens among the T
tokens of one packed row, so there is nothing to mask. D is the hidden size, V the vocabulary's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import gc
import hashlib
import heapq
import inspect
import json
import math
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

FORMAT_VERSION = 1
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # flock on some shared disks
NOT_FINITE = "its log-probs are not finite; train it with a lower rate"
HEAD_TILE_ELEMENTS = {"cuda": 2**27, "cpu": 2**21}  # logits that exist at once; a CPU caches


class UserError(Exception):
    """Reports bad input. `run` prints it without a traceback and exits with code 2."""


def run(main: Callable[[Any], None], args_type: type, doc: str | None) -> None:
    """Parses the command line and calls `main`. Bad input ends with one line and exit code 2."""
    import tyro  # only here: a machine that lacks it can still call `main`

    args = tyro.cli(args_type, description=doc)
    try:
        main(args)
    except (UserError, OSError, SafetensorError, ModuleNotFoundError) as error:
        # A bad value, a bad path, a full disk, an optional package that is not installed.
        locks = isinstance(error, OSError) and error.errno in NO_LOCKS
        remedy = "; this file system has no locks: set HF_HOME to a local disk" if locks else ""
        tqdm.write(f"error: {error}{remedy}", file=sys.stderr)  # on a line below a progress bar
        sys.exit(2)
    if dist.is_initialized():  # not after an error: NCCL would wait here for the other ranks
        dist.destroy_process_group()


def require(args: Any, flags: str, allowed: Callable[[Any], bool], what: str) -> None:
    """Raises UserError for the first of `flags` (space-separated) given a value not allowed."""
    for flag in flags.split():
        value = getattr(args, flag)
        if value is not None and not allowed(value):
            raise UserError(f"--{flag.replace('_', '-')} {value}: must be {what}")


# --------------------------------------------------------------------------------------------------
# Ranks


@dataclass(frozen=True)
class Ranks:
    """Says which process this is and how many there are. Without torchrun there is one."""

    rank: int
    world_size: int
    device: torch.device

    def print(self, text: str) -> None:
        """Prints on rank 0 only, above a running progress bar."""
        if self.rank == 0:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def decide(self, question: Callable[[], Any]) -> Any:
        """Asks on rank 0 and tells all ranks: a shared disk may show them different files."""
        if self.world_size == 1:
            return question()
        answer = [question() if self.rank == 0 else None]
        dist.broadcast_object_list(answer, device=self.device)
        return answer[0]


def setup_ranks(cpu_offload: bool = False) -> Ranks:
    """Reads torchrun's environment. Without torchrun there is one process, on a GPU or the CPU.

    cpu_offload: ranks on GPUs can also exchange what lies on the CPU, such as a gradient's norm."""
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    rank, local, world_size = (int(os.environ.get(name, value)) for name, value in names.items())
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    if not dist.is_initialized():  # also for a single process, so that every collective works
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world_size == 1 else {}
        # Ranks wait while rank 0 writes a model, and NCCL's own limit of 10 minutes is too short.
        limit = timedelta(minutes=30)
        backend = ("cpu:gloo,cuda:nccl" if cpu_offload else "nccl") if cuda else "gloo"
        dist.init_process_group(backend, timeout=limit, **alone)
    return Ranks(rank, world_size, torch.device("cuda", local) if cuda else torch.device("cpu"))


def progress(ranks: Ranks, total: int, initial: int, what: str) -> tqdm:
    """Makes a progress bar on rank 0. In a log file it is updated every ten seconds."""
    every = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, initial=initial, desc=what, mininterval=every, disable=ranks.rank != 0)


# --------------------------------------------------------------------------------------------------
# Files: written under a temporary name, then renamed


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path. The file written there replaces `path` as a whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another node may be writing the same file, in a process with the same number.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
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
    """Reads a JSON file. Raises UserError if it is not JSON, OSError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes a safetensors file, atomically."""
    # One string: safetensors does not keep the order of several entries, and equal content must
    # give equal bytes.
    text = json.dumps({"format": FORMAT_VERSION} | metadata, sort_keys=True)
    with atomic(path) as temporary:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata={"erpd": text})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the arrays and metadata that `save_tensors` wrote. Raises UserError for other files."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; is the run that writes it finished?")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("erpd", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path}: damaged, or not a safetensors file ({error})") from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT_VERSION:
        raise UserError(f"{path}: not written by this version of these scripts; make it again")
    return tensors, metadata


def take(tensors: dict[str, Tensor], name: str, dtype: torch.dtype, n: int, path: Path) -> Tensor:
    """Returns one array of a loaded file. Raises UserError if dtype or shape differ."""
    array = tensors.get(name)
    if array is not None and array.dtype == dtype and array.shape == (n,):
        return array
    found = "missing" if array is None else f"{array.dtype} of shape {list(array.shape)}"
    raise UserError(f"{path}: array '{name}' is {found}, not {dtype} of shape [{n}]")


def fingerprint(path: Path) -> str:
    """Returns 16 hex digits of the SHA-256 of a file, or of a model's config and weights."""
    files = sorted([*path.glob("*.safetensors"), path / "config.json"]) if path.is_dir() else [path]
    return _digest(tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files))


@functools.cache  # a script asks several times for the fingerprint of a model of many gigabytes
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for file, _, _ in files:
        with open(file, "rb") as handle:
            while block := handle.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# Rollouts


@dataclass(frozen=True)
class Rollouts:
    """Holds S responses as flat arrays of N tokens without padding: rollouts.safetensors."""

    path: Path
    metadata: dict[str, Any]
    tokens: Tensor  # [N] int32
    cu_seqlens: Tensor  # [S+1] int64: sequence s is tokens[cu[s]:cu[s+1]], its prompt first
    prompt_lens: Tensor  # [S] int32
    rewards: Tensor  # [S] float32, 0 or 1
    problem_index: Tensor  # [S] int32, line of problems.jsonl
    truncated: Tensor  # [S] bool: reached the token limit
    sampler_logprobs: Tensor | None = None  # [N] float32, the engine's own numbers
    first_wrong_token: Tensor | None = None  # [S] int32, counted from the prompt's start; -1: none

    @property
    def lengths(self) -> Tensor:
        """[S] int64: tokens of each sequence, prompt included."""
        return self.cu_seqlens.diff()

    @property
    def response_lens(self) -> Tensor:
        """[S] int64: response tokens of each sequence."""
        return self.lengths - self.prompt_lens

    @property
    def sequence_ids(self) -> Tensor:
        """[N] int64: the sequence that each token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self.rewards)), self.lengths)

    @property
    def response_mask(self) -> Tensor:
        """[N] bool: True on response tokens."""
        ids = self.sequence_ids
        return torch.arange(len(ids)) - self.cu_seqlens[ids] >= self.prompt_lens[ids]


ARRAYS = {  # name: dtype, one entry per token ("N") or per response ("S"), needed
    "tokens": (torch.int32, "N", True), "sampler_logprobs": (torch.float32, "N", False),
    "prompt_lens": (torch.int32, "S", True), "rewards": (torch.float32, "S", True),
    "problem_index": (torch.int32, "S", True), "truncated": (torch.bool, "S", True),
    "first_wrong_token": (torch.int32, "S", False),
}  # fmt: skip


def load_rollouts(folder: Path) -> Rollouts:
    """Reads FOLDER/rollouts.safetensors. Raises UserError that names the array or response."""
    path = Path(folder) / "rollouts.safetensors"
    tensors, metadata = load_tensors(path)
    n_responses = len(tensors.get("rewards", ()))
    cu_seqlens = take(tensors, "cu_seqlens", torch.int64, n_responses + 1, path)
    size = {"N": int(cu_seqlens[-1]), "S": n_responses}
    arrays = {
        name: take(tensors, name, dtype, size[axis], path)
        for name, (dtype, axis, needed) in ARRAYS.items()
        if needed or name in tensors
    }
    rollouts = Rollouts(path, metadata, cu_seqlens=cu_seqlens, **arrays)
    if not n_responses or cu_seqlens[0] != 0:
        raise UserError(f"{path}: has no responses, or they do not start at token 0; make it again")
    for bad, what in [
        (rollouts.prompt_lens < 1, "has an empty prompt"),
        (rollouts.response_lens < 1, "has an empty response"),
        (rollouts.problem_index < 0, "belongs to no problem"),
        ((rollouts.rewards != 0) & (rollouts.rewards != 1), "has a reward that is not 0 or 1"),
    ]:
        if bad.any():
            first = int(bad.nonzero()[0])
            raise UserError(f"{path}: response {first} {what} ({int(bad.sum())} in all)")
    return rollouts


def check_sampling(rollouts: Rollouts, force: bool) -> float:
    """Returns the sampling temperature. Raises UserError if samples are not the policy's own."""
    sampling = rollouts.metadata.get("sampling", {})
    temperature = float(sampling.get("temperature", 1.0))
    top_p, top_k = sampling.get("top_p", 1.0), sampling.get("top_k", 0)
    if temperature == 0 or not (force or (top_p == 1 and top_k == 0)):
        raise UserError(
            f"{rollouts.path}: sampled at temperature {temperature:g}, top-p {top_p}, top-k "
            f"{top_k}, so ratios would be wrong; sample again with --temperature 1 --top-p 1"
        )
    return temperature


# --------------------------------------------------------------------------------------------------
# Packed rows


@dataclass(frozen=True, eq=False)  # no equality: comparing tensors gives no single truth value
class Row:
    """Holds one packed row: whole sequences end to end, without padding."""

    tokens: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, counting from 0 in each sequence
    cu_seqlens: Tensor  # [sequences + 1] int32: where each sequence starts, and the end
    response_index: Tensor  # [R] int64: where the response tokens are in the row
    sequence_ids: Tensor  # [R] int64: which sequence of the row each of them belongs to
    lengths: list[int]  # of the sequences, on the host, so that splitting does not wait for the GPU
    sequences: Tensor  # [S] int64, on the host: the sequences' numbers in the rollouts file
    flat: Tensor  # [R] int64, on the host: where the response tokens are in the file's arrays


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """Splits n responses into the steps of an epoch; (seed, epoch) alone decide the order."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    return torch.randperm(n, generator=generator).split(batch_size)


def pack(lengths: list[int], budget: int, world_size: int) -> list[list[list[int]]]:
    """Distributes sequences over rows of at most `budget` tokens; a longer one gets its own row.

    The longest go first, each into the emptiest row, so rows end up nearly equal. Returns the rows
    of each rank as lists of indices into `lengths`. All ranks get the same number of rows, because
    every row is one round of collectives."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    n_rows = max(1, min(len(lengths), -(-sum(lengths) // budget)))
    while True:
        n_rows = -(-n_rows // world_size) * world_size  # a multiple of the ranks
        rows: list[list[int]] = [[] for _ in range(n_rows)]
        filled = [(0, row) for row in range(n_rows)]  # a heap: the emptiest row is first
        for index in order:
            size, row = filled[0]
            rows[row].append(index)
            heapq.heapreplace(filled, (size + lengths[index], row))
        if all(size <= budget or len(rows[row]) == 1 for size, row in filled):
            return [rows[rank::world_size] for rank in range(world_size)]
        n_rows += max(1, n_rows // 50)


def make_row(rollouts: Rollouts, sequences: list[int], device: torch.device) -> Row:
    """Packs sequences of the rollouts. With prompts of 2 and 1 and responses of 2 and 3 tokens:

        tokens        p p y y p y y y        response_index  2 3 5 6 7
        position_ids  0 1 2 3 0 1 2 3        sequence_ids    0 0 1 1 1

    Without sequences (a rank that has no work) the row holds the first sequence's tokens and no
    response: R = S = 0. It takes part in every collective, and all its sums are zero."""
    chosen = torch.tensor(sequences or [0])
    lengths = rollouts.lengths[chosen]
    starts = F.pad(lengths.cumsum(0), (1, 0))
    ids = torch.repeat_interleave(torch.arange(len(chosen)), lengths)  # [T]
    position_ids = torch.arange(len(ids)) - starts[ids]
    flat = rollouts.cu_seqlens[chosen][ids] + position_ids  # [T]
    is_response = (position_ids >= rollouts.prompt_lens[chosen][ids]) & bool(sequences)
    index = is_response.nonzero()[:, 0]
    tokens = rollouts.tokens[flat].long()
    on_device = (x.to(device) for x in (tokens, position_ids, starts.int(), index, ids[index]))
    return Row(*on_device, lengths.tolist(), chosen[: len(sequences)], flat[index])


# --------------------------------------------------------------------------------------------------
# Models


# Keywords of an attention call that change nothing, or say what a row says itself.
NEUTRAL = {"position_ids", "use_cache", "output_router_logits", "cu_seq_lens_q", "cu_seq_lens_k",
           "max_length_q", "max_length_k", "seq_idx"}  # fmt: skip


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    *, packed: Row, scaling: float | None = None, sliding_window: int | None = None,
    dropout: float = 0.0, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Computes causal attention within each sequence of a row; no [T, T] mask exists.

    query [1, heads, T, head_dim], key and value [1, kv_heads, T, head_dim]: the signature of
    transformers' AttentionInterface. sliding_window: tokens that a token sees, itself included. A
    GPU runs torch's own variable-length FlashAttention, a CPU one fused call per sequence. Both are
    linear in the number of sequences. Raises UserError for anything else, such as soft caps."""
    others |= {"attention_mask": attention_mask, "dropout": dropout or None}
    if refused := [k for k, v in others.items() if k not in NEUTRAL and v is not None]:
        raise UserError(f"no {', '.join(refused)} in our attention")
    if not query.is_cuda:
        attend = functools.partial(F.scaled_dot_product_attention, scale=scaling)
        grouped, out = query.shape[1] != key.shape[1], []
        for q, k, v in zip(*(x.split(packed.lengths, 2) for x in (query, key, value)), strict=True):
            n, band = q.shape[2], None
            if sliding_window and n > sliding_window:  # elsewhere it hides nothing
                band = torch.ones(n, n, dtype=torch.bool).tril().triu(1 - sliding_window)
            out.append(attend(q, k, v, band, is_causal=band is None, enable_gqa=grouped))
        return torch.cat([o.transpose(1, 2) for o in out], dim=1), None
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, head_dim]
    known = inspect.signature(varlen_attn).parameters
    if "enable_gqa" not in known:  # torch 2.11 wants as many heads of keys as of queries
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if sliding_window and "window_size" not in known:
        raise UserError("this torch has no sliding window in packed rows")
    # torch 2.13 expresses "causal" by a window (tokens before, tokens after), torch 2.11 by a flag.
    options = {"scale": scaling, "window_size": ((sliding_window or 0) - 1, 0), "is_causal": True}
    options |= {"enable_gqa": True}
    options = {name: value for name, value in options.items() if name in known}
    cu, longest = packed.cu_seqlens, max(packed.lengths)
    return varlen_attn(q, k, v, cu, cu, longest, longest, **options)[None], None


@functools.cache
def model_folder(name: str) -> Path:
    """Returns the folder of a model, of a hub name after its download. Raises UserError."""
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or name.count("/") != 1 or name.startswith("."):
            raise UserError(f"model '{name}': neither a folder nor a hub name (owner/name)")
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pth", "*.gguf"]))
        except Exception as error:  # the hub client and its transport raise a dozen kinds
            if getattr(error, "errno", None) in NO_LOCKS:
                raise
            reason = f"no such folder, and not found on the hub ({type(error).__name__})"
            raise UserError(f"model '{name}': {reason}") from None
    if not (folder / "config.json").is_file():
        raise UserError(f"model '{name}': has no config.json; an unfinished run, or no model")
    return folder


def from_pretrained(loader: Any, name: str, **kwargs: Any) -> Any:
    """Calls from_pretrained of a transformers class. Its many errors become one UserError."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return loader.from_pretrained(model_folder(name), **kwargs)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model '{name}': cannot be loaded ({first[:200]})") from None


def load_tokenizer(name: str) -> Any:
    """Loads the tokenizer of a model; by its tokenizer.json alone where only so a text comes back
    as it was. Raises UserError."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    given, text = from_pretrained(AutoTokenizer, name), "Is 1 + 2\n equal to 3?"
    if text != given.decode(given(text, add_special_tokens=False).input_ids):
        with contextlib.suppress(UserError):  # without a tokenizer.json
            own = from_pretrained(PreTrainedTokenizerFast, name)
            if text == own.decode(own(text, add_special_tokens=False).input_ids):
                tqdm.write(f"{name}: {type(given).__name__} loses text, so tokenizer.json is taken")
                return own
    return given


def text_config(name: str) -> Any:
    """Returns the config of a model, of a wrapper with a vision tower that of its text model."""
    from transformers import AutoConfig

    whole = from_pretrained(AutoConfig, name)
    config = whole.get_text_config(decoder=True)
    config.tie_word_embeddings = getattr(whole, "tie_word_embeddings", config.tie_word_embeddings)
    return config


def load_lm(
    name: str, device: torch.device, dtype: torch.dtype, attention: str = "packed"
) -> nn.Module:
    """Loads a transformers causal LM without dropout, so that ratios start at exactly 1.

    device: "meta" gives shapes without weights. attention: "packed", or transformers' own ("sdpa"),
    if the model lets it be chosen. Raises UserError if its files lack a matrix."""
    from transformers import AttentionInterface, AutoModelForCausalLM, GenerationConfig

    AttentionInterface.register("packed", packed_attention)
    kwargs = {"attn_implementation": "eager", "dtype": dtype, "config": text_config(name)}
    if device.type != "meta":
        # The files of a wrapper have its text model's matrices under these names, new or old.
        names = {r"^(model\.language_model|language_model\.model)\.": "model."}
        names |= {r"^language_model\.lm_head\.": "lm_head."}
        kwargs |= {"key_mapping": names, "output_loading_info": True}
        lm, info = from_pretrained(AutoModelForCausalLM, name, **kwargs)
        if missing := sorted(info["missing_keys"]):  # transformers fills it with random numbers
            raise UserError(f"model '{name}': its files lack {missing[0]}; download them again")
        lm._weight_conversions = None  # else it would be saved under the wrapper's names
        lm.to(device)
    else:
        with device:
            lm = AutoModelForCausalLM.from_config(**kwargs)
        if (model_folder(name) / "generation_config.json").is_file():  # it names every EOS token
            lm.generation_config = from_pretrained(GenerationConfig, name)
    try:
        lm.generation_config.validate(strict=True)
    except ValueError:  # save_pretrained would refuse it
        ids = {k: v for k, v in lm.generation_config.to_dict().items() if k.endswith("_token_id")}
        lm.generation_config = GenerationConfig(**ids)
    if not lm._supports_sdpa or getattr(lm.config, "attn_logit_softcapping", None):
        attention = attention.replace("sdpa", "eager")  # sdpa leaves out sinks and soft caps
    if lm._can_set_attn_implementation():
        lm.set_attn_implementation(attention)
    return lm.eval()


@dataclass(frozen=True, eq=False)
class Output:
    """Turns hidden states h into logits: cap tanh(x / cap), or x, of x = scale (h W^T + bias)."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: Tensor, part: slice = slice(None)) -> Tensor:
        """Computes the logits of a part of the vocabulary: [R, D] -> [R, part], in float32."""
        x = _product(hidden, self.weight[part].T)
        if self.bias is not None:
            x += self.bias[part]
        if self.scale != 1:
            x *= self.scale
        return x if self.cap is None else torch.tanh(x / self.cap) * self.cap


# How a row is run: by which attention ("packed" is packed_attention, others are transformers' own),
# and "alone" where it holds one sequence, because a state or a mask would run on into the next one.
# check_policy tries them in this order, against transformers' own forward from tokens to logits.
ALONE, OWN = ["packed alone", "sdpa alone", "eager alone"], "eager own"
WAYS = {"cpu": ["packed", "sdpa", "eager", *ALONE],
        "cuda": ["packed", "flex_attention", "flash_attention_2", *ALONE]}  # fmt: skip
NOISE = {torch.float32: 1e-4, torch.bfloat16: 8e-2}  # nats between two right ways, mean of tokens


class Policy(nn.Module):
    """A causal LM that reads one row. It applies a head, a function of hidden states and output,
    inside the forward, because FSDP has gathered the output matrix only there."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm, own = lm, lm.config._attn_implementation
        self.way = "packed" if own == "packed" else f"{own} alone"

    def budget(self, tokens: int) -> int:
        """Returns the token budget of a row: 1 if every sequence needs a row of its own."""
        return 1 if self.way in ALONE else tokens

    def forward(self, row: Row, head: Callable[[Tensor, Output], Any]) -> Any:
        """Returns head(hidden [R, D], output); hidden[i] predicts response token i."""
        # A cache, even unused, makes transformers attend across sequences.
        inputs = {"input_ids": row.tokens[None], "use_cache": False}
        if self.way == OWN:
            logprobs = self.lm(**inputs).logits[0, row.response_index - 1].float().log_softmax(-1)
            return logprobs.gather(-1, row.tokens[row.response_index, None]).unbind(-1)
        if self.way.startswith("packed"):
            inputs["packed"] = row
        if self.way not in ALONE:
            inputs["position_ids"] = row.position_ids[None]
        elif len(row.lengths) > 1:
            raise UserError(f"several sequences in a row, and the model runs {self.way}")
        if self.way in ("packed", "flash_attention_2"):
            # Where flash-attention and the fast kernels of recurrent layers look for boundaries.
            inputs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), row.cu_seqlens)
            inputs |= dict.fromkeys(("max_length_q", "max_length_k"), max(row.lengths))
            inputs["seq_idx"] = (row.position_ids[None] == 0).cumsum(1, dtype=torch.int32) - 1
        body = self.lm.base_model if self.lm.base_model is not self.lm else self.lm.model
        hidden = body(**inputs).last_hidden_state[0]
        config, matrix = vars(self.lm.config), self.lm.get_output_embeddings()
        scale = config.get("logit_scale") or config.get("lm_head_multiplier") or 1.0
        scale, cap = scale / config.get("logits_scaling", 1.0), config.get("logits_soft_cap")
        cap = cap or config.get("final_logit_softcapping")
        output = Output(matrix.weight, getattr(matrix, "bias", None), scale, cap)
        # The token before a response token predicts it; there is one, because no prompt is empty.
        return head(hidden[row.response_index - 1], output)


def compute_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype in which models are computed and saved. Master weights are float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_policy(
    name: str, ranks: Ranks, train: bool, checkpointing: bool = False, cpu_offload: bool = False
) -> Policy:
    """Loads a model to be trained, or only scored.

    With several ranks, and for training on a GPU, FSDP2 shards it, and every rank reads no more
    than its own shard. checkpointing: each block runs again in the backward pass. cpu_offload:
    weights, gradients and, as they lie beside them, the optimizer's moments stay on the CPU."""
    device, dtype = ranks.device, compute_dtype(ranks.device)
    sharded = ranks.world_size > 1 or cpu_offload or (train and device.type == "cuda")
    where = torch.device("meta") if sharded else device
    policy = Policy(load_lm(name, where, torch.float32 if train else dtype)).requires_grad_(train)
    if checkpointing:
        from torch.utils.checkpoint import checkpoint

        for block in _blocks(policy.lm):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if sharded:
        _shard(policy, name, ranks, cpu_offload)
        for buffer in policy.buffers():  # FSDP brings the weights to the GPU, but no buffers
            buffer.data = buffer.to(device)
    return policy


def _blocks(lm: nn.Module) -> nn.ModuleList:
    """Returns the decoder blocks, whatever their name: the list with the most parameters."""
    lists = [m for m in lm.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))


def _shard(policy: Policy, name: str, ranks: Ranks, cpu_offload: bool) -> None:
    """Wraps blocks, an untied embedding and the rest in FSDP2, and reads the shards from the files.

    Where the files have other names than transformers' module (a wrapper, experts one by one),
    rank 0 reads the model and sends it. Raises UserError if shapes differ or a matrix is missing"""
    import torch.distributed.checkpoint as dcp
    from torch.distributed import fsdp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.tensor.experimental import implicit_replication

    lm, folder = policy.lm, str(model_folder(name))
    units, embedding = [*_blocks(lm)], lm.get_input_embeddings()
    if embedding.weight is not lm.get_output_embeddings().weight:  # else it is the root's matrix
        units.append(embedding)
    precision = fsdp.MixedPrecisionPolicy(compute_dtype(ranks.device), reduce_dtype=torch.float32)
    kept = fsdp.CPUOffloadPolicy(ranks.device.type == "cuda") if cpu_offload else None  # pinned
    where = {"mp_policy": precision, "offload_policy": kept or fsdp.OffloadPolicy()}
    for unit in [*units, policy]:
        # The root reshards too. After a forward without backward (scoring) it would otherwise stay
        # whole, and the optimizer would be built on tensors that soon vanish.
        fsdp.fully_shard(unit, reshard_after_forward=True, **where)
    policy.to_empty(device="cpu" if cpu_offload else ranks.device)
    for module in policy.modules():  # frequencies of rotary embeddings are computed, not stored
        if module._non_persistent_buffers_set or not module._parameters:
            with implicit_replication():
                lm._init_weights(module)
    named = dict([*lm.named_parameters(), *lm.named_buffers()])  # a tied matrix once
    weights = {k: v for k, v in lm.state_dict().items() if k in named}
    try:
        reader = dcp.HuggingFaceStorageReader(folder)
        stored = reader.read_metadata().state_dict_metadata.keys()
        if "lm_head.weight" in stored - weights.keys():  # transformers would take it, unsharded
            raise ValueError(
                "they have an lm_head.weight, but config.json ties it to the embedding"
            )
        if weights.keys() <= stored:
            return dcp.load(weights, storage_reader=reader)
    except (dcp.CheckpointException, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
        raise UserError(f"model '{name}': cannot be read in shards ({reason})") from None
    dtype, options = embedding.weight.dtype, StateDictOptions(True, broadcast_from_rank0=True)
    whole = load_lm(name, torch.device("cpu"), dtype).state_dict() if ranks.rank == 0 else {}
    set_model_state_dict(lm, whole, options=options)


def save_model(policy: Policy, tokenizer: Any, folder: Path, ranks: Ranks) -> None:
    """Writes a Hugging Face folder with its tokenizer; all ranks call it.

    config.json comes last, so a folder that has one is complete."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(policy, options=options)
    if ranks.rank == 0:
        folder, dtype = folder.absolute(), compute_dtype(ranks.device)
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        # A tied matrix is stored once. After gathering, its two names no longer share memory.
        tied = dict(policy.named_parameters(remove_duplicate=False)).keys()
        tied -= dict(policy.named_parameters()).keys()
        weights = {k.removeprefix("lm."): w for k, w in weights.items() if k not in tied}
        weights = {k: w.to(dtype) if w.is_floating_point() else w for k, w in weights.items()}
        policy.lm.save_pretrained(temporary, state_dict=weights)
        config = read_json(temporary / "config.json") | {"dtype": str(dtype).removeprefix("torch.")}
        write_json(temporary / "config.json", config)  # not the dtype of the master weights
        tokenizer.save_pretrained(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(temporary.iterdir(), key=lambda f: f.name == "config.json"):
            os.replace(file, folder / file.name)
        temporary.rmdir()
    dist.barrier()


# --------------------------------------------------------------------------------------------------
# Token log-probs: log softmax(h W^T / temperature)[y] and the entropy, without whole logits


def _tiles(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Yields the tiles of the vocabulary. On a CPU the logits of one fit the cache; on a GPU it
    bounds memory, and tensor cores want a width of a multiple of 64."""
    size = max(1, HEAD_TILE_ELEMENTS[hidden.device.type] // max(1, len(hidden)))
    size = size // 64 * 64 or size
    for start in range(0, len(weight), size):
        yield slice(start, min(start + size, len(weight)))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Returns a @ b in float32 (float64 stays). On a GPU the tensor cores multiply bfloat16 as it
    is, because the product of two such numbers is exact in float32, in which they are summed."""
    if a.is_cuda and a.dtype == b.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) @ b.to(wide)


class _HeadLogprobs(torch.autograd.Function):
    """Computes log softmax(z)[y] and the entropy of softmax(z), z = logits / T.

    Forward: log sum exp z, the mean of z under the softmax, and z[y], each put together from tiles.
    Backward: d log softmax(z)[y] / d z = onehot(y) - softmax(z), tile by tile again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float,
        cap: float | None, targets: Tensor, temperature: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        output, tiles = Output(weight, bias, scale, cap), list(_tiles(hidden, weight))
        wide = torch.promote_types(hidden.dtype, torch.float32)
        # Allocated before the tiles: small tensors between them would keep their memory from reuse.
        log_sums, means = hidden.new_empty(2, len(tiles), len(hidden), dtype=wide)  # [tiles, R]
        chosen = hidden.new_zeros(len(hidden), dtype=wide)
        for i, tile in enumerate(tiles):
            z = output.logits(hidden, tile).div_(temperature)  # [R, tile]
            at = (targets - tile.start).clamp(0, z.shape[1] - 1)
            chosen += z.gather(-1, at[:, None])[:, 0] * (at == targets - tile.start)
            top = z.amax(-1, keepdim=True)
            exps = (z - top).exp_()
            total = exps.sum(-1)
            log_sums[i] = total.log() + top[:, 0]
            means[i] = exps.mul_(z).sum(-1) / total
        log_z = log_sums.logsumexp(0)
        entropy = log_z - ((log_sums - log_z).exp() * means).sum(0)
        ctx.save_for_backward(hidden, weight, bias, targets, log_z)
        ctx.numbers = scale, cap, temperature
        ctx.mark_non_differentiable(entropy)
        return chosen - log_z, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_z = ctx.saved_tensors
        scale, cap, temperature = ctx.numbers
        output = Output(weight, bias, scale, cap)
        grad_weight, grad_bias = (x if x is None else torch.empty_like(x) for x in (weight, bias))
        grad_hidden = torch.zeros_like(hidden, dtype=log_z.dtype)
        grad = (grad * (scale / temperature))[:, None]
        for tile in _tiles(hidden, weight):
            z = output.logits(hidden, tile)
            slope = None if cap is None else 1 - (z / cap).square()  # of cap tanh(x / cap)
            at = (targets - tile.start).clamp(0, z.shape[1] - 1)[:, None]
            onehot = grad * (at == targets[:, None] - tile.start)
            softmax = z.div_(temperature).sub_(log_z[:, None]).exp_()
            grad_x = softmax.mul_(-grad).scatter_add_(-1, at, onehot)
            grad_x = grad_x if slope is None else grad_x.mul_(slope)
            if bias is not None:
                grad_bias[tile] = grad_x.sum(0)
            if hidden.is_cuda:  # so that the products below use the tensor cores
                grad_x = grad_x.to(hidden.dtype)
            grad_hidden += _product(grad_x, weight[tile])
            grad_weight[tile] = _product(grad_x.T, hidden)
        return grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None, None, None


def head_logprobs(
    hidden: Tensor, output: Output, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Returns log softmax(logits / temperature)[target] and the entropy.

    hidden [R, D], targets [R] -> two [R], float32 (float64 stays). The logits exist for one tile of
    the vocabulary at a time. The entropy carries no gradient."""
    numbers = output.scale, output.cap, targets, temperature
    return _HeadLogprobs.apply(hidden, output.weight, output.bias, *numbers)


def row_logprobs(policy: Policy, row: Row, temperature: float) -> tuple[Tensor, Tensor]:
    """Returns the log-prob of each response token and the entropy there: two [R], float32."""
    targets = row.tokens[row.response_index]
    return policy(row, lambda hidden, output: head_logprobs(hidden, output, targets, temperature))


@torch.no_grad()
def check_policy(policy: Policy, rollouts: Rollouts, name: str, ranks: Ranks) -> None:
    """Sets policy.way to the first way that gives the log-probs of transformers' own forward of one
    sequence, in the same dtype; prints it, and what was wrong with those before it.

    Compares pieces of the three longest sequences, 32 tokens around the start of the response.
    Raises UserError if no way is right, or if a token is not in the vocabulary."""
    lm, kind, wrong = policy.lm, policy.lm.config.model_type, ""
    size, (low, high) = lm.get_input_embeddings().num_embeddings, rollouts.tokens.aminmax()
    if low < 0 or high >= size:
        raise UserError(f"{rollouts.path}: has tokens {low} to {high}, but '{name}' has {size}")
    longest = rollouts.lengths.argsort(stable=True)[-3:]
    starts = rollouts.cu_seqlens[longest] + (rollouts.prompt_lens[longest] - 8).clamp(min=0)
    n = min(32, int((rollouts.cu_seqlens[longest + 1] - starts).min()))
    pieces = {"cu_seqlens": torch.arange(len(longest) + 1) * n}
    pieces["tokens"] = rollouts.tokens[(starts[:, None] + torch.arange(n)).flatten()]
    pieces = dataclasses.replace(rollouts, prompt_lens=torch.ones_like(longest), **pieces)

    def run(way: str) -> Tensor:
        """Returns the log-probs of the pieces, run in this way."""
        policy.way, attention = way, way.split()[0]
        if lm._can_set_attn_implementation():
            lm.set_attn_implementation(attention)
        elif attention != "eager":
            raise UserError("attention cannot be exchanged")
        rows = [[0, 1, 2][: len(longest)]]
        if way in (*ALONE, OWN):
            rows = [[s] for s in rows[0]]
        elif re.search("longrope|dynamic", str([vars(m).get("rope_type") for m in lm.modules()])):
            raise UserError("rotary frequencies depend on the longest sequence of a row")
        rows = [make_row(pieces, row, ranks.device) for row in rows]
        return torch.cat([row_logprobs(policy, row, 1.0)[0] for row in rows])

    with contextlib.ExitStack() as at_end:
        # Windows of 8 tokens, so that pieces show whether they are honoured.
        for values in [vars(x) for m in lm.modules() for x in (m, getattr(m, "config", m))]:
            for key in [k for k in values if re.search("window(_size)?$|attention_chunk_size$", k)]:
                if type(value := values[key]) is int and value > 8:
                    at_end.callback(values.update, {key: value})
                    values[key] = 8
        if not (expected := run(OWN)).isfinite().all():
            raise UserError(f"model '{name}': {NOT_FINITE}")
        for way in WAYS[ranks.device.type]:
            try:
                gap = (run(way) - expected).abs().mean().item()
                found = f"{gap:.0e} nats off"
            except Exception as error:  # what a model does not support, it says in many ways
                gap, found = math.inf, (str(error).splitlines() or [type(error).__name__])[0][:60]
            if ranks.decide(lambda gap=gap: gap <= NOISE[compute_dtype(ranks.device)]):
                return ranks.print(f"{name} ({kind}) runs {way}, {found}{wrong}")
            wrong += "" if found in wrong else f"; {way}: {found}"
    raise UserError(f"model '{name}': its type {kind} is not computed rightly{wrong}; use another")


@torch.no_grad()
def score(name: str, rollouts: Rollouts, budget: int, ranks: Ranks) -> Tensor:
    """Returns every response token's log-prob under a model: [N] float32 on the CPU, 0 on prompts.

    Uses the forward, dtype and temperature of training, so that ratios start at exactly 1. Kept in
    ROLLOUTS/logprobs/ for every later script and run. budget: tokens of a packed row. Raises
    UserError if a token is out of range or a log-prob is not finite."""
    key = {
        "model": fingerprint(model_folder(name)),
        "rollouts": fingerprint(rollouts.path),
        "temperature": check_sampling(rollouts, force=True),
        "dtype": str(compute_dtype(ranks.device)),
    }
    paths, n_tokens = {}, len(rollouts.tokens)
    for way in WAYS[ranks.device.type]:
        file = hashlib.sha256(json.dumps(key | {"attention": way}).encode()).hexdigest()[:16]
        paths[way] = rollouts.path.parent / "logprobs" / f"{file}.safetensors"
    if path := ranks.decide(lambda: next(filter(Path.is_file, paths.values()), None)):
        return take(load_tensors(path)[0], "logprobs", torch.float32, n_tokens, path)
    policy = load_policy(name, ranks, train=False)
    check_policy(policy, rollouts, name, ranks)
    path, key, budget = paths[policy.way], key | {"attention": policy.way}, policy.budget(budget)
    result = torch.zeros(n_tokens)
    with progress(ranks, len(rollouts.rewards), 0, f"score {Path(name).name}") as bar:
        for members in pack(rollouts.lengths.tolist(), budget, ranks.world_size)[ranks.rank]:
            row = make_row(rollouts, members, ranks.device)
            result[row.flat] = row_logprobs(policy, row, key["temperature"])[0].float().cpu()
            bar.update(len(members) * ranks.world_size)
    del policy
    gc.collect()  # FSDP's modules refer to each other, and a policy to be trained needs the memory
    result = result.to(ranks.device)
    dist.all_reduce(result)
    result = result.cpu()
    if not result.isfinite().all():
        raise UserError(f"model '{name}': {NOT_FINITE}")
    try:
        if ranks.rank == 0:
            save_tensors(path, {"logprobs": result}, key | {"name": name})
    except OSError as error:  # a read-only folder of data is no reason to stop
        ranks.print(f"note: the log-probs of {name} are not kept for other runs ({error})")
    return result


# --------------------------------------------------------------------------------------------------
# Run folders, optimizer, checkpoints, metrics

# These may change when a run is continued: they change memory and speed, but not its result.
FREE_FLAGS = ("output", "micro_batch_tokens", "activation_checkpointing", "cpu_offload",
              "checkpoint_every", "max_noise", "tensorboard")  # fmt: skip


def start_run(
    output: Path, args: Any, inputs: dict[str, Path], ranks: Ranks, last_file: str = "config.json"
) -> bool:
    """Opens a run folder and writes args.json. Returns False if the run is complete.

    inputs: files and model folders whose fingerprints the run depends on. last_file: the file that
    a complete run has. Raises UserError if the folder holds another run or other files."""
    record = {"args": vars(args), "inputs": {k: fingerprint(path) for k, path in inputs.items()}}
    record = json.loads(json.dumps(record, default=str))  # as it is stored: tuples become lists
    path = output / "args.json"
    is_new = ranks.decide(lambda: not any(output.glob("[!.]*")))  # first: shards may start at once
    old = ranks.decide(lambda: read_json(path) if path.is_file() else None)
    if old is None and not is_new:
        raise UserError(f"--output {output}: exists and is not a run folder; choose another")
    if old is not None:
        if not isinstance(old, dict) or not record.keys() <= old.keys():
            raise UserError(f"{path}: not written by these scripts; choose another --output")
        begun, now = (
            {k: v for k, v in entry["args"].items() if k not in FREE_FLAGS}
            | {f"contents of {k}": digest for k, digest in entry["inputs"].items()}
            for entry in (old, record)
        )
        changed = [f"{k}: {begun.get(k)!r} -> {v!r}" for k, v in now.items() if begun.get(k) != v]
        if changed:
            text = f"a run with other settings ({'; '.join(changed)}); repeat its command"
            raise UserError(f"--output {output}: {text}, or choose another folder")
    if ranks.decide((output / last_file).is_file):
        ranks.print(f"{output} is complete; nothing to do")
        return False
    if ranks.rank == 0:
        write_json(path, record | {"torch": torch.__version__, "world_size": ranks.world_size})
    return True


def make_optimizer(policy: Policy, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Makes a fused AdamW with torch's betas (0.9, 0.999)."""
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=weight_decay, fused=True)
    for p in parameters:  # else get_state_dict takes a step to make them, and AdamW counts it
        moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = moments | {"step": torch.zeros((), device=p.device)}
    return optimizer


def optimizer_step(
    policy: Policy, optimizer: Optimizer, learning_rate: float, max_grad_norm: float
) -> float:
    """Clips the global gradient norm, takes the step, clears the gradients; returns the norm before
    clipping. Raises UserError if it is not finite."""
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    if not math.isfinite(norm):
        raise UserError(f"the gradient norm is {norm}; lower --learning-rate, in another --output")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
    return norm


def save_checkpoint(
    output: Path, state: dict[str, Any], policy: Policy, optimizer: Optimizer, ranks: Ranks
) -> None:
    """Writes weights, optimizer and `state` to OUTPUT/checkpoints/resume-STEP; all ranks call it.

    The folder gets its name when it is whole, and only then is the older one deleted. The order of
    the data is not stored: (seed, epoch) decide it, and the step says how far the run is."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    final = output / "checkpoints" / f"resume-{state['step']:07d}"
    temporary = final.with_name(f".{final.name}.tmp")
    if ranks.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    dist.barrier()
    weights, moments = get_state_dict(policy, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=temporary)
    if ranks.rank == 0:
        write_json(temporary / "state.json", state)
        shutil.rmtree(final, ignore_errors=True)  # left by a run that was killed here
        os.replace(temporary, final)
        for old in final.parent.glob("resume-*"):
            if old != final:
                shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(
    output: Path, policy: Policy, optimizer: Optimizer, ranks: Ranks
) -> dict[str, Any]:
    """Loads the newest checkpoint, at any world size. Returns its state, or {} if there is none."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    newest = ranks.decide(lambda: max((output / "checkpoints").glob("resume-*"), default=None))
    if newest is None:
        return {}
    weights, moments = get_state_dict(policy, optimizer)
    contents = {"model": weights, "optimizer": moments}
    try:
        dcp.load(contents, checkpoint_id=newest)
        state = read_json(newest / "state.json")
    except (dcp.CheckpointException, OSError, EOFError) as error:
        raise UserError(f"{newest}: damaged ({type(error).__name__}); delete it") from None
    weights, moments = contents["model"], contents["optimizer"]
    set_state_dict(policy, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return state


class MetricsLog:
    """Writes metrics.jsonl, one line per step, and with `tensorboard` the same numbers as events.

    A resumed run drops the lines of the steps that it takes again."""

    def __init__(self, output: Path, step: int, ranks: Ranks, tensorboard: bool = False) -> None:
        self.path, self.ranks, self.events = output / "metrics.jsonl", ranks, None
        if ranks.rank != 0:
            return
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        # A killed run may have left half of its last line.
        kept = [x for x in lines if x.endswith("}") and json.loads(x)["step"] <= step]
        with atomic(self.path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)

    def write(self, values: dict[str, float]) -> None:
        """Appends one line on rank 0. A number that is not finite becomes null."""
        if self.ranks.rank != 0:
            return
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps(finite) + "\n")
        for name, value in finite.items() if self.events else ():
            if value is not None and name != "step":
                self.events.add_scalar(name, value, values["step"])
                self.events.flush()  # else a killed run loses its last points


def sum_and_count(values: Tensor, where: Tensor | None = None) -> Tensor:
    """Returns [sum, count] of the values, or of those for which `where` (bool) is true."""
    where = torch.ones_like(values) if where is None else where
    return torch.stack([(values * where).sum(), where.sum()])


def means(metrics: list[dict[str, Tensor]]) -> dict[str, float]:
    """Returns the means over the global batch, by one reduction. metrics: {name: [sum, count]} of
    each micro-batch of this rank. A mean of nothing is nan."""
    table = torch.stack([torch.stack([*part.values()]) for part in metrics]).sum(0)  # [metrics, 2]
    dist.all_reduce(table)
    pairs = zip(metrics[0], table.tolist(), strict=True)
    return {name: total / count if count else math.nan for name, (total, count) in pairs}
