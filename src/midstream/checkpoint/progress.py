"""Progress of a run per source, in samples delivered."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from html import escape
from typing import Any

from midstream.checkpoint.merge import merge_states
from midstream.checkpoint.read import RunState, parse
from midstream.checkpoint.spec import source_names
from midstream.checkpoint.weights_history import shares_asked
from midstream.common.plain_state import State
from midstream.common.tables import NOTE, table_html, table_lines
from midstream.metrics.totals import Totals
from midstream.metrics.tracked import decode_tracked, merge_totals, merge_tracked

__all__ = ["Progress", "SourceProgress", "progress"]


@dataclass(frozen=True)
class SourceProgress:
    """Progress of one source.

    Attributes:
        name: The source.
        samples: Samples delivered in batches (parts of a row count each; a document that ``pack``
            cut counts once).
        epochs: Passes over the source, as a float; None when its length is not known.
        failures: Samples lost to errors in user code, by exception type.
        filtered: Samples that a filter dropped.
        dropped: Samples of incomplete last batches that were dropped, and rows for which
            ``flat_map`` returned nothing.
        share: Fraction of all samples delivered.
        padded: Samples delivered again so that every rank gets as many batches; no other number
            includes them.
        tokens: Tokens delivered; 0 where the pipeline does not count them (``pack`` does).
        counts: Other counts by name: documents ``split`` and ``truncated``, ``tokens dropped``;
            samples ``excluded``, and ``skipped`` with their ``tokens skipped`` (see
            `DataLoader.exclude` and `DataLoader.skip`).
        asked: The share that the weights of the mixes above it ask for now; None where no weights
            set it.
        token_share: Fraction of all tokens delivered; None where tokens are not counted.
        metrics: Metrics of `Dataset.track` by name: ``count``, ``sum``, ``mean``, ``min``, ``max``,
            of a distribution also ``p05``, ``p50``, ``p95``; or the counts of categories.
    """

    name: str
    samples: int
    epochs: float | None
    failures: dict[str, int]
    filtered: int
    dropped: int
    share: float
    padded: int = 0
    tokens: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    asked: float | None = None
    token_share: float | None = None
    metrics: dict[str, dict[str, int | float]] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Progress:
    """Counts since the first epoch of a run, over all ranks and resumes.

    ``str(progress)`` is a table; `to_dict` has flat names for a logger.

    >>> import midstream as ms
    >>> loader = ms.DataLoader(ms.from_dataset(range(8), name="eight"), batch_size=4)
    >>> _ = next(iter(loader))
    >>> print(loader.progress())
    epoch 0, 1 batches in it, 4 samples in all
      source  samples   share  epochs  filtered  dropped  failures
      eight         4  100.0%   0.500         0        0         0
    """

    epoch: int
    batches: int
    sources: dict[str, SourceProgress] = field(default_factory=dict)
    unattributed: dict[str, int] = field(default_factory=dict)
    """Counts of no single source: rows of a mix that ``drop_last`` dropped, failed batches,
    ``padding tokens``."""
    metrics: dict[str, dict[str, int | float]] = field(default_factory=dict)
    """Metrics of `Dataset.track` over all sources; a mean is that of all samples."""
    kinds: dict[str, str] = field(default_factory=dict)
    """For each metric ``"numbers"``, ``"distribution"`` or ``"count"``."""

    @property
    def samples(self) -> int:
        """Number of samples delivered."""
        return sum(source.samples for source in self.sources.values())

    @property
    def tokens(self) -> int:
        """Number of tokens delivered, without padding."""
        return sum(source.tokens for source in self.sources.values())

    @property
    def packing_waste(self) -> float | None:
        """Fraction of the tokens in packed rows that is padding; None where no rows were packed."""
        padding = self.unattributed.get("padding tokens", 0)
        skipped = sum(source.counts.get("tokens skipped", 0) for source in self.sources.values())
        total = self.tokens + skipped + padding
        return padding / total if total else None

    def to_dict(self) -> dict[str, float]:
        """All numbers under flat names, for an experiment logger."""
        flat: dict[str, float] = {
            "epoch": self.epoch,
            "batches": self.batches,
            "samples": self.samples,
        }
        if self.packing_waste is not None:
            flat["packing_waste"] = self.packing_waste
        for name, source in self.sources.items():
            flat[f"{name}/samples"] = source.samples
            flat[f"{name}/share"] = source.share
            if source.asked is not None:
                flat[f"{name}/asked"] = source.asked
            if source.token_share is not None:
                flat[f"{name}/token_share"] = source.token_share
            if source.epochs is not None:
                flat[f"{name}/epochs"] = source.epochs
            flat[f"{name}/failures"] = sum(source.failures.values())
            flat[f"{name}/filtered"] = source.filtered
            flat[f"{name}/dropped"] = source.dropped
            flat[f"{name}/padded"] = source.padded
            if self.tokens:
                flat[f"{name}/tokens"] = source.tokens
            flat.update({f"{name}/{kind}": count for kind, count in source.counts.items()})
            flat.update(_flat(source.metrics, f"{name}/"))
        flat.update({f"unattributed/{kind}": count for kind, count in self.unattributed.items()})
        return {**flat, **_flat(self.metrics, "all/")}

    def rows(self) -> list[list[str]]:
        """The table as text: a header, then one row per source. Empty columns are omitted."""
        sources = list(self.sources.values())
        token_shares = [
            None if source.token_share is None else f"{source.token_share:.1%}"
            for source in sources
        ]
        failures = [
            ", ".join(f"{n} {kind}" for kind, n in sorted(source.failures.items())) or "0"
            for source in sources
        ]
        others = [
            ", ".join(f"{count:,} {kind}" for kind, count in source.counts.items())
            for source in sources
        ]
        asked = [None if source.asked is None else f"{source.asked:.1%}" for source in sources]
        columns: dict[str, list[str | None]] = {
            "source": [source.name for source in sources],
            "samples": [f"{source.samples:,}" for source in sources],
            "share": [f"{source.share:.1%}" for source in sources],
            **({"token share": token_shares} if self.tokens and len(sources) > 1 else {}),
            **({"asked": asked} if any(asked) else {}),
            "epochs": [
                None if source.epochs is None else f"{source.epochs:.3f}" for source in sources
            ],
            "filtered": [f"{source.filtered:,}" for source in sources],
            "dropped": [f"{source.dropped:,}" for source in sources],
            "failures": list(failures),
            **({"tokens": [f"{source.tokens:,}" for source in sources]} if self.tokens else {}),
            **({"also": list(others)} if any(others) else {}),
        }
        cells = [
            [cell if cell is not None else "–" for cell in column] for column in columns.values()
        ]
        return [list(columns), *map(list, zip(*cells))]

    def metric_rows(self) -> list[list[str]]:
        """Tracked numbers as text: a header, then a row per metric and source; or an empty list."""
        words = ["count", "mean", "min", "p05", "p50", "p95", "max", "sum"]
        wide = any(kind == "distribution" for kind in self.kinds.values())
        words = [word for word in words if wide or not word.startswith("p")]
        rows = [
            [name, source, *(_number(metrics[name].get(word)) for word in words)]
            for name, source, metrics in self._tracked()
            if self.kinds[name] != "count"
        ]
        return [["metric", "source", *words], *rows] if rows else []

    def category_rows(self) -> list[list[str]]:
        """Counted categories as text: a header, then a row per metric and source; or an empty list.

        Each row names the most frequent categories first.
        """
        rows = []
        for name, source, metrics in self._tracked():
            if self.kinds[name] == "count":
                total = sum(metrics[name].values())
                ordered = sorted(metrics[name].items(), key=lambda item: -item[1])
                shown = [
                    f"{category} {number:,} ({number / total:.0%})"
                    for category, number in ordered[:6]
                ]
                more = len(ordered) - len(shown)
                rows.append(
                    [
                        name,
                        source,
                        f"{total:,}",
                        ", ".join(shown) + (f", {more} more" if more else ""),
                    ]
                )
        return [["metric", "source", "count", "categories"], *rows] if rows else []

    def _tracked(self) -> list[tuple[str, str, dict[str, dict[str, int | float]]]]:
        """Name of a metric, name of a source, and all metrics of this source.

        The source is "all" for the totals, which are included where they say more.
        """
        found = []
        for name in self.kinds:
            of_sources = [
                (source.name, source.metrics)
                for source in self.sources.values()
                if name in source.metrics
            ]
            found += [(name, source, metrics) for source, metrics in of_sources]
            if name in self.metrics and not (
                len(of_sources) == 1 and of_sources[0][1][name] == self.metrics[name]
            ):
                found.append((name, "all", self.metrics))
        return found

    def __str__(self) -> str:
        lines = [
            f"epoch {self.epoch}, {self.batches:,} batches in it, {self.samples:,} samples in all"
        ]
        lines += _indented(table_lines(self.rows(), left=1))
        for kind, count in self.unattributed.items():
            part = (
                f" ({self.packing_waste:.1%} of the rows)"
                if kind == "padding tokens" and self.packing_waste
                else ""
            )
            lines.append(f"  of no single source: {count:,} {kind}{part}")
        if table := self.metric_rows():
            lines += ["tracked:", *_indented(table_lines(table, left=2))]
        if table := self.category_rows():
            lines += ["counted:", *_indented(table_lines(table, left=2, last=True))]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return _html(self)


def _flat(metrics: dict[str, dict[str, int | float]], prefix: str) -> dict[str, float]:
    return {
        f"{prefix}{name}/{word}": value
        for name, summary in metrics.items()
        for word, value in summary.items()
    }


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) and abs(value) < 1e15 else f"{value:,.4g}"


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def progress(state: State) -> Progress:
    """The progress of a run, read from a checkpoint.

    Args:
        state: A loader's ``state_dict()``, a merged one, or a list of the states of all ranks.

    Raises:
        CheckpointError: If it is no such state.

    >>> import midstream as ms
    >>> loader = ms.DataLoader(ms.from_dataset(range(8), name="eight"), batch_size=4)
    >>> _ = next(iter(loader))
    >>> ms.progress(loader.state_dict()).sources["eight"].samples
    4
    """
    if isinstance(state, list):
        state = merge_states(state)
    run_state = parse(state)
    names = source_names(run_state.spec)
    totals = {kind: [0] * len(names) for kind in ("samples", "rows", "tokens")}
    events: Counter[str] = Counter()
    for lane in run_state.lanes.values():
        if lane is not None:
            for kind, counts in totals.items():
                for index, count in zip(range(len(names)), lane.get(kind, [])):
                    counts[index] += count
            events.update(lane["events"])
    by_source: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for key, count in sorted(events.items()):
        kind, _, source = key.split("|")
        by_source[int(source)][kind] += count
    tracked, over_all, kinds = _metrics(run_state)
    samples, tokens = totals["samples"], totals["tokens"]
    total, all_tokens = sum(samples), sum(tokens)
    asked = shares_asked(run_state) if len(names) > 1 else {}
    sources: dict[str, SourceProgress] = {}
    for index, (name, length) in enumerate(zip(names, _lengths(run_state.spec))):
        others = dict(by_source[index])
        failures = {
            kind.removeprefix("failed "): others.pop(kind)
            for kind in list(others)
            if kind.startswith("failed ")
        }
        filtered, dropped, emptied, padded = (
            others.pop(kind, 0) for kind in ("filtered", "dropped", "emptied", "padded")
        )
        read = totals["rows"][index] + filtered + dropped + emptied + sum(failures.values())
        read += others.get("excluded", 0)
        sources[name] = SourceProgress(
            name=name,
            samples=samples[index],
            epochs=read / length if length else None,
            failures=failures,
            filtered=filtered,
            dropped=dropped + emptied,
            share=samples[index] / total if total else 0.0,
            padded=padded,
            tokens=tokens[index],
            counts=dict(sorted(others.items())),
            asked=asked.get(name),
            token_share=tokens[index] / all_tokens if all_tokens else None,
            metrics=tracked.get(index, {}),
        )
    unattributed = dict(by_source[-1])
    return Progress(run_state.epoch, run_state.batches, sources, unattributed, over_all, kinds)


_Summaries = dict[str, dict[str, "int | float"]]


def _metrics(run_state: RunState) -> tuple[dict[int, _Summaries], _Summaries, dict[str, str]]:
    """Tracked metrics by index of the source, those over all sources, and the kind of each metric.

    Nodes in different branches may track metrics of the same name. Their totals are joined where
    their kinds agree; otherwise each metric is named after its path and kind.
    """
    lanes = [
        lane["tracked"]
        for lane in run_state.lanes.values()
        if lane is not None and "tracked" in lane
    ]
    tracked = merge_tracked(map(decode_tracked, lanes))
    kinds: dict[str, set[str]] = {}
    for named in tracked.values():
        for name, totals in named.items():
            kinds.setdefault(name, set()).add(totals.kind)
    by_source: dict[int, dict[str, Totals]] = {}
    for (path, source), named in sorted(tracked.items()):
        renamed = {
            name if len(kinds[name]) == 1 else f"{name} ({path}, {totals.kind})": totals
            for name, totals in named.items()
        }
        by_source[source] = merge_totals(by_source.get(source, {}), renamed)
    whole: dict[str, Totals] = {}
    for totals_by_name in by_source.values():
        whole = merge_totals(whole, totals_by_name)
    summaries = {
        source: {name: by_name[name].summary() for name in sorted(by_name)}
        for source, by_name in by_source.items()
    }
    names = sorted(whole)
    return (
        summaries,
        {name: whole[name].summary() for name in names},
        {name: whole[name].kind for name in names},
    )


def _lengths(spec: State) -> list[Any]:
    if "name" in spec:
        return [spec.get("length")]
    return [
        length for _, child in sorted(spec.get("inputs", {}).items()) for length in _lengths(child)
    ]


def _html(progress: Progress) -> str:
    """The tables of a progress as HTML."""
    tables = [
        (progress.rows(), 1, False),
        (progress.metric_rows(), 2, False),
        (progress.category_rows(), 2, True),
    ]
    shown = "".join(table_html(table, left, last) for table, left, last in tables if table)
    caption = (
        f"epoch {progress.epoch}, {progress.batches:,} batches in it, {progress.samples:,} samples"
        " in all"
    )
    if progress.packing_waste is not None:
        caption += f", {progress.packing_waste:.1%} of packed rows is padding"
    return f"<div><div style='{NOTE}'>{escape(caption)}</div>{shown}</div>"
