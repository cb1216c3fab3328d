"""LaneOutput and SingleLaneIterator: the finished samples of one lane; ``iter(dataset)``."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from midstream.common.plain_state import FORMAT, State, copy_plain
from midstream.errors import CheckpointError, TooManyErrors
from midstream.pipeline import describe
from midstream.pipeline.cursor import iterate
from midstream.pipeline.failures import FailedSample, SampleFailure
from midstream.pipeline.iterator import Lane
from midstream.pipeline.ledger import Ledger, RecentFailures, add_counts, check_limits
from midstream.pipeline.node import BoundNode, Node, bind
from midstream.pipeline.passes import epoch_key
from midstream.pipeline.rows import Item


def source_of(bound: BoundNode, failure: SampleFailure) -> int:
    """Index of the source a failed sample came from; -1 for a whole batch."""
    return bound.names.index(failure.origin.source) if failure.origin is not None else -1


class LaneOutput:
    """Returns the finished samples of a lane, and the failures to be raised.

    Skipped and excluded samples are counted in the lane's ledger and not returned.

    Args:
        bound: The root of the pipeline.
        lane: The lane.
        key: Seed key of the epoch.
        pass_: The epoch.
        skipped: Called after each skipped sample. It may raise: no sample is lost then.
    """

    __slots__ = ("bound", "iterator", "lane", "skipped")

    def __init__(
        self,
        bound: BoundNode,
        lane: Lane,
        key: int,
        pass_: int,
        skipped: Callable[[], None] | None = None,
    ) -> None:
        self.bound, self.lane, self.skipped = bound, lane, skipped
        self.iterator = iterate(bound, lane, key, pass_)

    def next(self) -> Item:
        """The next sample, or a `SampleFailure` in its place, with the origins.

        Raises:
            StopIteration: At the end of the lane.
        """
        while True:
            sample, origins = next(self.iterator)
            if type(sample) is not FailedSample:
                return sample, origins
            failure = sample.errors[0]
            if failure.outcome == "raise":
                return failure, origins
            self.lane.ledger.failed(failure, source_of(self.bound, failure))
            if self.skipped is not None:
                self.skipped()


class SingleLaneIterator:
    """``iter(dataset)``: iterates over one lane without a loader.

    State: ``{"midstream", "fingerprint", "epoch", "lane": [index, number of lanes], "done",
        "state", "marks", "events"}``: the state of the pipeline, and counts of the samples dropped
        or skipped so far.
    Resume: reads again what the pipeline's nodes say.
    """

    def __init__(self, dataset: Node, index: int, num_lanes: int, epoch: int) -> None:
        self.on_end: Callable[[SingleLaneIterator], None] | None = None
        self._dataset = dataset
        self._ledger = Ledger()
        self._lane = Lane(index, num_lanes, 1, self._ledger)
        self._bound = bind(dataset)
        self._epoch = epoch
        self._events: dict[str, int] = {}
        self._limit_errors: list[TooManyErrors] = []
        self._recent, self._seen = RecentFailures(), [0]
        self._warned: set[str] = set()
        self._done = False
        self._waiting: State = None
        self._output: LaneOutput | None = None

    def __iter__(self) -> SingleLaneIterator:
        return self

    def __del__(self) -> None:
        """Pass the position to the dataset, which is asked for it after a loop was left early."""
        with contextlib.suppress(Exception):
            if self.on_end is not None:
                self.on_end(self)

    def __next__(self) -> Any:
        if self._ledger.notices:
            self._warn()  # before a sample is read: a warning raised as an error loses none
        if self._limit_errors:
            raise self._limit_errors[0]
        if self._done:
            raise StopIteration
        self._seen[0] += 1
        try:
            sample = (self._output or self._start()).next()[0]
        except StopIteration:
            self._done = True
            self._warn()
            raise
        if type(sample) is SampleFailure:
            raise sample.error()
        return sample

    def _start(self) -> LaneOutput:
        # A bound method of this object would be a reference cycle, which delays `__del__`.
        skipped = functools.partial(
            _check_skipped,
            self._events,
            self._ledger,
            self._limit_errors,
            self._recent,
            self._seen,
        )
        output = LaneOutput(
            self._bound, self._lane, int(epoch_key(self._epoch)[0]), self._epoch, skipped
        )
        if self._waiting is not None:
            output.iterator.load(self._waiting["state"])
            self._ledger.marks = copy_plain(self._waiting["marks"])
            self._waiting = None
        self._output = output
        return output

    def _warn(self) -> None:
        notices, self._ledger.notices = self._ledger.notices, []
        for key, text in notices:
            if key not in self._warned:
                self._warned.add(key)
                warnings.warn(text, RuntimeWarning, stacklevel=3)

    def state_dict(self) -> State:
        """The state after the last sample returned, as fresh plain values."""
        if self._waiting is not None:
            return copy_plain(self._waiting)
        output = self._output or self._start()
        return copy_plain(
            {
                "midstream": FORMAT,
                "fingerprint": describe.fingerprint(self._dataset),
                "epoch": self._epoch,
                "lane": [self._lane.index, self._lane.num_lanes],
                "done": self._done,
                "state": output.iterator.snapshot(),
                "marks": self._ledger.marks,
                "events": add_counts(self._events, self._ledger.events),
            }
        )

    def load_state_dict(self, state: State) -> None:
        """Continue from ``state`` with the next ``next()``.

        Raises:
            CheckpointError: If it was saved by another pipeline, or with another number of lanes.
        """
        check_run_state(self._dataset, state)
        if state["lane"] != [self._lane.index, self._lane.num_lanes]:
            raise CheckpointError(
                f"this state is of worker {state['lane'][0]} of {state['lane'][1]}, and was given"
                f" to worker {self._lane.index} of {self._lane.num_lanes}. Under a bare"
                " StatefulDataLoader a worker is a lane, so resume with"
                f" num_workers={state['lane'][1]}; midstream.DataLoader takes any number."
            )
        self._waiting = copy_plain(state)
        self._epoch, self._done = state["epoch"], state["done"]
        self._events = dict(self._waiting["events"])
        self._ledger.events, self._limit_errors = {}, []
        self._recent.begin(self._events)
        self._seen[0] = 0
        self._output = None


def _check_skipped(
    events: Mapping[str, int],
    ledger: Ledger,
    limit_errors: list[TooManyErrors],
    recent: RecentFailures,
    seen: list[int],
) -> None:
    """Check the limits after a sample was skipped; the error is also added to ``limit_errors``."""
    seen[0] += 1
    try:
        check_limits(add_counts(events, ledger.events), ledger.limits, recent, seen[0])
    except TooManyErrors as error:
        limit_errors.append(error)
        raise


_RUN_KEYS = {
    "midstream": int,
    "fingerprint": str,
    "epoch": int,
    "lane": list,
    "done": bool,
    "marks": dict,
    "events": dict,
}


def check_run_state(dataset: Node, state: State) -> None:
    """Check that ``state`` was saved by `SingleLaneIterator` of the same pipeline.

    Raises:
        CheckpointError: If it was not.
    """
    if (
        not isinstance(state, dict)
        or "state" not in state
        or any(not isinstance(state.get(key), kind) for key, kind in _RUN_KEYS.items())
    ):
        found = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(
            f"not a state of a midstream dataset: expected {sorted([*_RUN_KEYS, 'state'])}, found"
            f" {found}"
        )
    if state["midstream"] != FORMAT:
        raise CheckpointError(
            f"this state has format {state['midstream']}; this midstream reads format {FORMAT}"
        )
    if state["fingerprint"] != describe.fingerprint(dataset):
        raise CheckpointError(
            f"this state was written by another pipeline (fingerprint {state['fingerprint']}, here "
            f"{describe.fingerprint(dataset)}). This pipeline is:\n{describe.tree(dataset)}"
        )
