"""Messages from a reader to the loader."""

from __future__ import annotations

import pickle
import traceback
from typing import Any, NamedTuple

import numpy as np

from midstream.errors import WorkerError
from midstream.pipeline.failures import SampleFailure
from midstream.pipeline.ledger import LaneReport
from midstream.pipeline.node import BoundNode
from midstream.pipeline.rows import I64
from midstream.transport.bundles import Bundle
from midstream.transport.packing import pack
from midstream.transport.parcel import Parcel

BATCH, ERROR, FATAL, NOTHING = range(4)


class Message(NamedTuple):
    """One thing that a turn made.

    Attributes:
        kind: A batch, a failure to raise, an error that ends the run, or nothing (counts and states
            only).
        payload: The batch, the `SampleFailure`, or the error.
        origins: int64 [m, 5], or None.
        final: Whether the turn's batch number is done with after this.
        state: Streams: the lane's state as canonical JSON, or None when it did not change.
        notes: What the lane's ledger has to tell, or None.
    """

    kind: int
    payload: Any = None
    origins: I64 | None = None
    final: bool = False
    state: str | None = None
    notes: LaneReport | None = None


class Plan(NamedTuple):
    """Where a run continues.

    Attributes:
        start: The first batch not delivered yet, over all ranks (random access).
        turns: Batches this rank makes from there; None: as many as there are.
        told: Errors already raised, by batch number.
        lanes: Streams: the decoded lane states by number.
        ahead: Batches from ``start`` on that are done already (random access).
    """

    start: int
    turns: int | None
    told: dict[int, int]
    lanes: dict[int, Any]
    ahead: frozenset[int] = frozenset()


def source_of(place: BoundNode, failure: SampleFailure) -> int:
    """Index of the source a failed sample came from; -1 for a whole batch."""
    return place.names.index(failure.origin.source) if failure.origin is not None else -1


def fatal_message(error: Exception) -> Message:
    """An error that is no sample's: shipped whole where it can be, else as text."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        data = b""
    return Message(FATAL, (f"{type(error).__name__}: {error}", text, data))


def collate_nothing(made: tuple[int, int, list[Message]] | Bundle) -> Any:
    """The collate function of what a `Runner` makes: nothing is left to do."""
    return made


def pack_message(envelope: tuple[int, int, list[Message]]) -> Parcel:
    """An envelope, packed for the way to the main process.

    Origins go in the header: the main process keeps them for long, and would keep a slot with them.
    """
    number, lane, outs = envelope
    try:
        return pack((number, lane, [_flat(out) for out in outs]))
    except Exception as error:
        what = ", ".join(
            sorted({type(out.payload).__name__ for out in outs if out.kind != NOTHING})
        )
        failure = WorkerError(
            f"batch {number} ({what}) cannot leave its worker process: {type(error).__name__}:"
            f" {error}. Let the pipeline make what pickle can take, or read with"
            " worker_type='thread' or num_workers=0."
        )
        return pack((number, lane, [_flat(fatal_message(failure))]))


def _flat(out: Message) -> tuple[Any, ...]:
    return (out.kind, out.payload, None if out.origins is None else out.origins.tobytes(), *out[3:])


def unpack_message(arrived: Any) -> tuple[int, int, list[Message]]:
    """The envelope that `pack_message` was given."""
    if not isinstance(arrived, Parcel):
        return arrived  # type: ignore[no-any-return]
    number, lane, flat = arrived.open()
    outs = [
        Message(
            kind,
            payload,
            None if origins is None else np.frombuffer(origins, np.int64).reshape(-1, 5),
            *rest,
        )
        for kind, payload, origins, *rest in flat
    ]
    return number, lane, outs
