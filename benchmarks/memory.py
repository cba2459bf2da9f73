"""Memory and time of a training step by arithmetic, before a GPU is rented. Derived, not measured.

Every term names what the code holds (stage 1, or stage 2 without --teacher). P parameters, L
blocks, D hidden size, V vocabulary, I width of the MLP, Q and K widths of all query and all key
heads, T tokens of a row, W ranks that share a copy; c bytes of the compute type (bfloat16: 2).

    weights      4 P/W   float32 masters (load_policy)
    moments      8 P/W   AdamW's two, float32
    gradients    4 P/W   float32; with deferred sync 4 P while micro-batches are added up
    gathered     c (V D + 2 P_block): FSDP's copies in the compute type: the root all the time, the
                 block at work and the next one
    reducing     (c + 4) P_block + 4 P_block: a block's fresh gradient, its float32 copy on the way
                 to the other ranks, and that of the block before
    activations  what autograd saves (saved_by_block: exact, tests count the same tensors); with
                 checkpointing c D T for each block, and one block whole
    transient    in the head: forward two tiles of logits; backward one (on a GPU its copy in the
                 compute type too), its weight's gradient, c V D, and that of the hidden states,
                 4 R D. In a block's backward: gradients of two MLP activations and of the residual

Peak is the largest of four moments: in the head (all activations), the backward of the first block
that it reaches and of the last, the optimiser's step. Not in it: the CUDA context, NCCL's buffers,
fragmentation. The same functions without FSDP predict the CPU memory of stage1_extreme.py, which
is measured: benchmarks/memory_cpu.py. The terms gathered and reducing have not been.

    python benchmarks/memory.py                          # Qwen3-4B; 1, 8, 64 GPUs
    python benchmarks/memory.py --model CONFIG_FOLDER --micro-batch-tokens 16384
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

HEAD_CHUNK_ELEMENTS = 2**27  # common.py, on a GPU
CPU_TILE_ELEMENTS = 2**21  # common.py, on a CPU
GPU_MEMORY = 80e9  # bytes of an 80 GB GPU
# Of config.json of Qwen/Qwen3-4B and Qwen3-4B-Thinking-2507.
QWEN3_4B = {
    "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 9728, "vocab_size": 151936,
    "tie_word_embeddings": True, "model_type": "qwen3",
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A decoder of the Qwen3 or Llama kind: SwiGLU, RMSNorm, grouped queries, no biases."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    tied: bool
    head_norms: bool  # Qwen3 normalises queries and keys

    @property
    def block_matrices(self) -> int:
        """Parameters of a block that multiply every token."""
        q, k = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return 2 * self.hidden * (q + k) + 3 * self.hidden * self.mlp

    @property
    def block_parameters(self) -> int:
        """Of one block."""
        norms = 2 * self.hidden + (2 * self.head_dim if self.head_norms else 0)
        return self.block_matrices + norms

    @property
    def root_parameters(self) -> int:
        """Embedding, final norm, output matrix where it is its own."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """P."""
        return self.layers * self.block_parameters + self.root_parameters


def read_shape(config: dict[str, Any]) -> Shape:
    """Shape of a transformers config.json."""
    heads = config["num_attention_heads"]
    return Shape(
        layers=config["num_hidden_layers"], hidden=config["hidden_size"], heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        mlp=config["intermediate_size"], vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings")), head_norms=config["model_type"] == "qwen3",
    )  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """How a step is computed."""

    tokens: int
    """T, of the longest row: --micro-batch-tokens, or the longest sequence where that is more"""
    response_tokens: int
    """R, of that row: only they meet the head"""
    checkpointing: bool
    deferred: bool
    shards: int = 1
    """W, ranks that share one copy of the model"""
    gpu: bool = True
    """bfloat16 under FSDP with attention in one kernel; False: float32, one process on the CPU"""

    @property
    def compute_bytes(self) -> int:
        return 2 if self.gpu else 4


# --------------------------------------------------------------------------------------------------
# Memory, in bytes


def saved_by_norm(width: int, groups: int, c: int) -> int:
    """RMSNorm of transformers, a token: float32 input (in bfloat16 a copy), 1/rms of each group,
    normalised value."""
    return 4 * width + 4 * groups + c * width


def saved_by_block(shape: Shape, setting: Setting) -> int:
    """What autograd keeps of one block, bytes a token."""
    d, c = shape.hidden, setting.compute_bytes
    q, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 2 * (saved_by_norm(d, 1, c) + c * d)  # and the outputs: what the projections read
    if shape.head_norms:
        norms += saved_by_norm(q, shape.heads, c) + saved_by_norm(k, shape.kv_heads, c)
    # Rotated queries and keys, values, the output, log-sum-exp in float32.
    attention = c * (q + k + k + q) + 4 * shape.heads
    if not setting.gpu:  # the loop over sequences joins their outputs: o_proj reads a copy
        attention += c * q
    return norms + attention + 4 * c * shape.mlp  # gate, silu(gate), up, their product


def activations(shape: Shape, setting: Setting) -> dict[str, int]:
    """Bytes of a row: kept by all blocks; of the block that runs again; of the last one that the
    backward reaches; around the blocks."""
    d, c, t = shape.hidden, setting.compute_bytes, setting.tokens
    block = saved_by_block(shape, setting) * t
    kept = shape.layers * (c * d * t if setting.checkpointing else block)
    around = (2 * c * shape.head_dim + saved_by_norm(d, 1, c) + 8) * t  # cos, sin; final norm; ids
    around += (c * d + 4 + 3 * 8) * setting.response_tokens  # hidden states, log Z, indices
    again = block if setting.checkpointing else 0
    last = again or block
    return {"kept": kept, "block": again, "last": last, "around": around}


def memory(shape: Shape, setting: Setting) -> dict[str, int]:
    """Bytes at the worst of four moments, by part; "peak" is their sum, "moment" its number."""
    c, t, w = setting.compute_bytes, setting.tokens, setting.shards
    p, table = shape.parameters, shape.vocabulary * shape.hidden
    kept = activations(shape, setting)
    limit = HEAD_CHUNK_ELEMENTS if setting.gpu else CPU_TILE_ELEMENTS
    tile = 4 * min(limit, setting.response_tokens * shape.vocabulary)
    always = {"weights": 4 * p // w, "moments": 8 * p // w}
    sharded = 4 * p // w
    gathered = reducing = whole = 0
    if setting.gpu:
        gathered = c * (shape.root_parameters + 2 * shape.block_parameters)
        reducing = (c + 4) * shape.block_parameters + 4 * shape.block_parameters
        whole = 4 * p if setting.deferred else 0
    # In the first micro-batch no gradient is there yet; every later one finds them.
    gradients = max(sharded, whole) if setting.gpu else 0
    head = tile + c * table + 4 * setting.response_tokens * shape.hidden
    head += tile // 2 if setting.gpu else 0
    backward = (2 * shape.mlp + shape.hidden) * c * t  # of the MLP's two factors, of the residual
    head_gradient = c * table if setting.gpu else 4 * table
    of_blocks = 4 * shape.layers * shape.block_parameters
    moments = [
        always | {"gradients": gradients, "gathered": gathered, "activations": kept["kept"]
                  + kept["around"], "transient": max(head, 2 * tile)},
        always | {"gradients": gradients + head_gradient, "gathered": gathered,
                  "reducing": reducing, "activations": kept["kept"] + kept["block"],
                  "transient": backward},
        always | {"gradients": (gradients or of_blocks) + head_gradient, "gathered": gathered,
                  "reducing": reducing, "activations": kept["last"],
                  "transient": max(backward, head_gradient) + (4 * table if setting.gpu else 0)},
        always | {"gradients": sharded},
    ]  # fmt: skip
    worst = max(moments, key=lambda parts: sum(parts.values()))
    return worst | {"peak": sum(worst.values())}


# --------------------------------------------------------------------------------------------------
# Time


def step_flops(
    shape: Shape, lengths: list[int], response_tokens: int, checkpointing: bool
) -> float:
    """FLOPs of forward and backward over sequences of these lengths.

    Matrices: 6 a parameter and token (2 forward, 4 backward); with checkpointing 2 more, but for
    the MLP's last, whose output nothing saves. The head: 8 a response token, for its backward makes
    the logits again. Causal attention: 2 Q n^2 forward for n tokens and a block (half of 4 Q n^2),
    2.5 times that backward (FlashAttention makes the scores again), with checkpointing one forward
    more."""
    blocks = shape.layers * shape.block_matrices
    again = 1 if checkpointing else 0
    repeated = again * (blocks - shape.layers * shape.hidden * shape.mlp)
    matrices = (6 * blocks + 2 * repeated) * sum(lengths)
    head = 8 * shape.vocabulary * shape.hidden * response_tokens
    width = shape.heads * shape.head_dim
    attention = (3.5 + again) * 2 * width * shape.layers * sum(n * n for n in lengths)
    return float(matrices + head + attention)


def step_traffic(shape: Shape, micro_batches: int, checkpointing: bool, deferred: bool) -> float:
    """Bytes a rank receives in a step, sharded over many: weights in bfloat16 for forward and for
    backward of every micro-batch (checkpointing gathers no more often: a block runs again while it
    is gathered), gradients in float32 after every one, or once."""
    p = shape.parameters
    return float(2 * 2 * p * micro_batches + 4 * p * (1 if deferred else micro_batches))


# --------------------------------------------------------------------------------------------------


@dataclass
class Args:
    model: Path | None = None
    """folder with a config.json; default: Qwen3-4B"""
    micro_batch_tokens: tuple[int, ...] = (16384, 32768)
    """token budgets of a row"""
    gpus: tuple[int, ...] = (1, 8, 64)
    """numbers of GPUs"""
    shard_size: int | None = None
    """ranks that share one copy of the model (--shard-size of the stages); default: all"""
    length: int = 12288
    """tokens of a response (assumed): enters attention's time"""
    batch_size: int = 256
    """responses of a step"""
    peak_tflops: float = 989.0
    """of a GPU: H100 SXM in bfloat16, by its data sheet"""
    utilisation: float = 0.3
    """share of it that is reached (assumed; published full-parameter runs reach 0.27 to 0.39)"""


def main(args: Args) -> None:
    name = "Qwen3-4B" if args.model is None else args.model.name
    config = (
        QWEN3_4B if args.model is None else json.loads((args.model / "config.json").read_text())
    )
    shape = read_shape(config)
    kilobytes = saved_by_block(shape, Setting(1, 1, False, False)) / 1e3
    print(f"{name}: {shape.parameters / 1e9:.2f} G parameters, {kilobytes:.0f} kB saved a token "
          "and block in bfloat16. Derived, not measured.\n")  # fmt: skip
    columns = ["weights", "moments", "gradients", "gathered", "reducing", "activations",
               "transient"]  # fmt: skip
    head = ["GPUs", "micro-batch tokens", "checkpointing", "deferred sync", *columns, "peak, GB",
            "80 GB", "step, s", "traffic, GB"]  # fmt: skip
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for gpus in args.gpus:
        for tokens in args.micro_batch_tokens:
            for checkpointing, deferred in [(False, False), (True, False), (True, True)]:
                if deferred and gpus == 1:
                    continue  # nothing to synchronise
                print_row(shape, args, gpus, tokens, checkpointing, deferred, columns)
    print(f"\nA step is {args.batch_size} responses of {args.length} tokens at "
          f"{args.utilisation:.0%} (assumed) of {args.peak_tflops:g} TFLOP/s. Rows: a response "
          "longer than the budget has its own. GB = 1e9 bytes; without CUDA's context, NCCL's "
          "buffers and fragmentation: fits leaves 5 GB for them.")  # fmt: skip


def print_row(
    shape: Shape, args: Args, gpus: int, tokens: int, checkpointing: bool, deferred: bool,
    columns: list[str],
) -> None:  # fmt: skip
    """One line of the table."""
    row = max(tokens, args.length)  # a longer response has a row of its own
    shards = min(gpus, args.shard_size or gpus)
    parts = memory(shape, Setting(row, row, checkpointing, deferred, shards))
    lengths = [args.length] * args.batch_size
    flops = step_flops(shape, lengths, sum(lengths), checkpointing)
    seconds = flops / (gpus * args.peak_tflops * 1e12 * args.utilisation)
    micro_batches = -(-args.batch_size // (max(1, tokens // args.length) * gpus))
    traffic = step_traffic(shape, micro_batches, checkpointing, deferred) if gpus > 1 else 0.0
    cells = [str(gpus), str(tokens), *("yes" if x else "no" for x in (checkpointing, deferred)),
             *(f"{parts.get(name, 0) / 1e9:.1f}" for name in columns), f"{parts['peak'] / 1e9:.1f}",
             "fits" if parts["peak"] < GPU_MEMORY - 5e9 else "no", f"{seconds:.0f}",
             f"{traffic / 1e9:.0f}"]  # fmt: skip
    print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
