"""Filter: keeps the samples for which a predicate is true."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from midstream.common.plain_state import State
from midstream.common.validation import require_callable
from midstream.errors import SourceError
from midstream.nodes.user_function import RAISE, Call, ErrorPolicy
from midstream.pipeline.cursor import iterate
from midstream.pipeline.failures import FailedSample, callable_name, describe_callable
from midstream.pipeline.iterator import Iterator, Lane
from midstream.pipeline.node import BoundNode, Node
from midstream.pipeline.patience import Patience
from midstream.pipeline.rows import Item, as_origin_array

_WARN_AFTER = 1_000


@dataclass(frozen=True, eq=False, repr=False)
class Filter(Node):
    """Keeps the samples for which ``fn(sample)`` is true. A stream.

    Warns once when fewer than 1 % of the first 1,000 samples of a lane pass. Over an endless input,
    100,000 samples in a row that do not pass are an error. Dropped samples are counted by source.

    State: ``[inputs seen, state of the input]``.
    Resume: reads nothing again.
    """

    source: Node
    fn: Callable[[Any], Any]
    errors: ErrorPolicy = RAISE
    kind = "filter"
    random_access = False

    def __post_init__(self) -> None:
        require_callable(self.fn, "filter")
        self.errors.check(("raise", "skip"), "filter")

    def spec_fields(self) -> dict[str, State]:
        """The predicate's name, and ``on_error`` where it is not the default."""
        return {"fn": callable_name(self.fn), **self.errors.spec_fields()}

    def _iterate(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> Iterator:
        return _FilterIterator(self, bound, lane, key, pass_)


class _FilterIterator(Iterator):
    def __init__(self, node: Filter, bound: BoundNode, lane: Lane, key: int, pass_: int) -> None:
        self.node, self.bound, self.lane, self.pass_ = node, bound, lane, pass_
        self.source = iterate(bound.input, lane, key, pass_)
        fn = node.fn
        self.call = Call(bound, fn, node.errors, lambda sample, _: bool(fn(sample)))
        self.patience = Patience(node.source.infinite)
        self.seen = 0
        self.started_at, self.passed = 0, 0  # since this process began to read
        self.warn_after = _WARN_AFTER

    def _next(self) -> Item:
        self.patience.count = 0
        while True:
            sample, origins = next(self.source)
            self.seen += 1
            if type(sample) is FailedSample:
                return sample, origins
            verdict = self.call(sample, origins)
            if type(verdict) is FailedSample:
                return verdict, origins
            if verdict:
                self.passed += 1
                self._warn_if_few_pass()
                return sample, origins
            for source in as_origin_array(origins)[:1, 0].tolist():
                self.lane.ledger.dropped("filtered", self.bound.path, source, self.pass_, self.seen)
            self._warn_if_few_pass()
            if self.patience.exhausted_by(1):
                raise SourceError(
                    f"{self.bound.path}: {self.patience.count:,} samples in a row did not pass"
                    f" {describe_callable(self.node.fn)}, and the input never ends. Check the"
                    " predicate against a few samples, or filter before .repeat() so that a pass"
                    " without samples ends."
                )

    def _warn_if_few_pass(self) -> None:
        """Warn once when almost nothing passes."""
        if self.seen - self.started_at == self.warn_after and self.passed * 100 < self.warn_after:
            self.warn_after = -1
            self.lane.ledger.notice(
                f"filter {self.bound.path}",
                f"{self.bound.path}: only {self.passed} of {self.seen - self.started_at:,} samples"
                f" passed {describe_callable(self.node.fn)}; most of what is read is dropped.",
            )

    def _state(self) -> State:
        return [self.seen, self.source.snapshot()]

    def _load(self, state: State) -> None:
        self.seen, upstream = state
        self.started_at, self.passed = self.seen, 0
        self.source.load(upstream)
