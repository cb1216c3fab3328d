"""The commands of ``midstream``: their options and exit statuses.

They need the extra ``cli`` (typer and rich). Importing this file imports neither of them.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import midstream
from midstream.cli import inspection
from midstream.cli.inspection import find
from midstream.cli.output import show_batches, show_checkpoint, show_demo, show_difference
from midstream.errors import MidstreamError
from midstream.testing import check_resume

if TYPE_CHECKING:
    import typer

_CHECKPOINT = "A folder of midstream.checkpoint.save, a JSON file, or a file of torch.save."
_KEY = "Where the state is in the file, such as trainer.loader. Needed if it holds several."
_JSON = "Print it as JSON, and nothing else."


def main() -> None:
    """Runs the ``midstream`` command."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(f"the command line needs {error.name}: pip install 'midstream[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    _app()()


def _app() -> typer.Typer:
    global typer  # named by the annotations below, which typer evaluates when it builds a command
    import typer

    app = typer.Typer(
        name="midstream",
        help=_root.__doc__,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    for command in (demo, verify, inspect, diff, trace):
        app.command()(command)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"midstream {midstream.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """A stateful PyTorch data pipeline that resumes mid-stream, exactly."""


def demo(
    steps: Annotated[
        int, typer.Option(min=20, help="Training steps of a whole run; an epoch has about 130.")
    ] = 240,
    workers: Annotated[
        int, typer.Option(min=0, help="Worker processes of the first two runs.")
    ] = 2,
    resume_workers: Annotated[
        int, typer.Option(min=0, help="Worker processes of the resumed run.")
    ] = 1,
    seed: Annotated[
        int | None, typer.Option(help="Chooses the step of the kill.", show_default="random")
    ] = None,
    kill_at: Annotated[
        int | None,
        typer.Option(min=1, help="Kill after this step.", show_default="chosen by --seed"),
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")] = 20,
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep ledgers, logs and checkpoint there.",
            show_default="nothing is kept",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the verdict as JSON, and nothing else.")
    ] = False,
) -> None:
    """Kill a real training job, resume it, and compare it bit for bit.

    Trains a small language model on text that is on this machine: the
    standard library's sources and Python's help texts, mixed 7:3,
    shuffled, filtered, cut and padded. It takes about half a minute on
    the CPU, and needs no network.

    The first run is not interrupted. The second is killed by SIGKILL at a
    random step inside an epoch. The third resumes from the last
    checkpoint of the second, with another number of workers. All samples
    must come in the same order as in the first run, and every loss must
    be the same to the last bit. (Steps after the last checkpoint are lost
    with their weights, and trained again.)

    Exit status: 0 exact, 1 not exact, 2 it could not run.
    """

    try:
        exact = show_demo(
            as_json,
            steps=steps,
            workers=workers,
            resume_workers=resume_workers,
            seed=seed,
            kill_at=kill_at,
            every=every,
            folder=keep,
        )
    except (RuntimeError, ValueError, OSError) as error:
        typer.echo(f"The demonstration could not run: {error}", err=True)
        raise typer.Exit(2) from None
    raise typer.Exit(0 if exact else 1)


def verify(
    target: Annotated[str, typer.Argument(metavar="MODULE:FUNCTION", help="Or FILE.py:FUNCTION.")],
    workers: Annotated[str, typer.Option(help="Numbers of worker processes.")] = "0,2",
    ranks: Annotated[str, typer.Option(help="Numbers of ranks.")] = "1,2",
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Batches to read, over all ranks.",
            show_default="48, or 3 of every lane",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs to read at most.")] = 2,
    batch_size: Annotated[
        int, typer.Option(min=1, help="For datasets that do not end in .batch.")
    ] = 4,
    seconds: Annotated[float, typer.Option(min=1, help="About how long it may take.")] = 60,
    kill: Annotated[bool, typer.Option("--kill/--no-kill", help="Kill processes, too.")] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")
    ] = False,
) -> None:
    """Prove that your pipeline or loader resumes exactly.

    The function returns a midstream dataset (or the name is one); or it
    returns a loader and takes any of num_workers, rank and world_size by
    keyword. Any loader with state_dict and load_state_dict can be
    checked, and iterators with get_state and set_state.

    It is read once without interruption. Then it is stopped at every
    batch, at the ends of epochs, many times in a row, and killed by
    SIGKILL. Each time it is made anew and resumed; midstream's pipelines
    also on the other numbers of workers and ranks. The remaining samples
    must be the same, in the same order.

    Exit status: 0 exact, 1 not exact, 2 it could not run.
    """

    with _bad_input():
        report = check_resume(
            find(target),
            workers=_numbers(workers, "--workers"),
            ranks=_numbers(ranks, "--ranks"),
            steps=steps,
            epochs=epochs,
            batch_size=batch_size,
            seconds=seconds,
            kill=kill,
            raises=False,
            progress=False if as_json else None,
        )
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        report.show()
    raise typer.Exit(0 if report.exact else 1)


def inspect(
    path: Annotated[str, typer.Argument(metavar="CHECKPOINT", help=_CHECKPOINT)],
    key: Annotated[str | None, typer.Option(help=_KEY, show_default=False)] = None,
    lanes: Annotated[bool, typer.Option("--lanes", help="A line for every lane.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help=_JSON)] = False,
) -> None:
    """Show the contents of a checkpoint: position, progress, lanes, pipeline.

    Needs neither the data nor the code that made it.

    Exit status: 0 it could be read, 2 it could not.
    """

    with _bad_input():
        state = inspection.read(path, key)
        found = inspection.describe(state)
    if as_json:
        print(json.dumps(found))
    else:
        show_checkpoint(path, state, found, lanes)


def diff(
    one: Annotated[str, typer.Argument(metavar="CHECKPOINT", help=_CHECKPOINT)],
    other: Annotated[str, typer.Argument(metavar="CHECKPOINT", help=_CHECKPOINT)],
    key: Annotated[str | None, typer.Option(help=_KEY, show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help=_JSON)] = False,
) -> None:
    """Show how two checkpoints differ.

    Lists the differences of the pipelines, of excluded samples and of
    changed weights, how far the run came from one checkpoint to the
    other, and the lanes that are not the same.

    Exit status: 0 they are the same, 1 they differ, 2 one could not be read.
    """

    with _bad_input():
        found = inspection.difference(inspection.read(one, key), inspection.read(other, key))
    if as_json:
        print(json.dumps(found))
    else:
        show_difference(found)
    raise typer.Exit(0 if found["same"] else 1)


def trace(
    target: Annotated[
        str, typer.Argument(metavar="MODULE:FUNCTION", help="Makes the dataset or the loader.")
    ],
    path: Annotated[str, typer.Argument(metavar="CHECKPOINT", help=_CHECKPOINT)],
    steps: Annotated[int, typer.Option(min=1, help="How many batches.")] = 10,
    key: Annotated[str | None, typer.Option(help=_KEY, show_default=False)] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON for every batch.")
    ] = False,
) -> None:
    """Show which rows come next after a checkpoint.

    In the run's order of batches, over all ranks. Reads the data, and
    changes nothing.

    Exit status: 0, or 2 if the checkpoint is not of this pipeline.
    """

    with _bad_input():
        loader = inspection.loader_for(find(target), inspection.read(path, key))
        batches = inspection.follow(loader, steps)
        if as_json:
            for epoch, batch, origins in batches:
                print(json.dumps({"epoch": epoch, "batch": batch, "origins": origins}))
        else:
            show_batches(batches)


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"{option} takes integers with commas between them, such as 0,2; found {text!r}"
        ) from None


@contextlib.contextmanager
def _bad_input() -> Iterator[None]:
    """Prints errors of the input, in place of a traceback, and exits with status 2."""

    try:
        yield
    except (MidstreamError, ValueError, TypeError, OSError) as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(2) from None
