"""Pictures of a pipeline: shares of a mix, the effect of a shuffle, lengths of samples.

Needs matplotlib: ``pip install 'midstream[plot]'``. Every function draws into the axes it is given,
or into new ones, and returns them. Reading a pipeline for a picture does not change its state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from midstream.checkpoint.progress import Progress, progress
from midstream.common.plain_state import State
from midstream.common.validation import require_int
from midstream.dataset import Dataset, node_of
from midstream.display.preview import peek
from midstream.pipeline.failures import SampleFailure
from midstream.pipeline.node import bind
from midstream.pipeline.rows import as_origin_array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["lengths", "mix", "shuffle"]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#555555")
"""Colours that can be distinguished without colour vision (Okabe and Ito), and two more.

With more sources the colours repeat.
"""

_MAX_LEGEND = 24
"""Largest number of sources that a legend lists."""


def mix(
    data: Progress | Mapping[str, State] | Sequence[Progress | Mapping[str, State]],
    *,
    unit: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws the asked and the real share of every source.

    Draws bars for one state, and lines over the run for several.

    Args:
        data: A `Progress`, a checkpoint's state, or a sequence of either in the order of the run.
        unit: ``"samples"`` or ``"tokens"``; by default tokens, if the pipeline counts them.
        ax: Axes to draw in.

    Returns:
        The axes.

    Raises:
        ValueError: If ``data`` is empty, or tokens are asked for and not counted.

    >>> import midstream as ms
    >>> a, b = ms.from_dataset(range(70)), ms.from_dataset(range(30))
    >>> ds = ms.interleave({"a": a, "b": b}, {"a": 7, "b": 3})
    >>> loader = ms.DataLoader(ds, batch_size=10)
    >>> states = [loader.state_dict() for _ in loader]
    >>> ax = ms.plot.mix(states)
    >>> ax.get_ylabel(), len(ax.lines) >= 2
    ('share of samples', True)
    """
    items = [data] if isinstance(data, (Progress, Mapping)) else list(data)
    history = [item if isinstance(item, Progress) else progress(dict(item)) for item in items]
    if not history:
        raise ValueError(
            "plot.mix draws a progress, a state, or a sequence of them; found an empty sequence"
        )
    if unit is None:
        unit = "tokens" if history[-1].tokens else "samples"
    if unit not in ("samples", "tokens"):
        raise ValueError(f"unit is 'samples' or 'tokens'; found {unit!r}")
    if unit == "tokens" and not history[-1].tokens:
        raise ValueError("this pipeline counts no tokens (pack does); use unit='samples'")
    names = list(history[-1].sources)
    ax = _axes(ax)
    if len(history) == 1:
        _bars(ax, history[0], names, unit)
    else:
        _lines(ax, history, names, unit)
    return ax


def _bars(ax: Axes, progress: Progress, names: list[str], unit: str) -> None:
    heights = np.arange(len(names))
    real = [_share(progress, name, unit) for name in names]
    bars = ax.barh(heights, real, height=0.6, color=[_colour(index) for index in range(len(names))])
    ax.bar_label(bars, [f"{value:.1%}" for value in real], padding=4, fontsize=9)
    asked = [progress.sources[name].asked for name in names]
    for height, value in zip(heights, asked):
        if value is not None:
            ax.plot(
                [value, value],
                [height - 0.4, height + 0.4],
                color="black",
                linewidth=1.5,
                solid_capstyle="butt",
            )
    if any(value is not None for value in asked):
        ax.plot([], [], color="black", linewidth=1.5, label="asked")
        ax.legend(frameon=False, fontsize=9, loc="lower right")
    ax.set_yticks(heights, names)
    ax.invert_yaxis()
    ax.set_xlim(0, max([*real, *(value or 0 for value in asked), 0.01]) * 1.15)
    ax.xaxis.set_major_formatter(_percent())
    ax.set_xlabel(f"share of {unit}")
    ax.set_title(
        f"epoch {progress.epoch}, {getattr(progress, unit):,} {unit} delivered", fontsize=10
    )


def _lines(ax: Axes, history: list[Progress], names: list[str], unit: str) -> None:
    over = [getattr(item, unit) for item in history]
    for index, name in enumerate(names):
        real = [_share(item, name, unit) if getattr(item, unit) else np.nan for item in history]
        ax.plot(over, real, color=_colour(index), linewidth=1.6, label=name)
        asked = [_asked(item, name) for item in history]
        if not all(np.isnan(asked)):
            ax.plot(over, asked, color=_colour(index), linewidth=1, linestyle=(0, (4, 3)))
    ax.plot([], [], color="grey", linewidth=1, linestyle=(0, (4, 3)), label="asked")
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(_percent())
    ax.set_xlabel(f"{unit} delivered")
    ax.xaxis.set_major_formatter(_thousands())
    ax.set_ylabel(f"share of {unit}")
    if len(names) <= _MAX_LEGEND:
        ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))


def shuffle(dataset: Dataset, *, n: int = 2000, epoch: int = 0, ax: Axes | None = None) -> Axes:
    """Draws the row of each sample in its source against its position in the output.

    Without a shuffle the points form a line, with a global shuffle a cloud, with a buffered shuffle
    a band.

    Args:
        dataset: A pipeline; it is read as one lane.
        n: Number of samples to read, from the start.
        epoch: The epoch whose order is drawn.
        ax: Axes to draw in.

    Returns:
        The axes.

    >>> import midstream as ms
    >>> ax = ms.plot.shuffle(ms.from_dataset(range(100), name="hundred").shuffle(seed=1))
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('position out', 'row of the source')
    """
    node = node_of(dataset, "plot.shuffle")
    require_int(n, "n", 1, "plot.shuffle")
    points = []
    for out, (sample, origins) in enumerate(islice(peek(node, epoch), n)):
        if not isinstance(sample, SampleFailure):
            points += [(out, origin[0], origin[2]) for origin in as_origin_array(origins).tolist()]
    ax = _axes(ax)
    found = np.array(points, dtype=np.int64).reshape(-1, 3)
    names = bind(node).names
    for index, name in enumerate(names):
        here = found[found[:, 1] == index]
        if len(here):
            size = float(np.clip(3000 / len(found), 2, 20))
            ax.scatter(
                here[:, 0],
                here[:, 2],
                s=size,
                color=_colour(index),
                linewidths=0,
                alpha=0.8,
                label=name,
            )
    ax.set_xlabel("position out")
    ax.set_ylabel("row of the source")
    ax.xaxis.set_major_formatter(_thousands())
    ax.yaxis.set_major_formatter(_thousands())
    if 1 < len(names) <= _MAX_LEGEND:
        ax.legend(
            frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2
        )
    return ax


def lengths(
    dataset: Dataset,
    key: str | Callable[[Any], int] | None = None,
    *,
    n: int = 2000,
    bins: int = 40,
    ax: Axes | None = None,
) -> Axes:
    """Draws a histogram of the lengths of the first ``n`` samples, per source.

    Args:
        dataset: A pipeline; it is read as one lane.
        key: A column whose ``len`` is taken, or a function from sample to length; None: the
            ``len`` of the sample.
        n: Number of samples to read, from the start.
        bins: Number of bars.
        ax: Axes to draw in.

    Returns:
        The axes.

    Raises:
        TypeError: If a sample has no length.

    >>> import midstream as ms
    >>> ax = ms.plot.lengths(ms.from_dataset([[0] * (i % 7) for i in range(50)], name="lists"))
    >>> ax.get_xlabel()
    'length'
    """
    node = node_of(dataset, "plot.lengths")
    require_int(n, "n", 1, "plot.lengths")
    names = bind(node).names
    found: dict[int, list[int]] = {index: [] for index in range(len(names))}
    for sample, origins in islice(peek(node), n):
        if not isinstance(sample, SampleFailure):
            first = as_origin_array(origins)
            found[int(first[0, 0]) if len(first) else 0].append(_length(sample, key))
    ax = _axes(ax)
    every = np.concatenate([np.array(values, dtype=np.float64) for values in found.values()])
    if len(every):
        low, high = float(every.min()), float(every.max())
        far = low > 0 and high / low > 50
        edges = (
            np.geomspace(low, high + 1, bins + 1) if far else np.linspace(low, high + 1, bins + 1)
        )
        for index, values in found.items():
            if values:
                middle = int(np.median(values))
                label = f"{names[index]} (median {middle:,})"
                ax.hist(values, edges.tolist(), color=_colour(index), alpha=0.55, label=label)
        if far:
            ax.set_xscale("log")
        ax.legend(frameon=False, fontsize=9)
    ax.xaxis.set_major_formatter(_thousands())
    ax.set_xlabel(f"length of {key}" if isinstance(key, str) else "length")
    ax.set_ylabel("samples")
    return ax


def _length(sample: Any, key: str | Callable[[Any], int] | None) -> int:
    try:
        if callable(key):
            return int(key(sample))
        return len(sample if key is None else sample[key])
    except (TypeError, KeyError, IndexError) as error:
        raise TypeError(
            f"plot.lengths cannot find the length of a sample ({type(error).__name__}: {error});"
            f" give the key of a column, or a function: {sample!r:.120}"
        ) from None


def _share(progress: Progress, name: str, unit: str) -> float:
    total = getattr(progress, unit)
    return (
        getattr(progress.sources[name], unit) / total if total and name in progress.sources else 0.0
    )


def _asked(progress: Progress, name: str) -> float:
    asked = progress.sources[name].asked if name in progress.sources else None
    return float("nan") if asked is None else asked


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _axes(ax: Axes | None) -> Axes:
    if ax is None:
        try:
            from matplotlib.pyplot import subplots
        except ImportError as error:
            raise ImportError(
                "midstream.plot draws with matplotlib: pip install 'midstream[plot]'"
            ) from error
        _, ax = subplots(figsize=(7, 3.5), layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)
    return ax


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0)


def _thousands() -> Any:
    from matplotlib.ticker import StrMethodFormatter

    return StrMethodFormatter("{x:,.0f}")
