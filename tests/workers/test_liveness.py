"""A worker process that dies: told at once when a batch is asked for, never in between, and never
waited for in vain.
"""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path
from typing import Any

import pytest

import midstream as ms

pytestmark = pytest.mark.slow

HEAD = """
    import array, fcntl, json, os, queue, signal, sys, termios, threading, time
    import torch
    import midstream as ms
    from midstream.workers.processes import ProcessIterator

    LATE = 3600.0
    ProcessIterator._try_get_data.__defaults__ = (LATE,)  # torch itself looks which workers live after so many seconds

    def say(*words):
        print(json.dumps(words), flush=True)

    def big(rows):
        return rows + list(range(10**6))  # more than the pipe takes

    def waiting(loader, size=60000):  # for that many bytes in the pipe
        count = array.array("i", [0])
        while count[0] < size:
            fcntl.ioctl(loader._iterator._worker_result_queue._reader.fileno(), termios.FIONREAD, count)

    def kill(loader, worker, number=signal.SIGKILL):
        os.kill(loader._iterator._workers[worker].pid, number)

    def die(x):  # once the main process says so
        if x == 20:
            while not os.path.exists(__file__ + ".go"):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    def pin():  # what torch asks and calls, so that its thread runs here too
        torch.accelerator.is_available = lambda: True
        torch.accelerator.set_device_index = lambda *_: None
        torch.accelerator.current_accelerator = lambda *_, **__: torch.device("cuda")
        torch._C._get_accelerator = lambda *_, **__: torch.device("cuda")
        torch.cuda.current_device = lambda: 0

    def run(loader, doing=lambda seen, loader: None):
        seen, error = [], None
        try:
            for batch in loader:
                seen.append(batch[:4])
                doing(len(seen), loader)
        except ms.WorkerError as error_:
            error = str(error_)
        return seen, error, loader.state_dict()["steps_done"]
"""

PROGRAMS = {
    # Every instruction of a step of training is a place where a handler could raise.
    "between": """
        def train(seen, loader):
            open(__file__ + ".go", "w").close()
            while all(worker.is_alive() for worker in loader._iterator._workers):
                pass
            say("trained")

        ds = ms.from_dataset(range(400)).map(die).batch(4, collate_fn=list)
    """,
    "half a batch": """
        def made(rows):
            if rows[0] % 8 and rows[0] > 8:
                time.sleep(LATE)
            if rows[0] == 8 and sys.argv[3] == "held" and os.fork() == 0:
                os.closerange(0, 3)
                time.sleep(20)  # it has all other descriptors of its worker, and lives longer
                os._exit(0)
            return rows if rows[0] < 8 else big(rows)

        def train(seen, loader):
            if seen == 2:
                waiting(loader)
                kill(loader, 0)
                while loader._iterator._workers[0].is_alive():
                    pass
                say("trained")

        ds = ms.from_dataset(range(400)).batch(4, collate_fn=made)
    """,
    "half a batch, by its own end": """
        def made(rows):
            if rows[0] == 16:
                time.sleep(1.5)
                os._exit(0)
            return big(rows) if rows[0] == 8 else rows

        def train(seen, loader):
            if seen == 2:
                time.sleep(3)
                say("trained")

        ds = ms.from_dataset(range(400)).batch(4, collate_fn=made)
    """,
    "while another sends": """
        def made(rows):
            if rows[0] == 8 or rows[0] > 12:
                time.sleep(LATE)
            return big(rows) if rows[0] == 12 else rows

        def train(seen, loader):
            def later():
                time.sleep(0.5)
                kill(loader, 0)
                time.sleep(0.5)
                kill(loader, 1, signal.SIGCONT)

            if seen == 2:
                waiting(loader)
                kill(loader, 1, signal.SIGSTOP)
                threading.Thread(target=later).start()
                say("trained")

        ds = ms.from_dataset(range(400)).batch(4, collate_fn=made)
    """,
    "somebody else is told": """
        def reap(number, frame):
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                pass

        def train(seen, loader):
            open(__file__ + ".go", "w").close()
            if seen == 1:
                say("trained")

        signal.signal(signal.SIGCHLD, reap)
        ds = ms.from_dataset(range(400)).map(die).batch(4, collate_fn=list)
    """,
}

TOLD = """
    if __name__ == "__main__":
        if sys.argv[3] == "pinned":
            pin()
        loader = ms.DataLoader(
            ds, num_workers=2, multiprocessing_context=sys.argv[1], timeout=int(sys.argv[2]), pin_memory=sys.argv[3] == "pinned"
        )
        first = iter(loader)
        assert hasattr(loader._iterator, "_pin_memory_thread") == (sys.argv[3] == "pinned")
        say(*run(loader, train))
"""


def run(folder: Path, *program: str, arguments: tuple[str, ...] = ()) -> list[Any]:
    """What a program said; it must end well, in a minute, and print nothing else."""
    script = folder / "program.py"
    script.write_text("".join(map(textwrap.dedent, (HEAD, *program))))
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.stderr, ran.returncode) == ("", 0)
    return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.mark.parametrize(
    ("name", "method", "timeout", "how"),
    [
        ("between", "fork", 0, ""),
        ("between", "fork", 50, ""),
        ("between", "fork", 50, "pinned"),
        ("half a batch", "spawn", 50, ""),
        ("half a batch", "fork", 0, "held"),
        ("half a batch", "fork", 0, "pinned"),
        ("half a batch, by its own end", "fork", 0, ""),
        ("while another sends", "fork", 50, ""),
        ("somebody else is told", "fork", 0, ""),
    ],
)
def test_a_death_is_told_at_once_when_a_batch_is_asked_for_and_not_before(
    name: str, method: str, timeout: int, how: str, tmp_path: Path
) -> None:
    trained, *rest = run(tmp_path, PROGRAMS[name], TOLD, arguments=(method, str(timeout), how))
    assert trained == ["trained"]
    seen, text, steps = [line for line in rest if line != trained][-1]
    assert re.match(r"worker [01] \(pid \d+\) (was killed by SIGKILL|ended)", text), text
    assert seen == [list(range(row, row + 4)) for row in range(0, 4 * len(seen), 4)]
    assert steps == len(seen) and 1 <= steps <= 5


def test_all_of_it_goes_with_its_iterator() -> None:
    """Without the collector: it holds the pipe, and what tells of the ends of workers."""
    loader = ms.DataLoader(ms.from_dataset(range(40)).batch(4), num_workers=1)
    batches = iter(loader)
    next(batches)
    gc.collect()
    gc.disable()
    try:
        of = loader._iterator
        held = [
            weakref.ref(x) for x in (of, of.wait, of._worker_result_queue._reader, of._workers[0])
        ]
        del of
        loader.close()
        del batches, loader
        assert [each() for each in held] == [None] * 4
    finally:
        gc.enable()


ENDED = """
    def rows(shard):
        for i in range(4 if shard else 12):
            if not shard:
                time.sleep(0.1)
            yield i + 1000 * shard

    def made(rows):
        return big(rows) * 5 if rows[0] == 8 else rows  # long enough on its way to be met there

    def stop(loader):
        inner = loader._iterator
        while all(inner._workers_status):
            time.sleep(0.001)
        kill(loader, ended := inner._workers_status.index(False))
        waiting(loader, 30000)
        kill(loader, 1 - ended, signal.SIGSTOP)
        time.sleep(2.5)
        kill(loader, 1 - ended, signal.SIGCONT)

    if __name__ == "__main__":
        ds = ms.from_iterable(rows, name="web", num_shards=2).batch(1, collate_fn=made)
        loader = ms.DataLoader(ds, num_workers=2, lanes=2, multiprocessing_context="fork", persistent_workers=True)
        batches = iter(loader)
        threading.Thread(target=stop, args=(loader,)).start()
        first = [batch[0] for batch in batches]
        say(first, [batch[0] for batch in loader], [batch[0] for batch in ms.DataLoader(ds, lanes=2)])
"""


def test_a_worker_that_had_sent_all_may_die_and_the_epoch_is_whole_and_so_is_the_next(
    tmp_path: Path,
) -> None:
    """Also while another takes its time in the middle of a batch."""
    ((first, second, whole),) = run(tmp_path, ENDED)
    assert first == second == whole


UNEVEN = """
    def rows(shard):
        for i in range(4 if shard else 20):
            if not shard:
                time.sleep(0.05)
            yield i + 1000 * shard

    class Slow:  # the loader is kept from going on, after a worker was told to end
        def __init__(self, tasks):
            self.tasks = tasks

        def __getattr__(self, name):
            return getattr(self.tasks, name)

        def put(self, task):
            self.tasks.put(task)
            if task is None:
                time.sleep(0.3)

    if __name__ == "__main__":
        pin()
        ds = ms.from_iterable(rows, name="web", num_shards=2).batch(1, collate_fn=list)
        loader = ms.DataLoader(ds, num_workers=2, lanes=2, multiprocessing_context="fork", pin_memory=True)
        batches = iter(loader)
        inner = loader._iterator
        assert hasattr(inner, "_pin_memory_thread")
        inner._index_queues = [Slow(tasks) for tasks in inner._index_queues]
        say([batch[0] for batch in batches], [batch[0] for batch in ms.DataLoader(ds, lanes=2)])
"""


def test_an_ordinary_end_is_no_death_for_the_thread_that_pins(tmp_path: Path) -> None:
    ((found, whole),) = run(tmp_path, UNEVEN)
    assert found == whole


INTERRUPTED = """
    def made(rows):
        return big(rows) if rows[0] == 20 else rows

    def later(loader):
        waiting(loader)
        kill(loader, 1, signal.SIGSTOP)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        kill(loader, 1, signal.SIGCONT)

    if __name__ == "__main__":
        ds = ms.from_dataset(range(400)).batch(4, collate_fn=made)
        loader = ms.DataLoader(ds, num_workers=2, multiprocessing_context="fork", persistent_workers=True)
        try:
            for batch in loader:
                if batch[0] == 4:
                    thread = threading.Thread(target=later, args=(loader,))
                    thread.start()
                if batch[0] == 12:
                    time.sleep(0.3)
        except KeyboardInterrupt:
            say("interrupted")
        thread.join()
        say(run(loader)[0])
"""


def test_a_cell_that_was_interrupted_in_the_middle_of_a_batch_can_be_run_again(
    tmp_path: Path,
) -> None:
    said, (batches,) = run(tmp_path, INTERRUPTED)
    assert said == ["interrupted"]
    assert batches == [list(range(row, row + 4)) for row in range(0, 400, 4)]


STARTED = """
    def init(number):
        if number == 1:
            time.sleep(0.3)
            os._exit(3)

    if __name__ == "__main__":
        for _ in torch.utils.data.DataLoader(range(4), num_workers=1, multiprocessing_context="fork"):
            pass  # from now on torch's handler is there
        ds = ms.from_dataset(range(400)).batch(4)
        for method in ("fork", "spawn"):
            loader = ms.DataLoader(ds, num_workers=2, multiprocessing_context=method, worker_init_fn=init)
            if method == "spawn":
                loader.start()
                x, until = torch.ones(9), time.monotonic() + 6
                while time.monotonic() < until:
                    x = x * 1.0001
            try:
                iter(loader)
            except ms.WorkerError as error:
                kept = error  # and with it all that its traceback knows
                say(str(error), [worker.pid for worker in torch.multiprocessing.active_children()])
"""


def test_a_death_while_workers_start_is_told_by_iter(tmp_path: Path) -> None:
    told = run(tmp_path, STARTED)
    assert len(told) == 2
    for text, alive in told:
        assert alive == []
        assert re.match(
            r"DataLoader worker 1 \(pid \d+\) ended with exit status 3, before it had begun to read\.",
            text,
        )
