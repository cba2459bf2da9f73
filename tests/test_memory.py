"""benchmarks/memory.py: its terms against tensors that autograd keeps, FLOPs that torch counts, and
the memory that a real run takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import memory
import memory_cpu
import pytest
import torch

import common

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [
    {},
    {"num_key_value_heads": 8, "intermediate_size": 96},
    {"tie_word_embeddings": False, "model_type": "llama"},
]
LENGTHS, PROMPT = [40, 24, 64], 4


def make(config: dict[str, Any], dtype: torch.dtype) -> tuple[memory.Shape, common.Policy, Any]:
    """Shape, a random policy of it, and one packed row."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common.register_attention()
    config = memory_cpu.config(2, 96, 160, 120) | config
    settings = AutoConfig.for_model(
        **config, max_position_embeddings=64, attn_implementation="packed_loop"
    )
    policy = common.Policy(AutoModelForCausalLM.from_config(settings, dtype=dtype))
    n, zeros = sum(LENGTHS), torch.zeros(len(LENGTHS))
    rollouts = common.Rollouts(
        Path("random"), {}, torch.randint(0, 120, (n,), dtype=torch.int32),
        torch.tensor([0, *LENGTHS]).cumsum(0), (zeros + PROMPT).int(), zeros, zeros.int(),
        zeros.bool(),
    )  # fmt: skip
    row = common.make_row(rollouts, list(range(len(LENGTHS))), torch.device("cpu"))
    return memory.read_shape(config), policy, row


@pytest.mark.parametrize("config", SHAPES)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_tensors(config: dict[str, Any], checkpointing: bool, dtype: torch.dtype) -> None:
    shape, policy, row = make(config, dtype)
    common._checkpoint_blocks(policy, checkpointing)
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = common.row_logprobs(policy, row, 1.0)
    n = sum(LENGTHS)
    found = sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in weights)
    gpu = dtype == torch.bfloat16
    setting = memory.Setting(n, n - PROMPT * len(LENGTHS), checkpointing, False, gpu=gpu)
    parts = memory.activations(shape, setting)
    expected = parts["kept"] + parts["around"]
    if gpu and not checkpointing:  # the loop's copy, which one kernel for all sequences has not
        expected += shape.layers * 2 * shape.heads * shape.head_dim * n
    if checkpointing:  # cos and sin are held by the blocks' closures, where no hook sees them
        expected -= 2 * setting.compute_bytes * shape.head_dim * n
    del outputs
    assert found == pytest.approx(expected, rel=0.002)


@pytest.mark.parametrize("config", SHAPES)
def test_parameters(config: dict[str, Any]) -> None:
    shape, policy, _ = make(config, torch.float32)
    assert shape.parameters == sum(p.numel() for p in policy.parameters())
    assert shape.block_parameters == sum(p.numel() for p in policy.blocks[0].parameters())


def test_the_preset_is_4_billion() -> None:
    shape = memory.read_shape(memory.QWEN3_4B)
    assert shape.parameters == 4_022_468_096


@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointing"])
def test_flops(checkpointing: bool) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    shape, policy, row = make({}, torch.float32)
    common._checkpoint_blocks(policy, checkpointing)
    with FlopCounterMode(display=False) as counter:
        common.row_logprobs(policy, row, 1.0)[0].sum().backward()
    counts = {str(k): v for k, v in counter.get_flop_counts()["Global"].items()}
    found = sum(counts[name] for name in counts if name in ("aten.mm", "aten.addmm"))
    responses = sum(LENGTHS) - PROMPT * len(LENGTHS)
    squares = sum(n * n for n in LENGTHS)
    width = shape.heads * shape.head_dim
    attention = (3.5 + checkpointing) * 2 * width * shape.layers * squares
    expected = memory.step_flops(shape, LENGTHS, responses, checkpointing) - attention
    assert found == expected


def test_attention_flops_are_half_of_the_square() -> None:
    shape = memory.read_shape(memory.QWEN3_4B)
    one, two = (memory.step_flops(shape, [n], 0, False) for n in (1000, 2000))
    assert two - 2 * one == 3.5 * 2 * 4096 * 36 * (2000**2 - 2 * 1000**2)


def test_memory_of_a_real_run() -> None:
    """Six shapes, with and without checkpointing, long and short rows: within 15 %."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc")
    script = str(ROOT / "benchmarks" / "memory_cpu.py")
    printed = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=1200
    )  # fmt: skip
    assert printed.returncode == 0, printed.stderr
    rows = [json.loads(line) for line in printed.stdout.splitlines()]
    assert [row["case"] for row in rows] == [case.name for case in memory_cpu.CASES]
    for row in rows:
        assert row["measured"] > 1e8 and abs(row["error"]) < 0.15, row
    # Checkpointing is worth having, and the formula knows it.
    whole, again = (memory_cpu.predict(case)["activations"] for case in memory_cpu.CASES[:2])
    assert again < 0.5 * whole


def test_more_gpus_and_checkpointing_need_less() -> None:
    shape = memory.read_shape(memory.QWEN3_4B)

    def peak(shards: int, checkpointing: bool, deferred: bool) -> int:
        setting = memory.Setting(16384, 16384, checkpointing, deferred, shards)
        parts = memory.memory(shape, setting)
        assert parts["peak"] == sum(v for k, v in parts.items() if k != "peak")
        return parts["peak"]

    assert peak(64, True, False) < peak(8, True, False) < peak(1, True, False)
    assert peak(8, True, False) < peak(8, False, False)
    # Deferred sync holds all gradients in float32, sharded ones in their place.
    extra = peak(8, True, True) - peak(8, True, False)
    assert extra == pytest.approx(4 * shape.parameters * 7 / 8, rel=0.01)
