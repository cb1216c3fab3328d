"""Iterates over a dataset without a loader: one lane."""

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


class LaneOutput:
    """Pulls the deliverable out of a lane: a sample, or a failure to be raised. Quiet failures are
    counted on the way.
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
        """The next sample with its origins, or a `SampleFailure` in the sample's place; raises
        StopIteration at the end.
        """
        while True:
            sample, origins = next(self.iterator)
            if type(sample) is not FailedSample:
                return sample, origins
            failure = sample.errors[0]
            if failure.outcome == "raise":
                return failure, origins
            source = (
                self.bound.names.index(failure.origin.source) if failure.origin is not None else -1
            )
            self.lane.ledger.failed(failure, source)
            if self.skipped is not None:
                self.skipped()  # may raise, while no sample is in hand that could be lost


class SingleLaneIterator:
    """``iter(dataset)``: the samples of one lane, one after the other.

    State: ``{"midstream", "fingerprint", "epoch", "lane": [index, number of lanes], "done",
    "state", "marks", "events"}``: the root's state, and what was dropped or skipped so far.
    """

    def __init__(self, dataset: Node, index: int, num_lanes: int, epoch: int) -> None:
        self.on_end: Callable[[SingleLaneIterator], None] | None = None
        self._dataset = dataset
        self._ledger = Ledger()
        self._lane = Lane(index, num_lanes, 1, self._ledger)
        self._place = bind(dataset)
        self._epoch = epoch
        self._events: dict[str, int] = {}
        self._over: list[TooManyErrors] = []
        self._windows, self._seen = RecentFailures(), [0]
        self._noticed: set[str] = set()
        self._done = False
        self._waiting: State = None
        self._delivery: LaneOutput | None = None

    def __iter__(self) -> SingleLaneIterator:
        return self

    def __del__(self) -> None:
        """Leave the position with the dataset, which may be asked for it after a loop was left."""
        with contextlib.suppress(Exception):
            if self.on_end is not None:
                self.on_end(self)

    def __next__(self) -> Any:
        if self._ledger.notices:
            self._tell()  # of what was met on the way to the sample before: no sample is in hand that could be lost
        if self._over:
            raise self._over[0]
        if self._done:
            raise StopIteration
        self._seen[0] += 1
        try:
            sample = (self._delivery or self._start()).next()[0]
        except StopIteration:
            self._done = True
            self._tell()
            raise
        if type(sample) is SampleFailure:
            raise sample.error()
        return sample

    def _start(self) -> LaneOutput:
        # Not a method of this object: that would be a cycle.
        skipped = functools.partial(
            _check_skipped, self._events, self._ledger, self._over, self._windows, self._seen
        )
        delivery = LaneOutput(
            self._place, self._lane, int(epoch_key(self._epoch)[0]), self._epoch, skipped
        )
        if self._waiting is not None:
            delivery.iterator.load(self._waiting["state"])
            self._ledger.marks = copy_plain(self._waiting["marks"])
            self._waiting = None
        self._delivery = delivery
        return delivery

    def _tell(self) -> None:
        notices, self._ledger.notices = self._ledger.notices, []
        for key, text in notices:
            if key not in self._noticed:
                self._noticed.add(key)
                warnings.warn(text, RuntimeWarning, stacklevel=3)

    def state_dict(self) -> State:
        """The state after the last sample returned; plain values, fresh each time."""
        if self._waiting is not None:
            return copy_plain(self._waiting)
        delivery = self._delivery or self._start()
        return copy_plain(
            {
                "midstream": FORMAT,
                "fingerprint": describe.fingerprint(self._dataset),
                "epoch": self._epoch,
                "lane": [self._lane.index, self._lane.num_lanes],
                "done": self._done,
                "state": delivery.iterator.snapshot(),
                "marks": self._ledger.marks,
                "events": add_counts(self._events, self._ledger.events),
            }
        )

    def load_state_dict(self, state: State) -> None:
        """Continue from ``state`` with the next ``next()``.

        Raises:
            CheckpointError: If another pipeline, or another number of lanes, wrote it.
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
        self._ledger.events, self._over = {}, []
        self._windows.begin(self._events)
        self._seen[0] = 0
        self._delivery = None


def _check_skipped(
    events: Mapping[str, int],
    ledger: Ledger,
    over: list[TooManyErrors],
    windows: RecentFailures,
    seen: list[int],
) -> None:
    """A sample was skipped: is that one too many?"""
    seen[0] += 1
    try:
        check_limits(add_counts(events, ledger.events), ledger.limits, windows, seen[0])
    except TooManyErrors as error:
        over.append(error)
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
    """Refuse what is not a state of this dataset."""
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
