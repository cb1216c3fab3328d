"""Preemption: workers that signals do not kill, ranks that stop together, and a dead worker told
with what it had in hand.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import midstream as ms
from midstream.pipeline.breadcrumbs import ROWS, Trail, describe_trail

METHODS = ["fork", "spawn", "forkserver"]
GROUP = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]
DEADLINE_S = 60

HEAD = """
    import json, os, signal, subprocess, sys, time
    import midstream as ms

    METHOD = sys.argv[1]

    def say(*words):
        print(json.dumps(words), flush=True)

    def pids(loader):
        return [worker.pid for worker in loader._iterator._workers]

    def stuck(x):
        if x == 12:
            time.sleep(3600)
        return x

    def terminate_a_program(x):
        program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        program.terminate()
        return program.wait()

    def make(ds, **options):
        options = {"num_workers": 2, "multiprocessing_context": METHOD, **options}
        return ms.DataLoader(ds.batch(4, collate_fn=list), **options)
"""


class Program:
    """A program in a session of its own, so that its whole group can be signalled."""

    def __init__(self, folder: Path, body: str, *arguments: str, **environment: str) -> None:
        script = folder / "program.py"
        script.write_text(textwrap.dedent(HEAD) + textwrap.dedent(body))
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "error",
                "-W",
                "ignore:This DataLoader",
                str(script),
                *arguments,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **environment},
        )

    def hear(self) -> list[Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        heard: list[Any] = json.loads(line)
        return heard

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def signal_all(self, numbers: list[signal.Signals] = GROUP) -> None:
        for number in numbers:
            os.killpg(self.process.pid, number)

    def end(self) -> tuple[list[list[Any]], str, int]:
        """What else it said, its errors and its exit status; fails when it hangs."""
        out, errors = self.process.communicate(timeout=DEADLINE_S)
        return [json.loads(line) for line in out.splitlines()], errors, self.process.returncode


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Any]:
    made: list[Program] = []

    def start(*arguments: Any, **environment: str) -> Program:
        made.append(Program(tmp_path, *arguments, **environment))
        return made[-1]

    yield start
    for each in made:
        if each.process.poll() is None:
            os.killpg(each.process.pid, signal.SIGKILL)
        each.process.communicate()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, f"still there: {[pid for pid in pids if is_alive(pid)]}"
        time.sleep(0.02)


# -- workers and signals ------------------------------------------------------------------------------------------------

SIGNALLED = """
    if __name__ == "__main__":
        received = set()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda number, frame: received.add(number))
        loader = make(ms.from_dataset(range(100)).shuffle(1), persistent_workers=True)
        found = []
        for epoch in range(2):
            for step, batch in enumerate(loader):
                found.append(batch)
                if epoch == 0 and step == 1:
                    before = pids(loader)
                    say("ready")
                    sys.stdin.readline()
        say(found, sorted(received), pids(loader) == before)
"""


def whole(epochs: int) -> list[Any]:
    loader = ms.DataLoader(ms.from_dataset(range(100)).shuffle(1).batch(4, collate_fn=list))
    return [batch for _ in range(epochs) for batch in loader]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_workers_survive_signals_to_all_processes_and_the_order_stays(
    program: Any, method: str
) -> None:
    running = program(SIGNALLED, method)
    assert running.hear() == ["ready"]
    running.signal_all()
    running.go_on()
    ((found, received, same),), errors, status = running.end()
    assert (status, errors) == (0, "")
    assert received == sorted(GROUP), "the main process's own handlers run"
    assert same, "the workers are the same processes"
    assert found == whole(2)


STORM = """
    if __name__ == "__main__":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda number, frame: None)
        say("ready")
        loader = make(ms.from_dataset(range(100)).shuffle(1))
        say([batch for _ in range(2) for batch in loader])
        sys.stdin.readline()
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_there_is_no_gap_while_workers_start(program: Any, method: str) -> None:
    running = program(STORM, method)
    assert running.hear() == ["ready"]
    heard: list[str] = []
    listener = threading.Thread(target=lambda: heard.append(running.process.stdout.readline()))
    listener.start()
    while listener.is_alive():
        running.signal_all()
        listener.join(0.003)
    running.go_on()
    _, errors, status = running.end()
    assert (status, errors) == (0, "")
    assert json.loads(heard[0]) == [whole(2)]


KILLED = """
    if __name__ == "__main__":
        loader = make(ms.from_dataset(range(100)).map(stuck))
        batches = iter(loader)
        next(batches)
        say(pids(loader))
        next(batches), next(batches), next(batches)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_workers_die_with_a_main_process_that_is_killed(program: Any, method: str) -> None:
    """One of them is stuck in user code, the other waits for work."""
    running = program(KILLED, method)
    (workers,) = running.hear()
    assert all(map(is_alive, workers))
    os.kill(running.process.pid, signal.SIGKILL)
    wait_until_gone(workers)


EXIT = """
    if __name__ == "__main__":
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        # Many, so that torch's handler would meet some that are killed and not waited for.
        options = {"num_workers": 6 if METHOD == "fork" else 2, "persistent_workers": sys.argv[2] == "persistent"}
        loader = make(ms.from_dataset(range(100)).map(stuck), **options)
        batches = iter(loader)
        next(batches)
        say(pids(loader))
        sys.stdin.readline()
"""


@pytest.mark.slow
@pytest.mark.parametrize("persistent", ["persistent", "fresh"])
@pytest.mark.parametrize("method", METHODS)
def test_the_interpreter_exits_at_once_while_an_iterator_lives(
    program: Any, method: str, persistent: str
) -> None:
    running = program(EXIT, method, persistent)
    (workers,) = running.hear()
    running.signal_all([signal.SIGTERM])
    running.go_on()
    said, errors, status = running.end()
    assert (said, errors, status) == ([], "", 0)
    wait_until_gone(workers)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_ctrl_c_ends_the_main_process_and_its_workers(program: Any, method: str) -> None:
    running = program(KILLED, method)
    (workers,) = running.hear()
    running.signal_all([signal.SIGINT])
    _, errors, status = running.end()
    assert status == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert errors.count("Traceback") == 1, errors
    wait_until_gone(workers)


CLOSE = """
    if __name__ == "__main__":
        loader = make(ms.from_dataset(range(100)).map(stuck))
        batches = iter(loader)
        next(batches)
        workers = pids(loader)
        if sys.argv[2] == "close":
            loader.close()
        else:
            del batches, loader
        say(workers)
        sys.stdin.readline()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["close", "drop"])
def test_closing_and_dropping_end_a_worker_that_is_stuck(program: Any, how: str) -> None:
    running = program(CLOSE, "fork", how)
    (workers,) = running.hear()
    wait_until_gone(workers)
    running.go_on()
    assert running.end() == ([], "", 0)


HANDLERS = """
    def init(worker):
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    def look(x):
        return [
            terminate_a_program(x),
            sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
            signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN,
            callable(signal.getsignal(signal.SIGTERM)),
        ]

    if __name__ == "__main__":
        before = [signal.getsignal(number) for number in range(1, 32)], signal.pthread_sigmask(signal.SIG_BLOCK, ())
        loader = make(ms.from_dataset(range(4)).repeat(4).map(look), worker_init_fn=init)
        say(*(row for batch in loader for row in batch))
        after = [signal.getsignal(number) for number in range(1, 32)], signal.pthread_sigmask(signal.SIG_BLOCK, ())
        # torch sets a handler for children that die; ours are not among those it asks for
        differ = [n for n in range(1, 32) if before[0][n - 1] != after[0][n - 1] and n != signal.SIGCHLD]
        say(differ, before[1] == after[1], loader.worker_init_fn is init)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_programs_started_in_a_worker_hear_signals_and_the_parent_is_as_it_was(
    program: Any, method: str
) -> None:
    said, errors, status = program(HANDLERS, method).end()
    assert (status, errors) == (0, "")
    assert said[0] == [[-signal.SIGTERM, [], True, True]] * 16
    assert said[1] == [[], True, True]


# -- the guard ----------------------------------------------------------------------------------------------------------


def test_a_signal_makes_should_stop_true_and_stays() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    with ms.PreemptionGuard() as guard:
        assert (guard.should_stop, guard.requested, guard.signal) == (False, False, None)
        signal.raise_signal(signal.SIGUSR1)
        assert (guard.requested, guard.signal) == (True, signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert [guard.should_stop, guard.should_stop] == [True, True]
        assert guard.signal == signal.SIGUSR1, "the first one"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before
    assert guard.should_stop
    with guard:
        assert not guard.should_stop, "entered again it starts anew"


def test_earlier_handlers_are_not_called_and_come_back_also_after_an_error() -> None:
    called: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: called.append(number))
    try:
        with pytest.raises(KeyError), ms.PreemptionGuard([signal.SIGUSR2]) as guard:
            signal.raise_signal(signal.SIGUSR2)
            assert guard.should_stop
            assert called == []
            raise KeyError
        signal.raise_signal(signal.SIGUSR2)
        assert called == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_handler_set_inside_is_left_alone() -> None:
    before = signal.getsignal(signal.SIGUSR2)
    with ms.PreemptionGuard([signal.SIGUSR2]):
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN
    signal.signal(signal.SIGUSR2, before)


def test_wrong_uses_are_told() -> None:
    with pytest.raises(ValueError, match="SIGKILL"):
        ms.PreemptionGuard([signal.SIGTERM, signal.SIGKILL])
    with pytest.raises(ValueError, match="none"):
        ms.PreemptionGuard([])
    with pytest.raises(ValueError, match="every"):
        ms.PreemptionGuard(every=0)
    with ms.PreemptionGuard() as guard, pytest.raises(RuntimeError, match="entered already"):
        guard.__enter__()
    raised: list[BaseException] = []

    def enter() -> None:
        try:
            ms.PreemptionGuard().__enter__()
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "main thread" in str(raised[0])


RANKS = """
    import torch.distributed as dist

    if __name__ == "__main__":
        dist.init_process_group("gloo")
        every, group = int(sys.argv[2]), dist.new_group(backend="gloo") if sys.argv[3] == "own" else None
        with ms.PreemptionGuard(group=group, every=every) as guard:
            step = 0
            while not guard.should_stop:
                step += 1
                if step == 5:
                    say("ready")
                if step == 1_000_000:
                    break
        say(step, guard.requested, guard.signal)
        dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("every", "group"), [(1, "none"), (7, "own")])
def test_a_signal_at_any_time_to_one_rank_stops_all_at_the_same_step(
    program: Any, every: int, group: str
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = [program(RANKS, "", str(every), group, RANK=str(rank), **where) for rank in range(2)]
    assert [rank.hear() for rank in ranks] == [["ready"]] * 2
    time.sleep(random.random() / 10)  # anywhere in a step
    os.kill(ranks[1].process.pid, signal.SIGUSR1)
    ends = [rank.end() for rank in ranks]
    assert [(errors, status) for _, errors, status in ends] == [("", 0)] * 2
    (first,), (second,) = (said for said, _, _ in ends)
    assert first == [second[0], False, signal.SIGUSR1]
    assert second == [first[0], True, signal.SIGUSR1]
    assert 5 <= first[0] < 1_000_000
    assert (first[0] + 1) % every == 0


# -- a dead worker ------------------------------------------------------------------------------------------------------

DEAD = """
    ROW = 150

    class Records:
        def __len__(self):
            return 400
        def __getitem__(self, row):
            return die(row)

    def die(x):
        if x == ROW:
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    def die_in(batch):
        return [die(x) for x in batch]

    def yes(x):
        return True

    def alive(x):
        return die(x) is not None

    def parts(x):
        return [die(x)]

    def shards(number):
        return iter(range(number, 400, 4))

    def deadly(number):
        return map(die, shards(number))

    web = ms.from_dataset(range(400), name="web")
    code = ms.from_dataset(range(1000, 1400), name="code")
    both = lambda ds: ms.interleave({"web": ds, "code": code}, {"web": 3, "code": 1}, seed=1)
    stream = ms.from_iterable(shards, name="web", num_shards=4)
    PIPELINES = {
        "map": web.map(die),
        "source": ms.from_dataset(Records(), name="web"),
        "shuffle": web.shuffle(1).map(die),
        "interleave": both(web.shuffle(1)).map(die),
        "collate": web,
        "filter": web.filter(alive),
        "buffered shuffle": both(web.filter(yes)).shuffle(1, buffer_size=64).map(die),
        "flat_map": web.flat_map(parts),
        "collate of a stream": web.filter(yes),
        "shards": ms.from_iterable(deadly, name="web", num_shards=4),
        "map over shards": stream.map(die),
    }
    NAMES = sys.argv[3].split(",") if len(sys.argv) > 3 else list(PIPELINES)

    if __name__ == "__main__":
        for name in NAMES:
            ds = PIPELINES[name].batch(4, collate_fn=die_in if "collate" in name else list)
            loader = ms.DataLoader(ds, num_workers=int(sys.argv[2]), lanes=4, multiprocessing_context=METHOD)
            try:
                for batch in loader:
                    pass
            except ms.WorkerError as error:
                say(name, str(error))
            loader.close()
"""

ROW_ALONE = ["filter", "buffered shuffle", "flat_map", "shards", "map over shards"]
WITH_OTHERS = ["map", "source", "shuffle", "interleave", "collate", "collate of a stream"]


def names_row(text: str, row: int) -> bool:
    """Whether the error names that row of 'web': alone, in a list, or in a range."""
    found = re.search(
        r"(?:row|rows|rows (between)) (\d+(?:, \d+)*)(?: (to|and) (\d+))? of 'web' \(pass 0\)", text
    )
    assert found is not None, text
    some = [int(number) for number in found[2].split(", ")]
    return row in (range(some[0], int(found[4]) + 1) if found[4] else some)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "workers", "names"),
    [
        ("fork", 1, [*ROW_ALONE, *WITH_OTHERS]),
        ("fork", 2, [*ROW_ALONE, *WITH_OTHERS]),
        ("spawn", 2, ["map over shards", "interleave"]),
        ("forkserver", 1, ["map"]),
    ],
)
def test_a_dead_worker_is_told_with_the_rows_it_had_in_hand(
    program: Any, method: str, workers: int, names: list[str]
) -> None:
    said, errors, status = program(DEAD, method, str(workers), ",".join(names)).end()
    assert (errors, status) == ("", 0)
    assert [name for name, _ in said] == names
    for name, text in said:
        assert re.match(
            r"worker [01] \(pid \d+\) was killed by SIGKILL while working on (\d+ )?rows? ", text
        ), text
        assert names_row(text, 150), (name, text)
        if name in ROW_ALONE:
            assert " working on row 150 of 'web' (pass 0)." in text, (name, text)
        assert ("'code'" in text) == (name == "interleave"), (name, text)


def test_the_table_says_what_is_in_hand() -> None:
    table = np.zeros((1 + ROWS, 5), dtype=np.int64)
    trail = Trail(table)
    names = ["a", "b"]
    assert describe_trail(table, names) == ""
    trail.row(1, 2, 3456, 7, 0)
    assert describe_trail(table, names) == "row 3,456 of 'b' (pass 2)"
    origins = np.zeros((ROWS + 1, 5), dtype=np.int64)
    origins[:, 2] = np.arange(ROWS + 1)
    trail.rows(origins[:ROWS])
    assert describe_trail(table, names) == "rows 0 to 1,023 of 'a' (pass 0)"
    trail.rows(origins)
    assert describe_trail(table, names) == "1,025 rows between 0 and 1,024 of 'a' (pass 0)"
    origins[-1, :2] = 1, 4
    trail.rows(origins)
    assert (
        describe_trail(table, names)
        == "1,025 rows between 0 and 1,024 of 'a' and 'b' (passes 0 to 4)"
    )
    trail.rows(origins[[9, 5, 7]])
    assert describe_trail(table, names) == "rows 5, 7, 9 of 'a' (pass 0)"
    trail.rows(origins[::100])
    assert describe_trail(table, names) == "11 rows between 0 and 1,000 of 'a' (pass 0)"
    trail.row(0, 0, 5, 0, 0)
    trail.passed_on(origins[::100])
    assert describe_trail(table, names) == "11 rows between 0 and 1,000 of 'a' (pass 0)"
    trail.clear()
    assert describe_trail(table, names) == ""


@pytest.mark.processes
def test_between_two_turns_nothing_is_in_hand() -> None:
    for ds in (ms.from_dataset(range(40)), ms.from_dataset(range(40)).filter(lambda x: True)):
        loader = ms.DataLoader(ds.batch(4), num_workers=1, lanes=2, multiprocessing_context="fork")
        assert len(list(loader)) == 10
        runner = loader._pool.runner
        assert runner is not None
        assert runner.crumbs is not None
        crumbs = runner.crumbs.numpy()
        assert crumbs[0, 1:].any(), "the worker wrote where the main process reads"
        assert describe_trail(crumbs[0], ["data"]) == ""
        loader.close()


@pytest.mark.processes
def test_shared_memory_is_given_back() -> None:
    def maps() -> int:
        return Path("/proc/self/maps").read_text().count("torch_")

    loader = ms.DataLoader(
        ms.from_dataset(range(8)).batch(4), num_workers=1, multiprocessing_context="fork"
    )
    list(loader)
    before = maps()
    for _ in range(5):
        list(loader)
    assert maps() <= before
