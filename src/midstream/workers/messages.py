"""Messages from a reader to the loader, and the plan by which a reader continues.

In each turn a reader makes the messages of one batch: ``(batch number, lane, messages)``; the lane
is -1 for random access. A turn without messages keeps the readers in step.
"""

from __future__ import annotations

import enum
import pickle
import traceback
from typing import Any, NamedTuple

import numpy as np

from midstream.errors import WorkerError
from midstream.pipeline.ledger import LaneReport
from midstream.pipeline.rows import I64
from midstream.transport.bundles import Bundle
from midstream.transport.packing import pack
from midstream.transport.parcel import Parcel


class MessageKind(enum.IntEnum):
    """The contents of a message.

    BATCH is a batch; ERROR a failed sample, to be raised; FATAL an error that ends the pass;
    NOTHING only counts and states.
    """

    BATCH = 0
    ERROR = 1
    FATAL = 2
    NOTHING = 3


BATCH, ERROR, FATAL, NOTHING = MessageKind
Turn = tuple[int, int, "list[Message]"]
"""Batch number, lane (-1: random access), and the messages of one turn of a reader."""


class Message(NamedTuple):
    """One thing that a reader made in its turn.

    Attributes:
        kind: A `MessageKind`, as an integer.
        payload: The batch, the `SampleFailure`, or the error.
        origins: Of the batch's samples, int64 of shape [m, 5], or None.
        final: Whether nothing more comes of this batch number.
        state: Streams: the lane's state as canonical JSON, or None when it did not change.
        notes: The lane's report: events, warnings, limits and metrics; None where there is none.
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
        start: The first batch of all ranks that is not delivered yet (random access).
        turns: Batches this rank makes from there; None: as many as there are.
        raised: Errors already raised, by batch number.
        lanes: Streams: the decoded lane states by number.
        done_early: Batches from ``start`` on that are done already (random access).
    """

    start: int
    turns: int | None
    raised: dict[int, int]
    lanes: dict[int, Any]
    done_early: frozenset[int] = frozenset()


def fatal_message(error: Exception) -> Message:
    """An error that is not of one sample: pickled where that is possible, else as text."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        data = b""
    return Message(FATAL, (f"{type(error).__name__}: {error}", text, data))


def collate_nothing(made: Turn | Bundle) -> Any:
    """Identity collate_fn: the `Runner` already yields finished messages."""
    return made


def pack_turn(turn: Turn) -> Parcel:
    """Pack the messages of a turn for the main process.

    Origins are packed as bytes: the main process keeps them for long, and as an array they would
    keep a slot of shared memory occupied.
    """
    number, lane, messages = turn
    try:
        return pack((number, lane, [_flat(message) for message in messages]))
    except Exception as error:
        kinds = {type(each.payload).__name__ for each in messages if each.kind != NOTHING}
        failure = WorkerError(
            f"batch {number} ({', '.join(sorted(kinds))}) cannot leave its worker process:"
            f" {type(error).__name__}: {error}. Let the pipeline make what pickle can take, or"
            " read with worker_type='thread' or num_workers=0."
        )
        return pack((number, lane, [_flat(fatal_message(failure))]))


def _flat(message: Message) -> tuple[Any, ...]:
    origins = None if message.origins is None else message.origins.tobytes()
    return (int(message.kind), message.payload, origins, *message[3:])


def unpack_turn(arrived: Any) -> Turn:
    """The turn that `pack_turn` was given, or ``arrived`` itself where it was not packed."""
    if not isinstance(arrived, Parcel):
        return arrived  # type: ignore[no-any-return]
    number, lane, flat = arrived.open()
    messages = [
        Message(
            kind,
            payload,
            None if origins is None else np.frombuffer(origins, np.int64).reshape(-1, 5),
            *rest,
        )
        for kind, payload, origins, *rest in flat
    ]
    return number, lane, messages
