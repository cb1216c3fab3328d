"""Run the benchmarks: environments, data, measurements, results, plots and the tables of README.md.

    python benchmarks/run.py --all                 everything, into benchmarks/results
    python benchmarks/run.py --all --quick         small, into the cache folder
    python benchmarks/run.py --only W1,W3          some questions
    python benchmarks/run.py --only W1 --contestants midstream,grain
    python benchmarks/run.py --all --prepare       environments and data alone, before a quiet run
    python benchmarks/run.py --report              tables and plots again, from the recorded results alone

Contestants take turns: round by round, each in a fresh process in its environment, starting with
another one each round. One that fails or takes too long is recorded as such. Every measurement is
written down when it is made; ``--resume`` continues the last run where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import environments  # noqa: E402
import prepare  # noqa: E402
import questions  # noqa: E402
from contestants import everyone  # noqa: E402
from endpoint import Endpoint  # noqa: E402
from interface import Contestant  # noqa: E402

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "midstream-benchmarks"
EFFORT: dict[str, dict[str, Any]] = {
    "full": {"seconds": 0.6, "patience": 8.0, "rounds": None, "timeout": 150},
    "quick": {"seconds": 0.4, "patience": 5.0, "rounds": 1, "timeout": 90},
    "tiny": {"seconds": 0.1, "patience": 5.0, "rounds": 1, "timeout": 45},
}


def chosen(question: Any, only: Sequence[str] | None) -> list[Contestant]:
    """Who answers a question."""
    return [
        one
        for one in everyone().values()
        if question.KIND in one.kinds
        and one.name not in question.LEFT_OUT
        and (not only or one.name in only)
    ]


def machine() -> dict[str, Any]:
    """What kind of machine; nothing that names it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    model = ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "cores": os.cpu_count(),
        "processor": model or platform.machine(),
        "memory, GiB": round(memory),
        "system": platform.system(),
        "kernel": ".".join(platform.release().split("-")[0].split(".")[:2]),
        "python": platform.python_version(),
    }


def get_ready(
    question: Any, everybody: Sequence[Contestant], cache: Path, scale: str, pip: Sequence[str]
) -> dict[str, str]:
    """Environments and data. Contestant -> why it cannot take part."""
    out: dict[str, str] = {}
    bad: dict[str, str] = {}
    for environment in dict.fromkeys(one.environment for one in everybody):
        try:
            if not Path(environments.python_of(environment, cache)).exists():
                say(f"  making the environment {environment}")
            environments.make(environment, cache, pip)
        except Exception as error:
            bad[environment] = str(error)
    for one in everybody:
        if one.environment in bad:
            out[one.name] = bad[one.environment]
    for name in question.SETS:
        for number, (part, rows) in enumerate(prepare.parts_of(name, scale).items()):
            folder = prepare.folder_of(cache, scale, name, part)
            if not (folder / "raw" / "values.npy").exists():
                prepare.make_raw(folder, name, number, rows)
            wanted = {"parquet"} if name == "remote" else set()
            wanted |= {one.format for one in everybody} - (
                {"arrow", "tar", "litdata"} if name == "remote" else set()
            )
            for kind in sorted(wanted - {"parquet"} if name != "remote" else wanted):
                if (folder / kind).exists():
                    continue
                say(f"  writing {name}/{part} as {kind}")
                writer = next((one for one in everybody if one.format == kind), None)
                environment = writer.environment if writer is not None else "main"
                if kind == "arrow":
                    environment = "main"
                if environment in bad:
                    continue
                log = subprocess.run(
                    [
                        environments.python_of(environment, cache),
                        str(HERE / "prepare.py"),
                        kind,
                        str(folder),
                    ],
                    env=child_environment(),
                    capture_output=True,
                    text=True,
                    timeout=900,
                )
                if not (folder / kind).exists():
                    last = (log.stderr.strip().splitlines() or ["?"])[-1]
                    for one in everybody:
                        if one.format == kind:
                            out[one.name] = f"its data could not be written: {last[:200]}"
    return out


def child_environment() -> dict[str, str]:
    """Of a measuring process: this checkout's midstream, one thread a process, no network."""
    paths = [str(HERE), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "LITDATA_DISABLE_VERSION_CHECK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }


def measure(
    question: str,
    one: Contestant,
    options: dict[str, Any],
    timeout: float,
    cache: Path,
    more: dict[str, str],
) -> dict[str, Any]:
    """One measurement in a fresh process."""
    order = {"question": question, "contestant": one.name, "options": options, "timeout": timeout}
    log = cache / "logs" / f"{question}-{one.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    row: dict[str, Any] = {}
    # Into files, not pipes: a worker that outlives the process would hold a pipe open.
    with log.open("w") as errors, log.with_suffix(".out").open("w+") as out:
        process = subprocess.Popen(
            [
                environments.python_of(one.environment, cache),
                str(HERE / "measure.py"),
                json.dumps(order),
            ],
            env=child_environment() | more,
            stdout=out,
            stderr=errors,
            start_new_session=True,
        )
        try:
            process.wait(timeout)
            out.seek(0)
            found = [line for line in out.read().splitlines() if line.startswith("RESULT ")]
            row = {"result": json.loads(found[-1][7:])} if found else {}
        except subprocess.TimeoutExpired:
            row = {"failed": f"not done after {timeout:.0f} s"}
        finally:
            process.kill()
            end_session(process.pid)
            process.wait()
    if not row:
        last = (log.read_text().strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        row = {"failed": last[:300]}
    return row | {"took": round(time.perf_counter() - begin, 1)}


def end_session(session: int) -> None:
    """End the workers that outlived a process we started. The resource tracker ends by itself, when
    it has cleaned up.
    """
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
            if (
                int(fields[3]) == session
                and b"resource_tracker" not in Path("/proc", entry, "cmdline").read_bytes()
            ):
                os.kill(int(entry), signal.SIGKILL)


def warm(question: Any, one: Contestant, cache: Path, scale: str) -> None:
    """Read the files once, so that no measurement waits for the disk."""
    for name in question.SETS:
        for part in prepare.parts_of(name, scale):
            folder = prepare.folder_of(cache, scale, name, part)
            for kind in ("raw", one.format):
                for path in sorted((folder / kind).rglob("*")):
                    if path.is_file():
                        with path.open("rb", buffering=0) as file:
                            while file.read(1 << 22):
                                pass


def answer(name: str, arguments: argparse.Namespace, scale: str) -> dict[str, Any]:
    """All rounds of a question."""
    question, effort, cache = questions.load(name), EFFORT[scale], arguments.cache
    everybody = chosen(question, arguments.contestants)
    say(f"{name} {question.TITLE}: {len(everybody)} contestants")
    left_out = get_ready(question, everybody, cache, scale, arguments.pip)
    journal = cache / "journal" / f"{scale}-{name}.jsonl"
    journal.parent.mkdir(parents=True, exist_ok=True)
    if not arguments.resume:
        journal.unlink(missing_ok=True)
    rows = (
        [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    )
    done = {(row["contestant"], row["round"]) for row in rows}
    begun = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    rounds = arguments.rounds or effort["rounds"] or question.ROUNDS
    options = {
        "cache": str(cache),
        "scale": scale,
        "seconds": effort["seconds"],
        "patience": effort["patience"],
    }
    with contextlib.ExitStack() as stack:
        more: dict[str, str] = {}
        if name == "W7":
            endpoint = stack.enter_context(Endpoint())
            more = endpoint.environment()
            folder = prepare.folder_of(cache, scale, "remote", "all")
            options["url"] = endpoint.upload(folder / "parquet", "remote")
            if (folder / "mds").exists():
                endpoint.upload(folder / "mds", "remote-mds")
        for number in range(rounds):
            turn = number * len(everybody) // rounds
            for one in [*everybody[turn:], *everybody[:turn]]:
                if (one.name, number) in done:
                    continue
                if one.name in left_out:
                    row: dict[str, Any] = {"failed": left_out[one.name]}
                else:
                    warm(question, one, cache, scale)
                    row = measure(name, one, options, effort["timeout"], cache, more)
                row = {"contestant": one.name, "round": number} | row
                rows.append(row)
                with journal.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                say(
                    f"  round {number + 1}/{rounds} {one.name:18} {row.get('took', 0):6.1f} s  {headline(row)}"
                )
    return {
        "question": name,
        "title": question.TITLE,
        "begun": begun,
        "scale": scale,
        "rounds": rounds,
        "load before": round(os.getloadavg()[0], 2),
        "machine": machine(),
        "versions": {
            row["contestant"]: row["result"].pop("versions")
            for row in rows
            if "versions" in row.get("result", {})
        },
        "settings": {one.name: one.settings for one in everybody},
        "rows": rows,
    }


def headline(row: dict[str, Any]) -> str:
    """One line of a row, to look at while it runs."""
    if "failed" in row:
        return f"FAILED {row['failed']}"
    result = row["result"]
    if "modes" in result:
        found = []
        for mode, cell in result["modes"].items():
            figure = cell.get("per_second") or cell.get("seconds")
            shown = (
                str(cell) if not figure else f"{figure:,.3f}" if figure < 100 else f"{figure:,.0f}"
            )
            found.append(f"{mode}: {shown}")
        return "; ".join(found)
    text = json.dumps({key: value for key, value in result.items() if key != "versions"})
    return text if len(text) < 300 else text[:300] + " ..."


def say(text: str) -> None:
    """To whoever waits."""
    print(text, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def write_report(results: Path, page: Path | None, plots: bool) -> str:
    """Plots beside the results, and the tables between the page's markers. Returns the whole of the
    tables.
    """
    sections = {}
    for name in questions.MODULES:
        path = results / f"{name}.json"
        if not path.exists():
            continue
        recorded, question = json.loads(path.read_text()), questions.load(name)
        text = [f"### {name} {question.TITLE}", question.TEXT, _when(recorded)]
        if plots:
            question.plot(recorded["rows"], results / f"{name}.png")
        if (results / f"{name}.png").exists():
            text.append(f"![{question.TITLE}](results/{name}.png)")
        text.append(question.report(recorded["rows"]))
        text.extend(_failures(recorded))
        sections[name] = "\n\n".join(text)
    body = "\n\n".join(sections.values())
    if page is not None and sections:
        before, _, rest = page.read_text().partition("<!-- results: written by run.py -->")
        _, _, after = rest.partition("<!-- end of results -->")
        settings = _settings(results)
        page.write_text(
            f"{before}<!-- results: written by run.py -->\n\n{body}\n\n{settings}\n\n<!-- end of results -->{after}"
        )
    return body


def _when(recorded: dict[str, Any]) -> str:
    one = recorded["machine"]
    rounds = (
        f"{recorded['rounds']} rounds, medians (least to most)"
        if recorded["rounds"] > 1
        else "one round"
    )
    small = (
        ""
        if recorded["scale"] == "full"
        else f" **A {recorded['scale']} run, on little data: not for comparison.**"
    )
    return (
        f"{recorded['begun']}, {one['cores']} cores ({one['processor']}), {one['memory, GiB']} GiB, {one['system']} "
        f"{one['kernel']}, Python {one['python']}; {rounds}.{small}"
    )


def _failures(recorded: dict[str, Any]) -> list[str]:
    """What went wrong, in full."""
    found: dict[str, None] = {}

    def walk(where: str, value: Any) -> None:
        if isinstance(value, dict):
            for word in ("failed", "absent"):
                if word in value:
                    found[f"- {where}: {value[word]}"] = None
            for key, inner in value.items():
                if key == "elsewhere":
                    continue  # a table of its own says it
                walk(f"{where}, {key}", inner)

    for row in recorded["rows"]:
        walk(
            everyone()[row["contestant"]].title,
            {key: value for key, value in row.items() if key in ("result", "failed")},
        )
    lines = [
        line.replace(", result, modes", "").replace(", result", "").replace(", grid", "")
        for line in found
    ]
    return ["Not measured:\n\n" + "\n".join(lines)] if lines else []


def _settings(results: Path) -> str:
    """What was set, and the versions."""
    settings: dict[str, str] = {}
    versions: dict[str, dict[str, str]] = {}
    for path in filter(Path.exists, (results / f"{name}.json" for name in questions.MODULES)):
        recorded = json.loads(path.read_text())
        settings |= recorded["settings"]
        for name, found in recorded["versions"].items():
            versions.setdefault(name, {}).update(found)
    lines = []
    for name, one in everyone().items():
        if name in settings:
            shown = ", ".join(
                f"{library} {version}"
                for library, version in sorted(versions.get(name, {}).items())
            )
            lines.append([one.title, settings[name], shown])
    import show

    return "### Settings and versions\n\n" + show.table(
        ["contestant", "what was set", "versions"], lines
    )


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = lambda text: [one.strip() for one in text.split(",") if one.strip()]  # noqa: E731
    parser.add_argument("--all", action="store_true", help="all questions")
    parser.add_argument(
        "--only", type=names, default=[], help=f"questions, of {','.join(questions.MODULES)}"
    )
    parser.add_argument("--contestants", type=names, help=f"of {','.join(everyone())}")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tenth of the data, one round; results into the cache folder",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a hundredth of the data: for tests of this program"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the measurements of the last run that was broken off",
    )
    parser.add_argument(
        "--report", action="store_true", help="measure nothing; plots and tables from the results"
    )
    parser.add_argument("--no-plots", action="store_true", help="without matplotlib")
    parser.add_argument(
        "--prepare", action="store_true", help="make environments and data, measure nothing"
    )
    parser.add_argument("--rounds", type=int, help="instead of each question's own number")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="environments, data and logs; default %(default)s"
    )
    parser.add_argument(
        "--results", type=Path, help="where JSON and plots go; default benchmarks/results"
    )
    parser.add_argument(
        "--pip", type=str.split, default=[], help="further arguments of pip install, as one string"
    )
    arguments = parser.parse_args(given)
    unknown = [
        *(set(arguments.only) - set(questions.MODULES)),
        *(set(arguments.contestants or ()) - set(everyone())),
    ]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    if not (arguments.all or arguments.only or arguments.report):
        parser.error("say --all, --only W1,... or --report")
    arguments.cache = arguments.cache.resolve()
    return arguments


def main(given: Sequence[str] | None = None) -> None:
    """The one command."""
    arguments = parse(given)
    scale = "tiny" if arguments.tiny else "quick" if arguments.quick else "full"
    results = arguments.results or (
        HERE / "results" if scale == "full" else arguments.cache / f"results-{scale}"
    )
    results.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    for name in (
        [] if arguments.report else list(questions.MODULES) if arguments.all else arguments.only
    ):
        started = time.perf_counter()
        if arguments.prepare:
            question = questions.load(name)
            for who, why in get_ready(
                question, chosen(question, None), arguments.cache, scale, arguments.pip
            ).items():
                say(f"  {name} without {who}: {why}")
            continue
        try:
            found = answer(name, arguments, scale)
        except Exception as error:  # a question that cannot be asked does not stop the others
            say(f"  {name} FAILED: {type(error).__name__}: {error}")
            continue
        (results / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        say(f"  {name}: {time.perf_counter() - started:.0f} s")
    if arguments.prepare:
        say(f"{time.perf_counter() - begin:.0f} s; environments and data are in {arguments.cache}")
        return
    page = HERE / "README.md" if results.resolve() == HERE / "results" else None
    text = write_report(results, page, not arguments.no_plots)
    (results / "report.md").write_text(text) if page is None else None
    say(f"{time.perf_counter() - begin:.0f} s in all; results, tables and plots in {results}")


if __name__ == "__main__":
    main()
