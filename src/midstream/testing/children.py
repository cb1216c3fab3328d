"""Child processes that read a target, report every step, and can be killed."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

from midstream.pipeline.pickling import from_bytes, to_bytes
from midstream.testing.drivers import Item, Saved, Session, Setup, Target, Topology

__all__ = ["Child", "ChildStep", "Unreachable"]


class Unreachable(RuntimeError):
    """Raised if the target cannot run in another process, or fails there."""


class ChildStep(NamedTuple):
    """The items of one step of a child, and its checkpoint after the step."""

    items: list[Item]
    saved: Saved


class Child:
    """A process that reads a target's loaders, from a checkpoint on.

    Use as a context manager: at its end the process is killed.

    Args:
        given: The target, as the user gave it.
        topology: Ranks and workers.
        setup: How the loaders are made and read.
        saved: The checkpoint to resume from.
        batches: Stop after this many batches; None: at the end.

    Raises:
        Unreachable: If the target cannot be pickled.
    """

    def __init__(
        self, given: Any, topology: Topology, setup: Setup, saved: Saved | None, batches: int | None
    ) -> None:
        try:
            target, key = to_bytes(given), to_bytes(setup.key)
        except Exception as error:
            raise Unreachable(
                f"the target cannot be sent to another process ({type(error).__name__}: {error})."
                " Define it at the top of a module, or leave the kills out with kill=False."
            ) from error
        job = {
            "path": sys.path,
            "target": base64.b64encode(target).decode(),
            "setup": base64.b64encode(pickle.dumps(dataclasses.replace(setup, key=None))).decode(),
            "key": base64.b64encode(key).decode(),
            "topology": list(topology),
            "saved": base64.b64encode(pickle.dumps(saved)).decode(),
            "batches": batches,
        }
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with the child
        read, write = os.pipe()
        os.set_inheritable(write, True)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "midstream.testing.children", str(write)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            env=environment,
            pass_fds=(write,),
        )
        os.close(write)
        self._lines = os.fdopen(read, "rb")
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job).encode())
            self._process.stdin.close()

    def steps(self) -> Iterator[ChildStep]:
        """Yields the steps as the child reports them.

        Raises:
            Unreachable: If the child fails.
        """
        while True:
            line = self._lines.readline()
            if not line.endswith(b"\n"):
                status = self._process.wait()
                self._log.seek(0)
                text = self._log.read().decode(errors="replace").strip()
                raise Unreachable(f"a child process ended with status {status}:\n{text[-1500:]}")
            if line == b"end\n":
                return
            yield ChildStep(*pickle.loads(base64.b64decode(line)))

    def kill(self) -> None:
        """Sends SIGKILL."""
        self._process.kill()

    def wait(self) -> None:
        """Waits until the process has ended."""
        self._process.wait()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._lines.close()
        self._log.close()


def main(handle: int) -> None:
    """Runs the job on standard input, and writes each step to the file descriptor ``handle``."""
    job = json.load(sys.stdin)
    sys.path[:] = job["path"]
    out = os.fdopen(handle, "wb")
    setup: Setup = pickle.loads(base64.b64decode(job["setup"]))
    target, key = (from_bytes(base64.b64decode(job[name])).value for name in ("target", "key"))
    setup, target = dataclasses.replace(setup, key=key), Target(target)
    saved = pickle.loads(base64.b64decode(job["saved"]))
    session = Session(target, Topology(*job["topology"]), setup, saved)
    done = 0
    while job["batches"] is None or done < job["batches"]:
        step = session.step()
        if step is None:
            break
        if step.end:
            continue
        done += len(step.items)
        line = base64.b64encode(pickle.dumps((step.items, session.save())))
        out.write(line + b"\n")
        out.flush()
    session.close()
    out.write(b"end\n")
    out.flush()


if __name__ == "__main__":
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        main(int(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
