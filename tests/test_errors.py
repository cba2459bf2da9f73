"""Bad input ends with a message that names the flag, file or array, its value and a remedy.

Flags are tried without a model, files through the functions that read them, and a few cases of each
kind through the whole command: exit code 2, one line on stderr, nothing written.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import shutil

import pytest
import tiny
import torch
import tyro
from safetensors.torch import save_file

import build_signals
import common
import evaluate
import stage1_extreme
import stage2_distill

# --------------------------------------------------------------------------------------------------
# Flags

REQUIRED = {
    evaluate: "--model M --problems P --output O",
    stage1_extreme: "--base B --rollouts R --output O",
    build_signals: "--rollouts R --base B --teachers T --output O.safetensors",
    stage2_distill: "--base B --rollouts R --signals S --output O",
}
REFUSED = {  # each by itself; a message names one of the flags
    evaluate: """
        --n 0 | --batch-size 0 | --max-new-tokens 0 | --micro-batch-tokens 0 | --tensor-parallel 0
        --temperature -1 | --temperature nan | --kl-samples -1 | --top-p 0 | --top-p 1.5
        --gpu-memory-utilization 1.1 | --gpu-memory-utilization 0 | --grading-timeout 0
        --grading-timeout inf | --shard 2/2 | --shard 0 | --prompt-template Solve. | --base-run R
        --base B --temperature 0.5 | --base B --top-p 0.9 | --engine hf --tensor-parallel 2
        --date 2026-02-30 | --date today | --chat-template-kwargs {x} | --chat-template-kwargs [1]
        --shard= | --shard=-1/2 | --shard a/b | --shard 0/0 | --shard 1/2/3 | --shard 0.5/2
    """,
    stage1_extreme: """
        --epochs 0 | --batch-size 0 | --micro-batch-tokens 0 | --checkpoint-every 0 | --beta 0
        --learning-rate 0 | --learning-rate nan | --learning-rate inf | --max-grad-norm 0
        --sapo-tau-positive 0 | --sapo-tau-negative 0 | --kl-coef -1 | --kl-coef inf
        --weight-decay -1 | --warmup-steps -1 | --clip-high -1 | --clip-low 1.5 | --clip-low -0.1
        --max-noise 1.5 | --max-noise -0.1 | --save-at 9 | --save-at 0 | --stop-at-logprob -50
        --invert-rewards --unlearn | --unlearn --loss sft | --unlearn --stop-at-logprob 0
    """,
    build_signals: """
        --references A A | --weights 1 2 | --weights nan | --output O.pt | --micro-batch-tokens 0
        --teachers A B --references a b c | --teachers A B --weights 1 | --teachers
        --signal-floor 4 | --signal-floor -1 | --signal-clip 0 | --token-kl 0 | --signal-scale inf
    """,
    stage2_distill: """
        --epochs 0 | --batch-size 0 | --micro-batch-tokens 0 | --kl-every 0 | --learning-rate 0
        --learning-rate inf | --max-grad-norm 0 | --signal-clip 0 | --token-kl 0 | --kl-budget 0
        --kl-budget nan | --signal-floor -1 | --signal-floor 4 | --kl-coef -1 | --weight-decay -1
        --warmup-steps -1 | --clip-high inf | --clip-low 1.5 | --clip-low -0.1 | --kl-holdout 0
        --within-kl 0 | --reach-accuracy 1 | --within-kl 1 --reach-accuracy 0.5
        --kl-holdout 1 | --signal-scale nan | --prob-mask 0.2 | --objective pg --prob-mask -1
    """,
}
ALLOWED = {  # the last values that are still allowed, all at once
    evaluate: "--n 1 --temperature 0 --top-p 1 --kl-samples 0 --grading-timeout 86400 --shard 1/2",
    stage1_extreme: "--epochs 1 --batch-size 1 --micro-batch-tokens 1 --checkpoint-every 1 "
    "--clip-low 1 --clip-high 0 --max-noise 0 --kl-coef 0 --warmup-steps 0 --save-at 0.01 1 "
    "--max-grad-norm 1e-9 --unlearn --stop-at-logprob -0.1",
    build_signals: "--teachers A B --weights -1 0 --references a b --micro-batch-tokens 1",
    stage2_distill: "--kl-every 1 --kl-budget inf --token-kl inf --signal-clip 3 --signal-floor 3 "
    "--objective pg --prob-mask 0 --clip-low 0 --kl-holdout 0.999 --signal-scale -1",
}
ROWS = [
    pytest.param(script, flags.strip(), id=f"{script.__name__} {flags.strip()}")
    for script, table in REFUSED.items()
    for flags in table.strip().replace("\n", "|").split("|")
]


def parse(script, flags):
    return tyro.cli(script.Args, args=[*REQUIRED[script].split(), *flags.split()])


@pytest.mark.parametrize(("script", "flags"), ROWS)
def test_flags(script, flags):
    with pytest.raises(common.UserError) as caught:
        parse(script, flags).check()
    assert any(flag in str(caught.value) for flag in re.findall(r"--[a-z-]+", flags))


@pytest.mark.parametrize("script", ALLOWED)
def test_flags_at_their_limits(script):
    parse(script, ALLOWED[script]).check()
    parse(script, "").check()


# --------------------------------------------------------------------------------------------------
# Files


@pytest.fixture
def world(tmp_path):
    """Rollouts and signals that a test may spoil."""
    shutil.copytree(tiny.setting() / "rollouts", tmp_path / "rollouts")
    shutil.copy(tiny.signals(), tmp_path / "signals.safetensors")
    return tmp_path


def spoil(path, **changes):
    """Replaces arrays of a file: None drops one, a function gets the old one."""
    tensors, metadata = common.load_tensors(path)
    for name, change in changes.items():
        old = tensors.pop(name, None)
        if change is not None:
            tensors[name] = change(old) if callable(change) else change
    common.save_tensors(path, tensors, metadata)


def put(index, value):
    """A change of one entry."""

    def change(old):
        old[index] = value
        return old

    return change


ROLLOUTS = {  # what is changed: what the message names
    "no tokens": ({"tokens": None}, "'tokens'"),
    "no prompts": ({"prompt_lens": None}, "'prompt_lens'"),
    "type": ({"rewards": lambda r: r.double()}, "'rewards' is torch.float64"),
    "shape": ({"truncated": lambda t: t[1:]}, r"'truncated' is .*\[31\].*\[32\]"),
    "too many": ({"cu_seqlens": lambda c: torch.cat([c, c[-1:]])}, "'cu_seqlens'"),
    "optional": ({"sampler_logprobs": torch.zeros(3)}, "'sampler_logprobs'"),
    "marks": ({"first_wrong_token": torch.zeros(32)}, "'first_wrong_token' is torch.float32"),
    "verdict": ({"rewards": put(2, 0.5)}, "response 2 "),
    "two verdicts": ({"rewards": put([2, 4], 2.0)}, r"response 2 .*\(2 "),
    "no problems": ({"problem_index": None}, "'problem_index'"),
    "no ends": ({"truncated": None}, "'truncated'"),
    "problem": ({"problem_index": put(3, -1)}, "response 3 "),
    "prompt": ({"prompt_lens": put(4, 0)}, "response 4 "),
    "response": ({"prompt_lens": put(5, 999)}, "response 5 "),
    "falls": ({"cu_seqlens": put(1, 0)}, "response 0 "),
    "start": ({"cu_seqlens": put(0, 1)}, "token 0"),
}


@pytest.mark.parametrize("name", ROLLOUTS)
def test_spoiled_rollouts(name, world):
    changes, words = ROLLOUTS[name]
    spoil(world / "rollouts/rollouts.safetensors", **changes)
    with pytest.raises(common.UserError, match=rf"rollouts\.safetensors: .*{words}"):
        common.load_rollouts(world / "rollouts")


def test_rollouts_that_are_none(world):
    path = world / "rollouts/rollouts.safetensors"
    whole, found = path.read_bytes(), []
    for metadata in (None, {"erpd": "null"}, {"erpd": '{"format": 2}'}, {"erpd": "{"}):
        save_file({"tokens": torch.zeros(3)}, path, metadata=metadata)
        found.append(path.read_bytes())
    for contents in (*found, whole[: len(whole) // 2], b"", b"half"):
        path.write_bytes(contents)
        with pytest.raises(common.UserError, match=r"rollouts\.safetensors: "):
            common.load_rollouts(world / "rollouts")
    path.write_bytes(whole)
    names = ("tokens", "prompt_lens", "rewards", "problem_index", "truncated")
    spoil(path, cu_seqlens=torch.zeros(1).long(), **dict.fromkeys(names, lambda x: x[:0]))
    with pytest.raises(common.UserError, match="no responses"):
        common.load_rollouts(world / "rollouts")
    path.unlink()
    with pytest.raises(common.UserError, match=r"rollouts\.safetensors: "):
        common.load_rollouts(world / "rollouts")


@pytest.mark.parametrize("changes", [{"top_p": 0.9}, {"top_k": 20}, {"temperature": 0.0}])
def test_samples_that_are_not_the_policys_own(rollouts, changes):
    sampling = {"temperature": 0.7} | changes
    other = dataclasses.replace(rollouts, metadata={"sampling": sampling})
    with pytest.raises(common.UserError, match="--t"):
        common.check_sampling(other, force=False)
    if sampling["temperature"]:
        assert common.check_sampling(other, force=True) == 0.7
    else:  # greedy responses have no distribution
        with pytest.raises(common.UserError, match="--temperature"):
            common.check_sampling(other, force=True)
    assert common.check_sampling(dataclasses.replace(rollouts, metadata={}), force=False) == 1


SIGNALS = {
    "missing": ({"signal": None}, "'signal'"),
    "not finite": ({"signal": put(30, torch.nan)}, "'signal'"),
    "base not finite": ({"base_logprobs": put(30, torch.inf)}, "'base_logprobs'"),
    "not aligned": ({"behavior_logprobs": lambda s: s[1:]}, "'behavior_logprobs'"),
}


def signals_args(world, **changes):
    fields = {"base": str(tiny.setting() / "base"), "signals": world / "signals.safetensors"}
    fields |= {"rollouts": world / "rollouts", "output": world / "out"}
    return stage2_distill.Args(**fields | changes)


@pytest.mark.parametrize("name", SIGNALS)
def test_spoiled_signals(name, world):
    changes, words = SIGNALS[name]
    spoil(world / "signals.safetensors", **changes)
    rollouts = common.load_rollouts(world / "rollouts")
    with pytest.raises(common.UserError, match=rf"signals\.safetensors: .*{words}"):
        stage2_distill.load_signals(signals_args(world), rollouts)


def test_signals_of_something_else(world):
    rollouts = common.load_rollouts(world / "rollouts")
    (scores, *_) = (tiny.setting() / "rollouts/logprobs").glob("*")
    others = {"signals": rollouts.path}, {"signals": scores}, {"signals": world / "nowhere"}
    for changes in (*others, {"base": str(tiny.setting() / "other")}):
        with pytest.raises(common.UserError, match=next(iter(changes))):
            stage2_distill.load_signals(signals_args(world, **changes), rollouts)


# --------------------------------------------------------------------------------------------------
# The whole command

FLAGS = {
    "evaluate": "--model {base} --problems {problems} --output {out}",
    "stage1_extreme": "--base {base} --rollouts {w}/rollouts --output {out}",
    "build_signals": "--rollouts {w}/rollouts --base {base} --teachers {other} --output {out}",
    "stage2_distill": "--base {base} --rollouts {w}/rollouts --signals {signals} --output {out}",
}
ROLLOUTS_FILE, SIGNALS_FILE = "rollouts/rollouts.safetensors", "signals.safetensors"


def arrays(name, **changes):
    return lambda world: spoil(world / name, **changes)


def args_json(text):
    return lambda world: common.write_json(world / "out/args.json", text)


def model(file, text=None):
    """A copy of the base with one file replaced, or dropped."""

    def edit(world):
        shutil.copytree(tiny.setting() / "base", world / "model")
        (world / "model" / file).unlink()
        if text is not None:
            (world / "model" / file).write_text(text)

    return edit


def earlier_run(world):
    args = stage1_extreme.Args("B", world / "rollouts", world / "out", beta=0.5)
    common.start_run(world / "out", args, {}, common.setup_ranks())


def whole(script, words, edit=None, flags="", **names):
    return script, words, edit, flags, names


COMMANDS = {  # words of the message, how the input is spoiled, further flags, other names
    "no problems": whole("evaluate", "p.jsonl", problems="{w}/p.jsonl"),
    "no model": whole("stage1_extreme", "{w}/model", base="{w}/model"),
    "unfinished": whole("stage1_extreme", "config", model("config.json"), base="{w}/model"),
    "tokenizer": whole("stage1_extreme", "model'", model("tokenizer.json"), base="{w}/model"),
    "weights": whole("stage1_extreme", "model'", model("model.safetensors", ""), base="{w}/model"),
    "hub": whole("stage1_extreme", "nobody/nothing.*hub", base="nobody/nothing"),
    "no hub name": whole("stage1_extreme", "'nothing'.*owner/name", base="nothing"),
    "no groups": whole(
        "stage1_extreme", "zero usable.*--n", arrays(ROLLOUTS_FILE, rewards=torch.zeros(32))
    ),
    "token": whole("stage1_extreme", "999", arrays(ROLLOUTS_FILE, tokens=put(20, 999))),
    "init": whole("stage1_extreme", "{small}", flags="--init {small}"),
    "output is a file": whole("stage1_extreme", SIGNALS_FILE, out="{signals}"),
    "output is data": whole("stage1_extreme", "--output", out="{w}/rollouts"),
    "settings": whole("stage1_extreme", "--output.*beta: 0.5 -> 0.05", earlier_run),
    "list": whole("stage1_extreme", "args.json.*--output", args_json([])),
    "foreign": whole("stage1_extreme", "args.json.*--output", args_json({})),
    "vocabulary": whole("build_signals", "{small}.* 12", other="{small}"),
    "ruined": whole("build_signals", "{ruined}.*finite", other="{ruined}"),
    "other signals": whole("build_signals", "--output", flags="--weights 2", out="{signals}"),
    "over rollouts": whole("build_signals", ROLLOUTS_FILE, out=f"{{w}}/{ROLLOUTS_FILE}"),
    "stage 2 init": whole("stage2_distill", "{small}", flags="--init {small}"),
    "stale": whole("stage2_distill", "other rollouts", arrays(ROLLOUTS_FILE, rewards=put(0, 0.0))),
    "parent is a file": whole("stage2_distill", SIGNALS_FILE, out="{signals}/out"),
    "flag": whole("stage1_extreme", "--lerning-rate", flags="--lerning-rate 1"),
    "choice": whole("stage1_extreme", "sapo", flags="--loss bce"),
}


def contents(folder):
    """The files of a folder, but for scores, which are kept, and the arguments of a begun run."""
    files = [p for p in folder.rglob("*") if p.is_file() and "logprobs" not in p.parts]
    return {p: p.read_bytes() for p in files if p != folder / "out/args.json"}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(name, world, monkeypatch, capfd):
    script, words, edit, flags, changes = COMMANDS[name]
    names = {name: tiny.setting() / name for name in ("base", "other", "small", "ruined")}
    names |= {"w": world, "signals": world / SIGNALS_FILE, "out": world / "out", "problems": "p"}
    if script == "build_signals":
        names["out"] = world / "out.safetensors"
    names |= {key: value.format(**names) for key, value in changes.items()}
    if edit is not None:
        edit(world)
    before, module = contents(world), importlib.import_module(script)
    monkeypatch.setattr("sys.argv", [script, *f"{FLAGS[script]} {flags}".format(**names).split()])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as caught:
        common.run(module.main, module.Args, module.__doc__)
    message = capfd.readouterr().err
    assert caught.value.code == 2 and re.search(words.format(**names), message), message
    assert "Traceback" not in message and contents(world) == before
    if name not in ("flag", "choice"):  # those are pages of the parser
        assert len(message[message.index("error: ") :].splitlines()) == 1, message
