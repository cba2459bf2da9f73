"""What the numbers of the benchmarks rest on: memory.py's terms, gpu.py's sums, mutants.py."""

import ast
import random
import shutil

import gpu
import memory
import mutants
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

import common

SOURCE = b'''
class Args:
    n: int = 4
def f(x: int = 1, *, y=True) -> float:
    """Not here: 1 + 1."""
    if not x and x is not None:  # 2 < 3
        raise ValueError(1 + x)
    print(x + 1)
    x += sum(-x for _ in zip("ab", (x), strict=True))
    return x[-1] // (0.5) if (x) == 1e-3 else f"{x + 1}"
'''


def test_mutants_of_a_small_file():
    found = [f"{m.line} {m.original} -> {m.changed}" for m in mutants.find_mutants("f", SOURCE)]
    expected = "4 1 -> 2, 4 True -> False, 6 and -> or, 6 not -> , 6 is not -> is, 9 + -> -, "
    expected += "9 - -> , 10 // -> *, 10 1 -> 2, 10 0.5 -> 1.0, 10 == -> !=, 10 1e-3 -> 0.002"
    assert sorted(found) == sorted(expected.split(", "))


def test_mutants_of_the_five_files_are_programs():
    for name in mutants.FILES:
        source = (mutants.ROOT / name).read_bytes()
        for mutant in random.Random(0).sample(mutants.find_mutants(name, source), 3):
            changed = ast.unparse(ast.parse(mutant.apply(source)))
            assert changed != ast.unparse(ast.parse(source)), mutant


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [Qwen3Config, LlamaConfig])
def test_memory_counts_what_autograd_saves(kind, checkpointing, rollouts, ranks, tmp_path):
    config = kind(head_dim=8, vocab_size=120, **tiny.WIDTHS, num_key_value_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    policy = common.load_policy(str(tmp_path), ranks, train=True, checkpointing=checkpointing)
    row = common.make_row(rollouts, [0, 1, 2], ranks.device)
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x), lambda x: x
    ):
        common.row_logprobs(policy, row, 1.0)
    found = sum(x.untyped_storage().nbytes() for p, x in kept.items() if p not in weights)
    setting = memory.Setting(len(row.tokens), len(row.flat), checkpointing, gpu=False)
    parts = memory.activations(memory.read_shape(config.to_dict()), setting)
    hidden = 2 * 4 * 8 * len(row.tokens) if checkpointing else 0  # cos and sin, in closures
    assert found == parts["kept"] + parts["around"] - hidden


def test_what_fits_is_as_the_page_says(capsys):
    memory.print_fits()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| Qwen3-")]
    assert len(rows) == 12
    page = (mutants.ROOT / "docs" / "scaling.md").read_text()
    assert all(row in page for row in rows)
    # One more step of 1,024 tokens would not fit. Offloading takes 16 bytes a parameter away.
    shape = memory.read_shape(memory.qwen3("4B"))
    for offload in (False, True):
        most = memory.longest_row(shape, 80e9, offload)
        parts = memory.memory(
            shape, memory.Setting(most + 1024, most + 1024, True, offload=offload)
        )
        assert parts["peak"] > 75e9
        assert parts.get("weights", 0) + parts.get("moments", 0) == 12 * shape.parameters * (
            not offload
        )


def test_useful_flops_and_time_that_a_device_is_busy():
    assert gpu.busy([(3, 4), (0, 2), (1, 2.5), (1, 1.5)]) == 3.5
    shape = memory.Shape(2, 8, 4, 2, 4, 16, 100, tied=True, head_norms=True)
    # Without recomputation and without the head's second product; the scores are not made again.
    counted = memory.step_flops(shape, [5, 7], 9, checkpointing=False)
    counted -= 2 * 100 * 8 * 9 + 0.5 * 2 * 16 * 2 * (25 + 49)
    assert gpu.useful_flops(shape, [5, 7], 9) == counted


def test_gpu_py_refuses_a_machine_without_one(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["gpu.py", "--output", str(tmp_path)])
    if not torch.cuda.is_available():
        assert gpu.main() == 2 and "--quick" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_gpu_py_goes_on_after_a_part_that_failed(tmp_path):
    (tmp_path / "models" / "tiny").mkdir(parents=True)  # `packed` will find no model there
    first = gpu.run_parts(["packed", "head"], True, tmp_path, 200)
    assert "has no config.json" in first["packed"]["error"] and not gpu.succeeded(first["packed"])
    assert gpu.succeeded(first["head"]) and "| log-probs | " in gpu.page(first)
    shutil.rmtree(tmp_path / "models")
    again = gpu.run_parts(["packed", "head"], True, tmp_path, 200)
    assert gpu.succeeded(again["packed"]) and again["head"] == first["head"]
    assert gpu.run_parts(["noise"], True, tmp_path, 0) == again  # no time is left
