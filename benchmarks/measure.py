"""One measurement in a fresh process: ``python measure.py JSON``; the result is the last line, after ``RESULT``.

Runs in the contestant's environment, so nothing here needs more than numpy, torch and the
contestant's own library.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import pickle
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contestants import everyone
from interface import PRELOAD, Contestant, Raw, Work, arrays_of, ids_of, rows_of
from prepare import FAR, folder_of, parts_of

WARM_UP = 10
"""Batches before the clock starts, which are compared with the raw bytes."""


@dataclass(frozen=True)
class Options:
    """What the runner says."""

    cache: Path
    scale: str = "full"
    seconds: float = 1.2
    """How long a rate is measured."""
    patience: float = 20.0
    """How long a read to a position may take before the position is given up."""
    url: str = ""

    def folders(self, name: str) -> dict[str, str]:
        """Part -> folder of a set of data."""
        return {
            part: str(folder_of(self.cache, self.scale, name, part))
            for part in parts_of(name, self.scale)
        }

    def rows(self, name: str) -> int:
        """Rows of a set of data."""
        return sum(parts_of(name, self.scale).values())


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result, or why there is none."""
    try:
        return work()
    except NotImplementedError as error:
        return {"absent": str(error)}
    except StopIteration:
        return {"failed": "it ended before its data did"}
    except Exception as error:
        text = str(error).strip().splitlines()
        print(traceback.format_exc(), file=sys.stderr)
        return {"failed": f"{type(error).__name__}: {text[0][:200] if text else ''}"}


class Truth:
    """The raw bytes of all parts, to compare with."""

    def __init__(self, folders: dict[str, str]) -> None:
        self.parts = [Raw(folder) for folder in folders.values()]

    def check(self, batch: Any) -> None:
        """Compare the rows of a batch.

        Raises:
            ValueError: If one differs.
        """
        ids = ids_of(batch)
        arrays = arrays_of(batch)
        if len(ids) != len(arrays):
            raise ValueError(f"{len(ids)} ids, {len(arrays)} rows")
        for number, array in zip(ids, arrays):
            part, row = divmod(number, FAR)
            truth = self.parts[part][row]
            if len(truth) != len(array) or not (truth == array).all():
                raise ValueError(f"row {number} differs from what was written")


def rate(
    contestant: Contestant,
    work: Work,
    options: Options,
    *,
    most: int,
    truth: Any = None,
    warm_up: int = WARM_UP,
    after: Callable[[Any], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Rows a second (``truth.check`` sees the warm-up's batches), from after the warm-up on; and
    the seconds to the first batch, the opening included.
    """
    begin = time.perf_counter()
    reader = contestant.open(work)
    try:
        iterator = iter(reader)
        batch = next(iterator)
        first = time.perf_counter() - begin
        for _ in range(warm_up):
            if truth is not None:
                truth.check(batch)
            batch = next(iterator)
        rows = 0
        clock = time.perf_counter
        start = now = clock()
        stop = start + options.seconds
        while rows < most and now < stop:
            try:
                batch = next(iterator)
            except StopIteration:
                break
            rows += rows_of(batch)
            now = clock()
        result = {"per_second": rows / (now - start), "rows": rows, "first_batch": first}
        if after is not None:
            result |= after(iterator)
        del iterator, batch
    finally:
        reader.close()
    return result


# ---------------------------------------------------------------------------------------------------------------------
# States
# ---------------------------------------------------------------------------------------------------------------------


def size_of(state: Any) -> dict[str, Any]:
    """Bytes as JSON, or pickled where it is no JSON; per lane where the state has lanes."""
    try:
        sizes: dict[str, Any] = {"bytes": len(json.dumps(state)), "as": "JSON"}
    except TypeError:
        sizes = {"bytes": len(pickle.dumps(state)), "as": "pickle"}
    if isinstance(state, dict) and isinstance(state.get("lanes"), dict) and "num_lanes" in state:
        sizes["bytes_a_lane"] = len(json.dumps(state["lanes"])) / state["num_lanes"]
    return sizes


def take_ids(iterator: Any, count: int) -> list[int]:
    """The next ids, at least so many."""
    found: list[int] = []
    while len(found) < count:
        found += ids_of(next(iterator))
    return found[:count]


def verdict(expected: Sequence[int], found: Sequence[int]) -> str:
    """How the ids after a resume compare."""
    if list(expected) == list(found):
        return "exact"
    equal = sum(a == b for a, b in zip(expected, found))
    return f"NOT exact: {equal} of {len(expected)} in place, {len(set(expected) & set(found))} as a set"


def first_after(
    contestant: Contestant,
    work: Work,
    state: Any,
    expected: Sequence[int],
    *,
    times: int,
    patience: float,
) -> dict[str, Any]:
    """Seconds from nothing opened to the first batch, loaded from a state or (None) cold; and
    whether it continues with the right rows.
    """
    took: list[float] = []
    result: dict[str, Any] = {}
    for number in range(times):
        begin = time.perf_counter()
        reader = contestant.open(work)
        try:
            if state is not None:
                reader.load(pickle.loads(state))
            iterator = iter(reader)
            batch = next(iterator)
            took.append(time.perf_counter() - begin)
            if number == 0 and expected:
                ids = ids_of(batch)
                result["next"] = verdict(
                    expected, ids + take_ids(iterator, len(expected) - len(ids))
                )
            del iterator
        finally:
            reader.close()
        if sum(took) > patience:
            break
    return result | {"seconds": sorted(took)[len(took) // 2]}


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def family() -> list[int]:
    """This process and all below it."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry)] = int(fields[1])
    found = [os.getpid()]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def memory() -> dict[str, float]:
    """MiB of this process and its children, shared pages counted once: own (anonymous and shared
    memory), and all resident.
    """
    own = everything = 0.0
    for pid in family():
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        fields = {line.split(":")[0]: line.split() for line in lines[1:]}
        own += sum(float(fields[key][1]) for key in ("Pss_Anon", "Pss_Shmem") if key in fields)
        everything += float(fields["Pss"][1])
    return {"own": own / 1024, "resident": everything / 1024}


# ---------------------------------------------------------------------------------------------------------------------


def run(question: str, contestant: str, options: Options) -> dict[str, Any]:
    """One contestant's answer to one question, in this process."""
    import questions

    asked = questions.load(question)
    one = everyone()[contestant]
    result: dict[str, Any] = asked.measure(one, options)
    result["versions"] = one.versions()
    return result


def main() -> None:
    """Read the order, measure, print the result."""
    order = json.loads(sys.argv[1])
    faulthandler.dump_traceback_later(
        order["timeout"] - 5
    )  # into the log, before the runner ends it
    warnings.filterwarnings("ignore")
    import numpy as np
    import torch

    torch.set_num_threads(1)
    options = Options(**(order["options"] | {"cache": Path(order["options"]["cache"])}))
    result = run(order["question"], order["contestant"], options)
    result["versions"] |= {"torch": torch.__version__, "numpy": np.__version__}
    sys.stdout.flush()
    print("\nRESULT " + json.dumps(result), flush=True)
    sys.stderr.flush()
    os._exit(0)  # a library's thread that does not end must not cost the result


if __name__ == "__mp_main__" and PRELOAD in os.environ:
    importlib.import_module(
        os.environ[PRELOAD]
    ).preload()  # a spawned worker, before anything of a library is unpickled

if __name__ == "__main__":
    main()
