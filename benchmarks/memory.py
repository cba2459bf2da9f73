"""Derives memory and time of a training step by arithmetic, before a GPU is rented. Not measured.

Every term names what the code holds in a step of either stage. P parameters, D hidden size, V size
of the vocabulary, T tokens of a row, R of them response tokens, W ranks; c bytes of a number in the
compute type (bfloat16: 2).

    weights      4 P/W   float32 masters (load_policy)
    moments      8 P/W   the two of AdamW, float32
    gradients    4 P/W   float32
    gathered     c (V D + 2 P_block): the copies that FSDP makes in the compute type, of the root
                 all the time, of the block at work and of the next one
    reducing     (c + 4) P_block + 4 P_block: a block's fresh gradient, its float32 copy on the way
                 to the other ranks, and that of the block before
    activations  what autograd saves (saved_by_block is exact: a test counts the same tensors); with
                 checkpointing c D T for each block, and one block whole
    transient    in the head two tiles of logits forward; one backward (on a GPU also in the compute
                 type), with the gradient of its matrix, c V D, and of the hidden states, 4 R D.
                 In the backward of a block the gradients of two MLP activations and the residual

The peak is the largest of four moments: in the head (all activations), in the backward of the first
block that it reaches and of the last, in the optimizer's step. It leaves out the CUDA context, the
buffers of NCCL, and fragmentation. With --cpu-offload the first three terms lie on the host, 16 P
bytes for all ranks of a node, and `gathered` holds one more float32 copy, 4 P_root/W, of the root's
shard on its way. The same functions without FSDP predict the memory of stage1_extreme.py on a CPU,
which benchmarks/memory_cpu.py measures. The terms `gathered` and `reducing`, and --cpu-offload,
have not been measured yet (benchmarks/gpu.py does it).

    python benchmarks/memory.py                          # Qwen3-4B on 1, 8 and 64 GPUs
    python benchmarks/memory.py --fits                   # what fits on one GPU of 24, 48 or 80 GB
    python benchmarks/memory.py --model CONFIG_FOLDER --micro-batch-tokens 16384
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import HEAD_TILE_ELEMENTS  # noqa: E402

GPU_MEMORY = 80e9  # bytes of an 80 GB GPU
COLUMNS = ["weights", "moments", "gradients", "gathered", "reducing", "activations", "transient"]
# From the config.json of Qwen/Qwen3-0.6B and so on: hidden size, blocks, heads, MLP, tied matrices.
QWEN3 = {
    "0.6B": (1024, 28, 16, 3072, True),
    "1.7B": (2048, 28, 16, 6144, True),
    "4B": (2560, 36, 32, 9728, True),  # Qwen3-4B-Thinking-2507 too
    "8B": (4096, 36, 32, 12288, False),
    "14B": (5120, 40, 40, 17408, False),
    "32B": (5120, 64, 64, 25600, False),
}


def qwen3(size: str) -> dict[str, Any]:
    """Returns what the config.json of a Qwen3 says about its shape."""
    hidden, layers, heads, mlp, tied = QWEN3[size]
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": mlp,
        "vocab_size": 151936,
        "tie_word_embeddings": tied,
        "model_type": "qwen3",
    }


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
    head_norms: bool  # Qwen3 normalizes queries and keys

    @property
    def block_matrices(self) -> int:
        """Counts the parameters of a block that multiply every token."""
        q, k = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return 2 * self.hidden * (q + k) + 3 * self.hidden * self.mlp

    @property
    def block_parameters(self) -> int:
        """Counts the parameters of one block."""
        norms = 2 * self.hidden + (2 * self.head_dim if self.head_norms else 0)
        return self.block_matrices + norms

    @property
    def root_parameters(self) -> int:
        """Counts embedding, final norm, and the output matrix where it is one of its own."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """Counts all parameters, P."""
        return self.layers * self.block_parameters + self.root_parameters


def read_shape(config: dict[str, Any]) -> Shape:
    """Reads the shape from the contents of a config.json of transformers."""
    config = config.get("text_config", config)  # of a wrapper with a vision tower
    heads = config["num_attention_heads"]
    return Shape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        mlp=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings")),
        head_norms=config["model_type"] == "qwen3",
    )


@dataclass(frozen=True)
class Setting:
    """How a step is computed."""

    tokens: int  # T of the longest row: --micro-batch-tokens, or a longer sequence
    response_tokens: int  # R of that row: only they meet the head
    checkpointing: bool
    ranks: int = 1
    gpu: bool = True  # bfloat16 under FSDP; else float32 in one process on the CPU
    offload: bool = False  # --cpu-offload

    @property
    def compute_bytes(self) -> int:
        """Returns the bytes of a number in the compute type."""
        return 2 if self.gpu else 4


# --------------------------------------------------------------------------------------------------
# Memory, in bytes


def saved_by_norm(width: int, groups: int, c: int) -> int:
    """Returns what a RMSNorm of transformers saves per token: float32 input (in bfloat16 it is a
    copy), 1/rms of each group, normalized value."""
    return 4 * width + 4 * groups + c * width


def saved_by_block(shape: Shape, setting: Setting) -> int:
    """Returns what autograd saves of one block, in bytes per token."""
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
    """Returns bytes that a row saves in all blocks, in the block that runs again, in the last block
    that the backward reaches, and around the blocks."""
    d, c, t = shape.hidden, setting.compute_bytes, setting.tokens
    block = saved_by_block(shape, setting) * t
    kept = shape.layers * (c * d * t if setting.checkpointing else block)
    around = (2 * c * shape.head_dim + saved_by_norm(d, 1, c) + 8) * t  # cos, sin; final norm; ids
    around += (c * d + 4 + 2 * 8) * setting.response_tokens  # hidden states, log Z, indices
    again = block if setting.checkpointing else 0
    return {"kept": kept, "block": again, "last": again or block, "around": around}


def memory(shape: Shape, setting: Setting) -> dict[str, int]:
    """Returns bytes at the worst of four moments, by part; "peak" is their sum."""
    c, t, w = setting.compute_bytes, setting.tokens, setting.ranks
    p, table = shape.parameters, shape.vocabulary * shape.hidden
    kept = activations(shape, setting)
    limit = HEAD_TILE_ELEMENTS["cuda" if setting.gpu else "cpu"]
    tile = 4 * min(limit, setting.response_tokens * shape.vocabulary)
    always = {} if setting.offload else {"weights": 4 * p // w, "moments": 8 * p // w}
    sharded = 0 if setting.offload else 4 * p // w
    gathered = reducing = 0
    if setting.gpu:
        gathered = c * (shape.root_parameters + 2 * shape.block_parameters)
        gathered += 4 * shape.root_parameters // w if setting.offload else 0
        reducing = (c + 8) * shape.block_parameters
    # In the first micro-batch no gradient is there yet; every later one finds them.
    gradients = sharded if setting.gpu else 0
    head = tile + c * table + 4 * setting.response_tokens * shape.hidden
    head += tile // 2 if setting.gpu else 0
    backward = (2 * shape.mlp + shape.hidden) * c * t  # of the MLP's two factors, of the residual
    head_gradient = c * table if setting.gpu else 4 * table
    of_blocks = 4 * shape.layers * shape.block_parameters
    in_head = {
        "gradients": gradients,
        "gathered": gathered,
        "activations": kept["kept"] + kept["around"],
        "transient": max(head, 2 * tile),
    }
    first_block = {
        "gradients": gradients + head_gradient,
        "gathered": gathered,
        "reducing": reducing,
        "activations": kept["kept"] + kept["block"],
        "transient": backward,
    }
    last_block = {
        "gradients": (gradients if setting.gpu else of_blocks) + head_gradient,
        "gathered": gathered,
        "reducing": reducing,
        "activations": kept["last"],
        "transient": max(backward, head_gradient) + (4 * table if setting.gpu else 0),
    }
    moments = [in_head, first_block, last_block, {"gradients": sharded}]
    worst = always | max(moments, key=lambda parts: sum(parts.values()))
    return worst | {"peak": sum(worst.values())}


# --------------------------------------------------------------------------------------------------
# Time


def step_flops(
    shape: Shape, lengths: list[int], response_tokens: int, checkpointing: bool
) -> float:
    """Returns the FLOPs of forward and backward over sequences of these lengths.

    Matrices: 6 per parameter and token (2 forward, 4 backward); with checkpointing 2 more, but not
    for the MLP's last, whose output nothing saves. Head: 8 per response token, for its backward
    makes the logits again. Causal attention: 2 Q n^2 forward for n tokens, a block and queries of
    width Q, 2.5 times that backward (FlashAttention makes the scores again), with checkpointing one
    forward more."""
    blocks, again = shape.layers * shape.block_matrices, int(checkpointing)
    repeated = again * (blocks - shape.layers * shape.hidden * shape.mlp)
    matrices = (6 * blocks + 2 * repeated) * sum(lengths)
    head = 8 * shape.vocabulary * shape.hidden * response_tokens
    width = shape.heads * shape.head_dim
    attention = (3.5 + again) * 2 * width * shape.layers * sum(n * n for n in lengths)
    return float(matrices + head + attention)


def step_traffic(shape: Shape, micro_batches: int) -> float:
    """Returns the bytes that a rank receives in a step, sharded over many: in every micro-batch the
    weights in bfloat16 for forward and for backward, and the gradients in float32. Checkpointing
    gathers no more often, because a block runs again while it is gathered."""
    return float((2 * 2 + 4) * shape.parameters * micro_batches)


# --------------------------------------------------------------------------------------------------


@dataclass
class Args:
    model: Path | None = None
    """folder with a config.json; default: Qwen3-4B"""
    micro_batch_tokens: tuple[int, ...] = (16384, 32768)
    """token budgets of a row"""
    gpus: tuple[int, ...] = (1, 8, 64)
    """numbers of GPUs"""
    length: int = 12288
    """tokens of a response (assumed): decides the time of attention"""
    batch_size: int = 256
    """responses of a step"""
    peak_tflops: float = 989.0
    """speed of a GPU: H100 SXM in bfloat16, by its data sheet"""
    utilization: float = 0.3
    """share of it that is reached (assumed; published full-parameter runs reach 0.27 to 0.39)"""
    fits: bool = False
    """print instead the longest row that fits on one GPU of 24, 48 and 80 GB, for each Qwen3"""


def main(args: Args) -> None:
    if args.fits:
        return print_fits()
    config, name = qwen3("4B"), "Qwen3-4B"
    if args.model is not None:
        config, name = json.loads((args.model / "config.json").read_text()), args.model.name
    shape = read_shape(config)
    kilobytes = saved_by_block(shape, Setting(1, 1, False)) / 1e3
    print(
        f"{name}: {shape.parameters / 1e9:.2f} G parameters, {kilobytes:.0f} kB saved per token "
        "and block in bfloat16. Derived, not measured.\n"
    )
    head = ["GPUs", "micro-batch tokens", "checkpointing", *COLUMNS, "peak, GB", "80 GB"]
    head += ["step, s", "traffic, GB"]
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for gpus in args.gpus:
        for tokens in args.micro_batch_tokens:
            for checkpointing in (False, True):
                print_row(shape, args, gpus, tokens, checkpointing)
    print(
        f"\nA step is {args.batch_size} responses of {args.length} tokens at "
        f"{args.utilization:.0%} (assumed) of {args.peak_tflops:g} TFLOP/s. A response that is "
        "longer than the budget has a row of its own. GB = 1e9 bytes. CUDA's context, the buffers "
        "of NCCL and fragmentation come on top: 'fits' leaves 5 GB for them."
    )


def print_row(shape: Shape, args: Args, gpus: int, tokens: int, checkpointing: bool) -> None:
    """Prints one line of the table."""
    row = max(tokens, args.length)  # a longer response has a row of its own
    parts = memory(shape, Setting(row, row, checkpointing, gpus))
    lengths = [args.length] * args.batch_size
    flops = step_flops(shape, lengths, sum(lengths), checkpointing)
    seconds = flops / (gpus * args.peak_tflops * 1e12 * args.utilization)
    micro_batches = -(-args.batch_size // (max(1, tokens // args.length) * gpus))
    traffic = step_traffic(shape, micro_batches) if gpus > 1 else 0.0
    cells = [str(gpus), str(tokens), "yes" if checkpointing else "no"]
    cells += [f"{parts.get(name, 0) / 1e9:.1f}" for name in [*COLUMNS, "peak"]]
    cells += ["fits" if parts["peak"] < GPU_MEMORY - 5e9 else "no"]
    cells += [f"{seconds:.0f}", f"{traffic / 1e9:.0f}"]
    print("| " + " | ".join(cells) + " |")


def longest_row(shape: Shape, card: float, offload: bool) -> int:
    """Returns the most tokens of a row, in steps of 1,024, that fit on one GPU of `card` bytes, in
    training and in scoring, which holds the model in bfloat16 whatever the flag."""
    longest = 0
    for n in range(1024, 2**18 + 1, 1024):
        training = memory(shape, Setting(n, n, checkpointing=True, offload=offload))["peak"]
        scoring = 2 * shape.parameters + 2 * (2 * shape.mlp + 4 * shape.hidden) * n
        if max(training, scoring) <= card * (1 - 1 / 16):
            longest = n
    return longest


def print_fits() -> None:
    """Prints what fits on one GPU, with the weights there or on the host."""
    cards = (24, 48, 80)
    head = ["model", "G parameters", "--cpu-offload", "host, GB", *(f"{c} GB" for c in cards)]
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for size in QWEN3:
        shape = read_shape(qwen3(size))
        for offload in (False, True):
            cells = [f"Qwen3-{size}", f"{shape.parameters / 1e9:.2f}", "yes" if offload else "no"]
            cells += [f"{16e-9 * shape.parameters:.0f}" if offload else "0"]
            rows = [longest_row(shape, card * 1e9, offload) for card in cards]
            print("| " + " | ".join(cells + [f"{n:,}" if n else "no" for n in rows]) + " |")
    print(
        "\nThe longest row in tokens (at most 262,144), all of them response tokens, with "
        "--activation-checkpointing, also in scoring, where the GPU holds the model in bfloat16; a "
        "sixteenth of the card is left for CUDA and fragmentation. Predicted, not yet run."
    )


if __name__ == "__main__":
    import tyro  # gpu.py imports this file where tyro may lack

    main(tyro.cli(Args, description=__doc__))
