"""What a run tells while it goes on: progress in a log file and on a terminal, TensorBoard."""

from __future__ import annotations

import functools
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import stage1
import tiny
import torch

import common
import stage1_extreme
import stage2_distill

ROOT = Path(common.__file__).parent
LINE = re.compile(
    r"stage 1 ce: \d+ %, \d+ of 40, \d\d:\d\d gone, [\d:?]+ left, +[\d.?]+(it/s|s/it)(, loss=\d+)?"
)
# One short bar: 40 steps of 20 ms, a line each 0.2 s; the message in between goes to stdout.
BAR = """
import time, torch, common
common.LOG_INTERVAL = 0.2
ranks = common.Ranks({rank}, 2, torch.device("cpu"))
start = time.monotonic()
with common.progress(ranks, 40, 4, "stage 1 ce") as bar:
    for step in range(36):
        time.sleep(0.02)
        bar.set_postfix(loss=step, refresh=False)
        bar.update()
        if step == 20:
            ranks.print("in between")
print(time.monotonic() - start)
"""


def run_bar(rank: int, stderr: Any) -> str:
    """stdout of BAR, with stderr into a file."""
    command = [sys.executable, "-c", BAR.format(rank=rank)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True)
    assert done.returncode == 0
    return done.stdout


def test_progress_in_a_log_file_is_a_few_whole_lines(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w") as file:
        printed = run_bar(0, file).splitlines()
    text = (tmp_path / "log").read_bytes().decode()
    assert "\r" not in text and "\x1b" not in text and text.endswith("\n")
    lines = text.splitlines()
    assert all(LINE.fullmatch(line) for line in lines), text
    assert lines[0].startswith("stage 1 ce: 10 %, 4 of 40") and "40 of 40" in lines[-1]
    assert 4 <= len(lines) <= 2 + float(printed[1]) / 0.2  # the start, the end, one an interval
    assert printed[0] == "in between"
    assert len(set(lines)) == len(lines)


def test_progress_is_of_rank_0_and_a_terminal_keeps_its_bar(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w") as file:
        assert len(run_bar(1, file).splitlines()) == 1  # the time; ranks.print is of rank 0 too
    assert (tmp_path / "log").read_bytes() == b""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    run_bar(0, theirs)
    os.close(theirs)
    shown = os.read(ours, 100_000)
    os.close(ours)
    assert b"\r" in shown and b"\xe2\x96\x88" in shown  # one line, rewritten; a bar of blocks


def stage1_args(
    output: Path, kind: type[stage1_extreme.Args] = stage1_extreme.Args, **changes: Any
) -> stage1_extreme.Args:
    given = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "checkpoint_every": 3}
    folder = tiny.setting()
    return kind(
        base=str(folder / "base"), rollouts=folder / "rollouts", output=output, **(given | changes)
    )


def stage2_args(output: Path, **changes: Any) -> stage2_distill.Args:
    given = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "kl_every": 3, "kl_holdout": 0.2}
    folder = tiny.setting()
    return stage2_distill.Args(
        base=str(folder / "base"), rollouts=folder / "rollouts", output=output,
        signals=tiny.signals(), **(given | changes),
    )  # fmt: skip


@pytest.mark.parametrize("script", ["stage1_extreme", "evaluate"])
def test_scripts_write_a_log_without_carriage_returns(script: str, tmp_path: Path) -> None:
    folder, output = tiny.setting(), tmp_path / "out"
    flags = {
        "stage1_extreme": f"--base {folder}/base --rollouts {folder}/rollouts --output {output} "
        "--epochs 1 --batch-size 8",
        "evaluate": f"--model {folder}/base --problems {folder}/test.jsonl --output {output} "
        f"--base {folder}/base --n 2 --max-new-tokens 8 --engine hf",
    }
    bars = {"stage1_extreme": ["score the base", "stage 1 ce"],
            "evaluate": ["sample base", "measure KL"]}  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as file:
        command = [sys.executable, ROOT / f"{script}.py", *flags[script].split()]
        subprocess.run(command, env=env, stdout=file, stderr=file, check=True)
    text = (tmp_path / "log").read_bytes().decode()
    assert "\r" not in text and "\x1b" not in text
    for bar in bars[script]:
        # A few seconds in all: the start, the end, and hardly a line between.
        assert 2 <= len(re.findall(rf"^{bar}: \d+ %, .* left, ", text, re.M)) <= 5, text


# --------------------------------------------------------------------------------------------------
# TensorBoard


def drawn(output: Path) -> dict[tuple[str, int], float]:
    """Every point that TensorBoard shows of a run: {(name, step): value}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    points = [
        ((name, event.step), event.value)
        for name in events.Tags()["scalars"] for event in events.Scalars(name)
    ]  # fmt: skip
    assert len(dict(points)) == len(points)  # no step twice
    return dict(points)


def logged(output: Path) -> dict[tuple[str, int], float]:
    """The same of metrics.jsonl."""
    return {
        (name, row["step"]): value
        for row in common.read_jsonl(output / "metrics.jsonl")
        for name, value in row.items() if name != "step" and value is not None
    }  # fmt: skip


def assert_drawn_is_logged(output: Path) -> None:
    shown, written = drawn(output), logged(output)
    assert shown.keys() == written.keys()
    assert shown == {key: pytest.approx(value, rel=1e-6) for key, value in written.items()}


class Killed(Exception):
    """In the place of kill -9, after a line has been written."""


def run_until(step: int, main: Any, args: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs `main` until the line of `step` is written, and no further."""
    write = common.MetricsLog.write

    def killed(log: common.MetricsLog, values: dict[str, float]) -> None:
        write(log, values)
        if values["step"] == step:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(common.MetricsLog, "write", killed)
        main(args)


@pytest.mark.parametrize("stage", ["1", "2", "fork"])
def test_tensorboard_has_every_number_of_metrics_jsonl_once(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard", reason="it is optional")
    monkeypatch.setattr(stage1_extreme, "LOSSES", stage1_extreme.LOSSES)  # a fork adds its own
    main, make_args = {
        "1": (stage1_extreme.main, stage1_args),
        "2": (stage2_distill.main, stage2_args),
        "fork": (stage1.main, functools.partial(stage1_args, kind=stage1.Args, loss="cispo")),
    }[stage]
    args = make_args(tmp_path / "run", tensorboard=True)
    if stage == "1":  # killed before, with the flag; and once more, without it
        run_until(2, main, make_args(args.output), monkeypatch)
        assert not (args.output / "tensorboard").exists()
    run_until(2 if stage == "2" else 5, main, args, monkeypatch)
    assert_drawn_is_logged(args.output)  # nothing waits in a buffer
    main(args)  # goes on from the checkpoint of step 3, or from the start
    assert_drawn_is_logged(args.output)
    assert {"loss", "entropy", "kl_proxy"} <= {name for name, _ in drawn(args.output)}


def test_without_the_flag_there_is_no_folder_and_the_numbers_are_the_same(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="it is optional")
    for name, flag in (("with", True), ("without", False)):
        stage1_extreme.main(stage1_args(tmp_path / name, epochs=1, tensorboard=flag))
    for file in ("metrics.jsonl", "model.safetensors"):
        one, other = ((tmp_path / name / file).read_bytes() for name in ("with", "without"))
        assert one == other
    assert not (tmp_path / "without" / "tensorboard").exists()


def test_other_ranks_write_no_events(tmp_path: Path) -> None:
    ranks = common.Ranks(1, 2, torch.device("cpu"))
    common.MetricsLog(tmp_path, 0, ranks, tensorboard=True).write({"step": 1, "loss": 0.0})
    assert not list(tmp_path.iterdir())


def test_missing_package_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    for args, main in ((stage1_args, stage1_extreme.main), (stage2_args, stage2_distill.main)):
        with pytest.raises(common.UserError, match="--tensorboard needs .* pip install tensorb"):
            main(args(tmp_path / "run", tensorboard=True))
    assert not (tmp_path / "run").exists()
    assert common.TENSORBOARD in (ROOT / "requirements.txt").read_text()


def test_a_state_drawn_twice_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """tqdm draws a full bar once more as it closes."""
    lines = common._Lines()
    for text in ("\rhalf", "\rfull", "\rfull", "\n"):
        lines.write(text)
    assert capsys.readouterr().err == "half\nfull\n"
