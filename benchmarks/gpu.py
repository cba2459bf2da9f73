"""Answers on one GPU, by one command, what tests on a CPU cannot: is it right there, and how fast?

    attention    our packed attention (FlashAttention on a GPU, a loop on the CPU) and torch's sdpa
                 against float64 with a whole mask: values, gradients, windows, grouped heads
    head         the tiled head in the compute type against float64, and its time
    packed       packed rows and one sequence at a time, against the CPU in float32
    noise        a training forward beside the scoring pass, packed otherwise: the ratios of step 0
    fsdp         steps, a checkpoint, the way back, a saved model, with and without --cpu-offload
    stages       stage 1, signals and stage 2 by their commands on a tiny model
    qwen3-...    random weights in the shape of Qwen3: tokens/s, MFU, peak of memory beside
                 benchmarks/memory.py, and the ten costliest kernels of a row

A part writes OUTPUT/results/PART.json when it ends, and is not run again once it is there: repeat
the command until none is missing. A part that fails does not stop the others. Exit code 1: a check
failed, or a part is missing. Nothing is downloaded; random weights (13 GB) stay in OUTPUT/models.
torch, transformers and safetensors are enough (without tyro, `stages` calls main, not commands).

    python benchmarks/gpu.py                # one H100 or H200, made for nine minutes
    python benchmarks/gpu.py --quick        # in small on the CPU; leaves RESULTS_GPU.md alone
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import importlib.util
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "examples" / "arithmetic")]

import make_base  # noqa: E402
import memory  # noqa: E402

import common  # noqa: E402
import evaluate  # noqa: E402
import stage1_extreme  # noqa: E402

# Dense bfloat16 by the data sheets, TFLOP/s; the first name that the device's contains.
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312}
FORMULA = (
    "Useful FLOPs of a row: 6 (block matrices) tokens + 6 V D (response tokens) + 6 L Q sum n^2, "
    "for L blocks, queries of width Q, causal sequences of n tokens; recomputation does not count"
)
ROUNDING = {torch.bfloat16: 1e-2, torch.float32: 1e-5}  # relative, of a sum of many products
CPU = torch.device("cpu")
LENGTHS = [40, 9, 200, 31, 90, 17]  # of the sequences of the small parts


@dataclass
class Part:
    """Says where a part runs, collects what it measured, and prints that as it goes."""

    quick: bool
    output: Path
    ranks: common.Ranks
    device: torch.device  # the GPU, or with --quick the CPU
    dtype: torch.dtype  # in which the stages compute there
    lines: list[dict[str, Any]] = field(default_factory=list)
    tables: str = ""

    def tell(self, what: str, value: str) -> None:
        """Notes a number without a bound."""
        self.lines.append({"what": what, "value": value})
        print(f"  {what}: {value}", flush=True)

    def check(self, what: str, value: float, most: float) -> None:
        """Notes a number that may be at most `most`; nan is more."""
        line = {"what": what, "value": f"{value:.3g}", "at most": f"{most:.3g}"}
        self.lines.append(line | {"passed": bool(value <= most)})
        verdict = "" if value <= most else ": FAILED"
        print(f"  {what}: {value:.3g}, at most {most:.3g}{verdict}", flush=True)


# --------------------------------------------------------------------------------------------------
# What several parts need


def off(found: Tensor, expected: Tensor) -> float:
    """Returns the size of the difference over the size of what is expected."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return ((found - expected).norm() / expected.norm()).item()


def joined(tensors: Any) -> Tensor:
    """Returns tensors, plain or sharded over one rank, as one in float32 on the CPU."""
    plain = (x.to_local() if hasattr(x, "to_local") else x for x in tensors)
    return torch.cat([x.detach().float().cpu().flatten() for x in plain])


def now(device: torch.device) -> float:
    """Waits until the device is done, and returns the time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(device: torch.device, work: Callable[[], Any]) -> float:
    """Returns the median time of three runs, after one that is not counted."""
    times = []
    for _ in range(4):
        start = now(device)
        work()
        times.append(now(device) - start)
    return statistics.median(times[1:])


def tiny_shape(p: Part) -> dict[str, Any]:
    """Returns the shape of a model for the tokenizer of the arithmetic example."""
    width, layers, head_dim = (64, 2, 16) if p.quick else (512, 4, 64)
    shape = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 2 * width}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": head_dim}
    return memory.qwen3("0.6B") | shape | {"vocab_size": len(make_base.make_tokenizer())}


def make_model(p: Part, size: str = "tiny") -> str:
    """Writes a Qwen3 with random weights, in bfloat16 as users have it; returns its folder.

    A large final norm makes its predictions peaked, as those of a trained model are."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = p.output / "models" / size
    if folder.is_dir():
        return str(folder)
    torch.manual_seed(0)
    shape = tiny_shape(p) if size == "tiny" else memory.qwen3(size)
    shape |= {"max_position_embeddings": 65536, "eos_token_id": 1, "bos_token_id": None}
    config = AutoConfig.for_model(**shape)
    with p.device:
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    torch.nn.init.constant_(lm.model.norm.weight, 5)
    temporary = folder.with_name(f".{size}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    lm.save_pretrained(temporary)
    make_base.make_tokenizer().save_pretrained(temporary)
    os.replace(temporary, folder)
    return str(folder)


def make_rollouts(p: Part, lengths: list[int], prompt: int, vocabulary: int = 0) -> common.Rollouts:
    """Makes rollouts of random tokens, four to a problem; every second is right."""
    n, generator = len(lengths), torch.Generator().manual_seed(0)
    shape = (3, vocabulary or tiny_shape(p)["vocab_size"], (sum(lengths),))
    return common.Rollouts(
        path=p.output / "data" / "rollouts.safetensors",
        metadata={},
        tokens=torch.randint(*shape, dtype=torch.int32, generator=generator),
        cu_seqlens=F.pad(torch.tensor(lengths).cumsum(0), (1, 0)),
        prompt_lens=torch.full((n,), prompt, dtype=torch.int32),
        rewards=(torch.arange(n) % 2).float(),
        problem_index=torch.arange(n, dtype=torch.int32) // 4,
        truncated=torch.zeros(n, dtype=torch.bool),
    )


# --------------------------------------------------------------------------------------------------
# Parts: is it right?


def attention(p: Part) -> None:
    """Compares three attentions with float64 on the CPU, where a whole mask says who sees whom."""
    lengths, window = ([33, 2, 70, 8], 16) if p.quick else ([257, 1, 700, 64], 100)
    rollouts = make_rollouts(p, lengths, 1)
    there, here = (common.make_row(rollouts, [0, 1, 2, 3], d) for d in (p.device, CPU))
    place, owner = torch.arange(sum(lengths)), here.position_ids.eq(0).cumsum(0)
    back = place[:, None] - place
    for (heads, groups, width), bound in itertools.product(
        [(8, 8, 64), (16, 4, 128)], [None, window]
    ):
        torch.manual_seed(0)
        mask = (owner[:, None] == owner) & (back >= 0) & (back < (bound or 10**9))
        shapes = [(1, n, len(place), width) for n in (heads, groups, groups)]
        inputs = [torch.randn(shape).bfloat16() for shape in shapes]
        upstream = torch.randn(1, len(place), heads, width).bfloat16()

        def run(
            row: common.Row | None, device: torch.device, dtype: torch.dtype, mask: Tensor = mask,
            bound: int | None = bound, inputs: Any = inputs, upstream: Tensor = upstream,
        ) -> list[Tensor]:  # fmt: skip
            """Returns values and gradients of our attention on a row, or of sdpa with the mask."""
            qkv = [x.to(device, dtype).requires_grad_() for x in inputs]
            if row is None:
                out = F.scaled_dot_product_attention(*qkv, mask.to(device), enable_gqa=True)
                out = out.transpose(1, 2)
            else:
                options = {"packed": row, "sliding_window": bound}
                out, _ = common.packed_attention(torch.nn.Identity(), *qkv, None, **options)
            return [out, *torch.autograd.grad(out, qkv, upstream.to(device, dtype))]

        expected = run(None, CPU, torch.float64)
        sides = {"ours": (there, p.device, p.dtype), "sdpa": (None, p.device, p.dtype)}
        for name, side in (sides | {"the loop on the CPU": (here, CPU, torch.float32)}).items():
            what = f"{heads} heads of {width}, {groups} of keys, window {bound}, {name}"
            try:
                worst = [off(a, b) for a, b in zip(run(*side), expected, strict=True)]
            except common.UserError as error:  # a torch from before windows
                p.tell(what, f"refused: {error}")
                continue
            if name == "sdpa":  # beside ours, not judged
                p.tell(f"{what}: values; gradients", f"{worst[0]:.3g}; {max(worst[1:]):.3g}")
                continue
            p.check(f"{what}: values", worst[0], ROUNDING[side[2]])
            p.check(f"{what}: gradients", max(worst[1:]), ROUNDING[side[2]])


def head(p: Part) -> None:
    """Compares log-probs, entropy and gradients of the head with float64, relatively."""
    torch.manual_seed(0)
    n, width, vocabulary = (64, 32, 5000) if p.quick else (2048, 2560, 151_936)
    with p.device:
        hidden = torch.randn(n, width).to(p.dtype).requires_grad_()
        weight = (0.05 * torch.randn(vocabulary, width)).to(p.dtype).requires_grad_()
        targets, upstream = torch.randint(vocabulary, (n,)), torch.randn(n)

    def ours() -> list[Tensor]:
        """Returns log-probs, entropy, and the gradients of both inputs."""
        pair = common.head_logprobs(hidden, common.Output(weight), targets, 0.7)
        return [*pair, *torch.autograd.grad(pair[0], (hidden, weight), upstream)]

    inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    z = (inputs[0] @ inputs[1].T / 0.7).log_softmax(-1)
    logprobs = z.gather(-1, targets[:, None])[:, 0]
    gradients = torch.autograd.grad(logprobs, inputs, upstream.double(), retain_graph=True)
    expected = [logprobs, -(z.exp() * z).sum(-1), *gradients]
    names = ["log-probs", "entropy", "gradient of hidden states", "gradient of the matrix"]
    bounds = [1e-4, 1e-4, ROUNDING[p.dtype], ROUNDING[p.dtype]]  # products are summed in float32
    for name, a, b, most in zip(names, ours(), expected, bounds, strict=True):
        p.check(name, off(a, b), most)
    shape = f"{n} positions of {width}, vocabulary {vocabulary}"
    p.tell(f"{shape}: forward and backward", f"{1e3 * seconds(p.device, ours):.1f} ms")


def packed(p: Part) -> None:
    """Compares packed rows and single sequences with the CPU in float32, relatively."""
    name, rollouts = make_model(p), make_rollouts(p, LENGTHS, 4)
    weights = torch.randn(len(rollouts.tokens), generator=torch.Generator().manual_seed(1))

    def run(rows: list[list[int]], ranks: common.Ranks) -> list[Tensor]:
        """Returns the log-probs [N], and all gradients as one tensor."""
        policy = common.load_policy(name, ranks, train=True)
        common.check_policy(policy, rollouts, "tiny", ranks)  # prints the way that it finds right
        result = torch.zeros(len(rollouts.tokens))
        for members in rows:
            row = common.make_row(rollouts, members, ranks.device)
            logprobs, _ = common.row_logprobs(policy, row, 1.0)
            (logprobs * weights[row.flat].to(ranks.device)).sum().backward()
            result[row.flat] = logprobs.detach().cpu()
        p.tell(f"way of {len(rows)} rows on {ranks.device}", policy.way)
        return [result, joined(x.grad for x in policy.parameters())]

    alone = [[i] for i in range(len(LENGTHS))]
    expected, single = run(alone, common.Ranks(0, 1, CPU)), run(alone, p.ranks)
    together = run([[2, 0], [4, 3, 1, 5]], p.ranks)
    for what, a, b, c in zip(["log-probs", "gradients"], together, single, expected, strict=True):
        p.tell(f"{what}, one sequence a row", f"{off(b, c):.3g}")
        p.check(f"{what}, packed rows", off(a, c), 1.5 * off(b, c) + ROUNDING[torch.float32])


def noise(p: Part) -> None:
    """Measures log-ratios that would be 0 without rounding: training forward minus scores."""
    name = make_model(p, "tiny" if p.quick else "0.6B")
    lengths = [n if p.quick else 20 * n for n in LENGTHS]
    rollouts = make_rollouts(p, lengths, 8, common.text_config(name).vocab_size)

    @torch.no_grad()
    def logprobs(policy: common.Policy, rows: list[list[int]]) -> Tensor:
        """Returns the log-probs of all response tokens."""
        result = torch.zeros(len(rollouts.tokens))
        for members in rows:
            row = common.make_row(rollouts, members, p.device)
            result[row.flat] = common.row_logprobs(policy, row, 1.0)[0].cpu()
        return result[rollouts.response_mask]

    rows = [[0, 1], [2, 3, 4, 5]]
    scored = logprobs(common.load_policy(name, p.ranks, train=False), rows)
    policy = common.load_policy(name, p.ranks, train=True)
    same = (logprobs(policy, rows) - scored).abs().max()
    gap = logprobs(policy, [[0], [1, 4, 5], [2, 3]]) - scored
    p.tell("log-ratio, packed the same way: largest, nats", f"{same:.3g}")
    p.tell("log-ratio, packed otherwise: mean, sd, nats", f"{gap.mean():+.1e}, {gap.std():.1e}")
    outside = ((gap.exp() - 1).abs() > 0.1).float().mean()
    p.tell("share of ratios outside [0.9, 1.1]", f"{outside:.2%}")
    p.tell("mean log-prob of a token, nats", f"{scored.mean():.2f}")
    p.check("mean |log-ratio|, nats (NOISE)", gap.abs().mean().item(), common.NOISE[p.dtype])


def fsdp(p: Part) -> None:
    """Takes three steps, goes back to the checkpoint of the second, and saves and loads a model."""
    name, rate, ends = make_model(p), 1e-3, []
    row = common.make_row(make_rollouts(p, LENGTHS, 4), [0, 1, 2, 3], p.device)

    def begin(offload: bool) -> tuple[common.Policy, torch.optim.Optimizer]:
        """Loads the policy, and makes its optimizer."""
        how = {"checkpointing": True, "cpu_offload": offload}
        policy = common.load_policy(name, p.ranks, train=True, **how)
        return policy, common.make_optimizer(policy, rate, 0.0)

    def step(policy: common.Policy, optimizer: torch.optim.Optimizer) -> float:
        """Takes a step of SFT; returns its loss."""
        loss = -common.row_logprobs(policy, row, 1.0)[0].mean()
        loss.backward()
        common.optimizer_step(policy, optimizer, rate, 1.0)
        return loss.item()

    def state(policy: common.Policy, optimizer: torch.optim.Optimizer) -> Tensor:
        """Returns weights, moments and step counters as one tensor."""
        moments = [v for entry in optimizer.state.values() for v in entry.values()]
        return joined([*policy.parameters(), *moments])

    for what, offload in (("on the device", False), ("--cpu-offload", True)):
        folder = p.output / "fsdp" / what
        shutil.rmtree(folder, ignore_errors=True)
        policy, optimizer = begin(offload)
        device = "cpu" if offload else p.device.type
        misplaced = sum(x.device.type != device for x in policy.parameters())
        p.check(f"{what}: weights on another device", misplaced, 0)
        losses = [step(policy, optimizer), step(policy, optimizer)]
        common.save_checkpoint(folder, {"step": 2}, policy, optimizer, p.ranks)
        saved = state(policy, optimizer)
        losses.append(step(policy, optimizer))
        p.check(f"{what}: loss of step 3 over that of step 1", losses[2] / losses[0], 0.99)
        ends.append(joined(policy.parameters()))
        common.save_model(policy, make_base.make_tokenizer(), folder / "model", p.ranks)
        stored = joined(common.load_lm(str(folder / "model"), CPU, torch.float32).parameters())
        gap = (stored - ends[-1].to(p.dtype).float()).abs().max().item()
        p.check(f"{what}: saved model, largest difference from the weights", gap, 0)
        policy, optimizer = begin(offload)
        common.load_checkpoint(folder, policy, optimizer, p.ranks)
        gap = (state(policy, optimizer) - saved).abs().max().item()
        p.check(f"{what}: resumed state, largest difference", gap, 0)
        step(policy, optimizer)
        gap = (joined(policy.parameters()) - ends[-1]).abs() / rate
        p.tell(f"{what}: step 3 again, the same bits", "yes" if gap.max() == 0 else "no")
        p.check(f"{what}: step 3 again, mean difference in steps", gap.mean().item(), 0.05)
    gap = (ends[1] - ends[0]).abs().mean().item() / rate
    p.check("--cpu-offload beside without: mean difference in steps", gap, 0.05)


def stages(p: Part) -> None:
    """Runs stage 1 (also with --cpu-offload), signals and stage 2 as users run them."""
    base, rollouts = make_model(p), make_rollouts(p, [60, 33, 90, 71] * 8, 8)
    runs = p.output / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    evaluate.save_rollouts(rollouts)

    def launch(script: str, **flags: Any) -> None:
        """Runs a script by its command; where tyro lacks, by its main in this process."""
        flags = {"base": base, "rollouts": rollouts.path.parent} | flags
        words = []
        for name, value in flags.items():
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            words += ["--" + name.replace("_", "-"), *map(str, values)]
        if importlib.util.find_spec("tyro"):
            subprocess.run([sys.executable, str(ROOT / f"{script}.py"), *words], check=True)
        else:
            module = importlib.import_module(script)
            module.main(module.Args(**flags))

    how = {"batch_size": 16, "learning_rate": 3e-4, "warmup_steps": 1}
    for name, offload in (("teacher", {}), ("offloaded", {"cpu_offload": True})):
        launch("stage1_extreme", output=runs / name, epochs=8, save_at=(8.0,), **how, **offload)
    launch("build_signals", teachers=(str(runs / "teacher"),), output=runs / "s.safetensors")
    how |= {"epochs": 4, "kl_every": 4, "token_kl": 5.0}
    launch("stage2_distill", signals=runs / "s.safetensors", output=runs / "student", **how)
    for name in ("teacher", "offloaded", "student"):
        lines = (runs / name / "metrics.jsonl").read_text().splitlines()
        first, last = json.loads(lines[0]), json.loads(lines[-1])
        gap, most = abs(first["ratio"] - 1), common.NOISE[p.dtype]
        p.check(f"{name}: |mean ratio - 1| at step 1", gap, most)
        p.check(f"{name}: loss, last over first", last["loss"] / first["loss"], 0.9)


# --------------------------------------------------------------------------------------------------
# Parts: how fast?


def useful_flops(shape: memory.Shape, lengths: list[int], responses: int) -> float:
    """Returns the FLOPs of FORMULA."""
    blocks = 6 * shape.layers * shape.block_matrices * sum(lengths)
    squares = 6 * shape.layers * shape.heads * shape.head_dim * sum(n * n for n in lengths)
    return float(blocks + 6 * shape.vocabulary * shape.hidden * responses + squares)


def busy(spans: list[tuple[float, float]]) -> float:
    """Returns how long at least one of the spans (start, end) lasts."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def profile(device: torch.device, work: Callable[[], Any]) -> tuple[str, float]:
    """Returns a table of the ten costliest kernels (CPU: operators), and the share of time in which
    the device runs none. Operators are not watched on a GPU, because that slows the host down."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    cuda = device.type == "cuda"
    with watch(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as record:
        work()
        now(device)
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    events = [e for e in record.events() if e.device_type == kind and not e.is_user_annotation]
    spans = [(e.time_range.start, e.time_range.end) for e in events]
    waits = 1 - busy(spans) / (max(end for _, end in spans) - min(start for start, _ in spans))
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        own = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
        times[event.name[:90].replace("|", "/")].append(own / 1e3)
    total = sum(map(sum, times.values()))
    table = "| kernel | calls | ms | share |\n| --- | --- | --- | --- |\n"
    for name, own in sorted(times.items(), key=lambda item: -sum(item[1]))[:10]:
        table += f"| `{name}` | {len(own)} | {sum(own):.1f} | {sum(own) / total:.1%} |\n"
    return table, waits


def training(p: Part, size: str, offload: bool) -> None:
    """Times stage 1's ce with activation checkpointing, in rows of 16k and 32k tokens."""
    cuda, name = p.device.type == "cuda", make_model(p, "tiny" if p.quick else size)
    shape = memory.read_shape(tiny_shape(p) if p.quick else memory.qwen3(size))
    before, start = torch.cuda.memory_allocated() if cuda else 0, now(p.device)
    how = {"checkpointing": True, "cpu_offload": offload}
    policy = common.load_policy(name, p.ranks, train=True, **how)
    optimizer = common.make_optimizer(policy, 1e-6, 0.0)
    p.tell("parameters; loading", f"{shape.parameters / 1e9:.3g} G; {now(p.device) - start:.0f} s")
    args = stage1_extreme.Args(base=name, rollouts=p.output, output=p.output)
    update = functools.partial(common.optimizer_step, policy, optimizer, 1e-6, 1.0)

    def train(row: common.Row, targets: dict[str, Tensor]) -> None:
        """Runs a row forward and backward, with the objective and the diagnostics of stage 1."""
        logprobs, entropy = common.row_logprobs(policy, row, 1.0)
        ours = (logprobs, logprobs.detach(), entropy, row.sequence_ids)
        x = stage1_extreme.LossInputs(*ours, **targets)
        stage1_extreme.ce_loss(x, args)[0].backward()
        stage1_extreme.diagnostics(x)

    for tokens in (512, 1024) if p.quick else (16384, 32768):
        what, prompt = f"rows of {tokens} tokens", tokens // 128
        lengths = [tokens // 2, tokens // 4, tokens // 8, tokens // 8]
        rollouts = make_rollouts(p, lengths, prompt, shape.vocabulary)
        targets = stage1_extreme.training_targets(args, rollouts)
        targets = {key: value.to(p.device) for key, value in targets.items()}
        row = common.make_row(rollouts, [0, 1, 2, 3], p.device)
        one, responses = functools.partial(train, row, targets), tokens - 4 * prompt
        setting = memory.Setting(tokens, responses, checkpointing=True, offload=offload)
        predicted = memory.memory(shape, setting)["peak"] / 1e9
        room = torch.cuda.get_device_properties(p.device).total_memory / 1e9 if cuda else 0.0
        try:
            one()
            update()  # a step that is not counted: kernels are loaded
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            of_row, start = seconds(p.device, one), now(p.device)
            norm = update()
            of_update = now(p.device) - start
        except torch.OutOfMemoryError:
            held = (torch.cuda.max_memory_allocated() - before) / 1e9
            p.tell(f"{what}: OUT OF MEMORY, GB held; predicted; on the card",
                   f"{held:.1f}; {predicted:.1f}; {room:.1f}")  # fmt: skip
            p.check(f"{what}: GB that the prediction leaves free", room * 15 / 16 - predicted, 0)
            return  # FSDP was cut short, so this policy is of no more use
        p.tell(f"{what}: s of forward and backward; of the optimizer; gradient norm",
               f"{of_row:.3f}; {of_update:.3f}; {norm:.3g}")  # fmt: skip
        p.tell(f"{what}: tokens/s of rows; computed, with a step after every 16",
               f"{tokens / of_row:,.0f}; {tokens / (of_row + of_update / 16):,.0f}")  # fmt: skip
        if cuda:
            tflops = useful_flops(shape, lengths, responses) / of_row / 1e12
            device = torch.cuda.get_device_name()
            peak = next((v for k, v in PEAKS.items() if k in device), float("nan"))
            p.tell(f"{what}: useful TFLOP/s of rows; MFU, of {peak} TFLOP/s",
                   f"{tflops:.0f}; {tflops / peak:.1%}")  # fmt: skip
            held = (torch.cuda.max_memory_allocated() - before) / 1e9
            p.tell(f"{what}: GB at the peak; reserved; predicted by memory.py",
                   f"{held:.1f}; {torch.cuda.max_memory_reserved() / 1e9:.1f}; "
                   f"{predicted:.1f}")  # fmt: skip
            p.check(f"{what}: |peak / predicted - 1|", abs(held / predicted - 1), 0.1)
        table, waits = profile(p.device, one)
        p.tell(f"{what}: share of a row in which the device waits", f"{waits:.1%}")
        p.tables += f"\nOne row of {tokens} tokens:\n\n{table}"
        optimizer.zero_grad()


PARTS: dict[str, Callable[[Part], None]] = {
    "attention": attention,
    "head": head,
    "packed": packed,
    "noise": noise,
    "fsdp": fsdp,
    "stages": stages,
    "qwen3-0.6b": functools.partial(training, size="0.6B", offload=False),
    "qwen3-4b": functools.partial(training, size="4B", offload=False),
    "qwen3-1.7b-cpu-offload": functools.partial(training, size="1.7B", offload=True),
}


# --------------------------------------------------------------------------------------------------
# Running them, and the page


def work(names: list[str], quick: bool, output: Path) -> None:
    """Runs parts in this process, up to the first that raises an exception or times a model."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # whatever the machine's name leads to
    ranks = common.setup_ranks(cpu_offload=True)
    cuda = ranks.device.type == "cuda"
    for name in names:
        part = Part(quick, output, ranks, ranks.device, common.compute_dtype(ranks.device))
        start, record = time.monotonic(), {}
        print(f"{name}: {getattr(PARTS[name], 'func', PARTS[name]).__doc__}", flush=True)
        try:
            PARTS[name](part)
        except ModuleNotFoundError as error:
            record["skipped"] = f"package {error.name} is not installed"
            print(f"  part {name} skipped: {record['skipped']}", flush=True)
        except Exception as error:
            traceback.print_exc()
            record["error"] = f"{type(error).__name__}: {error}"[:300].replace("\n", " ")
            record["error"] += f"; {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if cuda else ""
        record |= {"lines": part.lines, "tables": part.tables, "seconds": time.monotonic() - start}
        record |= {"device": torch.cuda.get_device_name() if cuda else "CPU"}
        common.write_json(output / "results" / f"{name}.json", record)
        if "error" in record or name.startswith("qwen3"):
            return  # the next part gets a device without errors, and memory that is not in pieces
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()


def run_parts(names: list[str], quick: bool, output: Path, limit: float) -> dict[str, Any]:
    """Runs the parts that have no result in a process of its own, and in a new one where it ends.

    Returns {part: record} of all parts, asked for or not, that have one then."""
    paths, end = {n: output / "results" / f"{n}.json" for n in names}, time.monotonic() + limit
    for path in filter(Path.is_file, paths.values()):
        if {"error", "skipped"} & common.read_json(path).keys():  # it may do better now
            path.unlink()
    while todo := [name for name, path in paths.items() if not path.is_file()]:
        command = [sys.executable, __file__, "--here", "--output", str(output), "--parts", *todo]
        command += ["--quick"] if quick else []
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if quick else {})
        try:
            left = max(1.0, end - time.monotonic())
            code = subprocess.run(command, env=environment, timeout=left).returncode
        except subprocess.TimeoutExpired:
            print("out of time; repeat the command for what is missing", flush=True)
            break
        if not paths[todo[0]].is_file():  # it died without a word
            record = {"lines": [], "tables": "", "seconds": 0, "device": "?"}
            common.write_json(paths[todo[0]], record | {"error": f"exit code {code}"})
    every = {name: output / "results" / f"{name}.json" for name in PARTS}
    return {name: common.read_json(path) for name, path in every.items() if path.is_file()}


def succeeded(record: dict[str, Any]) -> bool:
    """Says whether a part ended without an error and all its checks passed."""
    return "error" not in record and all(line.get("passed", True) for line in record["lines"])


def page(records: dict[str, Any]) -> str:
    """Returns the results as Markdown."""
    from transformers import __version__

    devices = " / ".join(sorted({record["device"] for record in records.values()}))
    text = "# Measured on a GPU\n\nMade by `python benchmarks/gpu.py`, whose docstring says what "
    text += f"is measured. {devices}, torch {torch.__version__}, transformers {__version__}. "
    text += f"{FORMULA}. Differences are relative where no unit is named.\n"
    for name, record in records.items():
        notes = "".join(f" {k}: {record[k]}." for k in ("error", "skipped") if k in record)
        text += f"\n## {name}\n\n{record['seconds']:.0f} s.{notes}\n\n"
        text += "| measured | value | at most | passed |\n| --- | --- | --- | --- |\n"
        for line in record["lines"]:
            passed = {True: "yes", False: "**no**", None: ""}[line.get("passed")]
            text += f"| {line['what']} | {line['value']} | {line.get('at most', '')} | {passed} |\n"
        text += record["tables"]
    return text


def main() -> int:
    """Runs what has no result yet. Parses without tyro, which a GPU machine may lack."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--quick", action="store_true", help="in small on the CPU")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu", help="folder")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="default: all")
    parser.add_argument("--minutes", type=float, default=8.8, help="when to stop")
    parser.add_argument("--here", action="store_true", help="in this process (used by the others)")
    args = parser.parse_args()
    if args.here:
        work(args.parts, args.quick, args.output)
        return 0
    if not (args.quick or torch.cuda.is_available()):
        print("error: torch sees no GPU; --quick runs everything in small", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) if args.quick else args.output
        records = run_parts(args.parts, args.quick, output, 60 * args.minutes)
    if records and not args.quick:
        (ROOT / "benchmarks" / "RESULTS_GPU.md").write_text(page(records), encoding="utf-8")
    failed = [name for name, record in records.items() if not succeeded(record)]
    missing = [name for name in args.parts if "skipped" in records.get(name, {"skipped": ""})]
    print(f"failed: {', '.join(failed) or 'none'}; missing: {', '.join(missing) or 'none'}")
    return 1 if failed or missing else 0


if __name__ == "__main__":
    sys.exit(main())
