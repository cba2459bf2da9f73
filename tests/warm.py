"""A warm Python for tests that start many processes: torch is imported once, each start is a fork.

`warm_python(folder)` gives an executable that takes a script or `-m module` with arguments, like
`python`, and behaves like it: environment, folder, the three streams, exit code, signals both ways.
Only what is expensive and not ours is imported beforehand; our modules are read at every start."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextlib.contextmanager
def warm_python(folder: Path) -> Iterator[Path]:
    """Yields the executable; the server ends with the context."""
    address, executable = folder / "socket", folder / "python"
    # -I -S: the client needs the standard library only, and starts in 20 ms.
    command = f'exec "{sys.executable}" -I -S "{Path(__file__).resolve()}" "{address}" "$@"'
    executable.write_text(f"#!/bin/sh\n{command}\n")
    executable.chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, address], env=os.environ | CPU)
    try:
        while not address.exists():
            assert server.poll() is None, "the warm server could not start"
            time.sleep(0.05)
        yield executable
    finally:
        server.kill()
        server.wait()


CPU = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def serve(address: str) -> None:
    """Forks a keeper for each client."""
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp
    import torch.distributed.run  # noqa: F401
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401
    import tyro  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + ".new")
    listener.listen(64)
    os.rename(address + ".new", address)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers leave no zombies
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            keep(client)
            os._exit(0)
        client.close()


def keep(client: socket.socket) -> None:
    """Starts what the client asked for; tells it the process id and, at the end, the status."""
    message, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
    child = os.fork()
    if child == 0:
        client.close()
        become(json.loads(message), streams)
    for stream in streams:
        os.close(stream)
    client.sendall(f"{child}\n".encode())
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return client.sendall(f"{status}\n".encode())
        if select.select([client], [], [], 0.01)[0]:  # the client was killed
            os.kill(child, signal.SIGKILL)


def become(request: dict, streams: list[int]) -> None:
    """Turns this process into the script; never returns."""
    import runpy

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    argv, code = request["argv"], 0
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = argv, str(Path(argv[0]).resolve().parent)
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            main.__file__ = argv[0]
            sys.modules["__mp_main__"] = main  # as multiprocessing names it for its children
            exec(compile(Path(argv[0]).read_text(), argv[0], "exec"), vars(main))
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ask(address: str, argv: list[str]) -> None:
    """The client: runs argv on the server's side and ends as it ended."""
    while argv[0] == "-u":  # torchrun starts its ranks so
        argv = argv[1:]
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    request = {"argv": argv, "folder": os.getcwd(), "environment": dict(os.environ)}
    for number in FORWARDED:  # not before the process is there
        signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
    answers = server.makefile()
    process = int(answers.readline())
    for number in FORWARDED:
        signal.signal(number, lambda got, _: os.kill(process, got))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    code = os.waitstatus_to_exitcode(int(answers.readline()))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    else:
        ask(sys.argv[1], sys.argv[2:])
