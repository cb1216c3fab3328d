"""Tables, sentences and plots, all made from the recorded results."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interface import Contestant


@dataclass(frozen=True)
class Spread:
    """The median of the rounds, the least and the most; or why there is none."""

    values: tuple[float, ...]
    reason: str = ""

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.values)

    def text(self, scale: float) -> str:
        """For a table."""
        if not self.values:
            return self.reason or "-"
        parts = [
            number(value / scale) for value in (self.median, min(self.values), max(self.values))
        ]
        return parts[0] if len(self.values) == 1 else f"{parts[0]} ({parts[1]} to {parts[2]})"


def number(value: float) -> str:
    """Three figures."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread(
    rows: Sequence[Mapping[str, Any]], pick: Callable[[Any], Mapping[str, Any]], key: str
) -> Spread:
    """Of what ``pick`` finds in each row."""
    values, reason = [], ""
    for row in rows:
        cell = pick(row) if "result" in row else row
        if key in cell:
            values.append(float(cell[key]))
        elif cell:
            reason = short(cell)
    return Spread(tuple(values), reason)


def why(cell: Mapping[str, Any]) -> str:
    """Why there is no figure."""
    return str(cell.get("failed") or cell.get("absent") or "-")


def short(cell: Mapping[str, Any]) -> str:
    """The same in few words; the JSON has them all."""
    if "failed" in cell:
        return "failed: " + str(cell["failed"]).split(":")[0]
    return "-"


def bold(text: str, strong: bool) -> str:
    """Ours stands out."""
    return f"**{text}**" if strong else text


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    rows = [heads, ["---"] + ["---:"] * (len(heads) - 1), *lines]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows
    )


def sentences(
    found: Mapping[str, Mapping[str, Spread]],
    modes: Sequence[str],
    known: Mapping[str, Contestant],
    scale: float,
    wording: str = "",
    less: bool = False,
) -> str:
    """For each mode: midstream, the best peer and the limit. Where a peer wins, it says so."""
    lines = []
    for mode in modes:
        has = {name: cells[mode].median for name, cells in found.items() if cells[mode].values}
        ours = {name: value for name, value in has.items() if known[name].ours}
        peers = {
            name: value
            for name, value in has.items()
            if not known[name].ours and not known[name].limit
        }
        limits = {name: value for name, value in has.items() if known[name].limit}
        if not ours:
            continue
        choose = min if less else max
        mine = choose(ours, key=lambda name: ours[name])
        said = f"- {mode}: {known[mine].title} {number(ours[mine] / scale)}"
        if peers:
            best = choose(peers, key=lambda name: peers[name])
            ratio = peers[best] / ours[mine] if less else ours[mine] / peers[best]
            said += f"; best peer {known[best].title} {number(peers[best] / scale)}"
            said += (
                f": {ratio:.2f} times the best peer"
                if ratio >= 1
                else f": **{known[best].title} wins**, {1 / ratio:.2f} times"
            )
            own = [name for name in ours if not known[name].threads]
            apart = [name for name in peers if not known[name].threads]
            if own and apart and (known[mine].threads or known[best].threads):
                mine_2, best = (
                    choose(own, key=lambda name: ours[name]),
                    choose(apart, key=lambda name: peers[name]),
                )
                ratio = peers[best] / ours[mine_2] if less else ours[mine_2] / peers[best]
                said += f"; by processes alone {number(ours[mine_2] / scale)} against {known[best].title} "
                said += f"{number(peers[best] / scale)}: {ratio:.2f} times"
        if limits and not less:
            for name, value in limits.items():
                said += (
                    f"; {ours[mine] / value:.2f} of *{known[name].title}* ({number(value / scale)})"
                )
        lines.append(said + ".")
    return "\n".join(lines) + wording


# ---------------------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------------------

OURS, PEER, LIMIT = "#0b6e4f", "#9aa5b1", "#d9dee3"
KEY = "  (green: midstream; grey: peers; pale: limits, no library)"
COLORS = {
    "midstream": OURS,
    "midstream-thread": "#3aa17e",
    "midstream-stream": "#8fd0b5",
    "torch-map": "#e07a1f",
    "sdl-map": "#b5521b",
    "sdl-iterable": "#f2b36d",
    "nodes-thread": "#7a3e9d",
    "nodes-process": "#b48ad0",
    "grain": "#1f5fbf",
    "mosaic": "#c2185b",
    "litdata": "#37474f",
    "webdataset": "#8d6e63",
}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "svg.hashsalt": "midstream",
        }
    )
    return plt


def bars(
    found: Mapping[str, Mapping[str, Spread]],
    modes: Sequence[str],
    known: Mapping[str, Contestant],
    unit: str,
    scale: float,
    title: str,
    path: Path,
    less: bool = False,
) -> None:
    """A panel a mode; a bar a contestant, best first; a whisker from the least round to the most."""
    plt = _pyplot()
    from matplotlib.ticker import MaxNLocator

    modes = [mode for mode in modes if any(cells[mode].values for cells in found.values())]
    most = max(
        (sum(bool(cells[mode].values) for cells in found.values()) for mode in modes), default=1
    )
    columns = min(len(modes), 2)
    lines = -(-len(modes) // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(6.2 * columns, (0.27 * most + 0.75) * lines + 0.45),
        squeeze=False,
        layout="constrained",
    )
    for axis, mode in zip(axes.flat, modes):
        has = [(name, cells[mode]) for name, cells in found.items() if cells[mode].values]
        has.sort(key=lambda pair: pair[1].median, reverse=less)
        widest = max(max(one.values) for _, one in has) / scale
        for place, (name, one) in enumerate(has):
            who = known[name]
            color = OURS if who.ours else LIMIT if who.limit else PEER
            value = one.median / scale
            axis.barh(place, value, color=color, height=0.72)
            if len(one.values) > 1:
                axis.plot(
                    [min(one.values) / scale, max(one.values) / scale],
                    [place, place],
                    color="#333333",
                    linewidth=1,
                )
            end = max(max(one.values) / scale, value)
            axis.text(
                end + widest * 0.012, place, number(value), va="center", fontsize=8, color="#333333"
            )
        axis.set_yticks(range(len(has)), [known[name].title for name, _ in has])
        for label, (name, _) in zip(axis.get_yticklabels(), has):
            if known[name].ours:
                label.set_fontweight("bold")
                label.set_color(OURS)
        axis.set_xlim(0, widest * 1.13)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.set_title(mode, fontsize=10, fontweight="bold", loc="left", pad=8)
        axis.set_xlabel(f"{unit} ({'shorter' if less else 'longer'} is better)", fontsize=8)
        axis.tick_params(axis="y", length=0)
    for axis in list(axes.flat)[len(modes) :]:
        axis.axis("off")
    figure.suptitle(title + KEY, fontsize=11, fontweight="bold")
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def lines(
    series: Sequence[tuple[str, str, Sequence[tuple[float, float]], Sequence[tuple[float, float]]]],
    known: Mapping[str, Contestant],
    xlabel: str,
    ylabel: str,
    title: str,
    path: Path,
    *,
    logs: bool,
) -> None:
    """A panel for each group, a line a contestant; what went on wrongly is crossed."""
    plt = _pyplot()
    panels = list(dict.fromkeys(group for group, *_ in series))
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(5.2 * len(panels) + 2.6, 4.6),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    drawn: dict[str, Any] = {}
    crossed = None
    for axis, panel in zip(axes.flat, panels):
        for group, name, points, wrong in series:
            if group != panel:
                continue
            xs, ys = zip(*sorted(points))
            strong = known[name].ours
            (line,) = axis.plot(
                xs,
                ys,
                marker="o",
                markersize=4.5 if strong else 3.5,
                linewidth=2.4 if strong else 1.3,
                color=COLORS.get(name, "#000000"),
                zorder=3 if strong else 2,
            )
            drawn.setdefault(name, line)
            if wrong:
                (crossed,) = axis.plot(
                    *zip(*wrong),
                    linestyle="",
                    marker="x",
                    markersize=10,
                    markeredgewidth=2,
                    color="#d32f2f",
                    zorder=4,
                )
        if logs:
            axis.set_xscale("log")
            axis.set_yscale("log")
        axis.grid(True, which="major", color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.set_title(panel, fontsize=10, loc="left")
        axis.set_xlabel(xlabel)
    axes.flat[0].set_ylabel(ylabel)
    if not logs:
        from matplotlib.ticker import MaxNLocator

        for axis in axes.flat:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    names = [name for name in known if name in drawn]
    handles, labels = [drawn[name] for name in names], [known[name].title for name in names]
    if crossed is not None:
        handles.append(crossed)
        labels.append("went on with other samples")
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8.5)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
