"""The command line. Needs the extra ``cli`` (typer and rich); nothing else in the package does."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

__all__ = ["main"]


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
            bool, typer.Option("--version", callback=version, is_eager=True, help="Show the version and exit.")
        ] = False,
    ) -> None:
        """A stateful PyTorch data pipeline that resumes mid-stream, exactly."""

    @app.command()
    def demo(
        steps: Annotated[
            int, typer.Option(min=20, help="Training steps of a whole run; an epoch has about 130.")
        ] = 240,
        workers: Annotated[int, typer.Option(min=0, help="Worker processes of the first two runs.")] = 2,
        resume_workers: Annotated[int, typer.Option(min=0, help="Worker processes of the resumed run.")] = 1,
        seed: Annotated[int | None, typer.Option(help="Chooses the step of the kill.", show_default="random")] = None,
        kill_at: Annotated[
            int | None, typer.Option(min=1, help="Kill after this step.", show_default="chosen by --seed")
        ] = None,
        every: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")] = 20,
        keep: Annotated[
            Path | None,
            typer.Option(
                metavar="DIR", help="Keep ledgers, logs and checkpoint there.", show_default="nothing is kept"
            ),
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON, and nothing else.")] = False,
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
            exact = _show_demo(
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

    return app


def _show_demo(as_json: bool, *, steps: int, **options: Any) -> bool:
    """Run the demonstration and show it; returns whether it was exact."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from midstream.demo import Step, Verdict, run

    console = Console(quiet=as_json, highlight=False, soft_wrap=True)
    columns = (
        TextColumn("  {task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    titles = {"whole": "left alone", "killed": "to be killed", "resumed": "resumed"}
    verdict = None
    # Without a terminal a bar would be noise: then only the lines are printed. (Colours can be forced where there is none.)
    moving = sys.stdout.isatty() and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not moving) as live:
        bar = live.add_task("starting", total=steps, loss="")
        for told in run(steps=steps, **options):
            if isinstance(told, Verdict):
                verdict = told
            elif isinstance(told, Step):
                last = told.run == "resumed" and told.step == steps
                live.update(
                    bar,
                    description=titles[told.run],
                    completed=told.step,
                    loss=f"loss {told.loss:.3f}",
                    visible=not last,
                )
            else:
                live.console.print(told, markup=False)
                live.reset(bar, description="starting", loss="")
    assert verdict is not None
    if as_json:
        print(json.dumps(asdict(verdict)))
        return verdict.exact
    for line in verdict.differences:
        console.print(f"  {line}", markup=False)
    if verdict.exact:
        console.print(
            f"[bold green]EXACT[/]: {verdict.samples:,} samples in {verdict.steps} steps came in the same order, and every "
            f"loss is the same bit for bit."
        )
    else:
        console.print("[bold red]NOT EXACT[/]: the resumed run differs from the one that was left alone.")
    console.print(f"Steps after the checkpoint, rolled back with the weights and done again: {verdict.rolled_back}.")
    return verdict.exact
