"""Compares benchmarks/memory.py with what stage1_extreme.py takes on the CPU, in float32.

Each case is a random Qwen3 or Llama with random rollouts. Two steps of stage 1 run in this process
(the moments of AdamW exist in the second), and the peak of the resident memory is taken above what
was resident before. A small run comes first, so that everything is imported. Every tensor is mapped
by itself, so that freed memory leaves the process. Linux only (/proc, glibc).

    python benchmarks/memory_cpu.py
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "examples" / "arithmetic")]

import make_base  # noqa: E402
import memory  # noqa: E402

import common  # noqa: E402
import evaluate  # noqa: E402
import stage1_extreme  # noqa: E402


@dataclass(frozen=True)
class Case:
    """A model, and one row of `sequences` responses of `length` tokens, prompt of 8 included."""

    name: str
    sequences: int
    length: int
    checkpointing: bool
    config: dict[str, Any]


def config(layers: int, hidden: int, mlp: int, vocabulary: int, **changes: Any) -> dict[str, Any]:
    """Makes a transformers config of the kind that the formula covers, with heads of 32."""
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": mlp}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
    kind = {"vocab_size": vocabulary, "tie_word_embeddings": True, "model_type": "qwen3"}
    return sizes | heads | kind | changes


DEEP = config(layers=6, hidden=192, mlp=512, vocabulary=1024)
WIDE = config(layers=2, hidden=512, mlp=1536, vocabulary=16000)
LLAMA = WIDE | {"tie_word_embeddings": False, "model_type": "llama", "vocab_size": 8000}
PROMPT = 8
WARM_UP = Case("warm-up", 2, 32, True, config(1, 64, 64, 64))
CASES = [
    Case("long rows", 1, 2048, False, DEEP),
    Case("long rows, checkpointing", 2, 1536, True, DEEP),
    Case("short rows", 32, 64, False, DEEP),
    Case("short rows, checkpointing", 48, 64, True, DEEP),
    Case("large vocabulary", 2, 256, False, WIDE),
    Case("untied Llama, checkpointing", 4, 256, True, LLAMA),
]


def make_inputs(case: Case, folder: Path) -> None:
    """Writes a random model with a tokenizer, and random rollouts; every second is right."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = AutoConfig.for_model(**case.config, max_position_embeddings=case.length)
    AutoModelForCausalLM.from_config(settings).save_pretrained(folder / "base")
    make_base.make_tokenizer().save_pretrained(folder / "base")
    n, length = case.sequences * 2, case.length  # two steps of one row each
    rollouts = common.Rollouts(
        path=folder / "rollouts" / "rollouts.safetensors",
        metadata={},
        tokens=torch.randint(0, case.config["vocab_size"], (n * length,), dtype=torch.int32),
        cu_seqlens=torch.arange(n + 1) * length,
        prompt_lens=torch.full((n,), PROMPT, dtype=torch.int32),
        rewards=(torch.arange(n) % 2).float(),
        problem_index=torch.zeros(n, dtype=torch.int32),
        truncated=torch.zeros(n, dtype=torch.bool),
    )
    evaluate.save_rollouts(rollouts)


def resident(line: str) -> int:
    """Returns the bytes that a line of /proc/self/status names: VmRSS (now), VmHWM (peak)."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(line + ":")[1].split()[0])


def measure(case: Case) -> int:
    """Returns the peak of two steps above what was resident before, in bytes."""
    with tempfile.TemporaryDirectory() as name, open(os.devnull, "w") as nowhere:
        folder = Path(name)
        make_inputs(case, folder)
        args = stage1_extreme.Args(
            base=str(folder / "base"),
            rollouts=folder / "rollouts",
            output=folder / "teacher",
            epochs=1,
            batch_size=case.sequences,
            save_at=(1.0,),
            micro_batch_tokens=case.sequences * case.length,
            activation_checkpointing=case.checkpointing,
        )
        ctypes.CDLL(None).malloc_trim(0)  # what earlier cases left behind would be used again
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
        before = resident("VmRSS")
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            stage1_extreme.main(args)
        return resident("VmHWM") - before


def predict(case: Case) -> dict[str, int]:
    """Returns the parts that benchmarks/memory.py predicts."""
    tokens, responses = case.sequences * case.length, case.sequences * (case.length - PROMPT)
    setting = memory.Setting(tokens, responses, case.checkpointing, gpu=False)
    return memory.memory(memory.read_shape(case.config), setting)


def main() -> None:
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # glibc reads it at the start only
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    torch.set_num_threads(1)
    measure(WARM_UP)
    for case in CASES:
        predicted, measured = predict(case), measure(case)
        row = {"case": case.name, "measured": measured, "predicted": predicted.pop("peak")}
        row["error"] = round(row["predicted"] / measured - 1, 3)
        print(json.dumps(row | predicted), flush=True)


if __name__ == "__main__":
    main()
