"""Runs `check_resume` over other loaders: a table for the README of how they resume.

    python benchmarks/others.py --environments /tmp/others

makes a virtual environment there for each (torch and midstream's own dependencies are installed
with every one), or uses those that are there already, and prints the table in Markdown. Where a
loader passes, it says so. ``--only grain`` runs the cases whose name has that in it, ``--details``
prints the whole reports to standard error.

Every case uses the loader as its documentation says; a sample is an id, so what is lost or repeated
can be counted. A cut is one checkpoint that was loaded into a loader made anew.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NEEDS = {
    "datasets": [],
    "grain": ["grain==0.2.18"],
    "litdata": ["litdata==0.2.76"],
}
"""What each environment has beside torch, torchdata and datasets."""


@dataclass(frozen=True)
class Case:
    """A row.

    Attributes:
        loader: Whose.
        pipeline: What it does, in words.
        make: Makes the loader.
        options: For check_resume.
        environment: Where it runs.
    """

    loader: str
    pipeline: str
    make: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    environment: str = "datasets"


def number(sample: Any) -> Any:
    """The id in a sample."""
    return sample["id"] if isinstance(sample, dict) else sample


# -- StatefulDataLoader and datasets -----------------------------------------------------------------------------------


def rows(first: int, count: int) -> Any:
    import datasets

    return datasets.Dataset.from_dict({"id": list(range(first, first + count))})


def hf_loader(data: Any, num_workers: int) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(data, batch_size=8, num_workers=num_workers)


def hf_shuffle(num_workers: int) -> Any:
    # 40 shards: with fewer than ten per worker, datasets 5.2 cannot load the state at all
    # (IndexError).
    return hf_loader(
        rows(0, 400).to_iterable_dataset(num_shards=40).shuffle(seed=1, buffer_size=64), num_workers
    )


def hf_interleave(num_workers: int) -> Any:
    import datasets

    web, code = (rows(first, 200).to_iterable_dataset(num_shards=4) for first in (0, 1000))
    mix = datasets.interleave_datasets([web, code], probabilities=[0.7, 0.3], seed=1)
    return hf_loader(mix, num_workers)


def hf_shuffled_interleave(num_workers: int) -> Any:
    import datasets

    web, code = (
        rows(f, 200).to_iterable_dataset(num_shards=40).shuffle(seed=1, buffer_size=32)
        for f in (0, 1000)
    )
    return hf_loader(
        datasets.interleave_datasets([web, code], probabilities=[0.7, 0.3], seed=1), num_workers
    )


# -- torchdata.nodes ---------------------------------------------------------------------------------------------------


def nodes() -> Any:
    from torchdata.nodes import Batcher, IterableWrapper, Loader, Prefetcher

    return Loader(Prefetcher(Batcher(IterableWrapper(range(96)), 8), prefetch_factor=4))


# -- Grain -------------------------------------------------------------------------------------------------------------


def odd(row: int) -> bool:
    return row % 2 == 1


def fails_at_20(row: int) -> int:
    if row == 20:
        raise ValueError("a bad row")
    return row


def grain_loader(data: Any, num_workers: int) -> Any:
    import grain
    from absl import flags

    flags.FLAGS.mark_as_parsed()
    data = data.batch(8)
    return iter(
        data.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
        if num_workers
        else data
    )


def grain_filter(num_workers: int) -> Any:
    import grain

    return grain_loader(
        grain.MapDataset.range(320).shuffle(seed=1).filter(odd).to_iter_dataset(), num_workers
    )


def grain_error() -> Any:
    import grain

    return iter(grain.MapDataset.range(64).map(fails_at_20).to_iter_dataset())


def grain_error_workers() -> Any:
    import grain
    from absl import flags

    flags.FLAGS.mark_as_parsed()
    data = grain.MapDataset.range(64).map(fails_at_20).to_iter_dataset()
    return iter(data.mp_prefetch(grain.MultiprocessingOptions(num_workers=2)))


# -- LitData -----------------------------------------------------------------------------------------------------------


def row_with_id(row: int) -> dict[str, int]:
    return {"id": row}


def litdata_mix(num_workers: int) -> Any:
    import litdata

    folder = Path(os.environ["OTHERS_DATA"])
    parts = []
    for name, first in (("web", 0), ("code", 1000)):
        if not (folder / name / "index.json").exists():
            litdata.optimize(
                fn=row_with_id,
                inputs=list(range(first, first + 200)),
                output_dir=str(folder / name),
                chunk_size=20,
                num_workers=1,
            )
        parts.append(litdata.StreamingDataset(str(folder / name), shuffle=True, drop_last=False))
    mix = litdata.CombinedStreamingDataset(
        parts, seed=1, weights=[0.7, 0.3], iterate_over_all=False
    )
    return litdata.StreamingDataLoader(mix, batch_size=8, num_workers=num_workers)


# -- midstream ---------------------------------------------------------------------------------------------------------


def shards(shard: int) -> range:
    return range(shard, 400, 40)


def ours(data: Any, options: dict[str, Any]) -> Any:
    import midstream as ms

    return ms.DataLoader(
        data, batch_size=8, lanes=12, remainder="uneven", **options
    )  # few, so that each is stopped often


def ours_shuffle(**options: Any) -> Any:
    import midstream as ms

    data = ms.from_iterable(shards, name="data", num_shards=40).shuffle(seed=1, buffer_size=64)
    return ours(data, options)


def ours_interleave(**options: Any) -> Any:
    import midstream as ms

    # A stream of the same shape: the filter keeps everything, but the pipeline cannot know that.
    web, code = (
        ms.from_dataset(rows(f, 200)).shuffle(1).filter(number_is_known) for f in (0, 1000)
    )
    mix = ms.interleave({"web": web, "code": code}, weights={"web": 7, "code": 3}).shuffle(
        2, buffer_size=32
    )
    return ours(mix, options)


def number_is_known(sample: dict[str, Any]) -> bool:
    return sample["id"] >= 0


def ours_error(**options: Any) -> Any:
    import midstream as ms

    data = ms.from_dataset(range(64)).map(fails_at_20)
    return ms.DataLoader(data, batch_size=None, remainder="uneven", **options)


CASES: dict[str, Case] = {
    "datasets-shuffle": Case(
        "StatefulDataLoader + datasets",
        "stream, shuffle buffer of 64",
        hf_shuffle,
        {"expected": [{"id": row} for row in range(400)]},
    ),
    "datasets-interleave": Case("StatefulDataLoader + datasets", "interleave 7:3", hf_interleave),
    "datasets-shuffled-interleave": Case(
        "StatefulDataLoader + datasets",
        "interleave 7:3 of two shuffle buffers",
        hf_shuffled_interleave,
    ),
    "nodes": Case(
        "torchdata.nodes",
        "batches, prefetched; three epochs",
        nodes,
        {"workers": (0,), "epochs": 3},
    ),
    "grain-filter": Case(
        "Grain", "shuffle, filter, batch", grain_filter, {"seconds": 90.0}, "grain"
    ),
    "grain-error": Case(
        "Grain",
        "threads; one row raises, the loop continues",
        grain_error,
        {"workers": (0,), "expected": [row for row in range(64) if row != 20]},
        "grain",
    ),
    "grain-error-workers": Case(
        "Grain",
        "2 workers; one row raises, the loop continues",
        grain_error_workers,
        {"workers": (0,), "expected": [row for row in range(64) if row != 20]},
        "grain",
    ),
    "litdata-mix": Case(
        "LitData", "mix 7:3 of two shuffled sets", litdata_mix, {"seconds": 90.0}, "litdata"
    ),
    "midstream-shuffle": Case("midstream", "stream, shuffle buffer of 64", ours_shuffle),
    "midstream-interleave": Case(
        "midstream", "interleave 7:3, shuffle buffer over it", ours_interleave
    ),
    "midstream-error": Case(
        "midstream", "one row raises, the loop continues", ours_error, {"ranks": (1,)}
    ),
}


def run(name: str) -> dict[str, Any]:
    """One case, in this environment."""
    from midstream.testing import check_resume

    case = CASES[name]
    options = {"steps": 120, "kill": False, "key": number, **case.options}
    report = check_resume(case.make, raises=False, progress=False, **options)
    return {**report.to_dict(), "text": str(report)}


def python_of(environment: str, folder: Path) -> str:
    """The interpreter of an environment, which is made if it is not there."""
    place = folder / environment
    python = place / "bin" / "python"
    if not python.exists():
        print(f"making {place} ...", file=sys.stderr)
        venv.create(place, with_pip=True)
        constraints = ["-c", str(ROOT / "constraints.txt")]
        base = ["torch", "torchdata", "datasets", "numpy", "pyarrow", "fsspec", "dill"]
        for packages in (
            ["torch"],
            [*base, *NEEDS[environment]],
        ):  # torch first, so that one build is chosen
            subprocess.run(
                [str(python), "-m", "pip", "install", "-q", *constraints, *packages], check=True
            )
    return str(python)


def outcome(checks: list[dict[str, Any]]) -> str:
    """Several checks in a cell."""
    checks = [check for check in checks if check["outcome"] != "not run"]
    if not checks:
        return "–"
    wrong = [check for check in checks if check["outcome"] not in ("exact", "once")]
    cuts = sum(check["cuts"] for check in checks)
    if not wrong:
        return f"exact ({cuts} cuts)"
    bad = sum(check["wrong"] for check in wrong)
    refused = all(check["outcome"] == "refused" for check in wrong)
    lost, repeated = (max(check[key] for check in wrong) for key in ("most_lost", "most_repeated"))
    text = f"{'error' if refused else '**wrong**'} at {bad} of {cuts} cuts"
    if refused:
        kind = wrong[0]["text"].split(": ")[1] if ": " in wrong[0]["text"] else ""
        text += f" ({kind})" if kind.isidentifier() else ""
    return text + (f": up to {lost} lost, {repeated} repeated" if lost or repeated else "")


def row(case: Case, report: dict[str, Any]) -> str:
    """A line of the table."""
    of: dict[str, list[dict[str, Any]]] = {"once": [], "chain": [], "other": [], "whole": []}
    for check in report["checks"]:
        name = check["name"]
        key = {
            "stopped at every batch": "once",
            "stopped again and again": "chain",
            "on other workers": "other",
        }.get(name)
        if key is None and name == "on other ranks":
            key = "other"
        if key is None and name == "an epoch has every sample once":
            key = "whole"
        if key is not None:
            of[key].append(check)
    whole = of["whole"][0] if of["whole"] and of["whole"][0]["outcome"] == "differs" else None
    note = f"; uninterrupted: {whole['most_lost']} lost" if whole else ""
    cells = [
        case.loader,
        case.pipeline + note,
        *(outcome(of[key]) for key in ("once", "chain", "other")),
    ]
    return f"| {' | '.join(cells)} | {report['state_bytes']:,} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--environments",
        type=Path,
        help="folder of virtual environments; made where they are missing",
    )
    parser.add_argument("--only", default="", help="run the cases whose name has this in it")
    parser.add_argument(
        "--details", action="store_true", help="print the whole reports to standard error"
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        sys.path.insert(0, str(Path(__file__).parent))
        import others  # as a module of its own, so that worker processes find what is in it

        json.dump(others.run(options.case), sys.__stdout__ or sys.stdout)
        return
    folder = options.environments or Path(tempfile.mkdtemp(prefix="others-"))
    print(
        "| loader | pipeline | stopped once, same workers | stopped again and again | other workers or ranks | state, bytes |"
    )
    print("|---|---|---|---|---|---|")
    for name, case in CASES.items():
        if options.only not in name:
            continue
        with tempfile.TemporaryDirectory() as data, tempfile.TemporaryFile("w+") as out:
            environment = {
                **os.environ,
                "PYTHONPATH": str(ROOT / "src"),
                "OTHERS_DATA": data,
                "HF_HUB_OFFLINE": "1",
            }
            command = [python_of(case.environment, folder.resolve()), __file__, "--case", name]
            done = subprocess.run(
                command, env=environment, stdout=out, stderr=subprocess.PIPE, text=True, check=False
            )
            out.seek(0)
            lines = out.read().strip().splitlines()
        if done.returncode != 0 or not lines:
            print(
                f"| {case.loader} | {case.pipeline} | could not run: {done.stderr.strip().splitlines()[-1:]} | | | |"
            )
            print(done.stderr[-3000:], file=sys.stderr)
            continue
        report = json.loads(lines[-1][lines[-1].index('{"exact"') :])
        if options.details:
            print(report["text"], file=sys.stderr)
        print(row(case, report), flush=True)


if __name__ == "__main__":
    main()
