"""Fixtures shared by the tests: a tiny random policy, its folder, and random rollouts."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import make_base
import pytest
import scripts
import torch
import warm

import common

torch.set_num_threads(1)

# tests/vllm.sh and tests/trl.sh run them, in environments that have vLLM and TRL.
collect_ignore = [
    f"test_{name}.py" for name in ("vllm", "trl") if importlib.util.find_spec(name) is None
]


def make_tiny(seed: int, spread: float = 0.3) -> Any:
    """A Qwen3 of width 32 whose random weights are wide enough for peaked, varied predictions."""
    torch.manual_seed(seed)
    args = make_base.Args(output=Path("unused"), hidden_size=32, layers=2)
    lm = make_base.make_model(args, make_base.make_tokenizer())
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, spread)
    return lm.eval()


def make_rollouts(
    path: Path, vocabulary: int, n_problems: int = 5, n: int = 4, seed: int = 0
) -> common.Rollouts:
    """Mixed lengths and verdicts; the first two problems are solved by all and by none."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    index = torch.arange(n_problems).repeat_interleave(n)
    prompts = [draw(3, vocabulary, int(draw(1, 7, 1))) for _ in range(n_problems)]
    sequences, prompt_lens = [], []
    for problem in index.tolist():
        response = draw(3, vocabulary, int(draw(1, 20, 1)))
        response[-1] = 1  # <eos>
        sequences.append(torch.cat([prompts[problem], response]))
        prompt_lens.append(len(prompts[problem]))
    rewards = draw(0, 2, len(index)).float()
    rewards[index == 0], rewards[index == 1] = 1.0, 0.0
    for problem in range(2, n_problems):  # every other problem has both verdicts
        rewards[problem * n], rewards[problem * n + 1] = 1.0, 0.0
    lengths = torch.tensor([0] + [len(s) for s in sequences])
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 20}
    return common.Rollouts(
        path, {"model": "random", "sampling": sampling},
        tokens=torch.cat(sequences).int(), cu_seqlens=lengths.cumsum(0),
        prompt_lens=torch.tensor(prompt_lens, dtype=torch.int32), rewards=rewards,
        problem_index=index.int(), truncated=torch.zeros(len(index), dtype=torch.bool),
    )  # fmt: skip


@pytest.fixture(scope="session")
def ranks() -> common.Ranks:
    """One process on the CPU."""
    return common.Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The character tokenizer of the arithmetic example."""
    return make_base.make_tokenizer()


@pytest.fixture
def policy() -> common.Policy:
    """A tiny random policy with gradients, new in every test."""
    return common.Policy(make_tiny(0))


@pytest.fixture(scope="session")
def other_policy() -> common.Policy:
    """Another tiny policy, frozen: teacher or base."""
    return common.Policy(make_tiny(1)).requires_grad_(False)


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two tiny policies on disk with their tokenizer (the weights of `policy`, `other_policy`)."""
    paths = []
    for seed in (0, 1):
        path = tmp_path_factory.mktemp("models") / f"tiny{seed}"
        make_tiny(seed).save_pretrained(path)
        make_base.make_tokenizer().save_pretrained(path)
        paths.append(str(path))
    return tuple(paths)


@pytest.fixture(scope="session")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> common.Rollouts:
    """Twenty random responses to five problems, also written to disk."""
    path = tmp_path_factory.mktemp("rollouts") / "rollouts.safetensors"
    made = make_rollouts(path, len(make_base.make_tokenizer()))
    common.save_rollouts(made)
    return made


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for one run of the arithmetic example and an environment without installation."""
    folder = tmp_path_factory.mktemp("arithmetic")
    (folder / "venv" / "bin").mkdir(parents=True)
    shutil.copy(scripts.ROOT / "requirements.txt", folder / "venv/requirements-installed.txt")
    with warm.warm_python(folder):
        (folder / "venv" / "bin" / "python").symlink_to(folder / "python")
        yield folder


@pytest.fixture(scope="session")
def two_rounds(place: Path) -> Path:
    """A quick run folder: rounds.sh, killed in the first round and started again."""
    run = place / "run"
    process = scripts.start(place, "rounds", ROUNDS="2")
    scripts.kill_when(process, run / "stage1/unlearned/config.json")
    assert not (run / "rounds/round2").exists()
    printed = scripts.finish(scripts.start(place, "rounds", ROUNDS="2"))
    assert "unlearned is complete" in printed
    return run


@pytest.fixture(scope="session")
def quick_run(two_rounds: Path, place: Path) -> Path:
    """The same folder after figures.sh, which calls run.sh, plateau.sh and online.sh; killed in its
    own runs and started again."""
    process = scripts.start(place, "figures", ROUNDS="2")
    scripts.kill_when(process, two_rounds / "paper/stage1/mse_verdict/config.json")
    assert not (two_rounds / "paper/curve").exists()
    printed = scripts.finish(scripts.start(place, "figures", ROUNDS="2"))
    assert "mse_soft_value is complete" in printed and "figures.sh: " in printed
    return two_rounds
