"""W4: stop after so many samples, open everything again, load: when does the next batch come, and
is it the right one?
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import show
from contestants import everyone
from interface import MIX, SHUFFLED, Contestant, Work, ids_of
from measure import Options, attempt, first_after, size_of

NAME, TITLE, KIND, SETS, ROUNDS = "W4", "Resume", SHUFFLED, ("short", "mix"), 1
TEXT = (
    "Read to a position in batches of 32, save, read the next 2,000 ids; then a fresh loader loads the state (both opened within "
    "the time; imports are warm). A position is left out where reading up to it takes too long. `-`: not measured."
)
LEFT_OUT = ("limit", "limit-rows", "nodes-views", "nodes-process", "midstream-thread")
POSITIONS = {
    "full": (1_000, 10_000, 100_000, 1_000_000),
    "quick": (1_000, 10_000, 100_000),
    "tiny": (500, 5_000),
}
NEXT = {"full": 2_000, "quick": 2_000, "tiny": 300}


def measure(contestant: Contestant, options: Options) -> dict[str, Any]:
    """For 0 and 2 workers: cold start, and resumes at positions; a state of 2 workers on others;
    the mix.
    """
    result: dict[str, Any] = {}
    positions = POSITIONS[options.scale]
    for workers in contestant.workers:
        work = Work(SHUFFLED, options.folders("short"), "flat", workers, start=contestant.starts[0])
        result[f"{workers} workers"] = attempt(
            lambda work=work: _positions(contestant, work, options, positions)
        )  # type: ignore[misc]
    if MIX in contestant.kinds:
        for workers in contestant.workers:
            work = Work(MIX, options.folders("mix"), "flat", workers, start=contestant.starts[0])
            at = min(10_000, positions[-1] // 10)
            result[f"mix, {workers} workers"] = attempt(
                lambda work=work, at=at: _positions(contestant, work, options, (at,))
            )  # type: ignore[misc]
    return result


def _positions(
    contestant: Contestant, work: Work, options: Options, positions: Sequence[int]
) -> dict[str, Any]:
    patience = options.patience
    first_after(
        contestant, work, None, (), times=1, patience=patience
    )  # files opened once, caches warm
    found: dict[str, Any] = {
        "cold": first_after(
            contestant,
            work,
            None,
            (),
            times=2 if options.scale == "tiny" else 5,
            patience=min(patience, 3),
        )["seconds"]
    }
    saved, left_out = _read(contestant, work, positions, patience, NEXT[options.scale])
    found["at"] = {}
    for position, (state, expected, sizes) in saved.items():
        cell = attempt(
            lambda state=state, expected=expected: first_after(  # type: ignore[misc]
                contestant,
                work,
                state,
                expected,
                times=2 if options.scale == "tiny" else 5,
                patience=min(patience, 3),
            )
        )
        found["at"][str(position)] = cell | sizes
    for position in left_out:
        found["at"][str(position)] = {
            "absent": f"reading up to it takes more than {patience:.0f} s"
        }
    if work.workers == 2 and contestant.resumes:
        state, expected, _ = saved[positions[min(1, len(saved) - 1)]]
        found["elsewhere"] = {}
        for other in (0, 1, 3):
            if other in contestant.workers or other:
                moved = Work(work.kind, work.folders, work.shape, other, start=work.start)
                cell = attempt(
                    lambda moved=moved: first_after(
                        contestant, moved, state, expected, times=1, patience=patience
                    )  # type: ignore[misc]
                )
                found["elsewhere"][str(other)] = cell
    return found


def _read(
    contestant: Contestant, work: Work, positions: Sequence[int], patience: float, following: int
) -> tuple[dict[int, Any], list[int]]:
    """Position -> (state, the ids that come next, sizes), and the positions given up."""
    saved: dict[int, Any] = {}
    left_out: list[int] = []
    reader = contestant.open(work)
    try:
        iterator = iter(reader)
        done, begin = 0, time.perf_counter()
        for position in positions:
            target = position // work.batch_size
            spent = time.perf_counter() - begin
            if done and spent / done * target > patience:
                left_out.append(position)
                continue
            while done < target:
                next(iterator)
                done += 1
                if time.perf_counter() - begin > patience * 1.5:
                    break
            if done < target:
                left_out.append(position)
                continue
            state = reader.state(iterator, done)
            frozen, sizes = pickle.dumps(state), size_of(state)
            expected: list[int] = []
            while len(expected) < following:
                expected += ids_of(next(iterator))
                done += 1
            saved[position] = (frozen, expected[:following], sizes)
        del iterator
    finally:
        reader.close()
    return saved, left_out


def report(rows: Sequence[dict[str, Any]]) -> str:
    """A table of times, one of sizes and verdicts."""
    known = everyone()
    results = {row["contestant"]: row["result"] for row in rows if "result" in row}
    positions = sorted(
        {
            int(p)
            for r in results.values()
            for w in (0, 2)
            for p in r.get(f"{w} workers", {}).get("at", {})
        }
    )
    heads = [
        "seconds to the first batch",
        "workers",
        "cold",
        *(f"at {p:,}" for p in positions),
        "worst / cold",
    ]
    lines, verdicts = [], []
    for name in [name for name in known if name in results]:
        for workers in (0, 2):
            cell = results[name].get(f"{workers} workers")
            if cell is None:
                continue
            title = show.bold(known[name].title, known[name].ours)
            if "at" not in cell:
                lines.append([title, str(workers), show.why(cell), *["-"] * (len(positions) + 1)])
                continue
            times = [cell["at"].get(str(p), {}) for p in positions]
            took = [one["seconds"] for one in times if "seconds" in one]
            worst = f"{max(took) / cell['cold']:.2f}" if took else "-"
            shown = [
                f"{one['seconds']:.3f}" if "seconds" in one else show.short(one) for one in times
            ]
            lines.append([title, str(workers), f"{cell['cold']:.3f}", *shown, worst])
            mix = results[name].get(f"mix, {workers} workers", {})
            verdicts.append(
                [title, str(workers), _exact(cell), _exact(mix), _bytes(cell), *_elsewhere(cell)]
            )
    heads_2 = [
        "the next 2,000 ids",
        "workers",
        "shuffled",
        "mix",
        "bytes",
        "on 0 workers",
        "on 1",
        "on 3",
    ]
    return show.table(heads, lines) + "\n\n" + show.table(heads_2, verdicts)


def _exact(cell: dict[str, Any]) -> str:
    if "at" not in cell:
        return show.why(cell) if cell else "-"
    bad = []
    for position, one in cell["at"].items():
        if "failed" in one:
            bad.append(f"at {int(position):,}: {one['failed']}")
        elif "next" in one and one["next"] != "exact":
            bad.append(f"at {int(position):,} {one['next']}")
    return "; ".join(bad) or "exact"


def _bytes(cell: dict[str, Any]) -> str:
    sizes = [one["bytes"] for one in cell["at"].values() if "bytes" in one]
    lane = [one["bytes_a_lane"] for one in cell["at"].values() if "bytes_a_lane" in one]
    if not sizes:
        return "-"
    least, most = min(sizes), max(sizes)
    text = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    return text + (f" ({max(lane):.0f} a lane)" if lane else "")


def _elsewhere(cell: dict[str, Any]) -> list[str]:
    moved = cell.get("elsewhere", {})
    return [
        moved[key].get("next") or _refused(moved[key]) if key in moved else "-"
        for key in ("0", "1", "3")
    ]


def _refused(cell: dict[str, Any]) -> str:
    return "refused: " + show.why(cell).split(":")[0]


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Time to the first batch against position."""
    lines = []
    for row in rows:
        for workers in (0, 2):
            cell = row.get("result", {}).get(f"{workers} workers", {})
            points = [
                (int(p), one["seconds"])
                for p, one in cell.get("at", {}).items()
                if "seconds" in one
            ]
            wrong = [
                (int(p), one["seconds"])
                for p, one in cell.get("at", {}).items()
                if one.get("next", "exact") != "exact"
            ]
            if points:
                lines.append((f"{workers} workers", row["contestant"], points, wrong))
    show.lines(
        lines,
        everyone(),
        "samples read before the stop",
        "seconds to the first batch",
        "W4: resume",
        path,
        logs=True,
    )
