"""benchmarks/training.py: it runs end to end on a tiny model and its table has the bars. Never a
time. With TRL as the peer only where it is installed (tests/trl.sh). benchmarks/grading.py: what it
says of the verdicts; sampling.py is in test_vllm.py, for it needs vLLM."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training
import training_sides
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3ForCausalLM

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
HAS_TRL = importlib.util.find_spec("trl") is not None
OTHERS = tuple(name for name in training.PARTS if name != "trl")
BARS = {"trl": 2, "plain": 2, "head": 2, "score": 1, "peak": 1, "growth": 1}


def check_table(text, names):
    """Every part has its section, rows of five cells with numbers, and as many bars as promised."""
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.M | re.S))
    assert tuple(sections) == tuple(names)
    for name, section in sections.items():
        lines = [line for line in section.splitlines() if line.startswith("| ")]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        assert cells[0] == ["measured", "value", "spread", "bar", "met"]
        assert all(len(row) == 5 for row in cells)
        for _, value, spread, bar, met in cells[1:]:
            low, middle, high = (
                float(x.replace(",", "").split()[0])
                for x in (spread.split(" ... ")[0], value, spread.split(" ... ")[1])
            )
            assert 0 <= low <= middle <= high
            assert bool(bar) == (met in ("yes", "**no**"))
        assert sum(bool(row[3]) for row in cells[1:]) == BARS[name]
        assert re.search(r"\d+ rounds.*threads on \d+ cores.*torch \d", section)


def test_quick_run_ends_in_a_table(tmp_path, monkeypatch):
    """The sides run in this process: what they do is the same, only memory is not their own."""
    monkeypatch.setattr(training, "side", lambda name, **given: training_sides.SIDES[name](**given))
    args = training.Args(part=OTHERS, quick=True, output=tmp_path / "R.md", numbers=tmp_path)
    training.main(args)
    table = args.output.read_text()
    check_table(table, OTHERS)
    # One part alone keeps the numbers of the others.
    kept = {name: (tmp_path / f"{name}.json").read_text() for name in OTHERS}
    training.main(dataclasses.replace(args, part=("head",)))
    check_table(args.output.read_text(), OTHERS)
    assert all((tmp_path / f"{name}.json").read_text() == kept[name]
               for name in OTHERS if name != "head")  # fmt: skip


def test_a_side_in_a_process_of_its_own():
    size = {"positions": 64, "hidden": 16, "vocabulary": 2**16}
    result = training.side("head", kind="whole", steps=2, **size)
    assert len(result["seconds"]) == 2  # the first is left out
    assert result["bytes"] > 2 * 64 * 2**16 * 4  # logits, and what the backward makes of them


def test_a_failing_side_is_an_error_that_shows_why():
    with pytest.raises(training.common.UserError, match="no-such-folder"):
        training.side("plain", folder="no-such-folder", steps=1, responses=1)


@pytest.mark.skipif(not HAS_TRL, reason="needs TRL: bash tests/trl.sh")
def test_quick_run_with_trl(tmp_path):
    script = Path(training.__file__)
    command = [sys.executable, str(script), "--quick", "--part", "trl", "--output",
               str(tmp_path / "R.md"), "--numbers", str(tmp_path)]  # fmt: skip
    subprocess.run(command, check=True)
    check_table((tmp_path / "R.md").read_text(), ["trl"])
    rows = json.loads((tmp_path / "trl.json").read_text())["rows"]
    assert [row["what"] for row in rows if row["bar"]]  # one setting of TRL is held to each bar


@pytest.mark.skipif(HAS_TRL, reason="where TRL is, the part runs")
def test_without_trl_the_part_is_an_error(tmp_path):
    args = training.Args(part=("trl",), quick=True, output=tmp_path / "R.md", numbers=tmp_path)
    with pytest.raises(training.common.UserError, match="TRL is not installed"):
        training.main(args)


def test_grading_in_small():
    """Its exit code depends on times, which no test asserts; what it says of verdicts does not."""
    script = Path(training.__file__).with_name("grading.py")
    flags = ["--responses=48", "--rounds=1", "--length=200", "--bombs=2", "--grading-timeout=1"]
    done = subprocess.run([sys.executable, str(script), *flags], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode in (0, 1) and lines[-1] == ("FAILED" if done.returncode else "ok"), done
    speed = re.compile(r"(\S+) a problem: ours \d+, plain \d+ responses a CPU second, "
                       r"ratio \d+\.\d+; 0 of 48 verdicts differ")  # fmt: skip
    assert [speed.fullmatch(line)[1] for line in lines[:2]] == ["16", "1"]
    assert re.fullmatch(r"2 bombs: \S+ s more than without; their own limits are 2\.0 s; "
                        r"0 other verdicts changed", lines[2])  # fmt: skip


# --------------------------------------------------------------------------------------------------
# What the numbers are made of


def test_model_flops_are_those_of_the_products(tmp_path):
    """torch counts what a plain forward and backward of the same sequences really multiplies."""
    shape = dataclasses.replace(
        training.SHAPES["peak"].tiny(), vocabulary=64, tokens=512, longest=384
    )
    rollouts = training.make_setting(tmp_path, shape)
    config = training.model_config(shape)
    config._attn_implementation = "eager"  # products that are seen, the causal half not left out
    lm = Qwen3ForCausalLM(config)
    counted, whole = 0, 0
    parts = rollouts.tokens.long().split(rollouts.lengths.tolist())
    for tokens, prompt in zip(parts, rollouts.prompt_lens.tolist(), strict=True):
        with FlopCounterMode(display=False) as counter:
            keep = torch.arange(prompt - 1, len(tokens) - 1)
            lm(tokens[None], logits_to_keep=keep).logits.sum().backward()
        counted += counter.get_total_flops()
        # eager attention makes all n^2 scores, the formula counts the causal half
        width = config.num_attention_heads * config.head_dim
        whole += 3 * config.num_hidden_layers * 2 * width * len(tokens) ** 2
    expected = training.model_flops(config, rollouts) + whole
    assert counted == pytest.approx(expected, rel=0.02)  # norms' weights count as parameters


@pytest.mark.parametrize("name", list(training.SHAPES))
def test_lengths_make_up_a_step(name):
    shape = training.SHAPES[name]
    for used in (shape, shape.tiny()):
        lengths = training.draw_lengths(used)
        assert sum(lengths) == used.tokens
        assert used.longest // 32 < min(lengths)
        assert max(lengths) < 1.1 * used.longest
        if shape.lengths == "log-normal":
            assert max(lengths) > 2 * sum(lengths) / len(lengths)  # padding would hurt


def test_body_of_the_peak_has_25_million_parameters():
    with torch.device("meta"):
        blocks = Qwen3ForCausalLM(training.model_config(training.SHAPES["peak"])).model.layers
    assert sum(p.numel() for p in blocks.parameters()) == pytest.approx(25e6, rel=0.02)


def test_distance_from_a_line():
    sizes = [2048, 4096, 8192, 16384]
    assert training.line_distance(sizes, [0.5 + 2e-3 * n for n in sizes]) < 1e-9
    assert training.line_distance(sizes, [1e-3 * n + 1e-7 * n * n for n in sizes]) > 0.05
    assert training.line_distance(sizes, [2.0, 4.0, 8.0, 24.0]) > 0.1


def test_rows_are_met_or_not():
    row = training.Row("speed", [1.0, 3.0, 2.0], "x", 2.0)
    assert row.met and str(row).endswith("| yes |")
    assert not dataclasses.replace(row, bar=2.5).met
    assert dataclasses.replace(row, bar=2.5, at_least=False).met
    assert dataclasses.replace(row, bar=None).met is None
