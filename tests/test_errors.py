"""Bad input: every script ends with exit code 2 and one or two lines on stderr that name what is
wrong and what to do, without a traceback; nothing is written and earlier results stay as they were.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

import common

EVALUATE = (
    "evaluate --model {base} --problems {w}/problems.jsonl --output {w}/out --n 2 "
    "--max-new-tokens 4"
)
STAGE1 = "stage1_extreme --base {base} --rollouts {w}/rollouts --output {w}/out --epochs 1"
SIGNALS = (
    "build_signals --rollouts {w}/rollouts --base {base} --teachers {other} "
    "--output {w}/out.safetensors"
)
STAGE2 = (
    "stage2_distill --base {base} --rollouts {w}/rollouts --signals {w}/signals.safetensors "
    "--output {w}/out --epochs 1"
)
CLONE = (
    "stage2_distill --base {base} --rollouts {w}/rollouts --output {w}/out --epochs 1 "
    "--objective forward_kl"
)
ANNOTATE = "annotate --rollouts {w}/rollouts"

Edit = Callable[[Path], None]


# --------------------------------------------------------------------------------------------------
# Ways to spoil the input


def line(number: int, text: str) -> Edit:
    """Replaces a line of problems.jsonl."""

    def edit(world: Path) -> None:
        lines = (world / "problems.jsonl").read_text().splitlines()
        lines[number - 1] = text
        (world / "problems.jsonl").write_text("\n".join(lines) + "\n")

    return edit


def problem(number: int, **fields: object) -> Edit:
    """Changes fields of a problem; None drops one."""

    def edit(world: Path) -> None:
        row = json.loads((world / "problems.jsonl").read_text().splitlines()[number - 1]) | fields
        line(number, json.dumps({k: v for k, v in row.items() if v is not None}))(world)

    return edit


def contents(name: str, data: bytes) -> Edit:
    """Replaces the bytes of a file."""

    def edit(world: Path) -> None:
        (world / name).parent.mkdir(exist_ok=True)
        (world / name).write_bytes(data)

    return edit


def truncated(name: str) -> Edit:
    """Keeps the first half of a file."""
    return lambda w: (w / name).write_bytes(
        (w / name).read_bytes()[: (w / name).stat().st_size // 2]
    )


def arrays(
    change: Callable[[dict[str, torch.Tensor]], object], name: str = "rollouts/rollouts"
) -> Edit:
    """Changes the arrays of a safetensors file; its metadata stays."""

    def edit(world: Path) -> None:
        path = world / f"{name}.safetensors"
        tensors, metadata = common.load_tensors(path, {})
        change(tensors)
        common.save_tensors(path, tensors, metadata)

    return edit


def signal_arrays(change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    return arrays(change, "signals")


def sampling(**changes: object) -> Edit:
    """Changes the sampling settings that the rollouts' metadata tell."""

    def edit(world: Path) -> None:
        rollouts = common.load_rollouts(world / "rollouts")
        settings = rollouts.metadata["sampling"] | changes
        metadata = rollouts.metadata | {"sampling": settings}
        common.save_rollouts(dataclasses.replace(rollouts, metadata=metadata))

    return edit


def foreign(name: str) -> Edit:
    return lambda w: save_file({"tokens": torch.zeros(3)}, w / f"{name}.safetensors")


def broken_model(file: str, data: bytes | None) -> Edit:
    """A copy of the base in the world, with a file replaced, or dropped."""

    def edit(world: Path) -> None:
        shutil.copytree(tiny.setting() / "base", world / "model")
        (world / "model" / file).unlink()
        if data is not None:
            (world / "model" / file).write_bytes(data)

    return edit


def earlier_run(script: str, **changes: object) -> Edit:
    """A run folder of the same command but for `changes`."""

    def edit(world: Path) -> None:
        module = importlib.import_module(script)
        command = {"evaluate": EVALUATE, "stage1_extreme": STAGE1}
        words = fill(command[script], world)[1:]
        values = {a[2:].replace("-", "_"): b for a, b in zip(words[::2], words[1::2], strict=True)}
        args = dataclasses.replace(module.Args(**values), **changes)
        common.start_run(world / "out", args, {}, common.setup_ranks())

    return edit


def base_run(**changes: object) -> Edit:
    """A finished evaluation of the base, but for `changes` of its sampling or model."""

    def edit(world: Path) -> None:
        shutil.copytree(world / "rollouts", world / "base_run")
        shutil.copy(world / "problems.jsonl", world / "base_run" / "problems.jsonl")
        rollouts = common.load_rollouts(world / "base_run")
        base = common.fingerprint(tiny.setting() / "base")
        settings = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 4, "top_k": 0}
        metadata = {"model": "M", "model_fingerprint": base, "sampling": settings}
        metadata |= {k: v for k, v in changes.items() if k in metadata}
        settings |= {k: v for k, v in changes.items() if k in settings}
        common.save_rollouts(dataclasses.replace(rollouts, metadata=metadata))

    return edit


BASE_RUN = (
    EVALUATE.replace("--model {base}", "--model {other}") + " --base {base} --base-run {w}/base_run"
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A command, what spoils it, and words that its message must have."""

    name: str
    command: str
    words: tuple[str, ...]
    edit: Edit | None = None
    lines: int = 2  # at most; pages of the command-line parser are longer


def flag_cases(name: str, command: str, table: str) -> list[Case]:
    """Cases of flags with values that are not allowed, from lines of `--flag value: remedy`."""
    rows = [line.strip().partition(": ") for line in table.strip().splitlines()]
    return [
        Case(f"{name} {flag}", f"{command} {flag}", (*flag.split(), remedy))
        for flag, _, remedy in rows
    ]


CASES = [
    # evaluate: problems
    Case("malformed line", EVALUATE, ("problems.jsonl:2", "JSON"), line(2, '{"id": ')),
    Case("line is not utf-8", EVALUATE, ("problems.jsonl:1", "JSON"),
         contents("problems.jsonl", b"\xff\n")),
    Case("blank line", EVALUATE, ("problems.jsonl:3", "JSON"), line(3, "")),
    Case("line is not an object", EVALUATE, ("problems.jsonl:2", "object"), line(2, "[1, 2]")),
    Case("missing id", EVALUATE, ("problems.jsonl:2", "'id'", "needs one"), problem(2, id=None)),
    Case("duplicate id", EVALUATE, ("problems.jsonl:3", "line 1", "unique"),
         problem(3, id="train-0")),
    Case("missing problem", EVALUATE, ("problems.jsonl:1", "'problem'", "needs one"),
         problem(1, problem=None)),
    Case("empty problem", EVALUATE, ("problems.jsonl:1", "'problem'", "needs one"),
         problem(1, problem=" ")),
    Case("empty answer", EVALUATE, ("problems.jsonl:4", "'answer'", "needs one"),
         problem(4, answer="")),
    Case("other column", EVALUATE + " --answer-column gold",
         ("problems.jsonl:1", "'gold'", "needs one")),
    Case("gold cannot be parsed", EVALUATE, ("problems.jsonl:2", "'answer'", "correct or drop"),
         problem(2, answer="}{")),
    Case("empty problems file", EVALUATE, ("problems.jsonl", "no problems"),
         contents("problems.jsonl", b"")),
    Case("no problems file", EVALUATE, ("problems.jsonl", "no such file"),
         lambda w: (w / "problems.jsonl").unlink()),
    Case("duplicate problem", EVALUATE, ("problems.jsonl:3", "'problem'", "repeats", "line"),
         lambda w: problem(3, problem=common.read_jsonl(w / "problems.jsonl")[0]["problem"])(w)),
    Case("half a surrogate pair", EVALUATE, ("problems.jsonl:2", "surrogate", "correct it"),
         line(2, '{"id": "x", "problem": "\\ud800", "answer": "1"}')),
    Case("brackets without end", EVALUATE, ("problems.jsonl:2", "JSON"), line(2, "[" * 100_000)),
    Case("hub set offline", EVALUATE.replace("{w}/problems.jsonl", "hf:nobody/nothing"),
         ("hf:nobody/nothing", "cannot load", "check name")),
    Case("hub name malformed", EVALUATE.replace("{w}/problems.jsonl", "hf:a:b:c:d"),
         ("hf:a:b:c:d", "hf:OWNER/NAME")),
    # prompts
    Case("no place for the problem", EVALUATE + " --prompt-template Solve.",
         ("--prompt-template", "'Solve.'", "{problem}", "add it")),
    Case("system without chat", EVALUATE + " --system Hi --no-chat-template",
         ("--system", "--no-chat-template", "--prompt-template")),
    Case("base run with other prompts", BASE_RUN + " --prompt-template Solve{{problem}}",
         ("--base-run", "other prompts", "make them equal"), base_run()),
    # comparison
    Case("compare with nothing", EVALUATE + " --compare {w}/nowhere",
         ("nowhere/metrics.json", "no such file")),
    Case("compare with other problems", EVALUATE + " --compare {w}/rollouts",
         ("--compare", "other problems", "evaluate both"),
         lambda w: (common.write_json(w / "rollouts/metrics.json", {}),
                    problem(2, id="renamed")(w))),
    # models
    Case("no such model", EVALUATE.replace("{base}", "{w}/nowhere"),
         ("nowhere", "no such folder")),
    Case("unfinished model", EVALUATE.replace("{base}", "{w}/model"),
         ("model", "config.json", "unfinished"), broken_model("config.json", None)),
    Case("hub name offline", EVALUATE.replace("{base}", "nobody/nothing"),
         ("nobody/nothing", "hub")),
    Case("truncated weights", EVALUATE.replace("{base}", "{w}/model"),
         ("model.safetensors", "truncated or damaged"), broken_model("model.safetensors", b"half")),
    Case("malformed config", EVALUATE.replace("{base}", "{w}/model"),
         ("config.json", "not JSON"), broken_model("config.json", b"{")),
    Case("no tokenizer", EVALUATE.replace("{base}", "{w}/model"), ("model", "cannot be loaded"),
         broken_model("tokenizer.json", None)),
    Case("stage 1: truncated weights", STAGE1.replace("{base}", "{w}/model"),
         ("model.safetensors", "truncated or damaged"), broken_model("model.safetensors", b"half")),
    Case("stage 1: no such model", STAGE1.replace("{base}", "{w}/nowhere"),
         ("nowhere", "no such folder")),
    Case("stage 1: init of another vocabulary", STAGE1 + " --init {small}",
         ("small", "vocabulary")),
    Case("signals: teacher of another vocabulary", SIGNALS.replace("{other}", "{small}"),
         ("small", "vocabulary")),
    Case("signals: ruined teacher", SIGNALS.replace("{other}", "{ruined}"),
         ("ruined", "not finite", "lower")),
    Case("stage 2: teacher of another vocabulary", CLONE + " --teacher {small}",
         ("small", "vocabulary")),
    Case("stage 2: init of another vocabulary", STAGE2 + " --init {small}",
         ("small", "vocabulary")),
    Case("evaluate: base of another vocabulary", EVALUATE + " --base {small}",
         ("small", "vocabulary")),
    # rollouts
    Case("no rollouts", STAGE1.replace("rollouts {w}/rollouts", "rollouts {w}/nowhere"),
         ("nowhere", "no such file")),
    Case("truncated rollouts", STAGE1, ("rollouts.safetensors", "truncated", "make it again"),
         truncated("rollouts/rollouts.safetensors")),
    Case("foreign rollouts", STAGE1, ("rollouts.safetensors", "not of these scripts"),
         foreign("rollouts/rollouts")),
    Case("array missing", STAGE1, ("'prompt_lens'", "missing"),
         arrays(lambda t: t.pop("prompt_lens"))),
    Case("wrong dtype", STAGE1, ("'rewards'", "torch.float64", "expected torch.float32"),
         arrays(lambda t: t.update(rewards=t["rewards"].double()))),
    Case("reward is not a verdict", STAGE1, ("response 2", "not 0 or 1"),
         arrays(lambda t: t["rewards"].__setitem__(2, 0.5))),
    Case("cu_seqlens too long", STAGE1, ("cu_seqlens", "32 responses"),
         arrays(lambda t: t.update(cu_seqlens=torch.cat([t["cu_seqlens"], t["cu_seqlens"][-1:]])))),
    Case("cu_seqlens falls", STAGE1, ("response 0", "empty response"),
         arrays(lambda t: t["cu_seqlens"].__setitem__(1, 0))),
    Case("no responses", STAGE1, ("cu_seqlens", "0 responses"),
         arrays(lambda t: t.update({k: v[: k == "cu_seqlens"] for k, v in t.items()}))),
    Case("array too short", STAGE1, ("'truncated'", "31 entries", "32"),
         arrays(lambda t: t.update(truncated=t["truncated"][1:]))),
    Case("optional array too short", STAGE1, ("'sampler_logprobs'", "3 entries"),
         arrays(lambda t: t.update(sampler_logprobs=torch.zeros(3)))),
    Case("optional array of wrong type", SIGNALS, ("'first_wrong_token'", "expected torch.int32"),
         arrays(lambda t: t.update(first_wrong_token=torch.zeros(32)))),
    Case("empty response", STAGE1, ("response 5", "empty response", "drop it"),
         arrays(lambda t: t["prompt_lens"].__setitem__(5, t["cu_seqlens"].diff()[5]))),
    Case("token beyond the vocabulary", STAGE1, ("token 999", "vocabulary of", "drawn by"),
         arrays(lambda t: t["tokens"].__setitem__(20, 999))),
    Case("negative token", STAGE1, ("rollouts.safetensors", "-1"),
         arrays(lambda t: t["tokens"].__setitem__(20, -1))),
    Case("signals: token beyond the vocabulary", SIGNALS,
         ("token 999", "vocabulary of", "drawn by"),
         arrays(lambda t: t["tokens"].__setitem__(20, 999))),
    Case("zero usable groups", STAGE1, ("zero usable groups", "--n"),
         arrays(lambda t: t["rewards"].zero_())),
    Case("nothing correct", STAGE1 + " --loss sft", ("no correct response", "sample"),
         arrays(lambda t: t["rewards"].zero_())),
    Case("top-p below 1", STAGE1, ("top-p 0.9", "--top-p 1", "--force"), sampling(top_p=0.9)),
    Case("top-k", SIGNALS, ("top-k 20", "--force"), sampling(top_k=20)),
    Case("stage 2: top-p below 1", CLONE + " --teacher {other}", ("top-p 0.9", "--force"),
         sampling(top_p=0.9)),
    Case("greedy", STAGE1, ("greedy", "--temperature 1"), sampling(temperature=0.0)),
    Case("annotate: problems of another kind", ANNOTATE, ("problems.jsonl:1", "Why?"),
         lambda w: common.write_jsonl(w / "rollouts/problems.jsonl", [{"problem": "Why?"}] * 8)),
    Case("annotate: samples lack a line", ANNOTATE, ("samples.jsonl", "31", "32"),
         lambda w: common.write_jsonl(w / "rollouts/samples.jsonl", [{"text": ""}] * 31)),
    # signals
    Case("no signals", STAGE2, ("signals.safetensors", "no such file"),
         lambda w: (w / "signals.safetensors").unlink()),
    Case("truncated signals", STAGE2, ("signals.safetensors", "truncated"),
         truncated("signals.safetensors")),
    Case("foreign signals", STAGE2, ("signals.safetensors", "not of these scripts"),
         foreign("signals")),
    Case("rollouts given as signals", STAGE2.replace("{w}/signals", "{w}/rollouts/rollouts"),
         ("rollouts.safetensors", "'behavior_logprobs'", "missing")),
    Case("stale signals", STAGE2, ("signals.safetensors", "other rollouts", "build_signals.py"),
         arrays(lambda t: t["rewards"].__setitem__(0, 1 - t["rewards"][0]))),
    Case("signals of another base", STAGE2.replace("--base {base}", "--base {other}"),
         ("signals.safetensors", "base", "other")),
    Case("signals not finite", STAGE2, ("'signal'", "not finite", "make it again"),
         signal_arrays(lambda t: t["signal"].__setitem__(30, torch.nan))),
    Case("signals not aligned", STAGE2, ("'signal'", "not aligned", "make it again"),
         signal_arrays(lambda t: t.update(signal=t["signal"][1:]))),
    Case("signals file of other inputs",
         SIGNALS.replace("{w}/out.safetensors", "{w}/signals.safetensors") + " --weights 2",
         ("signals.safetensors", "other inputs", "choose another")),
    Case("rollouts would be overwritten",
         SIGNALS.replace("{w}/out.safetensors", "{w}/rollouts/rollouts.safetensors"),
         ("rollouts.safetensors", "other inputs", "choose another")),
    # output
    Case("file where the parent should be", EVALUATE.replace("{w}/out", "{w}/problems.jsonl/out"),
         ("problems.jsonl", "check the path")),
    Case("stage 1: file where the parent should be",
         STAGE1.replace("{w}/out", "{w}/problems.jsonl/out"),
         ("problems.jsonl", "check the path")),
    Case("signals: file where the parent should be",
         SIGNALS.replace("{w}/out", "{w}/problems.jsonl/out"),
         ("problems.jsonl", "check the path")),
    Case("stage 2: file where the parent should be",
         STAGE2.replace("{w}/out", "{w}/problems.jsonl/out"),
         ("problems.jsonl", "check the path")),
    Case("output is a file", STAGE1.replace("{w}/out", "{w}/problems.jsonl"),
         ("problems.jsonl", "not a run folder", "choose another")),
    Case("output is no run folder", STAGE1.replace("{w}/out", "{w}/rollouts"),
         ("rollouts", "not a run folder", "choose another")),
    Case("stage 2: output is no run folder", STAGE2.replace("{w}/out", "{w}/rollouts"),
         ("rollouts", "not a run folder", "choose another")),
    Case("evaluate: other settings", EVALUATE, ("out", "seed: 1 -> 0", "choose another"),
         earlier_run("evaluate", seed=1)),
    Case("stage 1: other settings", STAGE1, ("out", "beta: 0.5 -> 0.05", "choose another"),
         earlier_run("stage1_extreme", beta=0.5)),
    Case("args.json of another tool", STAGE1, ("args.json", "choose another"),
         contents("out/args.json", b"{}")),
    Case("malformed args.json", STAGE1, ("args.json", "JSON"), contents("out/args.json", b"{")),
    # the base's own evaluation
    Case("no base run", BASE_RUN, ("base_run", "no such file")),
    Case("base run of another model", BASE_RUN, ("--base-run", "not by --base"),
         base_run(model_fingerprint="0")),
    Case("base run of other settings", BASE_RUN,
         ("--base-run", "max_new_tokens 9", "make them equal"), base_run(max_new_tokens=9)),
    Case("base run of other problems", BASE_RUN, ("--base-run", "other problems"),
         lambda w: (base_run()(w), problem(1, problem="1+1=?", answer="2")(w))),
    Case("base run without base", EVALUATE + " --base-run {w}/base_run",
         ("--base-run", "name the base")),
    # flags
    Case("base at another temperature", EVALUATE + " --base {base} --temperature 0.5",
         ("--base", "--temperature 1")),
    Case("vllm", EVALUATE + " --engine vllm", ("--engine vllm", "use --engine hf")),
    *flag_cases("evaluate", EVALUATE, """
        --n 0: 1 or more
        --batch-size 0: 1 or more
        --max-new-tokens 0: 1 or more
        --micro-batch-tokens 0: 1 or more
        --temperature -1: 0 or more
        --temperature nan: 0 or more
        --top-p 0: above 0
        --top-p 1.5: at most 1
        --kl-samples -1: 0 or more
        --limit -1: 0 or more
        --grading-timeout 0: above 0
        --grading-timeout inf: at most 86400
    """),
    *flag_cases("stage 1", STAGE1, """
        --epochs 0: 1 or more
        --batch-size 0: 1 or more
        --micro-batch-tokens 0: 1 or more
        --checkpoint-every 0: 1 or more
        --learning-rate -1: above 0
        --learning-rate nan: above 0
        --beta 0: above 0
        --max-grad-norm 0: above 0
        --sapo-tau-positive 0: above 0
        --save-at 9: --epochs 1
        --save-at 0: --epochs 1
        --weight-decay -1: 0 or more
        --kl-coef -1: 0 or more
        --clip-low 1.5: between 0 and 1
        --clip-high -1: 0 or more
        --warmup-steps -1: 0 or more
    """),
    Case("invert and unlearn", STAGE1 + " --invert-rewards --unlearn",
         ("--invert-rewards", "--unlearn", "exclude")),
    Case("unlearn sft", STAGE1 + " --unlearn --loss sft",
         ("--unlearn", "--loss sft", "use --loss")),
    Case("depth without unlearning", STAGE1 + " --stop-at-logprob -50",
         ("--stop-at-logprob", "add --unlearn")),
    Case("depth above 0", STAGE1 + " --unlearn --stop-at-logprob 5",
         ("--stop-at-logprob 5", "below 0")),
    Case("references", SIGNALS + " --references {base} {base}",
         ("--references", "2 given", "1 teachers", "one each")),
    Case("weights", SIGNALS + " --weights 1 2", ("--weights", "2 given", "one each")),
    Case("weight not finite", SIGNALS + " --weights nan", ("--weights", "nan", "finite")),
    Case("signals name", SIGNALS.replace("out.safetensors", "out.pt"), ("out.pt", ".safetensors")),
    Case("signals row", SIGNALS + " --micro-batch-tokens 0",
         ("--micro-batch-tokens", "1 or more")),
    Case("clone nobody", CLONE, ("forward_kl", "--teacher")),
    Case("clone and signals", CLONE + " --teacher {other} --signals {w}/signals.safetensors",
         ("forward_kl", "drop --signals")),
    Case("no signals flag", CLONE.replace("forward_kl", "regression"),
         ("regression", "needs --signals")),
    Case("teacher and signals", STAGE2 + " --teacher {other}",
         ("--teacher", "regression", "--signals")),
    Case("floor above clip", STAGE2 + " --signal-clip 2 --signal-floor 3",
         ("--signal-floor 3", "at most --signal-clip 2")),
    Case("mask without pg", STAGE2 + " --prob-mask 0.2", ("--prob-mask", "--objective pg")),
    Case("mask below 0", STAGE2 + " --objective pg --prob-mask -1", ("--prob-mask", "0 or more")),
    Case("nothing left to train on", STAGE2 + " --kl-holdout 0.99",
         ("--kl-holdout 0.99", "none of 8 problems")),
    *flag_cases("stage 2", STAGE2, """
        --epochs 0: 1 or more
        --batch-size 0: 1 or more
        --kl-every 0: 1 or more
        --micro-batch-tokens 0: 1 or more
        --learning-rate -1: above 0
        --signal-clip 0: above 0
        --token-kl 0: above 0
        --signal-floor -1: 0 or more
        --max-grad-norm 0: above 0
        --kl-budget 0: above 0
        --kl-holdout 0: between 0 and 1
        --kl-holdout 1: between 0 and 1
        --weight-decay -1: 0 or more
        --kl-coef -1: 0 or more
        --signal-scale nan: finite
    """),
    # what the command-line parser says itself
    Case("unknown flag", STAGE1 + " --lerning-rate 1", ("--lerning-rate",), lines=30),
    Case("flag is no number", EVALUATE + " --n many", ("--n", "many"), lines=30),
    Case("flag is no choice", STAGE1 + " --loss bce", ("--loss", "bce", "sapo"), lines=30),
    Case("flag missing", "stage1_extreme --base {base}", ("--rollouts",), lines=30),
]  # fmt: skip


# --------------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Problems, rollouts and signals to spoil."""
    folder = tmp_path / "world"
    tiny.signals()
    shutil.copytree(tiny.setting() / "rollouts", folder / "rollouts")
    shutil.copy(tiny.setting() / "train.jsonl", folder / "problems.jsonl")
    shutil.copy(tiny.signals(), folder / "signals.safetensors")
    return folder


def fill(command: str, world: Path) -> list[str]:
    """The words of a command, with the names of the models and of the world in them."""
    models = {name: tiny.setting() / name for name in ("base", "other", "small", "ruined")}
    return [word.format(w=world, **models) for word in command.split()]


def snapshot(folder: Path) -> dict[Path, bytes]:
    """Every file and what is in it, and every folder; but policies already scored may stay."""
    paths = [p for p in sorted(folder.rglob("*")) if ".safetensors.parts" not in str(p)]
    return {p: p.read_bytes() if p.is_file() else b"" for p in paths}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(
    case: Case, world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if case.edit is not None:
        case.edit(world)
    script, *arguments = fill(case.command, world)
    monkeypatch.setattr("sys.argv", [f"{script}.py", *arguments])
    module = importlib.import_module(script)
    before = snapshot(world)
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        common.run(module.main, module.Args, module.__doc__)

    message = capfd.readouterr().err
    assert caught.value.code == 2, message
    # Progress bars come before the message and are no part of it.
    message = message[max(0, message.find("error: ")) :] if case.lines == 2 else message
    assert len(message.strip().splitlines()) <= case.lines, message
    assert "Traceback" not in message
    assert [word for word in case.words if word not in message] == [], message
    after = snapshot(world)
    changed = [str(p) for p in {**before, **after} if before.get(p) != after.get(p)]
    assert not changed, (changed, message)
