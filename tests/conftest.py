"""Fixtures shared by the tests: a tiny random policy, its folder, and random rollouts."""

from __future__ import annotations

import importlib.util

import make_base
import pytest
import tiny
import torch

import common

torch.set_num_threads(1)

# tests/vllm.sh and tests/trl.sh run them, in environments that have vLLM and TRL.
NEEDS = {"test_vllm.py": "vllm", "test_trl.py": "trl"}
collect_ignore = [file for file, name in NEEDS.items() if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="session")
def ranks():
    """One process on the CPU."""
    return common.setup_ranks()


@pytest.fixture(scope="session")
def tokenizer():
    """The character tokenizer of the arithmetic example."""
    return make_base.make_tokenizer()


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory, tokenizer):
    """Two tiny policies on disk with their tokenizer (the weights of `policy`, `other_policy`)."""
    paths = []
    for seed in (0, 1):
        path = tmp_path_factory.mktemp("models") / f"tiny{seed}"
        tiny.make_lm(seed, len(tokenizer)).save_pretrained(path)
        tokenizer.save_pretrained(path)
        paths.append(str(path))
    return tuple(paths)


@pytest.fixture
def policy(model_folders):
    """A tiny random policy with gradients, new in every test."""
    return common.Policy(common.load_lm(model_folders[0], tiny.CPU, torch.float32))


@pytest.fixture(scope="session")
def other_policy(model_folders):
    """Another tiny policy, frozen: teacher or base."""
    lm = common.load_lm(model_folders[1], tiny.CPU, torch.float32)
    return common.Policy(lm).requires_grad_(False)


@pytest.fixture(scope="session")
def rollouts(tmp_path_factory, tokenizer):
    """Twenty random responses to five problems, also written to disk."""
    path = tmp_path_factory.mktemp("rollouts") / "rollouts.safetensors"
    made = tiny.random_rollouts(path, len(tokenizer))
    tiny.save_rollouts(made)
    return made
