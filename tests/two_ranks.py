"""Runs several commands at the ranks that torchrun started, because starting takes longest.

    torchrun --nproc-per-node 2 -- tests/two_ranks.py JOBS.json

JOBS.json is a list of [script, [flag, ...]]; test_scale.py compares what they leave.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch.distributed as dist
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: E402


def main():
    ranks = common.setup_ranks()
    assert ranks.decide(lambda: ranks.rank) == 0
    for name, words in common.read_json(Path(sys.argv[1])):
        script = importlib.import_module(name)
        script.main(tyro.cli(script.Args, args=words))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
