"""Answers on one GPU, in one command, what the tests on a CPU cannot: is it right there, how fast?

    attention    our packed attention (FlashAttention on a GPU, a loop on the CPU) and torch's sdpa
                 against float64 with a whole mask: values, gradients, windows, grouped heads
    head         the tiled head in the compute type against float64; its time and memory
    packed       packed rows and one sequence at a time, against the CPU in float32
    noise        a training forward beside the scoring pass, packed otherwise: the ratio of step 0
    fsdp         steps, a checkpoint, the way back and a saved model, with and without --cpu-offload
    stages       stage 1, signals and stage 2 by their commands on a tiny model
    qwen3-...    random weights in the shape of Qwen3: tokens/s, MFU, peak of memory beside
                 benchmarks/memory.py, and the ten costliest kernels of one row

A part writes OUTPUT/results/PART.json when it ends, and one that is there is not run again: repeat
the command until all are there. A part that fails does not stop the others. Exit code 1: a check
failed, or a part is missing. Nothing is downloaded, and the models' random weights (12 GB) stay in
OUTPUT/models. Packages: those of requirements.txt, but torch, transformers, safetensors will do.

    python benchmarks/gpu.py                # one H100 or H200, about nine minutes
    python benchmarks/gpu.py --quick        # small, on the CPU, without touching RESULTS_GPU.md
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
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
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
import stage1_extreme  # noqa: E402

# Dense bfloat16 by the data sheets, TFLOP/s; the first name that the device's contains.
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312}
FORMULA = (
    "FLOPs = 6 (block matrices) tokens + 6 V D (response tokens) + 6 L Q sum n^2, for L blocks, "
    "queries of width Q and sequences of n tokens (causal); recomputation is not counted"
)
ROUNDING = {torch.bfloat16: 1e-2, torch.float32: 1e-5}  # relative, of a sum of many products
PROMPT = 128  # tokens of a prompt in the timed rows


@dataclass
class Setting:
    """Where and how large the parts run."""

    quick: bool
    output: Path
    ranks: common.Ranks

    @property
    def device(self) -> torch.device:
        """Returns the GPU, or with --quick the CPU."""
        return self.ranks.device

    @property
    def dtype(self) -> torch.dtype:
        """Returns the type in which the stages compute there."""
        return common.compute_dtype(self.device)


@dataclass
class Found:
    """Collects what a part measured, and prints it as it goes."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""  # a table

    def tell(self, what: str, value: str) -> None:
        """Notes a number without a bound."""
        self.lines.append({"what": what, "value": value})
        print(f"  {what}: {value}", flush=True)

    def check(self, what: str, value: float, most: float) -> None:
        """Notes a number that may be at most `most`."""
        passed = bool(value <= most)  # nan does not pass
        line = {"what": what, "value": f"{value:.3g}", "at most": f"{most:.3g}", "passed": passed}
        self.lines.append(line)
        print(
            f"  {what}: {value:.3g} (at most {most:.3g}){'' if passed else ' FAILED'}", flush=True
        )


# --------------------------------------------------------------------------------------------------
# What several parts need


def off(found: Tensor, expected: Tensor) -> float:
    """Returns the size of the difference over the size of what is expected."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return ((found - expected).norm() / expected.norm()).item()


def wait(device: torch.device) -> float:
    """Waits until the device is done, and returns the time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(device: torch.device, work: Callable[[], Any]) -> float:
    """Returns the median time of three runs, after one that is not counted."""
    times = []
    for _ in range(4):
        start = wait(device)
        work()
        times.append(wait(device) - start)
    return statistics.median(times[1:])


def peak_of(device: torch.device, work: Callable[[], Any]) -> int:
    """Returns the most bytes that torch held while `work` ran, above those from before; CPU: 0."""
    if device.type != "cuda":
        work()
        return 0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    wait(device)
    return torch.cuda.max_memory_allocated() - before


def make_model(s: Setting, size: str = "tiny") -> str:
    """Writes a Qwen3 with random weights, in bfloat16 as users have it; returns its folder.

    A large final norm makes its predictions peaked, as those of a trained model are."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    folder, tokenizer = s.output / "models" / size, make_base.make_tokenizer()
    if folder.is_dir():
        return str(folder)
    torch.manual_seed(0)
    shape = tiny_shape(s) if size == "tiny" else memory.qwen3(size)
    del shape["model_type"]
    config = Qwen3Config(**shape, max_position_embeddings=65536, eos_token_id=1, bos_token_id=None)
    with s.device:
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        lm.model.norm.weight.fill_(5)
    temporary = folder.with_name(f".{size}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    lm.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    os.replace(temporary, folder)
    return str(folder)


def tiny_shape(s: Setting) -> dict[str, Any]:
    """Returns the shape of a model of the tokenizer of the arithmetic example."""
    width, layers, head_dim = (64, 2, 16) if s.quick else (512, 4, 64)
    shape = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 2 * width}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": head_dim}
    vocabulary = len(make_base.make_tokenizer())
    return memory.qwen3("0.6B") | shape | {"vocab_size": vocabulary}


def make_rollouts(
    folder: Path, lengths: list[int], prompt: int, vocabulary: int
) -> common.Rollouts:
    """Makes rollouts of random tokens, four to a problem; every second is right."""
    n, generator = len(lengths), torch.Generator().manual_seed(0)
    total = sum(lengths)
    return common.Rollouts(
        path=folder / "rollouts.safetensors",
        metadata={},
        tokens=torch.randint(3, vocabulary, (total,), dtype=torch.int32, generator=generator),
        cu_seqlens=F.pad(torch.tensor(lengths).cumsum(0), (1, 0)),
        prompt_lens=torch.full((n,), prompt, dtype=torch.int32),
        rewards=(torch.arange(n) % 2).float(),
        problem_index=torch.arange(n, dtype=torch.int32) // 4,
        truncated=torch.zeros(n, dtype=torch.bool),
    )


def whole(tensor: Tensor) -> Tensor:
    """Returns a copy of a sharded or plain tensor, in float32 on the CPU."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().float().cpu().clone()


# --------------------------------------------------------------------------------------------------
# Parts: is it right?


def attention(found: Found, s: Setting) -> None:
    """Compares with float64 on the CPU, where a whole mask says who sees whom."""
    lengths, window = ([257, 1, 700, 64], 100) if s.device.type == "cuda" else ([33, 2, 70, 8], 16)
    rollouts = make_rollouts(s.output, lengths, 1, 9)
    row, there = (
        common.make_row(rollouts, [0, 1, 2, 3], d) for d in (torch.device("cpu"), s.device)
    )
    place, owner = torch.arange(sum(lengths)), row.position_ids.eq(0).cumsum(0)
    seen = (owner[:, None] == owner) & (place[:, None] >= place)
    for (heads, groups, width), bound in itertools.product(
        [(8, 8, 64), (16, 4, 128)], [None, window]
    ):
        torch.manual_seed(0)
        mask = seen if bound is None else seen & (place[:, None] - place < bound)
        shapes = [(1, n, len(place), width) for n in (heads, groups, groups)]
        inputs = [torch.randn(shape).bfloat16() for shape in shapes]
        upstream = torch.randn(1, len(place), heads, width).bfloat16()

        def ours(q: Tensor, k: Tensor, v: Tensor, row: common.Row, bound: int | None) -> Tensor:
            module = torch.nn.Identity()
            return common.packed_attention(module, q, k, v, None, packed=row, sliding_window=bound)[
                0
            ]

        def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            out = F.scaled_dot_product_attention(q, k, v, mask.to(q.device), enable_gqa=True)
            return out.transpose(1, 2)

        def run(
            attend: Callable[..., Tensor], device: torch.device, dtype: torch.dtype,
            inputs: list[Tensor] = inputs, upstream: Tensor = upstream,
        ) -> list[Tensor]:  # fmt: skip
            """Returns values and the three gradients."""
            qkv = [x.to(device, dtype).requires_grad_() for x in inputs]
            out = attend(*qkv)
            return [out, *torch.autograd.grad(out, qkv, upstream.to(device, dtype))]

        what = f"{heads} heads of {width}, {groups} of keys, " + (
            f"window {bound}" if bound else "no window"
        )
        expected = run(functools.partial(sdpa, mask=mask), torch.device("cpu"), torch.float64)
        theirs = run(functools.partial(sdpa, mask=mask), s.device, s.dtype)
        loop = run(
            functools.partial(ours, row=row, bound=bound), torch.device("cpu"), torch.float32
        )
        try:
            packed = run(functools.partial(ours, row=there, bound=bound), s.device, s.dtype)
        except common.UserError as error:
            found.tell(what, f"refused: {error}")
            continue
        for name, values, most in [
            ("values", slice(0, 1), ROUNDING[s.dtype]),
            ("gradients", slice(1, 4), ROUNDING[s.dtype]),
        ]:
            worst = [
                max(off(a, b) for a, b in zip(x[values], expected[values], strict=True))
                for x in (packed, loop, theirs)
            ]
            found.check(f"{what}: {name}, ours", worst[0], most)
            found.check(f"{what}: {name}, the loop on the CPU", worst[1], ROUNDING[torch.float32])
            found.tell(f"{what}: {name}, torch's sdpa", f"{worst[2]:.3g}")


def head(found: Found, s: Setting) -> None:
    """Compares log-probs, entropy and gradients of the head with float64."""
    torch.manual_seed(0)
    n, width, vocabulary = (64, 32, 5000) if s.quick else (2048, 2560, 151_936)
    hidden = torch.randn(n, width, device=s.device).to(s.dtype).requires_grad_()
    weight = (0.05 * torch.randn(vocabulary, width, device=s.device)).to(s.dtype).requires_grad_()
    targets, upstream = torch.randint(vocabulary, (n,)), torch.randn(n)
    targets, upstream = targets.to(s.device), upstream.to(s.device)

    def ours(temperature: float = 0.7) -> list[Tensor]:
        """Returns log-probs, entropy, and the gradients of both inputs."""
        found = common.head_logprobs(hidden, common.Output(weight), targets, temperature)
        return [*found, *torch.autograd.grad(found[0], (hidden, weight), upstream)]

    inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    z = (inputs[0] @ inputs[1].T / 0.7).log_softmax(-1)
    logprobs = z.gather(-1, targets[:, None])[:, 0]
    expected = [logprobs, -(z.exp() * z).sum(-1)]
    expected += torch.autograd.grad(logprobs, inputs, upstream.double())
    names = ["log-probs", "entropy", "gradient of the hidden states", "gradient of the matrix"]
    bounds = [1e-5, 1e-5, ROUNDING[s.dtype], ROUNDING[s.dtype]]
    for name, a, b, most in zip(names, ours(), expected, bounds, strict=True):
        found.check(f"{name}, relative to float64", off(a, b), most)
    del z, logprobs, expected, inputs
    shape = f"{n} positions of {width}, vocabulary {vocabulary}"
    found.tell(f"{shape}: forward and backward", f"{1e3 * seconds(s.device, ours):.1f} ms")
    found.tell("memory above the inputs", f"{peak_of(s.device, ours) / 1e9:.2f} GB")


def packed(found: Found, s: Setting) -> None:
    """Compares packed rows and single sequences with the CPU in float32: log-probs, gradients."""
    name = make_model(s)
    rollouts = make_rollouts(s.output, [40, 9, 200, 31, 90, 17], 4, tiny_shape(s)["vocab_size"])
    weights = torch.randn(len(rollouts.tokens), generator=torch.Generator().manual_seed(1))

    def run(rows: list[list[int]], ranks: common.Ranks, found: Found | None) -> list[Tensor]:
        """Returns the log-probs [N] and all gradients as one tensor."""
        policy = common.load_policy(name, ranks, train=True)
        if found:
            common.check_policy(policy, rollouts, "tiny", ranks)
            found.tell("check_policy takes the way", policy.way)
        result = torch.zeros(len(rollouts.tokens))
        for members in rows:
            row = common.make_row(rollouts, members, ranks.device)
            logprobs, _ = common.row_logprobs(policy, row, 1.0)
            (logprobs * weights[row.flat].to(ranks.device)).sum().backward()
            result[row.flat] = logprobs.detach().cpu()
        return [result, torch.cat([whole(p.grad).flatten() for p in policy.parameters()])]

    alone = [[i] for i in range(6)]
    expected = run(alone, common.Ranks(0, 1, torch.device("cpu")), None)
    single, together = run(alone, s.ranks, None), run([[2, 0], [4, 3, 1, 5]], s.ranks, found)
    for i, what in enumerate(["log-probs", "gradients"]):
        rounding = off(single[i], expected[i])
        found.tell(f"{what}, one sequence a row: off float32 on the CPU", f"{rounding:.3g}")
        most = 1.5 * rounding + ROUNDING[torch.float32]
        found.check(
            f"{what}, packed rows: off float32 on the CPU", off(together[i], expected[i]), most
        )


def noise(found: Found, s: Setting) -> None:
    """Measures log-ratios that would be 0 without rounding: training forward minus scores."""
    name = make_model(s, "tiny" if s.quick else "0.6B")
    lengths = [40, 9, 200, 31, 90, 17] if s.quick else [4000, 900, 2000, 310, 1900, 1700]
    vocabulary = common.text_config(name).vocab_size
    rollouts = make_rollouts(s.output, lengths, 8, vocabulary)

    def logprobs(rows: list[list[int]], train: bool) -> Tensor:
        """Returns the log-probs of all response tokens."""
        policy = common.load_policy(name, s.ranks, train=train)
        result = torch.zeros(len(rollouts.tokens))
        for members in rows:
            row = common.make_row(rollouts, members, s.device)
            with torch.no_grad():
                result[row.flat] = common.row_logprobs(policy, row, 1.0)[0].cpu()
        return result[rollouts.response_mask]

    scored, same = logprobs([[0, 1], [2, 3, 4, 5]], False), logprobs([[0, 1], [2, 3, 4, 5]], True)
    log_ratio = logprobs([[0], [1, 4, 5], [2, 3]], True) - scored
    found.tell("packed the same way: most nats off", f"{(same - scored).abs().max():.3g}")
    found.tell("packed otherwise: mean and standard deviation, nats",
               f"{log_ratio.mean():+.1e}, {log_ratio.std():.1e}")  # fmt: skip
    outside = ((log_ratio.exp() - 1).abs() > 0.1).float().mean()
    found.tell("share of tokens with a ratio outside [0.9, 1.1]", f"{outside:.2%}")
    found.tell("mean log-prob of a token, nats", f"{scored.mean():.2f}")
    most = common.NOISE[s.dtype]  # of common.py, by which check_policy judges
    found.check("mean of |log-ratio|, nats", log_ratio.abs().mean().item(), most)


def fsdp(found: Found, s: Setting) -> None:
    """Takes three steps; goes back to the checkpoint of the second; saves and loads the model."""
    name, rate = make_model(s), 1e-3
    rollouts = make_rollouts(s.output, [40, 9, 200, 31], 4, tiny_shape(s)["vocab_size"])
    row = common.make_row(rollouts, [0, 1, 2, 3], s.device)
    ends = {}

    def begin(offload: bool) -> tuple[common.Policy, torch.optim.Optimizer]:
        """Loads the policy, and makes its optimizer."""
        how = {"checkpointing": True, "cpu_offload": offload}
        policy = common.load_policy(name, s.ranks, train=True, **how)
        return policy, common.make_optimizer(policy, rate, 0.0)

    def step(policy: common.Policy, optimizer: torch.optim.Optimizer) -> float:
        """Takes a step of SFT, clipped; returns its loss."""
        loss = -common.row_logprobs(policy, row, 1.0)[0].mean()
        loss.backward()
        common.optimizer_step(policy, optimizer, rate, 1.0)
        return loss.item()

    def contents(policy: common.Policy, optimizer: torch.optim.Optimizer) -> Tensor:
        """Returns weights, moments and step counters, as one tensor."""
        moments = [v for state in optimizer.state.values() for v in state.values()]
        return torch.cat([whole(x).flatten() for x in [*policy.parameters(), *moments]])

    def weights(policy: common.Policy) -> Tensor:
        """Returns the weights as one tensor."""
        return torch.cat([whole(p).flatten() for p in policy.parameters()])

    for offload in (False, True):
        what = "--cpu-offload" if offload else "on the device"
        folder = s.output / "scratch" / f"fsdp-{offload}"
        shutil.rmtree(folder, ignore_errors=True)
        policy, optimizer = begin(offload)
        elsewhere = sum(p.device.type != "cpu" for p in policy.parameters()) if offload else 0
        found.check(f"{what}: weights that do not lie where they should", elsewhere, 0)
        losses = [step(policy, optimizer), step(policy, optimizer)]
        common.save_checkpoint(folder, {"step": 2}, policy, optimizer, s.ranks)
        saved = contents(policy, optimizer)
        losses.append(step(policy, optimizer))
        ends[offload] = weights(policy)
        found.check(f"{what}: loss of step 3 over that of step 1", losses[2] / losses[0], 0.99)
        common.save_model(policy, make_base.make_tokenizer(), folder / "model", s.ranks)
        cpu = common.load_lm(str(folder / "model"), torch.device("cpu"), torch.float32)
        stored = torch.cat([p.detach().flatten() for p in cpu.parameters()])
        least = (stored - ends[offload].to(s.dtype).float()).abs().max().item()
        found.check(f"{what}: saved model, largest difference from its weights", least, 0)
        policy, optimizer = begin(offload)
        common.load_checkpoint(folder, policy, optimizer, s.ranks)
        least = (contents(policy, optimizer) - saved).abs().max().item()
        found.check(f"{what}: what a checkpoint gives back, largest difference", least, 0)
        step(policy, optimizer)
        gap = (weights(policy) - ends[offload]).abs() / rate
        bits = "the same bits" if gap.max() == 0 else f"at most {gap.max():.1e} steps off"
        found.tell(f"{what}: step 3 after resuming", bits)
        found.check(
            f"{what}: step 3 after resuming, mean difference in steps", gap.mean().item(), 0.05
        )
    gap = (ends[True] - ends[False]).abs().mean().item() / rate
    found.check("--cpu-offload beside without, mean difference in steps", gap, 0.05)


def stages(found: Found, s: Setting) -> None:
    """Runs stage 1 (twice: also with --cpu-offload), signals and stage 2 as users run them."""
    base, data, runs = make_model(s), s.output / "scratch" / "data", s.output / "scratch" / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    rollouts = make_rollouts(data, [60, 33, 90, 71] * 8, 8, tiny_shape(s)["vocab_size"])
    arrays = {name: getattr(rollouts, name) for name in ("cu_seqlens", *common.ARRAYS)}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    common.save_tensors(rollouts.path, arrays, rollouts.metadata)
    commands = importlib.util.find_spec("tyro") is not None
    if not commands:
        found.tell("package tyro is not installed", "main(Args) runs instead of the commands")

    def launch(script: str, **flags: Any) -> None:
        """Runs a script by its command; where tyro lacks, by its main in this process."""
        flags = {"base": base, "rollouts": data} | flags
        words = []
        for name, value in flags.items():
            values = [] if value is True else value if isinstance(value, tuple) else (value,)
            words += ["--" + name.replace("_", "-"), *map(str, values)]
        if commands:
            subprocess.run([sys.executable, str(ROOT / f"{script}.py"), *words], check=True)
        else:
            module = importlib.import_module(script)
            module.main(module.Args(**flags))

    steps = {"batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 1, "max_noise": 0.2}
    launch("stage1_extreme", output=runs / "teacher", epochs=8, save_at=(8.0,), **steps)
    launch("stage1_extreme", output=runs / "offloaded", epochs=8, save_at=(8.0,), **steps,
           cpu_offload=True)  # fmt: skip
    launch("build_signals", teachers=(str(runs / "teacher"),), output=runs / "s.safetensors")
    del steps["max_noise"]
    launch("stage2_distill", signals=runs / "s.safetensors", output=runs / "student", epochs=4,
           kl_every=4, token_kl=5.0, **steps)  # fmt: skip
    for run in ("teacher", "offloaded", "student"):
        lines = (runs / run / "metrics.jsonl").read_text().splitlines()
        first, last = json.loads(lines[0]), json.loads(lines[-1])
        most = common.NOISE[s.dtype]
        found.check(f"{run}: |mean ratio - 1| at step 1", abs(first["ratio"] - 1), most)
        found.check(f"{run}: loss, last over first", last["loss"] / first["loss"], 0.9)


# --------------------------------------------------------------------------------------------------
# Parts: how fast?


def useful_flops(shape: memory.Shape, lengths: list[int], responses: int) -> float:
    """Returns the FLOPs of FORMULA for one row."""
    blocks = 6 * shape.layers * shape.block_matrices * sum(lengths)
    width = shape.heads * shape.head_dim
    squares = 6 * shape.layers * width * sum(n * n for n in lengths)
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
    the device has none. Kernels only: watching operators too would slow the host down."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    cuda = device.type == "cuda"
    with watch(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as record:
        work()
        wait(device)
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    events = [e for e in record.events() if e.device_type == kind and not e.is_user_annotation]
    spans = [(e.time_range.start, e.time_range.end) for e in events]
    waits = 1 - busy(spans) / (max(b for _, b in spans) - min(a for a, _ in spans))
    sums: dict[str, list[float]] = defaultdict(list)
    for event in events:
        own = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
        sums[event.name[:90].replace("|", "/")].append(own)
    total = sum(map(sum, sums.values()))
    table = "| kernel | calls | ms | share |\n| --- | --- | --- | --- |\n"
    for name, times in sorted(sums.items(), key=lambda item: -sum(item[1]))[:10]:
        table += (
            f"| `{name}` | {len(times)} | {sum(times) / 1e3:.1f} | {sum(times) / total:.1%} |\n"
        )
    return table, waits


def training(found: Found, s: Setting, size: str, offload: bool) -> None:
    """Times steps of stage 1's ce with activation checkpointing, rows of 16k and 32k tokens."""
    name, cuda = make_model(s, "tiny" if s.quick else size), s.device.type == "cuda"
    shape = memory.read_shape(tiny_shape(s) if s.quick else memory.qwen3(size))
    before, start = torch.cuda.memory_allocated() if cuda else 0, wait(s.device)
    how = {"checkpointing": True, "cpu_offload": offload}
    policy = common.load_policy(name, s.ranks, train=True, **how)
    optimizer = common.make_optimizer(policy, 1e-6, 0.0)
    found.tell("parameters", f"{shape.parameters / 1e9:.3f} G")
    found.tell("loading, with the optimizer", f"{wait(s.device) - start:.0f} s")
    args = stage1_extreme.Args(base=name, rollouts=s.output, output=s.output)
    device = torch.cuda.get_device_name() if cuda else "CPU"
    peak_tflops = next((v for k, v in PEAKS.items() if k in device), None)

    def train(row: common.Row, targets: dict[str, Tensor]) -> None:
        """Runs a row forward and backward, with the objective and diagnostics of stage 1."""
        logprobs, entropy = common.row_logprobs(policy, row, 1.0)
        inputs = (logprobs, logprobs.detach(), entropy, row.sequence_ids)
        x = stage1_extreme.LossInputs(*inputs, **targets)
        (stage1_extreme.ce_loss(x, args)[0] / 4).backward()
        stage1_extreme.diagnostics(x)

    def update() -> None:
        """Takes the optimizer's step."""
        common.optimizer_step(policy, optimizer, 1e-6, 1.0)

    for tokens in (512, 1024) if s.quick else (16384, 32768):
        lengths = [tokens // 2, tokens // 4, tokens // 8, tokens // 8]
        prompt = min(PROMPT, tokens // 16)
        rollouts = make_rollouts(s.output, lengths, prompt, shape.vocabulary)
        row = common.make_row(rollouts, [0, 1, 2, 3], s.device)
        targets = stage1_extreme.training_targets(args, rollouts)
        targets = {k: v.to(s.device) for k, v in targets.items()}
        one = functools.partial(train, row, targets)
        responses = tokens - 4 * prompt
        setting = memory.Setting(tokens, responses, True, offload=offload)
        predicted = memory.memory(shape, setting)["peak"]
        what = f"rows of {tokens} tokens"
        try:
            one()
            update()  # a step that is not counted: kernels are loaded, memory is taken
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            of_row = seconds(s.device, one)
            start = wait(s.device)
            update()
            of_update = wait(s.device) - start
        except torch.OutOfMemoryError:
            held = (torch.cuda.max_memory_allocated() - before) / 1e9
            room = torch.cuda.get_device_properties(s.device).total_memory
            found.tell(f"{what}: OUT OF MEMORY", f"{held:.1f} GB held, {room / 1e9:.1f} GB there")
            found.check(f"{what}: out of memory though memory.py predicts, GB", 
                        (predicted < 15 / 16 * room) * predicted / 1e9, 0)  # fmt: skip
            return  # FSDP was cut short, so nothing more can be learnt from this policy
        tflops = useful_flops(shape, lengths, responses) / of_row / 1e12
        found.tell(f"{what}: row forward and backward", f"{of_row:.3f} s")
        found.tell(f"{what}: optimizer's step", f"{of_update:.3f} s")
        found.tell(f"{what}: tokens/s without, and with a step every 16 rows",
                   f"{tokens / of_row:,.0f}, {16 * tokens / (16 * of_row + of_update):,.0f}")  # fmt: skip
        if cuda and peak_tflops:
            found.tell(f"{what}: useful TFLOP/s; MFU, of {peak_tflops} TFLOP/s",
                       f"{tflops:.0f}; {tflops / peak_tflops:.1%}")  # fmt: skip
        if cuda:
            held = torch.cuda.max_memory_allocated() - before
            found.tell(f"{what}: peak, GB; reserved; predicted by memory.py",
                       f"{held / 1e9:.1f}; {torch.cuda.max_memory_reserved() / 1e9:.1f}; "
                       f"{predicted / 1e9:.1f}")  # fmt: skip
            found.check(f"{what}: |peak / predicted - 1|", abs(held / predicted - 1), 0.1)
        table, waits = profile(s.device, one)
        found.tell(f"{what}: share of a row in which the device waits", f"{waits:.1%}")
        found.text += f"\nOne row of {tokens} tokens:\n\n{table}"
        found.check(f"{what}: gradient that is not finite", float(not finite(policy)), 0)
        optimizer.zero_grad()
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found.tell("peak of this process on the host", f"{host / 1e9:.1f} GB")


def finite(policy: common.Policy) -> bool:
    """Says whether every gradient is finite."""
    return all(whole(p.grad.norm()).isfinite() for p in policy.parameters())


PARTS: dict[str, Callable[[Found, Setting], None]] = {
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


def work(parts: list[str], quick: bool, output: Path) -> None:
    """Runs parts in this process, up to the first that fails by an exception."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # this machine only, whatever its name
    s = Setting(quick, output, common.setup_ranks(cpu_offload=True))
    machine = torch.cuda.get_device_name() if s.device.type == "cuda" else platform.processor()
    for part in parts:
        print(f"{part}: {(PARTS[part].__doc__ or training.__doc__).splitlines()[0]}", flush=True)
        found, start, trouble = Found(), time.monotonic(), {}
        try:
            PARTS[part](found, s)
        except ModuleNotFoundError as error:
            trouble = {"skipped": f"package {error.name} is not installed"}
            print(f"  part {part} skipped: {trouble['skipped']}", flush=True)
        except Exception as error:
            traceback.print_exc()
            trouble = {"error": f"{type(error).__name__}: {error}"[:500]}
        record = asdict(found) | trouble | {"seconds": time.monotonic() - start}
        record |= {"machine": machine, "torch": torch.__version__}
        common.write_json(output / "results" / f"{part}.json", record)
        if "error" in trouble:
            sys.exit(1)  # a device after an error, or a policy cut short, may fail again
        gc.collect()
        if s.device.type == "cuda":
            torch.cuda.empty_cache()


def page(records: dict[str, dict[str, Any]]) -> str:
    """Returns the results as Markdown."""
    import transformers

    one = next(iter(records.values()))
    text = "# Measured on a GPU\n\nMade by `python benchmarks/gpu.py`, whose docstring says what "
    text += f"is measured. {one['machine']}, torch {one['torch']}, transformers "
    text += f"{transformers.__version__}. {FORMULA}.\n"
    for part, record in records.items():
        text += f"\n## {part}\n\n{record['seconds']:.0f} s."
        for key in ("error", "skipped"):
            text += f" {key.capitalize()}: {record[key]}" if key in record else ""
        text += "\n\n| measured | value | at most | passed |\n| --- | --- | --- | --- |\n"
        for line in record["lines"]:
            passed = {True: "yes", False: "**no**", None: ""}[line.get("passed")]
            cells = (line["what"], line["value"], line.get("at most", ""), passed)
            text += "| " + " | ".join(cells) + " |\n"
        text += record["text"]
    return text


def main() -> int:
    """Parses the command line (without tyro, which a GPU machine may lack), runs what is missing."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--quick", action="store_true", help="small, on the CPU, results not kept")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu", help="folder")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="default: all")
    parser.add_argument("--minutes", type=float, default=8.8, help="time after which to stop")
    parser.add_argument("--in-process", action="store_true", help="internal: run the parts here")
    args = parser.parse_args()
    if args.in_process:
        work(args.parts, args.quick, args.output)
        return 0
    if not args.quick and not torch.cuda.is_available():
        print("error: torch sees no CUDA device; --quick runs in small on a CPU", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) if args.quick else args.output
        records = run_parts(args.parts, args.quick, output, time.monotonic() + 60 * args.minutes)
    text = page(records) if records else ""
    if args.quick:
        print("\n" + text)
    elif records:
        (ROOT / "benchmarks" / "RESULTS_GPU.md").write_text(text, encoding="utf-8")
    failed = [
        part
        for part, record in records.items()
        if "error" in record or not all(line.get("passed", True) for line in record["lines"])
    ]
    missing = [part for part in args.parts if part not in records]
    print(f"failed: {', '.join(failed) or 'none'}; missing: {', '.join(missing) or 'none'}")
    return 1 if failed or missing else 0


def run_parts(
    parts: list[str], quick: bool, output: Path, deadline: float
) -> dict[str, dict[str, Any]]:
    """Runs the parts without a result in a process of their own, in a new one after a failure."""
    paths = {part: output / "results" / f"{part}.json" for part in parts}
    for path in filter(Path.is_file, paths.values()):
        if "error" in common.read_json(path):
            path.unlink()
    while todo := [part for part in parts if not paths[part].is_file()]:
        command = [sys.executable, __file__, "--in-process", "--output", str(output), "--parts"]
        command += [*todo, *(["--quick"] if quick else [])]
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if quick else {})
        try:
            left = max(1.0, deadline - time.monotonic())
            code = subprocess.run(command, env=environment, timeout=left).returncode
        except subprocess.TimeoutExpired:
            print("out of time; repeat the command for what is missing", flush=True)
            break
        if not paths[todo[0]].is_file():  # it died without a word
            record = {"lines": [], "text": "", "seconds": 0, "error": f"exit code {code}"}
            record |= {"machine": "unknown", "torch": torch.__version__}
            common.write_json(paths[todo[0]], record)
    return {part: common.read_json(path) for part, path in paths.items() if path.is_file()}


if __name__ == "__main__":
    sys.exit(main())
