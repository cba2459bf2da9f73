"""Training at full scale: sharded loading, switches that change memory and never the result,
attention kernels, exact resume, SIGTERM, guards."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import two_ranks
from test_pipeline import RUN, assert_same_files, lines, stage1_args, stage2_args, start, weights
from torch._subclasses.fake_tensor import FakeTensorMode

import build_signals
import common
import evaluate
import stage1_extreme
import stage2_distill

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def sigterm_as_before():
    """Training in this process leaves its handler of SIGTERM behind."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


# --------------------------------------------------------------------------------------------------
# Attention


def packed_inputs(lengths, heads=4, kv_heads=2, width=16, **options):
    torch.manual_seed(0)
    shapes = ((1, h, sum(lengths), width) for h in (heads, kv_heads, kv_heads))
    query, key, value = (torch.randn(shape, **options) for shape in shapes)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    row = common.Row(ids, ids, lengths, cu, ids, ids >= 0, ids, ids, ids)  # what attention reads
    return query, key, value, row


def test_flex_attention_is_the_loop(recwarn):
    """The compiled kernel needs a GPU; the mask of blocks and the grouping of heads do not."""
    query, key, value, row = packed_inputs([100, 150, 1, 49])
    loop, flex = (
        function(None, query, key, value, None, packed=row, scaling=0.3)[0]
        for function in (common.loop_attention, common.flex_attention)
    )
    assert loop.shape == flex.shape == (1, 300, 4, 16)
    assert torch.allclose(loop, flex, atol=1e-5)
    # FSDP hands every block a copy of the row: one mask all the same.
    before = common._block_mask.cache_info()
    common.flex_attention(None, query, key, value, None, packed=dataclasses.replace(row))
    after = common._block_mask.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_varlen_attention_calls_torch_as_it_is(kv_heads):
    """Shapes, names of arguments and the backward, by torch's own description of its kernel."""
    *inputs, row = packed_inputs([4, 6], kv_heads=kv_heads, dtype=torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        inputs = [fake.from_tensor(x).requires_grad_() for x in inputs]
        out, _ = common.varlen_attention(None, *inputs, None, packed=row, scaling=0.25)
        assert out.shape == (1, 10, 4, 16) and out.dtype == torch.bfloat16
        out.sum().backward()
        assert all(x.grad.shape == x.shape for x in inputs)


def test_attention_is_chosen_by_what_there_is(monkeypatch):
    assert common.choose_attention(CPU) == "loop"
    gpu = torch.device("cuda")
    assert common.choose_attention(gpu) == "varlen"
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", lambda query, is_causal=False: None)  # torch 2.10
    found = common.choose_attention(gpu)
    assert found == ("flash_attn" if shutil.which("flash_attn") else "flex")


# --------------------------------------------------------------------------------------------------
# Packing


def test_steps_are_balanced_by_cost_not_by_tokens():
    """A step lasts as long as its slowest rank: of what all ranks could do, under 3 % is lost, on
    lengths where balancing tokens alone loses four times as much."""
    rng = random.Random(0)
    quadratic = 4e-5  # Qwen3-4B's
    lengths = [min(16384, int(math.exp(rng.gauss(8.3, 0.8)))) for _ in range(512)]

    def lost(packed):
        costs = [[sum(lengths[i] + quadratic * lengths[i] ** 2 for i in row) for row in rows]
                 for rows in packed]  # fmt: skip
        return sum(map(max, zip(*costs, strict=True))) * 8 / sum(map(sum, costs)) - 1

    by_cost = lost(common.pack(lengths, 16384, 8, quadratic))
    assert by_cost < 0.03
    assert lost(common.pack(lengths, 16384, 8)) > 3 * by_cost


def test_attention_cost_is_that_of_the_flops(policy, rollouts):
    """Counted by torch: the FLOPs of attention over those of the blocks' matrices, forward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    n = 64
    one = dataclasses.replace(
        rollouts, tokens=torch.ones(n, dtype=torch.int32), cu_seqlens=torch.tensor([0, n]),
        prompt_lens=torch.tensor([1], dtype=torch.int32),
    )  # fmt: skip
    math_only = sdpa_kernel(SDPBackend.MATH)  # the fused kernel of the CPU is not counted
    with math_only, FlopCounterMode(display=False) as counter, torch.no_grad():
        policy(common.make_row(one, [0], CPU), lambda hidden, weight: hidden)
    counted = counter.get_flop_counts()["Global"]
    attention = counted[torch.ops.aten.bmm] / 2  # computed whole here, masked; half is causal
    matrices = counted[torch.ops.aten.mm]
    assert n * policy.attention_cost == pytest.approx(attention / matrices, rel=0.02)


# --------------------------------------------------------------------------------------------------
# Ranks, micro-batches and switches: one result


def llama(folder: Path) -> str:
    """Untied, frequencies of its own (rotary scaling), a vocabulary that two ranks cannot halve."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    scaling = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
    lm = LlamaForCausalLM(LlamaConfig(
        vocab_size=65, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
        max_position_embeddings=128, rope_parameters=scaling,
    ))  # fmt: skip
    lm.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return str(folder)


LAYOUTS = [  # ranks, tokens of a row, switches
    (2, 10_000, {}),
    (2, 60, {}),
    (2, 60, {"defer_gradient_sync": True, "activation_checkpointing": True}),
    (2, 60, {"shard_size": 1}),
    (4, 60, {"shard_size": 2}),
    (4, 60, {"shard_size": 2, "defer_gradient_sync": True}),
]


def run_ranks(folder: Path, n_ranks: int, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What tests/two_ranks.py finds for each job."""
    jobs = [job | {"output": str(folder / f"{n_ranks}-{i}")} for i, job in enumerate(jobs)]
    common.write_json(folder / f"{n_ranks}.json", jobs)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks), "--"]
    script = [str(ROOT / "tests" / "two_ranks.py"), str(folder / f"{n_ranks}.json")]
    subprocess.run([sys.executable, *launch, *script], check=True, capture_output=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    return [common.load_tensors(Path(job["output"]), {})[0] for job in jobs]


def test_ranks_and_switches_change_nothing(model_folders, rollouts, tmp_path):
    """One row of all on one rank is the measure; then two and four ranks, a row or several each."""
    ranks, models = common.setup_ranks(), [model_folders[0], llama(tmp_path / "llama")]
    torch.set_num_threads(1)
    jobs = {n: [{"model": model, "rollouts": str(rollouts.path.parent), "budget": budget,
                 "flags": flags} for model in models for m, budget, flags in LAYOUTS if m == n]
            for n in (2, 4)}  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda n: run_ranks(tmp_path, n, jobs[n]), jobs))
    found = [(job["model"], result) for n, many in zip(jobs, results, strict=True)
             for job, result in zip(jobs[n], many, strict=True)]  # fmt: skip
    assert len(found) == 12
    for model in models:
        one, *here = (
            two_ranks.one_step(model, rollouts, budget, ranks, activation_checkpointing=on)
            for budget, on in [(10_000, False), (10_000, True), (60, False), (60, True)]
        )
        assert one["micro_batches"] == 1 and one["loss"].abs() > 1e-3
        assert here[1]["micro_batches"] >= 5
        for name in one:  # the same operations again: the same bits
            assert torch.equal(one[name], here[0][name]), name
            assert torch.equal(here[1][name], here[2][name]), name
        scale = max(v.abs().max().item() for k, v in one.items() if k.startswith("gradient."))
        for other in [here[1], *(result for name, result in found if name == model)]:
            for name, value in one.items():
                if name.startswith(("parameter.", "buffer.")):
                    assert torch.equal(other[name], value), name
                elif name != "micro_batches":
                    atol = 1e-5 * scale if name.startswith("gradient.") else 1e-5
                    torch.testing.assert_close(other[name], value, rtol=1e-4, atol=atol, msg=name)


def test_activation_checkpointing_keeps_less(model_folders, rollouts):
    ranks, kept = common.setup_ranks(), {}
    row = common.make_row(rollouts, list(range(20)), CPU)
    for on in (False, True):
        policy = common.load_policy(
            model_folders[0], ranks, train=True, activation_checkpointing=on
        )
        sizes: list[int] = []

        def pack_hook(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
            common.row_logprobs(policy, row, 1.0)
        kept[on] = sum(sizes)
    assert kept[True] < kept[False] / 3


def test_models_with_other_names_in_their_files_are_refused(model_folders, tmp_path, monkeypatch):
    folder = tmp_path / "renamed"
    shutil.copytree(model_folders[0], folder)
    tensors = weights(folder)
    tensors["transformer.wte"] = tensors.pop("model.norm.weight")
    common.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    policy = common.Policy(common.load_lm(model_folders[0], CPU, torch.float32))
    with pytest.raises(common.UserError, match=r"no model\.norm\.weight.*save_pretrained"):
        common._load_shards(policy, str(folder), 0, 1)


def test_a_file_of_another_node_is_waited_for(tmp_path):
    """As NFS shows it: late."""
    path = tmp_path / "args.json"
    late = threading.Timer(0.3, path.touch)
    late.start()
    assert common.wait_for(path, 60) and not common.wait_for(tmp_path / "never", 0)
    late.join()


def test_shard_size_must_divide(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    ranks = common.Ranks(0, 8, CPU)
    with pytest.raises(common.UserError, match="--shard-size 3: must divide the 8 ranks"):
        common.load_policy("m", ranks, train=True, shard_size=3)


def test_what_shards_read_besides_the_weights(model_folders, tmp_path):
    """Every end-of-sequence token: sampling from what is trained stops where it did before."""
    folder = tmp_path / "model"
    shutil.copytree(model_folders[0], folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2], "pad_token_id": 0}')
    for whole in (True, False):
        lm = common.load_lm(str(folder), CPU, torch.float32, weights=whole)
        assert lm.generation_config.eos_token_id == [1, 2]


@pytest.mark.parametrize("what", ["logits_scaling", "bias of the output matrix"])
def test_a_head_that_we_do_not_compute_is_refused(what, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = {"logits_scaling": "granite", "bias of the output matrix": "phi"}[what]
    config = AutoConfig.for_model(
        kind, vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(common.UserError, match=f"has no {what}"):
        common.load_lm(str(tmp_path), CPU, torch.float32)


def test_a_dropped_policy_leaves_the_memory(model_folders):
    """FSDP's modules hold each other: without help the first model would stay beside the second."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ranks = common.setup_ranks()
        policy = common.load_policy(model_folders[0], ranks, train=True)
        assert hasattr(policy, "unshard")
        dropped = weakref.ref(policy)
        del policy
        common.load_policy(model_folders[1], ranks, train=True)
        assert dropped() is None
    finally:
        dist.destroy_process_group()


def test_a_model_is_on_disk_before_it_counts_as_complete(model_folders, tmp_path, monkeypatch):
    """A checkpoint goes once the model is there; a power cut then must not take both."""
    ranks, done = common.setup_ranks(), []
    sync, replace = os.fsync, os.replace

    def record_sync(descriptor):
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        sync(descriptor)

    def record_replace(source, target):
        done.append((Path(target).parent.name, Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_replace)
    policy = common.load_policy(model_folders[0], ranks, train=True)
    tokenizer = common.load_tokenizer(model_folders[0])
    common.save_model(policy, tokenizer, tmp_path / "saved", ranks)
    for path in (tmp_path / "saved").iterdir():
        assert done.index(("sync", path.name)) < done.index(("saved", path.name))
    assert done[-2:] == [("saved", "config.json"), ("sync", "saved")]
    assert ("saved", "model.safetensors") in done


def test_what_a_gpu_saves_is_bfloat16(model_folders, tmp_path, monkeypatch):
    """On a CPU, with the one function that decides it changed."""
    from transformers import AutoModelForCausalLM

    ranks = common.setup_ranks()
    policy = common.load_policy(model_folders[0], ranks, train=True)
    monkeypatch.setattr(common, "compute_dtype", lambda device: torch.bfloat16)
    tokenizer = common.load_tokenizer(model_folders[0])
    common.save_model(policy, tokenizer, tmp_path / "saved", ranks)
    assert {w.dtype for w in weights(tmp_path / "saved").values()} == {torch.bfloat16}
    # A tied output matrix is written once, as in what it was loaded from.
    assert weights(tmp_path / "saved").keys() == weights(Path(model_folders[0])).keys()
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert lm.dtype == torch.bfloat16
    scored = common.load_policy(str(tmp_path / "saved"), ranks, train=False)
    assert next(scored.parameters()).dtype == torch.bfloat16
    assert next(policy.parameters()).dtype == torch.float32  # the masters stay


# --------------------------------------------------------------------------------------------------
# Checkpoints


def few(output: Path, **changes: Any) -> stage1_extreme.Args:
    """Twelve steps of stage 1, a checkpoint after every third."""
    return stage1_args(output, **{"epochs": 3, "save_at": (3.0,)} | changes)


class Killed(BaseException):
    """Nothing of ours catches it."""


def cut(monkeypatch: pytest.MonkeyPatch, name: str, at: int) -> None:
    """From now on the at-th call of common's or a stage's `name` ends the run instead."""
    calls = iter(range(1, 10_000))
    for module in (common, stage1_extreme, stage2_distill):
        if hasattr(module, name):
            real = getattr(module, name)

            def wrapper(*args, real=real, **kwargs):
                if next(calls) == at:
                    raise Killed
                return real(*args, **kwargs)

            monkeypatch.setattr(module, name, wrapper)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    args = few(tmp_path_factory.mktemp("whole") / "teacher")
    stage1_extreme.main(args)
    return args.output


@pytest.mark.parametrize("moment", ["before it is whole", "before its name", "before the pointer",
                                    "before the old one goes"])  # fmt: skip
def test_a_run_cut_while_it_saves_goes_on_from_the_last_good(
    moment, uninterrupted, tmp_path, monkeypatch
):
    """At the second checkpoint, step 6."""
    args = few(tmp_path / "teacher")
    with monkeypatch.context() as patch:
        if moment == "before it is whole":
            patch.setattr(
                common, "_checkpoint_contents", fail_after(2, common._checkpoint_contents)
            )
        elif moment == "before its name":
            patch.setattr(common.os, "replace", fail_on(os.replace, ".resume-0000006.tmp"))
        elif moment == "before the pointer":
            patch.setattr(common, "write_json", fail_on(common.write_json, "last.json", 2))
        else:
            real = shutil.rmtree  # once to clear a leftover, once to prune
            patch.setattr(common.shutil, "rmtree", fail_on(real, "resume-0000003", 2))
        with pytest.raises(Killed):
            stage1_extreme.main(args)
    folder = args.output / "checkpoints"
    named = common.read_json(folder / "last.json")["folder"]
    assert named == ("resume-0000006" if moment == "before the old one goes" else "resume-0000003")
    assert (folder / named / "state.json").is_file()
    (folder / "resume-9999999").mkdir()  # foreign, or half a copy: not trusted
    stage1_extreme.main(args)
    assert_same_files(uninterrupted, args.output, RUN)
    kept = ["behavior_logprobs.safetensors", "epoch-003.000"]  # complete: no way back needed
    assert sorted(p.name for p in folder.iterdir()) == kept


def fail_after(n: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """`real`, whose n-th call ends the run."""
    calls = iter(range(1, 10_000))

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == n:
            raise Killed
        return real(*args, **kwargs)

    return wrapper


def fail_on(real: Callable[..., Any], name: str, n: int = 1) -> Callable[..., Any]:
    """`real`, which ends the run when called the n-th time for a path of that name."""
    failing = fail_after(n, real)

    def wrapper(path: Path, *args: Any, **kwargs: Any) -> Any:
        return (failing if Path(path).name == name else real)(path, *args, **kwargs)

    return wrapper


def cut_at_6(output: Path, monkeypatch: pytest.MonkeyPatch) -> stage1_extreme.Args:
    """A run that ended after its second checkpoint."""
    args = few(output)
    with monkeypatch.context() as patch:
        patch.setattr(stage1_extreme, "clip_gradients", fail_after(8, common.clip_gradients))
        with pytest.raises(Killed):
            stage1_extreme.main(args)
    return args


def test_a_checkpoint_before_the_first_step_is_none_itself(model_folders, rollouts, tmp_path):
    """Stage 2 saves the base. AdamW's first step, of full size, comes after it."""
    ranks = common.setup_ranks()
    policy = common.load_policy(model_folders[0], ranks, train=True)
    optimizer = common.make_optimizer(policy, 1e-3, 0.1)
    common.save_checkpoint(tmp_path, {"step": 0}, policy, optimizer, ranks)
    common.load_checkpoint(tmp_path, policy, optimizer, ranks)
    plain = copy.deepcopy(policy)
    theirs = torch.optim.AdamW(plain.parameters(), 1e-3, weight_decay=0.1, fused=True)
    row = common.make_row(rollouts, [0, 1], CPU)
    for model, adamw in ((policy, optimizer), (plain, theirs)):
        common.row_logprobs(model, row, 1.0)[0].sum().backward()
        adamw.step()
    for ours, expected in zip(policy.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("damage", ["gone", "weights cut", "state cut"])
def test_a_damaged_checkpoint_is_an_error_of_one_line(damage, tmp_path, monkeypatch):
    args = cut_at_6(tmp_path / "teacher", monkeypatch)
    folder = args.output / "checkpoints" / "resume-0000006"
    if damage == "gone":
        shutil.rmtree(folder)
    for file in folder.glob("*.distcp" if damage == "weights cut" else "state.json"):
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(common.UserError, match="resume-0000006|state.json") as caught:
        stage1_extreme.main(args)
    assert "\n" not in str(caught.value)


def test_random_numbers_go_on_where_they_were(uninterrupted, tmp_path, monkeypatch):
    """Nothing here draws, but a fork may (dropout): a loss with noise resumes to the same bits."""

    def noisy(x: stage1_extreme.LossInputs, **flags: Any) -> stage1_extreme.LossOutput:
        loss, metrics = stage1_extreme.grpo_loss(x, **flags)
        return loss * (1 + torch.rand(())), metrics

    monkeypatch.setitem(stage1_extreme.LOSSES, "grpo", (noisy, "responses"))
    whole, again = (few(tmp_path / name, loss="grpo") for name in ("whole", "again"))
    stage1_extreme.main(whole)
    with monkeypatch.context() as patch:
        patch.setattr(stage1_extreme, "clip_gradients", fail_after(8, common.clip_gradients))
        with pytest.raises(Killed):
            stage1_extreme.main(again)
    torch.rand(100)  # another process has drawn other numbers
    stage1_extreme.main(again)
    assert_same_files(whole.output, again.output, RUN)


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_sigterm_saves_and_ends_with_143(n_ranks, tmp_path):
    """The last checkpoint would be step 50's, which no run here reaches."""
    whole, args = (few(tmp_path / name, checkpoint_every=50, epochs=8, save_at=(8.0,))
                   for name in ("whole", "again"))  # fmt: skip
    first = start(whole, n_ranks)
    process, path = start(args, n_ranks), args.output / "metrics.jsonl"
    while process.poll() is None and (not path.is_file() or path.read_bytes().count(b"\n") < 3):
        time.sleep(0.001)
    process.terminate()
    printed = process.communicate(timeout=120)[0]
    # torchrun passes the signal on to its ranks and ends with a code of its own.
    assert process.returncode == 143 if n_ranks == 1 else process.returncode != 0, printed
    assert "SIGTERM: saved step" in printed
    saved = common.read_json(args.output / "checkpoints" / "last.json")["folder"]
    assert f"saved step {int(saved.removeprefix('resume-'))};" in printed
    assert len(lines(args.output)) == int(saved.removeprefix("resume-")) >= 3
    assert not (args.output / "config.json").exists()
    process = start(args, n_ranks)
    printed = process.communicate(timeout=120)[0] + first.communicate(timeout=120)[0]
    assert process.returncode == first.returncode == 0, printed
    assert_same_files(whole.output, args.output, RUN)


def test_sigterm_in_stage_2_keeps_to_the_budget(tmp_path, monkeypatch, capsys):
    """Without a budget the step is saved; with one, only what was measured to be within it."""
    signals = tiny_signals(tmp_path)
    for budget, expected in [(None, "resume-0000002"), (5.0, "resume-0000000")]:
        args = stage2_args(tmp_path / f"student{budget}", signals, kl_budget=budget)
        real = stage2_distill.mean_metrics

        def interrupt(sums, ranks, real=real):
            if len(lines(args.output)) == 1:  # noqa: B023
                os.kill(os.getpid(), signal.SIGTERM)
                sums["sigterm"] += 1
            return real(sums, ranks)

        with monkeypatch.context() as patch:
            patch.setattr(stage2_distill, "mean_metrics", interrupt)
            with pytest.raises(SystemExit) as caught:
                stage2_distill.main(args)
        assert caught.value.code == 143
        last = common.read_json(args.output / "checkpoints" / "last.json")
        assert last["folder"] == expected
        assert f"saved step {int(expected[-1])};" in capsys.readouterr().out
        stage2_distill.main(args)
        assert len(lines(args.output)) == 30


def tiny_signals(folder: Path) -> Path:
    """Signals of the tiny setting: the base against itself, plus a ripple."""
    path, base = folder / "signals.safetensors", str(tiny.setting() / "base")
    build_signals.main(build_signals.Args(
        rollouts=tiny.setting() / "rollouts", base=base, teachers=(base,), output=path
    ))  # fmt: skip
    arrays, metadata = common.load_tensors(path, {})
    mask = arrays["base_logprobs"] != 0
    arrays["signal"] = torch.sin(torch.arange(len(mask))).float() * mask
    metadata.pop("format")
    common.save_tensors(path, arrays, metadata)
    return path


# --------------------------------------------------------------------------------------------------
# Guards


def poisoned(monkeypatch: pytest.MonkeyPatch, bad_steps: set[int], value: float) -> None:
    """stage 1's ce loss, which is not finite at some steps (one row a step)."""
    calls = iter(range(1, 10_000))

    def loss(x: stage1_extreme.LossInputs, **flags: Any) -> stage1_extreme.LossOutput:
        total, metrics = stage1_extreme.ce_loss(x, **flags)
        return total * (value if next(calls) in bad_steps else 1.0), metrics

    monkeypatch.setitem(stage1_extreme.LOSSES, "ce", (loss, "responses"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_left_out(value, tmp_path, monkeypatch):
    poisoned(monkeypatch, {2, 3, 5, 6}, value)  # never three in a row
    args = few(tmp_path / "teacher", micro_batch_tokens=10_000, warmup_steps=0)
    stage1_extreme.main(args)
    rows = lines(args.output)
    assert [row["skipped"] for row in rows[:7]] == [0, 1, 2, 2, 3, 4, 4]
    assert rows[1]["loss"] is None and rows[3]["loss"] is not None
    assert all(w.isfinite().all() for w in weights(args.output).values())
    assert rows[3]["log_ratio_correct"] != 0


def test_three_in_a_row_end_the_run_with_the_last_good_checkpoint(tmp_path, monkeypatch):
    poisoned(monkeypatch, {5, 6, 7}, math.nan)
    args = few(tmp_path / "teacher", micro_batch_tokens=10_000)
    with pytest.raises(common.UserError, match="step 7: loss nan.*3rd step in a row.*checkpoints"):
        stage1_extreme.main(args)
    folder = args.output / "checkpoints"
    assert common.read_json(folder / "last.json")["folder"] == "resume-0000006"
    state = common.read_json(folder / "resume-0000006" / "state.json")
    assert (state["skipped"], state["skipped_in_a_row"]) == (2, 2)
    assert not (args.output / "config.json").exists()
    assert len(lines(args.output)) == 6


def test_not_finite_on_one_rank_is_skipped_on_all(tmp_path):
    """Rank 1 alone sees a rollout that makes its loss nan: both skip, and go on in step."""
    folder = tmp_path / "rollouts"
    shutil.copytree(tiny.setting() / "rollouts", folder)
    behavior = tmp_path / "teacher" / "checkpoints" / "behavior_logprobs.safetensors"
    args = few(tmp_path / "teacher", rollouts=folder, micro_batch_tokens=10_000, epochs=1,
               save_at=(1.0,))  # fmt: skip
    rollouts = common.load_rollouts(folder)
    scores = torch.zeros(len(rollouts.tokens))
    victim = int(common.epoch_batches(len(rollouts.rewards), 8, 0, 0)[1][0])  # of step 2
    scores[rollouts.sequence_ids == victim] = math.nan
    # As a killed run leaves it: scored, no step taken.
    args.output.mkdir()
    record = {"args": dataclasses.asdict(args), "inputs": {
        "base": common.fingerprint(common.model_folder(args.base)),
        "rollouts": common.fingerprint(rollouts.path)}}  # fmt: skip
    common.write_json(args.output / "args.json", json.loads(json.dumps(record, default=str)))
    common.save_tensors(behavior, {"behavior_logprobs": scores}, {})
    process = start(args, 2)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0, printed
    assert [row["skipped"] for row in lines(args.output)] == [0, 1, 1, 1]
    assert all(w.isfinite().all() for w in weights(args.output).values())


def test_rollouts_of_another_policy_are_refused(tmp_path):
    """Stage 1 by the sampler's log-probs, stage 2 by the base's in the signals file."""
    folder = tmp_path / "rollouts"
    shutil.copytree(tiny.setting() / "rollouts", folder)
    rollouts = common.load_rollouts(folder)
    mask = rollouts.response_mask
    ranks = common.setup_ranks()
    base = common.load_policy(str(tiny.setting() / "base"), ranks, train=False)
    shifted = (common.score(base, rollouts, 1.0, 10_000, ranks, "") - 0.2) * mask
    common.save_rollouts(dataclasses.replace(rollouts, sampler_logprobs=shifted))
    args = few(tmp_path / "teacher", rollouts=folder)
    message = "100.00% of tokens outside .*--max-noise 0.2"
    with pytest.raises(common.UserError, match="trainer minus sampler.*" + message):
        stage1_extreme.main(args)
    assert not (args.output / "metrics.jsonl").exists()
    args = dataclasses.replace(args, max_noise=1.0, output=tmp_path / "allowed", epochs=1,
                               save_at=(1.0,))  # fmt: skip
    stage1_extreme.main(args)

    signals = tiny_signals(tmp_path)
    arrays, metadata = common.load_tensors(signals, {})
    arrays["base_logprobs"] += 0.2 * mask
    metadata.pop("format")
    common.save_tensors(signals, arrays, metadata)
    with pytest.raises(common.UserError, match="student minus base.*" + message):
        stage2_distill.main(stage2_args(tmp_path / "student", signals))


def test_noise_floor_by_hand(capsys):
    gap = torch.tensor([0.0, 0.2, -0.2, 9.0])
    sums = common.noise_sums(gap, torch.tensor([True, True, True, False]))
    assert sums.tolist() == pytest.approx([0.0, 0.08, 2.0, 3.0], abs=1e-6)
    ranks = common.setup_ranks()
    common.check_noise(sums, "a minus b", 0.7, ranks)
    assert "sd 1.6e-01 nats, 66.67% of tokens outside" in capsys.readouterr().out
    with pytest.raises(common.UserError, match="66.67%"):
        common.check_noise(sums, "a minus b", 0.6, ranks)
    lost = common.noise_sums(torch.tensor([math.nan, 0.0]), torch.tensor([True, True]))
    with pytest.raises(common.UserError, match="50.00%"):
        common.check_noise(lost, "a minus b", 0.4, ranks)


@pytest.mark.parametrize("kind", ["host", "GPU"])
def test_out_of_memory_names_the_flags(kind, monkeypatch, capsys):
    def main(args: stage1_extreme.Args) -> None:
        if kind == "GPU":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        torch.empty(2**60)

    flags = ["--base", "b", "--rollouts", "r", "--output", "o", "--micro-batch-tokens", "4096"]
    monkeypatch.setattr("sys.argv", ["stage1", *flags])
    with pytest.raises(SystemExit) as caught:
        common.run(main, stage1_extreme.Args, "")
    printed = capsys.readouterr().err
    assert caught.value.code == 2
    assert printed.startswith(f"error: out of {kind} memory")
    for hint in ("--micro-batch-tokens (now 4096)", "--activation-checkpointing (now False)",
                 "--defer-gradient-sync (now False)", "more ranks"):  # fmt: skip
        assert hint in printed


def test_out_of_memory_in_one_process_asks_for_no_ranks(monkeypatch, capsys):
    """evaluate.py takes no torchrun, and its --shard is not the switch of build_signals.py."""

    def main(args: evaluate.Args) -> None:
        torch.empty(2**60)

    flags = ["--model", "m", "--problems", "p", "--output", "o", "--shard", "0/2"]
    monkeypatch.setattr("sys.argv", ["evaluate", *flags])
    with pytest.raises(SystemExit):
        common.run(main, evaluate.Args, "")
    printed = capsys.readouterr().err
    assert "--micro-batch-tokens (now " in printed
    assert "--shard" not in printed and "ranks" not in printed


def test_flags_that_only_cost_may_change_on_the_way(uninterrupted, tmp_path, monkeypatch):
    """What the out-of-memory message asks for can be done without starting again."""
    args = cut_at_6(tmp_path / "teacher", monkeypatch)
    cheaper = dataclasses.replace(
        args, micro_batch_tokens=128, activation_checkpointing=True, checkpoint_every=7
    )
    stage1_extreme.main(cheaper)
    assert lines(args.output)[:6] == lines(uninterrupted)[:6]
    for name, weight in weights(uninterrupted).items():
        torch.testing.assert_close(weights(args.output)[name], weight, rtol=0, atol=2e-4)
    assert common.read_json(args.output / "args.json")["args"]["micro_batch_tokens"] == 128
    with pytest.raises(common.UserError, match="seed: 0 -> 1"):
        stage1_extreme.main(dataclasses.replace(cheaper, seed=1))


def test_a_kill_before_the_checkpoint_goes_leaves_nothing(uninterrupted, tmp_path):
    output = tmp_path / "teacher"
    shutil.copytree(uninterrupted, output)
    (output / "checkpoints" / "resume-0000012").mkdir()
    stage1_extreme.main(few(output))
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == [
        "behavior_logprobs.safetensors", "epoch-003.000"
    ]  # fmt: skip


@pytest.mark.parametrize("n_ranks, fails", [(1, True), (2, True), (2, False)])
def test_an_error_on_one_rank_does_not_wait_for_the_others(n_ranks, fails, monkeypatch):
    """NCCL's destroy does: the rank would not end, and torchrun not see it."""

    def main(args: stage1_extreme.Args) -> None:
        if fails:
            raise common.UserError("this rank's alone")

    destroyed = []
    for name, value in [("is_initialized", True), ("get_world_size", n_ranks)]:
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: destroyed.append(1))
    monkeypatch.setattr("sys.argv", ["s", "--base", "b", "--rollouts", "r", "--output", "o"])
    with pytest.raises(SystemExit) if fails else contextlib.nullcontext():
        common.run(main, stage1_extreme.Args, "")
    assert bool(destroyed) == (n_ranks == 1 or not fails)


def test_other_runtime_errors_keep_their_traceback(monkeypatch):
    def main(args: stage1_extreme.Args) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr("sys.argv", ["s", "--base", "b", "--rollouts", "r", "--output", "o"])
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        common.run(main, stage1_extreme.Args, "")
