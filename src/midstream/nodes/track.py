"""Track: measures samples for progress(), and passes them on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from midstream.common.plain_state import MISSING, State
from midstream.metrics.metric import Metric, as_metric
from midstream.nodes.user_function import RAISE, Call
from midstream.pipeline.cursor import iterate
from midstream.pipeline.failures import FailedSample, describe_callable
from midstream.pipeline.iterator import Iterator, Lane, OneToOneIterator
from midstream.pipeline.node import BoundNode, Node
from midstream.pipeline.rows import I64, U64, Item, Origins, Rows

__all__ = ["Track"]


@dataclass(frozen=True, eq=False, repr=False)
class Track(Node):
    """Measures every sample and passes it on unchanged. Random access where the input is.

    State: random access: none of its own. Stream: ``[samples seen, state of the input]``. The
        totals are saved once per rank, not here.
    Resume: reads nothing again. A sample that a later node reads again counts once.
    """

    source: Node
    metrics: tuple[tuple[str, Metric], ...]
    kind = "track"
    one_to_one = True
    tracks = True
    _by_value = ("metrics",)

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ValueError("track takes at least one metric, as in track(length=len)")
        names = {name for name, _ in self.metrics}
        for name in names:
            if "/" in name or len(name) > 64:
                raise ValueError(
                    "track: the name of a metric has at most 64 characters and no '/'; found"
                    f" {name!r:.80}"
                )
        below = list(self.inputs().values())
        while below:
            node = below.pop()
            if isinstance(node, Track) and (
                twice := sorted(names & {name for name, _ in node.metrics})
            ):
                raise ValueError(
                    f"track: {', '.join(map(repr, twice))} is tracked further down already; choose"
                    " another name"
                )
            below.extend(node.inputs().values())

    @staticmethod
    def of(source: Node, metrics: Mapping[str, Any]) -> Track:
        """Return a node that tracks metrics, or plain functions, given by name."""
        return Track(
            source,
            tuple((name, as_metric(metric, name)) for name, metric in sorted(metrics.items())),
        )

    def spec_fields(self) -> dict[str, State]:
        """The kind of each metric, by name."""
        return {"metrics": self.kinds()}

    def kinds(self) -> dict[str, str]:
        """The kind of each metric, by name."""
        return {name: metric.kind for name, metric in self.metrics}

    def _rows(self, bound: BoundNode, positions: I64, keys: U64, passes: I64) -> Rows:
        rows = bound.input.rows(positions, keys, passes)
        stash = bound.stash
        if rows.sizes is None:
            try:
                if rows.columns is None and FailedSample in map(type, rows.samples):
                    raise ValueError("metrics are not taken of failed samples")
                found = [metric.values(rows.samples) for _, metric in self.metrics]
                if stash is not None:
                    which = map(tuple, rows.origins[:, :4].tolist())
                    stash.update(zip(which, zip(rows.origins[:, 0].tolist(), zip(*found))))
                return rows
            except Exception:  # a function or a sample failed: measure one by one, below
                pass
            origins: Iterable[Origins] = map(tuple, rows.origins.tolist())
        else:
            origins = [origin for _, origin in rows.items()]
        measure = _Measure(self, bound)
        samples: list[Any] | None = None
        for index, (sample, origin) in enumerate(zip(rows.samples, origins)):
            values, failed = measure(sample, origin)
            if failed is not None:
                samples = samples or list(rows.samples)
                samples[index] = failed
            elif values is not None and stash is not None:
                first, source = _key_and_source(origin)
                stash[first] = source, values
        return rows if samples is None else Rows(samples, rows.origins, rows.sizes)

    def _iterate(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> Iterator:
        return _TrackIterator(self, bound, lane, key, pass_)


def _key_and_source(origin: Origins) -> tuple[tuple[int, ...], int]:
    """Return the key of a sample in a `Stash`, and its source: -1 for rows of several sources."""
    if type(origin) is tuple:
        return origin[:4], origin[0]
    if not len(origin):
        return (), -1
    source = int(origin[0, 0])
    return tuple(origin[0, :4].tolist()), source if (origin[:, 0] == source).all() else -1


class _Measure:
    """Computes the metrics of one sample."""

    __slots__ = ("bound", "metrics")

    def __init__(self, node: Track, bound: BoundNode) -> None:
        self.bound, self.metrics = bound, node.metrics

    def __call__(
        self, sample: Any, origins: Origins
    ) -> tuple[tuple[Any, ...] | None, FailedSample | None]:
        """Return the value of each metric, or a `FailedSample` where a function raised.

        Both are None for a sample of which a failure left nothing.
        """
        errors: tuple[Any, ...] = ()
        if type(sample) is FailedSample:
            if sample.rest is MISSING:
                return None, None
            errors, sample = sample.errors, sample.rest
        values: list[Any] = []
        try:
            for _, metric in self.metrics:
                values.append(metric.value(sample))  # their number shows which metric failed
            return tuple(values), None
        except Exception as error:
            name, metric = self.metrics[len(values)]
            label = f"{describe_callable(metric.fn)} (metric {name!r})"
            call = Call(
                self.bound,
                metric.fn,
                RAISE,
                lambda sample, _: metric.value(sample),
                label=label,
            )
            failed = call.failed(error, origins, sample)
            return None, FailedSample(errors + failed.errors, failed.rest)


class _TrackIterator(OneToOneIterator):
    def __init__(self, node: Track, bound: BoundNode, lane: Lane, key: int, pass_: int) -> None:
        super().__init__(iterate(bound.input, lane, key, pass_))
        self.ledger, self.path, self.pass_ = lane.ledger, bound.path, pass_
        self.kinds = node.kinds()
        self.measure = _Measure(node, bound)
        self.number = 0

    def _next(self) -> Item:
        sample, origins = next(self.source)
        self.number += 1
        values, failed = self.measure(sample, origins)
        if failed is not None:
            return failed, origins
        if values is not None and self.ledger.first_time(self.path, self.pass_, self.number):
            self.ledger.track(self.path, _key_and_source(origins)[1], self.kinds, [values])
        return sample, origins

    def _state(self) -> State:
        return [self.number, super()._state()]

    def _load(self, state: State) -> None:
        self.number, upstream = state
        super()._load(upstream)
