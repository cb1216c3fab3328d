"""FlatMap: replaces every sample by any number of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from midstream.common.plain_state import State
from midstream.common.validation import require_callable
from midstream.errors import ReplayDiverged, SourceError
from midstream.nodes.parts import part_origin, require_depth
from midstream.nodes.user_function import RAISE, Call, ErrorPolicy
from midstream.pipeline.cursor import iterate
from midstream.pipeline.failures import FailedSample, callable_name, describe_callable
from midstream.pipeline.iterator import Iterator, Lane, SafePoint
from midstream.pipeline.node import BoundNode, Node
from midstream.pipeline.patience import Patience
from midstream.pipeline.rows import PARTS, Item, Origins, as_origin_array

_EVERY = 16
"""A state of the input is taken every so many inputs."""


@dataclass(frozen=True, eq=False, repr=False)
class FlatMap(Node):
    """Replaces every sample by the samples that ``fn`` returns, its parts. A stream.

    The origin of a part is the origin of its sample, with the number of the part. Where the sample
    was made of several rows (a batch), a part has the origins of all of them. If there are as many
    parts as rows, part i has the origin of row i: the batch was split into its samples.

    ``fn`` may be a generator function. Its samples are collected before the first is passed on, so
    the parts of one sample must fit in memory. Samples without parts are counted by source. Over an
    endless input, 100,000 of them in a row are an error.

    State: ``{"part", "source"}``: parts delivered of the sample in progress; safe point, as
        ``[inputs taken, inputs since, state of the input]``.
    Resume: reads at most 16 inputs again, and calls the function once for the sample in progress.
    """

    source: Node
    fn: Callable[[Any], Iterable[Any]]
    errors: ErrorPolicy = RAISE
    kind = "flat_map"
    makes_parts = True
    random_access = False
    batch_rows = None

    def __post_init__(self) -> None:
        require_callable(self.fn, "flat_map")
        self.errors.check(("raise", "skip"), "flat_map")
        require_depth(self)

    def spec_fields(self) -> dict[str, State]:
        """The function's name, and ``on_error`` where it is not the default."""
        return {"fn": callable_name(self.fn), **self.errors.spec_fields()}

    def replay_bound(self) -> str:
        """See `Node.replay_bound`."""
        return "at most 16 inputs of a lane"

    def _iterate(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> Iterator:
        return _FlatMapIterator(self, bound, lane, key, pass_)


class _FlatMapIterator(Iterator):
    def __init__(self, node: FlatMap, bound: BoundNode, lane: Lane, key: int, pass_: int) -> None:
        self.bound, self.lane, self.pass_ = bound, lane, pass_
        self.source = SafePoint(iterate(bound.input, lane, key, pass_), bound.path, _EVERY)
        fn = self.fn = node.fn
        self.patience = Patience(node.source.infinite)
        self.call = Call(bound, fn, node.errors, lambda sample, _: _collect(fn, sample))
        self.parts: list[Any] = []
        self.origins: Origins = None
        self.part = 0
        self.before: State = None

    def _next(self) -> Item:
        self.patience.count = 0
        while self.part == len(self.parts):
            self.before = self.source.snapshot()
            self.parts, self.part = [], 0
            sample, self.origins = self.source.next()
            if type(sample) is FailedSample:
                return sample, self.origins
            parts = self.call(sample, self.origins)
            if type(parts) is FailedSample:
                return parts, self.origins
            if not parts:
                for source in as_origin_array(self.origins)[:1, 0].tolist():
                    self.lane.ledger.dropped(
                        "emptied", self.bound.path, source, self.pass_, self.source.number
                    )
                if self.patience.exhausted_by(1):
                    raise SourceError(
                        f"{self.bound.path}: {describe_callable(self.fn)} made nothing of"
                        f" {self.patience.count:,} samples in a row, and the input never ends."
                        " Try it on a few samples"
                    )
            self.parts = parts
        part = self.part
        self.part = part + 1
        return self.parts[part], part_origin(self.origins, part, len(self.parts))

    def _state(self) -> State:
        if 0 < self.part < len(self.parts):
            return {"part": self.part, "source": self.before}
        return {"part": 0, "source": self.source.snapshot()}

    def _load(self, state: State) -> None:
        self.source.load(state["source"])
        self.parts, self.part, self.before = [], 0, state["source"]
        if state["part"]:
            try:
                sample, self.origins = self.source.next()
                parts: Any = (
                    sample if type(sample) is FailedSample else self.call(sample, self.origins)
                )
            except StopIteration:
                parts = []
            parts = [] if isinstance(parts, FailedSample) else parts
            found = len(parts)
            if found <= state["part"]:
                raise ReplayDiverged(
                    f"{self.bound.path}: the row in progress ({self.origins}) had more than"
                    f" {state['part']} parts when the state was saved and has {found} now; has the"
                    " data or the function changed?"
                )
            self.parts, self.part = parts, state["part"]


def _collect(fn: Callable[[Any], Iterable[Any]], sample: Any) -> list[Any]:
    """Return the parts of a sample, as a list."""
    result = fn(sample)
    if isinstance(result, (str, bytes, dict)) or not isinstance(result, Iterable):
        raise TypeError(
            f"the function returns an iterable of samples; found {type(result).__name__}"
        )
    parts = list(result)
    if len(parts) >= PARTS:
        raise ValueError(f"one row became {len(parts):,} samples; the most is {PARTS - 1:,}")
    return parts
