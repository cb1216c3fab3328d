"""What the command line prints."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any


def print_line(head: str, text: str, width: int) -> str:
    """A head, and text below each other behind it."""
    import textwrap

    room = max(30, width - len(head))
    return head + f"\n{' ' * len(head)}".join(
        textwrap.wrap(text, room, break_on_hyphens=False) or [""]
    )


def _table(rows: list[list[str]], left: int = 1, last: bool = False) -> Any:
    """A plain table: the first row is its header; the first columns, and with ``last`` the last
    one, are words.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    header, *rest = rows
    for index, column in enumerate(header):
        words = index < left or (last and index == len(header) - 1)
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    for row in rest:
        table.add_row(*map(Text, row))
    return table


def show_checkpoint(
    path: str, state: dict[str, Any], found: dict[str, Any], every_lane: bool
) -> None:
    from rich.console import Console
    from rich.markup import escape

    from midstream.checkpoint.progress import progress
    from midstream.cli.inspection import spec_lines

    console = Console(highlight=False)
    told = progress(state)
    part = (
        ""
        if found["lanes_here"] == found["num_lanes"]
        else f" (of {found['lanes_here']} lanes: one rank's part)"
    )
    console.print(
        f"[bold]{escape(path)}[/]: epoch {found['epoch']}, {found['batches']:,} batches of it over"
        f" all ranks, {found['steps_done']:,} steps; {told.samples:,} samples in all{part}",
        soft_wrap=False,
    )
    console.print(
        f"[dim]format {found['format']}, pipeline {found['fingerprint']}, {found['bytes']:,} bytes,"
        f" {found['bytes_of_spec']:,} of them the pipeline[/]"
    )
    console.print()
    console.print(_table(told.rows()))
    for table, last in ((told.metric_rows(), False), (told.category_rows(), True)):
        if table:
            console.print()
            console.print(_table(table, 2, last))
    for kind, count in told.unattributed.items():
        console.print(f"of no single source: {count:,} {kind}", markup=False)
    lanes = found["lanes"]
    spoken = [lane for lane in lanes.values() if lane["batches"] is not None]
    console.print()
    if spoken:
        made = [lane["batches"] or 0 for lane in lanes.values()]
        text = f"{found['num_lanes']} lanes: {min(made):,} to {max(made):,} batches each"
        for name, words in (
            ("done", "at their end"),
            ("left_over", "with something left over from the epoch before"),
        ):
            count = sum(lane[name] for lane in spoken)
            text += f", {count} {words}" if count else ""
        console.print(text)
    else:
        console.print(
            f"{found['num_lanes']} lanes, which only keep counts: the position is the number of"
            " batches"
        )
    if every_lane:
        rows = [["lane", "batches", "samples", "bytes", "", ""]]
        for name, lane in lanes.items():
            batches = "–" if lane["batches"] is None else f"{lane['batches']:,}"
            marks = ["done" if lane["done"] else "", "left over" if lane["left_over"] else ""]
            rows.append([name, batches, f"{lane['samples']:,}", f"{lane['bytes']:,}", *marks])
        console.print(_table(rows))
    console.print()
    for line in spec_lines(found["spec"]):
        console.print(line, markup=False)


def show_difference(found: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if found["same"]:
        console.print("[bold green]SAME[/]: both checkpoints say the same.")
        return
    for line in found["pipeline"]:
        console.print(f"pipeline: {line}", markup=False)
    for line in found["changes"]:
        console.print(line, markup=False)
    rows = [["", "first", "second", "change"]]
    for name, (before, after) in {**found["position"], **found["progress"]}.items():
        both = before is not None and after is not None
        rows.append(
            [
                name.replace("_", " "),
                _number(before),
                _number(after),
                _number(after - before, "+") if both else "",
            ]
        )
    if len(rows) > 1:
        console.print(_table(rows))
    if found["lanes"]:
        lanes = found["lanes"]
        shown = ", ".join(lanes[:8]) + (f" and {len(lanes) - 8} more" if len(lanes) > 8 else "")
        console.print(f"lanes that differ: {shown}", markup=False)


def _number(value: Any, sign: str = "") -> str:
    if value is None:
        return "–"
    return f"{value:{sign},}" if isinstance(value, int) else f"{value:{sign}.4f}"


def show_demo(as_json: bool, *, steps: int, **options: Any) -> bool:
    """Run the demonstration and show it; returns whether it was exact."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from midstream.cli.demo import Step, Verdict, run

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
    # Without a terminal a bar would be noise: then only the lines are printed. (Colours can be
    # forced where there is none.)
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
            f"[bold green]EXACT[/]: {verdict.samples:,} samples in {verdict.steps} steps came in"
            " the same order, and every loss is the same bit for bit."
        )
    else:
        console.print(
            "[bold red]NOT EXACT[/]: the resumed run differs from the one that was left alone."
        )
    console.print(
        "Steps after the checkpoint, rolled back with the weights and done again:"
        f" {verdict.rolled_back}."
    )
    return verdict.exact
