"""Starts the scripts of examples/arithmetic in small, on one folder of the session; awaits them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import warm

ROOT = Path(__file__).resolve().parents[1]


def start(place: Path, script: str, **changes: str) -> subprocess.Popen:
    """`place` holds venv/ (an environment that needs no installation) and run/."""
    environment = os.environ | warm.CPU | {
        "ERPD_VENV": str(place / "venv"), "RUN": str(place / "run"), "QUICK": "1", "SEED": "0",
    } | changes  # fmt: skip
    return subprocess.Popen(
        ["bash", ROOT / "examples" / "arithmetic" / f"{script}.sh"], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """Waits for the end, which must be with that exit code; returns what was printed."""
    printed = process.communicate(timeout=600)[0]
    assert process.returncode == code, printed
    return printed


def kill_when(process: subprocess.Popen, written: Path) -> None:
    """kill -9 of all its processes as soon as a file is there."""
    while not written.exists():
        assert process.poll() is None, process.communicate()[0]  # it ended before
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
