"""The command line. Needs the extra ``cli`` (typer and rich); nothing else in the package does."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from midstream.cli.output import print_line, show_checkpoint, show_demo, show_difference


def main() -> None:
    """Entry point of the ``midstream`` command."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(f"the command line needs {error.name}: pip install 'midstream[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    _app()()


def _app() -> Any:
    import typer

    app = typer.Typer(
        name="midstream",
        help="A stateful PyTorch data pipeline that resumes mid-stream, exactly.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    def version(wanted: bool) -> None:
        if wanted:
            import midstream

            typer.echo(f"midstream {midstream.__version__}")
            raise typer.Exit

    @app.callback()
    def _root(
        version: Annotated[
            bool,
            typer.Option(
                "--version", callback=version, is_eager=True, help="Show the version and exit."
            ),
        ] = False,
    ) -> None:
        """A stateful PyTorch data pipeline that resumes mid-stream, exactly."""

    @app.command()
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

        Trains a small language model on text that is on this machine:
        the standard library's sources and Python's help texts, mixed 7:3,
        shuffled, filtered, cut and padded. It takes about half a minute on
        the CPU, and no network.

        One run is left alone. One is killed by SIGKILL at a random step
        inside an epoch. One goes on from the last checkpoint with another
        number of workers. Every sample must come in the same order as in
        the run that was left alone, and every loss be the same to the last
        bit. (What was trained after the last checkpoint is lost with its
        weights, and done again.)

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

    _add_verify(app)
    _add_looking(app)
    return app


def _add_verify(to: Any) -> None:
    import typer

    app: typer.Typer = to

    @app.command()
    def verify(
        target: Annotated[
            str, typer.Argument(metavar="MODULE:FUNCTION", help="Or FILE.py:FUNCTION.")
        ],
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

        The function returns a midstream dataset (or is one); or it returns
        a loader and takes any of num_workers, rank and world_size by
        keyword. Any loader with state_dict and load_state_dict can be
        checked, and iterators with get_state and set_state.

        It is read once and left alone. Then it is stopped at every batch,
        at the ends of epochs, again and again, killed by SIGKILL, and
        resumed, each time made anew; midstream's also on the other numbers
        of workers and ranks. The rest must be the same, in order.

        Exit status: 0 exact, 1 not exact, 2 it could not run.
        """
        from midstream.cli.inspection import find
        from midstream.testing import check_resume

        with _bad_input(typer):
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


_KEY = "Where in the file the state is, trainer.loader say. Needed where there are several."

_STEPS = "How many batches."


def _add_looking(to: Any) -> None:
    import typer

    app: typer.Typer = to
    checkpoint = typer.Argument(
        metavar="CHECKPOINT",
        help="A folder of midstream.checkpoint.save, a JSON file, or a file of torch.save.",
    )

    @app.command("inspect")
    def inspect_(
        path: Annotated[str, checkpoint],
        key: Annotated[str | None, typer.Option(help=_KEY, show_default=False)] = None,
        lanes: Annotated[bool, typer.Option("--lanes", help="A line for every lane.")] = False,
        as_json: Annotated[
            bool, typer.Option("--json", help="Print it as JSON, and nothing else.")
        ] = False,
    ) -> None:
        """Show what a checkpoint says: position, progress, lanes, pipeline.

        Needs neither the data nor the code that made it.

        Exit status: 0 it could be read, 2 it could not.
        """
        from midstream.cli import inspection

        with _bad_input(typer):
            state = inspection.read(path, key)
            found = inspection.describe(state)
        if as_json:
            print(json.dumps(found))
        else:
            show_checkpoint(path, state, found, lanes)

    @app.command("diff")
    def diff_(
        one: Annotated[str, checkpoint],
        other: Annotated[str, checkpoint],
        key: Annotated[str | None, typer.Option(help=_KEY, show_default=False)] = None,
        as_json: Annotated[
            bool, typer.Option("--json", help="Print it as JSON, and nothing else.")
        ] = False,
    ) -> None:
        """Show what lies between two checkpoints.

        How the pipelines differ, and the samples that were excluded and
        the weights that were changed; how far the run came from one to the
        other, and which lanes are not the same.

        Exit status: 0 they say the same, 1 they do not, 2 one could not be read.
        """
        from midstream.cli import inspection

        with _bad_input(typer):
            found = inspection.difference(inspection.read(one, key), inspection.read(other, key))
        if as_json:
            print(json.dumps(found))
        else:
            show_difference(found)
        raise typer.Exit(0 if found["same"] else 1)

    @app.command()
    def trace(
        target: Annotated[
            str, typer.Argument(metavar="MODULE:FUNCTION", help="Makes the dataset or the loader.")
        ],
        path: Annotated[str, checkpoint],
        steps: Annotated[int, typer.Option(min=1, help=_STEPS)] = 10,
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
        from rich.console import Console

        from midstream.cli import inspection

        with _bad_input(typer):
            loader = inspection.loader_for(inspection.find(target), inspection.read(path, key))
            console = Console(highlight=False)
            for epoch, batch, origins in inspection.follow(loader, steps):
                if as_json:
                    print(json.dumps({"epoch": epoch, "batch": batch, "origins": origins}))
                else:
                    words = origins if isinstance(origins, str) else ", ".join(map(str, origins))
                    console.print(
                        print_line(f"epoch {epoch}  batch {batch:>6,}  ", words, console.width),
                        markup=False,
                    )


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"{option} takes integers with commas between them, 0,2 say; found {text!r}"
        ) from None


@contextlib.contextmanager
def _bad_input(typer: Any) -> Iterator[None]:
    """What cannot be read or run is told in words; exit status 2."""
    from midstream.errors import MidstreamError

    try:
        yield
    except (MidstreamError, ValueError, TypeError, OSError) as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(2) from None
