"""Starts programs in forks of an interpreter that has imported already what they need: importing a
trainer takes seconds.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_GRACE_S = 30.0  # what torchrun gives the other ranks when one has failed


class Nursery:
    """An interpreter that waits for orders, one at a time. It ends with this process.

    Args:
        modules: What it imports.
        path: Its ``PYTHONPATH``.
    """

    def __init__(self, modules: tuple[str, ...], path: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": path,
                "OMP_NUM_THREADS": "1",
                "PYTHONDONTWRITEBYTECODE": "1",
            },
        )
        atexit.register(self.process.communicate)

    def run(
        self,
        program: list[str],
        environments: list[dict[str, str]],
        errors: Path,
        timeout: float = 240,
        **more: Any,
    ) -> list[int]:
        """Run a program in a process for each environment; their exit statuses, in that order.

        When one fails the others are terminated, as torchrun does.

        Args:
            program: A file, or ``-m`` and a module, and its arguments.
            environments: What each has more in its environment.
            errors: A file for what they print to stderr.
            timeout: Seconds after which all are killed, and this fails.
            **more: ``out``, a file for what they print; ``cwd``, where they run; ``store``, that
            ranks are to meet there.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        order = {
            "program": program,
            "environments": environments,
            "errors": str(errors),
            "timeout": timeout,
            **more,
        }
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the nursery has ended"
        statuses: list[int] | None = json.loads(answer)
        assert statuses is not None, f"not done in {timeout} s:\n{errors.read_text()[-5000:]}"
        return statuses


@functools.lru_cache(None)
def nursery(*modules: str, path: str | None = None) -> Nursery:
    """The one that has imported these."""
    return Nursery(modules, os.pathsep.join(sys.path) if path is None else path)


def _serve() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    orders, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in orders:
        order = json.loads(line)
        children, (host, meeting) = [], _host() if order.get("store") else (0, {})
        for environment in order["environments"]:
            child = os.fork()
            if child == 0:
                orders.close()
                answers.close()
                _become({**environment, **meeting}, **order)
            children.append(child)
        statuses = _wait(children, order["timeout"])
        if host:
            os.kill(host, signal.SIGKILL)
            os.waitpid(host, 0)
        print(json.dumps(statuses), file=answers, flush=True)


def _host() -> tuple[int, dict[str, str]]:
    """A process with the store in which ranks find each other, as torchrun's agent has it, and what they need to know.

    Not in rank 0: the store of one that forks workers meets their copies of its connections, and
    turns in circles.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writer, str(store.port).encode())
        while True:
            signal.pause()
    os.close(writer)
    port = os.read(reader, 99).decode()
    os.close(reader)
    return child, {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _become(
    environment: dict[str, str],
    program: list[str],
    errors: str,
    out: str = "",
    cwd: str = "",
    **_: Any,
) -> None:
    """Be that program to the end of this process, whose interpreter then ends as any other."""
    for file, number in ((out, 1), (errors, 2)):
        if file:
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(environment)
    if cwd:
        os.chdir(cwd)
    if program[0] == "-m":
        sys.argv, sys.path[0] = program[1:], os.getcwd()
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = program, str(Path(program[0]).parent)
        runpy.run_path(program[0], run_name="__main__")
    sys.exit()


def _wait(children: list[int], timeout: float) -> list[int] | None:
    """Their exit statuses; None when they had to be killed because it took too long."""
    late = time.monotonic() + timeout
    statuses: dict[int, int] = {}
    until = late
    while len(statuses) < len(children):
        alive = [child for child in children if child not in statuses]
        for child in alive:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                statuses[child] = os.waitstatus_to_exitcode(status)
                if statuses[child]:
                    until = min(until, time.monotonic() + _GRACE_S)
                    for other in alive:
                        if other not in statuses:
                            os.kill(other, signal.SIGTERM)
        if time.monotonic() > until:
            for child in alive:
                if child not in statuses:
                    os.kill(child, signal.SIGKILL)
            until = float("inf")
        time.sleep(0.01)
    return None if time.monotonic() > late else [statuses[child] for child in children]


if __name__ == "__main__":
    _serve()
