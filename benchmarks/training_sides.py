"""The sides that benchmarks/training.py compares. Each runs in a process of its own, so that its
peak memory is its own:

    python benchmarks/training_sides.py SIDE '{"argument": value}'

prints one line of JSON. Memory is the peak of the resident set less what was resident once all
modules were imported: weights, gradients, optimiser, activations, logits. Linux only.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.state_dict  # as transformers' below: not in the memory measured
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import stage1_extreme  # noqa: E402

Result = dict[str, Any]


def resident(entry: str) -> int:
    """Bytes: VmRSS is what is resident now, VmHWM the most that ever was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:"))


class Meter:
    """Seconds of each step, and the peak of memory since it was made."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: imports had their own
        self.before, self.seconds, self.began = resident("VmRSS"), [], 0.0

    def start(self) -> None:
        self.began = time.perf_counter()

    def stop(self) -> None:
        self.seconds.append(time.perf_counter() - self.began)

    def result(self, **more: Any) -> Result:
        """The first step warms up and is left out."""
        peak = max(resident("VmHWM") - self.before, 4096)  # a page: not 0, ratios are made of it
        return {"seconds": self.seconds[1:], "bytes": peak} | more


class Done(Exception):
    """Ends stage1_extreme.main before it writes models that nobody needs."""


def ours(folder: str, steps: int, budget: int, probe: bool = False, rescore: int = 0) -> Result:
    """stage1_extreme.main itself with --loss grpo, one batch over and over: a step lasts from one
    line of metrics.jsonl to the next, so all that the loop does is in it.

    probe: after each step the rate of a matrix product is measured as well, in FLOP/s.
    rescore: times that the scoring pass is run again, by the same call, after the training."""
    n = len(common.load_rollouts(Path(folder) / "rollouts").rewards)
    args = stage1_extreme.Args(
        base=f"{folder}/model", rollouts=Path(folder) / "rollouts", loss="grpo",
        output=Path(folder) / f"run{budget}", epochs=steps + 1, save_at=(float(steps + 1),),
        batch_size=n, micro_batch_tokens=budget, warmup_steps=0,
    )  # fmt: skip
    if rescore:
        (args.output / "checkpoints" / "behavior_logprobs.safetensors").unlink(missing_ok=True)
    meter, products, calls = Meter(), [], []
    own_write, own_score = common.MetricsLog.write, stage1_extreme.score

    def write(log: Any, values: dict[str, float]) -> None:
        """In the place of MetricsLog.write: it, with a stopwatch."""
        own_write(log, values)
        meter.stop()
        if probe:
            products.append(product_rate())
        if len(meter.seconds) == steps + 1:
            raise Done
        meter.start()

    def score(*given: Any) -> Tensor:
        """In the place of score: it, and its arguments are remembered."""
        calls.append(given)
        return own_score(*given)

    def restart(*given: Any) -> Any:
        """In the place of progress: the first step begins where the bar is made."""
        meter.start()
        return own_progress(*given)

    own_progress = stage1_extreme.progress
    common.MetricsLog.write, stage1_extreme.score = write, score
    stage1_extreme.progress = restart
    with contextlib.suppress(Done):
        stage1_extreme.main(args)
    result = meter.result(products=products)
    stage1_extreme.progress, stage1_extreme.score = own_progress, own_score
    common.MetricsLog.write = own_write
    scoring = []
    for _ in range(rescore):
        began = time.perf_counter()
        own_score(*calls[0])
        scoring.append(time.perf_counter() - began)
    return result | {"scoring": scoring[1:]}


def growth(folders: list[str], steps: int, budget: int) -> Result:
    """`ours` on each of the folders in turn -> seconds[folder][step]."""
    return {"seconds": [ours(folder, steps, budget)["seconds"] for folder in folders]}


def product_rate(size: int = 2048) -> float:
    """FLOP/s of a square float32 product, the best of five."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out, best = torch.empty(size, size), float("inf")
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def plain(folder: str, steps: int, responses: int) -> Result:
    """The loop as one writes it first: micro-batches of `responses`, padded to their longest;
    transformers' forward with whole logits, log_softmax, gather; the same loss and optimiser."""
    rollouts = common.load_rollouts(Path(folder) / "rollouts")
    meter = Meter()
    lm = AutoModelForCausalLM.from_pretrained(
        f"{folder}/model", dtype=torch.float32, attn_implementation="sdpa"
    )
    optimizer = torch.optim.AdamW(lm.parameters(), 1e-6, weight_decay=0.0, fused=True)
    index = rollouts.problem_index
    advantages, _, _ = stage1_extreme.group_statistics(rollouts.rewards, index, 1.0)
    sequences = rollouts.tokens.long().split(rollouts.lengths.tolist())
    behavior = None  # of the first step, which warms up; then the ratio is near 1, as in ours
    for _ in range(steps + 1):
        meter.start()
        kept = []
        for number, members in enumerate(torch.arange(len(sequences)).split(responses)):
            tokens = torch.nn.utils.rnn.pad_sequence([sequences[i] for i in members], True)
            at = torch.arange(tokens.shape[1])
            lengths, prompts = rollouts.lengths[members, None], rollouts.prompt_lens[members, None]
            logits = lm(tokens, attention_mask=(at < lengths).long(), use_cache=False).logits
            logprobs = logits.log_softmax(-1)
            del logits
            targets = tokens.roll(-1, 1)
            logprobs = logprobs.gather(-1, targets[..., None])[..., 0]  # of the token that follows
            mask = (at + 1 >= prompts) & (at + 1 < lengths)
            old = logprobs.detach() if behavior is None else behavior[number]
            kept.append(old)
            ratio = (logprobs - old).exp()
            advantage = advantages[members, None]
            clipped = ratio.clamp(0.8, 1.28) * advantage
            loss = -(torch.minimum(ratio * advantage, clipped) * mask).sum(1) / mask.sum(1)
            (loss.sum() / len(sequences)).backward()
            del logprobs, ratio, clipped, loss
        behavior = kept
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.stop()
    return meter.result()


def trl(folder: str, steps: int, rows: str) -> Result:
    """TRL's SFTTrainer on the same tokens, its loss over the responses' tokens; see training.py."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from trl.data_utils import pack_dataset

    rollouts = common.load_rollouts(Path(folder) / "rollouts")
    tokens = rollouts.tokens.long()
    labels = torch.where(rollouts.response_mask, tokens, -100)
    parts = [x.split(rollouts.lengths.tolist()) for x in (tokens, labels)]
    ids, labels = ([part.tolist() for part in split] for split in parts)
    data = Dataset.from_dict({"input_ids": ids, "labels": labels})
    longest, total = int(rollouts.lengths.max()), len(tokens)
    length = {"one": total, "longest": longest, "single": longest}[rows]
    packing = rows != "single"
    micro_batches = len(pack_dataset(data, length, "bfd")) if packing else len(data)
    meter = Meter()
    lm = AutoModelForCausalLM.from_pretrained(
        f"{folder}/model", dtype=torch.float32, attn_implementation="sdpa"
    )

    class Stopwatch(TrainerCallback):
        """From the first micro-batch, data at hand, to the cleared gradients."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            meter.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.stop()

    with tempfile.TemporaryDirectory() as output:
        config = SFTConfig(
            output_dir=output, packing=packing, packing_strategy="bfd", max_length=length,
            per_device_train_batch_size=1, gradient_accumulation_steps=micro_batches,
            max_steps=steps + 1, learning_rate=1e-6, lr_scheduler_type="constant",
            weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch_fused", bf16=False,
            gradient_checkpointing=False, use_cpu=True, dataloader_pin_memory=False,
            logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        tokenizer = common.load_tokenizer(f"{folder}/model")
        SFTTrainer(
            lm, config, train_dataset=data, processing_class=tokenizer, callbacks=[Stopwatch()]
        ).train()
    return meter.result(micro_batches=micro_batches)


def head(kind: str, positions: int, hidden: int, vocabulary: int, steps: int) -> Result:
    """Forward and backward of log-probs to hidden states and output matrix.

    ours: the chunked head. whole: [positions, vocabulary] logits at once. products: the three
    matrix products alone, in tiles that stay in the cache as ours do."""
    torch.manual_seed(0)
    h = torch.randn(positions, hidden, requires_grad=True)
    weight = (torch.randn(vocabulary, hidden) * 0.02).requires_grad_()
    targets = torch.randint(vocabulary, (positions,))
    ones = torch.ones(positions)

    def chunked() -> None:
        common._HeadLogprobs.apply(h, weight, targets, 1.0)[0].backward(ones)

    def whole() -> None:
        logprobs = F.linear(h, weight).log_softmax(-1)
        logprobs.gather(-1, targets[:, None])[:, 0].backward(ones)

    @torch.no_grad()
    def products() -> None:
        columns = max(1, 2**21 // positions)
        logits = torch.empty(positions, columns)
        h.grad, weight.grad = torch.zeros_like(h), torch.empty_like(weight)
        for start in range(0, vocabulary, columns):
            rows = weight[start : start + columns]
            tile = logits[:, : len(rows)]
            torch.mm(h, rows.T, out=tile)
            h.grad.addmm_(tile, rows)
            torch.mm(tile.T, h, out=weight.grad[start : start + columns])

    step = {"ours": chunked, "whole": whole, "products": products}[kind]
    torch.mm(h.detach(), h.detach().T).sum()  # threads and their buffers
    meter = Meter()
    for _ in range(steps + 1):
        h.grad = weight.grad = None
        meter.start()
        step()
        meter.stop()
    return meter.result()


SIDES: dict[str, Callable[..., Result]] = {
    "ours": ours, "growth": growth, "plain": plain, "trl": trl, "head": head,
}  # fmt: skip

if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        measured = SIDES[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps(measured))
