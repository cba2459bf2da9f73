"""The sides that benchmarks/training.py compares.

Each runs in a process of its own, so that its peak memory is its own, and prints one line of JSON:

    python benchmarks/training_sides.py SIDE '{"argument": value}'

Memory is the peak of the resident set less what was resident once all modules were imported. So it
holds weights, gradients, optimizer, activations and logits. Linux only.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed.checkpoint.state_dict  # imported here, so that memory leaves it out
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import stage1_extreme  # noqa: E402

Result = dict[str, Any]
TRL_SETTINGS = {
    "packing_strategy": "bfd",
    "per_device_train_batch_size": 1,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch_fused",
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def resident(entry: str) -> int:
    """Returns bytes of this process: VmRSS is what is resident now, VmHWM the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:"))


class Meter:
    """Measures the seconds of each step, and the peak of memory since it was made."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the imports
        self.before, self.seconds, self.began = resident("VmRSS"), [], 0.0

    def start(self) -> None:
        """Begins a step."""
        self.began = time.perf_counter()

    def stop(self) -> None:
        """Ends a step."""
        self.seconds.append(time.perf_counter() - self.began)

    def result(self) -> Result:
        """Returns seconds and bytes. The first step warms up and is left out."""
        peak = max(resident("VmHWM") - self.before, 4096)  # not 0, for ratios are made of it
        return {"seconds": self.seconds[1:], "bytes": peak}


class DoneError(Exception):
    """Ends stage1_extreme.main before it writes models that nobody needs."""


def ours(folder: str, steps: int, budget: int) -> Result:
    """Runs stage1_extreme.main itself with --loss grpo, on one batch over and over.

    A step lasts from one line of metrics.jsonl to the next. Afterwards the scoring pass is timed,
    with the loading of its model."""
    meter, write, progress = Meter(), common.MetricsLog.write, stage1_extreme.progress

    def timed_write(log: common.MetricsLog, values: dict[str, float]) -> None:
        """Writes a line of metrics.jsonl, and ends the step."""
        write(log, values)
        meter.stop()
        if len(meter.seconds) == steps + 1:
            raise DoneError
        meter.start()

    def timed_progress(*given: Any) -> Any:
        """Makes the progress bar, after which the first step begins."""
        meter.start()
        return progress(*given)

    base, rollouts = f"{folder}/model", common.load_rollouts(Path(folder) / "rollouts")
    settings = {"loss": "grpo", "micro_batch_tokens": budget, "warmup_steps": 0}
    kept = rollouts.path.parent / "logprobs"
    shutil.rmtree(kept, ignore_errors=True)  # every round scores again, as a first run does
    with (
        tempfile.TemporaryDirectory() as output,
        contextlib.suppress(DoneError),
        mock.patch.object(common.MetricsLog, "write", timed_write),
        mock.patch.object(stage1_extreme, "progress", timed_progress),
    ):
        args = stage1_extreme.Args(
            base=base,
            rollouts=rollouts.path.parent,
            output=Path(output) / "run",
            epochs=steps + 1,
            save_at=(float(steps + 1),),
            batch_size=len(rollouts.rewards),
            **settings,
        )
        stage1_extreme.main(args)
    result = meter.result()
    shutil.rmtree(kept)
    began = time.perf_counter()
    common.score(base, rollouts, budget, common.setup_ranks())
    return result | {"scoring": time.perf_counter() - began}


def plain(folder: str, steps: int, responses: int) -> Result:
    """Trains with the loop as one writes it first.

    Micro-batches of `responses` are padded to their longest; transformers' forward gives whole
    logits, then come log_softmax, gather, and the same loss and optimizer as ours."""
    rollouts = common.load_rollouts(Path(folder) / "rollouts")
    meter = Meter()
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    lm = AutoModelForCausalLM.from_pretrained(f"{folder}/model", **options)
    optimizer = torch.optim.AdamW(lm.parameters(), 1e-6, weight_decay=0.0, fused=True)
    advantages, _ = stage1_extreme.group_statistics(rollouts.rewards, rollouts.problem_index)
    sequences = rollouts.tokens.long().split(rollouts.lengths.tolist())
    base_logprobs: dict[int, torch.Tensor] = {}  # of the first step, which warms up
    for _ in range(steps + 1):
        meter.start()
        for number, members in enumerate(torch.arange(len(sequences)).split(responses)):
            tokens = torch.nn.utils.rnn.pad_sequence([sequences[i] for i in members], True)
            at = torch.arange(tokens.shape[1])
            lengths, prompts = rollouts.lengths[members, None], rollouts.prompt_lens[members, None]
            logits = lm(tokens, attention_mask=(at < lengths).long(), use_cache=False).logits
            logprobs = logits.log_softmax(-1)
            del logits
            targets = tokens.roll(-1, 1)  # the token that follows
            logprobs = logprobs.gather(-1, targets[..., None])[..., 0]
            mask = (at + 1 >= prompts) & (at + 1 < lengths)
            ratio = (logprobs - base_logprobs.setdefault(number, logprobs.detach())).exp()
            advantage = advantages[members, None]
            clipped = ratio.clamp(0.8, 1.28) * advantage
            loss = -(torch.minimum(ratio * advantage, clipped) * mask).sum(1) / mask.sum(1)
            (loss.sum() / len(sequences)).backward()
            del logprobs, ratio, clipped, loss
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.stop()
    return meter.result()


def trl(folder: str, steps: int, packing: bool) -> Result:
    """Trains with TRL's SFTTrainer on the same tokens; its loss is over the responses' tokens."""
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
    longest = int(rollouts.lengths.max())
    micro_batches = len(pack_dataset(data, longest, "bfd")) if packing else len(data)
    meter = Meter()
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    lm = AutoModelForCausalLM.from_pretrained(f"{folder}/model", **options)

    class Stopwatch(TrainerCallback):
        """Times from the first micro-batch, data at hand, to the cleared gradients."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            meter.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.stop()

    with tempfile.TemporaryDirectory() as output:
        lengths = {"packing": packing, "max_length": longest, "max_steps": steps + 1}
        lengths |= {"gradient_accumulation_steps": micro_batches}
        settings = SFTConfig(output_dir=output, **lengths, **TRL_SETTINGS)
        tokenizer = common.load_tokenizer(f"{folder}/model")
        given = {"train_dataset": data, "processing_class": tokenizer, "callbacks": [Stopwatch()]}
        SFTTrainer(lm, settings, **given).train()
    return meter.result()


def head(kind: str, positions: int, hidden: int, vocabulary: int, steps: int) -> Result:
    """Runs log-probs forward, and backward to hidden states and output matrix.

    ours: the head of common.py. whole: [positions, vocabulary] logits at once. products: the three
    matrix products alone, in tiles that stay in the cache as ours do."""
    torch.manual_seed(0)
    h = torch.randn(positions, hidden, requires_grad=True)
    weight = (torch.randn(vocabulary, hidden) * 0.02).requires_grad_()
    targets = torch.randint(vocabulary, (positions,))
    ones = torch.ones(positions)

    def tiled() -> None:
        common.head_logprobs(h, common.Output(weight), targets, 1.0)[0].backward(ones)

    def whole() -> None:
        logprobs = F.linear(h, weight).log_softmax(-1)
        logprobs.gather(-1, targets[:, None])[:, 0].backward(ones)

    @torch.no_grad()
    def products() -> None:
        columns = max(1, common.HEAD_TILE_ELEMENTS["cpu"] // positions)
        logits = torch.empty(positions, columns)
        h.grad, weight.grad = torch.zeros_like(h), torch.empty_like(weight)
        for start in range(0, vocabulary, columns):
            rows = weight[start : start + columns]
            tile = logits[:, : len(rows)]
            torch.mm(h, rows.T, out=tile)
            h.grad.addmm_(tile, rows)
            torch.mm(tile.T, h, out=weight.grad[start : start + columns])

    step = {"ours": tiled, "whole": whole, "products": products}[kind]
    torch.mm(h.detach(), h.detach().T).sum()  # makes the threads and their buffers
    meter = Meter()
    for _ in range(steps + 1):
        h.grad = weight.grad = None
        meter.start()
        step()
        meter.stop()
    return meter.result()


SIDES: dict[str, Callable[..., Result]] = {"ours": ours, "plain": plain, "trl": trl, "head": head}

if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        measured = SIDES[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps(measured))
