"""Prints the results of the commands with rich."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from midstream.checkpoint.progress import progress
from midstream.cli import demo
from midstream.cli.inspection import spec_lines
from midstream.common.tables import column_sides, rich_table
from midstream.errors import Origin


def hanging_indent(head: str, text: str, width: int) -> str:
    """Returns a text wrapped to the right of a head, within ``width`` characters a line."""
    room = max(30, width - len(head))
    lines = textwrap.wrap(text, room, break_on_hyphens=False) or [""]
    return head + f"\n{' ' * len(head)}".join(lines)


def _table(rows: list[list[str]], left: int = 1, last: bool = False) -> Any:
    """Returns a table for rich; see `midstream.common.tables.table_lines` for the arguments."""
    from rich.text import Text

    header, *body = rows
    table = rich_table(header, column_sides(len(header), left, last))
    for row in body:
        table.add_row(*map(Text, row))
    return table


def show_checkpoint(
    path: str, state: dict[str, Any], found: dict[str, Any], every_lane: bool
) -> None:
    """Prints what a checkpoint holds.

    Args:
        path: Its name.
        state: The state in it.
        found: The same as `midstream.cli.inspection.describe` returns it.
        every_lane: Whether to print a table of all lanes.
    """
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    counts = progress(state)
    part = (
        ""
        if found["lanes_here"] == found["num_lanes"]
        else f" (of {found['lanes_here']} lanes: one rank's part)"
    )
    console.print(
        f"[bold]{escape(path)}[/]: epoch {found['epoch']}, {found['batches']:,} batches of it over"
        f" all ranks, {found['steps_done']:,} steps; {counts.samples:,} samples in all{part}",
        soft_wrap=False,
    )
    console.print(
        f"[dim]format {found['format']}, pipeline {found['fingerprint']}, {found['bytes']:,} bytes,"
        f" {found['bytes_of_spec']:,} of them the pipeline[/]"
    )
    console.print()
    console.print(_table(counts.rows()))
    for table, last in ((counts.metric_rows(), False), (counts.category_rows(), True)):
        if table:
            console.print()
            console.print(_table(table, 2, last))
    for kind, count in counts.unattributed.items():
        console.print(f"of no single source: {count:,} {kind}", markup=False)
    console.print()
    console.print(_lanes_text(found))
    if every_lane:
        console.print(_table(_lane_rows(found["lanes"])))
    console.print()
    for line in spec_lines(found["spec"]):
        console.print(line, markup=False)


def _lanes_text(found: dict[str, Any]) -> str:
    """Returns a sentence about the lanes: their number, and how far they are."""
    lanes = found["lanes"].values()
    positioned = [lane for lane in lanes if lane["batches"] is not None]
    if not positioned:
        return (
            f"{found['num_lanes']} lanes, which only keep counts: the position is the number of"
            " batches"
        )
    made = [lane["batches"] or 0 for lane in lanes]
    text = f"{found['num_lanes']} lanes: {min(made):,} to {max(made):,} batches each"
    for name, words in (
        ("done", "at their end"),
        ("left_over", "with something left over from the epoch before"),
    ):
        count = sum(lane[name] for lane in positioned)
        text += f", {count} {words}" if count else ""
    return text


def _lane_rows(lanes: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Returns a table with a row for every lane."""
    rows = [["lane", "batches", "samples", "bytes", "", ""]]
    for name, lane in lanes.items():
        batches = "–" if lane["batches"] is None else f"{lane['batches']:,}"
        marks = ["done" if lane["done"] else "", "left over" if lane["left_over"] else ""]
        rows.append([name, batches, f"{lane['samples']:,}", f"{lane['bytes']:,}", *marks])
    return rows


def show_difference(found: dict[str, Any]) -> None:
    """Prints how two checkpoints differ, as `midstream.cli.inspection.difference` found it."""
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


def show_batches(batches: Iterable[tuple[int, int, list[Origin] | str]]) -> None:
    """Prints batches as they come: epoch, number and the rows that made each of them."""
    from rich.console import Console

    console = Console(highlight=False)
    for epoch, batch, origins in batches:
        text = origins if isinstance(origins, str) else ", ".join(map(str, origins))
        line = hanging_indent(f"epoch {epoch}  batch {batch:>6,}  ", text, console.width)
        console.print(line, markup=False)


def show_demo(as_json: bool, *, steps: int, **options: Any) -> bool:
    """Runs the demonstration and shows it.

    Args:
        as_json: Whether to print the verdict as JSON, and nothing else.
        steps: Training steps of a whole run.
        options: Further arguments of `midstream.cli.demo.run`.

    Returns:
        Whether the resumed run was exact.
    """
    from rich.console import Console

    console = Console(quiet=as_json, highlight=False, soft_wrap=True)
    verdict = _watch_demo(console, demo.run(steps=steps, **options), steps)
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


def _watch_demo(
    console: Any, events: Iterable[str | demo.Step | demo.Verdict], steps: int
) -> demo.Verdict:
    """Shows the demonstration while it runs: a bar for each training process, and its lines."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("  {task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    titles = {"whole": "left alone", "killed": "to be killed", "resumed": "resumed"}
    verdict = None
    # Without a terminal only the lines are printed. (Colours can be forced where there is none.)
    moving = sys.stdout.isatty() and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not moving) as live:
        bar = live.add_task("starting", total=steps, loss="")
        for event in events:
            if isinstance(event, demo.Verdict):
                verdict = event
            elif isinstance(event, demo.Step):
                last = event.run == "resumed" and event.step == steps
                live.update(
                    bar,
                    description=titles[event.run],
                    completed=event.step,
                    loss=f"loss {event.loss:.3f}",
                    visible=not last,
                )
            else:
                live.console.print(event, markup=False)
                live.reset(bar, description="starting", loss="")
    assert verdict is not None
    return verdict
