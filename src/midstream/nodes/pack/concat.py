"""Fills rows by joining documents and cutting them at each row's end: mode="concat"."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from midstream.common.plain_state import State
from midstream.nodes.pack.documents import DocumentReader, require_tokens
from midstream.nodes.pack.rows import Piece, RowBuilder
from midstream.pipeline.cursor import Cursor
from midstream.pipeline.failures import FailedSample
from midstream.pipeline.iterator import Iterator, SafePoint
from midstream.pipeline.rows import PARTS, Item

_EVERY = 16  # inputs between two safe points


class Concat(Iterator):
    """Iterates rows of documents that are joined and cut.

    One row is in progress: it takes documents one by one. Where documents come as columns, several
    rows are made at once (`_ReadyRows`), and the row in progress holds the tokens left over.
    """

    def __init__(self, documents: DocumentReader, rows: RowBuilder, upstream: Iterator) -> None:
        self.documents, self.rows, self.seq_len = documents, rows, rows.seq_len
        self.source = SafePoint(upstream, documents.path, _EVERY)
        self.made = 0  # rows
        self.cursor = upstream if type(upstream) is Cursor and documents.ids_only else None
        self.ready: _ReadyRows | None = None
        self._clear()

    def _clear(self) -> None:
        """Starts an empty row."""
        self.pieces: list[Piece] = []
        self.filled = 0  # tokens of the pieces
        self.rest: Piece | None = None  # the part of the last document that did not fit
        # The input's state before the row's first document; None while the row is empty.
        self.start: State = None
        self.offset = 0  # tokens of that document that are in earlier rows
        self.taken = 0  # inputs read since

    def _next(self) -> Item:
        if self.ready is not None and self.ready.delivered == len(self.ready.rows):
            # Not earlier: a state between these rows comes from them, not from the row in progress.
            self.ready = None
        if self.ready is None and self.cursor is not None and self.rest is None:
            self._make_ready(self.cursor)
        if self.ready is not None:
            self.made += 1
            self.ready.delivered += 1
            return self.ready.row(self.documents)
        while self.filled < self.seq_len:
            if self.start is None:
                self.start, self.offset, self.taken = self.source.snapshot(), 0, 0
            try:
                sample, origins = self.source.next()
            except StopIteration:
                return self._last()
            self.taken += 1
            document = sample
            if type(sample) is not FailedSample:
                document = self.documents.document(sample, origins, self.source.number)
            if type(document) is tuple:
                self._add(document)
                continue
            if not self.pieces:
                self.start = None
            if document is not None:
                return document, origins
        return self._emit()

    def _make_ready(self, cursor: Cursor) -> None:
        """Makes several rows at once of documents that come as columns.

        Tokens left over become the row in progress. Stops before a document that is empty, or too
        long and not to be split; `_next` then takes documents one by one.
        """
        source, seq_len = self.source, self.seq_len
        began, before = source.number, (source.state_at, source.state)
        if (began % _EVERY and before[0] != began - began % _EVERY) or any(
            type(p[3]) is not tuple for p in self.pieces
        ):
            return
        views: list[Any] = []
        origins: list[Any] = []
        first_position = 0
        rows_needed = self.rows.group_size - self.made % self.rows.group_size
        need = rows_needed * seq_len - self.filled  # tokens
        while need > 0:
            found = self.documents.column(cursor)
            if found is None:
                break
            ends = found.lengths.cumsum()
            taken = min(int(np.searchsorted(ends, need)) + 1, len(ends))
            if not views:
                first_position = cursor.number
            here = slice(found.first, found.first + taken)
            views.extend(self.documents.with_separator(found.values[here]))
            origins.append(found.origins[here])
            cursor.advance(taken)
            need -= int(ends[taken - 1])
            if found.blocked and taken == len(ends):
                break
        if not views:
            return
        ready = _ReadyRows(
            self.rows,
            self.pieces,
            views,
            np.concatenate(origins),
            began,
            first_position,
            cursor.block,
            before,
            self.made,
        )
        held = ready.left_over()
        source.number = began + len(views)
        source.state_at = source.number - source.number % _EVERY
        source.state = ready.upstream(source.state_at)
        if not ready.rows:
            if self.start is None:
                self.start, self.offset, self.taken = ready.snapshot(began), 0, 0
            self.taken += len(views)
        else:
            number, offset = ready.end_of(len(ready.rows))
            self.start, self.offset = (ready.snapshot(number), offset) if held else (None, 0)
            self.taken = source.number - number if held else 0
            self.ready = ready
        self.pieces, self.filled = held, sum(stop - start for _, start, stop, _ in held)

    def _add(self, document: Piece) -> None:
        """Adds to the row as much of a document as it has room for."""
        columns, start, stop, origins = document
        cut = start + self.seq_len - self.filled
        if stop > cut:
            self.rest = columns, cut, stop, origins
            stop = cut
        self.pieces.append((columns, start, stop, origins))
        self.filled += stop - start

    def _emit(self) -> Item:
        """Makes the row, and starts the next one with the rest of the last document."""
        pieces, rest = self.pieces, self.rest
        self._clear()
        if rest is not None:
            self.start, self.offset, self.taken = self.source.before(), rest[1], 1
            self._add(rest)
        self.made += 1
        return self.rows.row(pieces, self.made)

    def _tokens(self) -> int:
        """Tokens held; a replay must find as many."""
        return self.filled + (0 if self.rest is None else self.rest[2] - self.rest[1])

    def _last(self) -> Item:
        """At the end of the input: pads the row in progress, or drops it and ends."""
        if self.pieces and self.documents.options.last == "pad":
            return self._emit()
        if self.pieces:
            self.made += 1
            self.rows.count_dropped(self.pieces, self.made)
        self._clear()
        raise StopIteration

    def _state(self) -> State:
        if self.ready is not None:
            return {**self.ready.state(), "row": self.made}
        if self.start is None:
            self.start, self.offset, self.taken = self.source.snapshot(), 0, 0
        return {
            "source": self.start,
            "offset": self.offset,
            "taken": self.taken,
            "tokens": self._tokens(),
            "row": self.made,
        }

    def _load(self, state: State) -> None:
        self._clear()
        self.ready = None
        self.source.load(state["source"])
        self.made = state["row"]
        self.start, self.offset, self.taken = state["source"], state["offset"], state["taken"]
        for number in range(self.taken):
            try:
                sample, origins = self.source.next()
            except StopIteration:
                break
            document = sample
            if type(sample) is not FailedSample:
                document = self.documents.document(sample, origins, self.source.number)
            if type(document) is tuple:
                columns, _, stop, origins = document
                self._add((columns, self.offset if number == 0 else 0, stop, origins))
        require_tokens(self.documents.path, self._tokens(), state["tokens"])


class _ReadyRows:
    """Rows that were made at once, and the state after each of them.

    The input is a cursor, whose states are positions, so every state is computed, not stored.

    Args:
        builder: Makes the rows.
        pieces: Pieces of the row in progress; they come first.
        views: Token ids of the documents after them, separators included.
        origins: int64, shape [len(views), 5].
        began: Inputs read before the first of ``views``.
        first_position: The cursor's position of the first of ``views``.
        block: The block in the cursor's states.
        before: ``(number of inputs, state)`` of the safe point before the first of ``views``.
        done: Rows made before.

    Attributes:
        rows: Each with its origins.
        delivered: How many of them were delivered.
        split: ``(row, document)`` for each document longer than a row that is not counted yet.
    """

    def __init__(
        self,
        builder: RowBuilder,
        pieces: list[Piece],
        views: list[Any],
        origins: npt.NDArray[np.int64],
        began: int,
        first_position: int,
        block: int,
        before: tuple[int, State],
        done: int,
    ) -> None:
        self.seq_len, self.pieces, self.views = builder.seq_len, pieces, views
        self.origins, self.began, self.first_position = origins, began, first_position
        self.block, self.before = block, before
        sizes = [*(stop - start for _, start, stop, _ in pieces), *map(len, views)]
        self.starts = np.zeros(len(sizes) + 1, dtype=np.int64)
        np.cumsum(sizes, out=self.starts[1:])
        self.delivered = 0
        count = int(self.starts[-1]) // self.seq_len
        self.rows: list[Item] = self._make(builder, count, done) if count else []
        # Every document longer than a row begins in one of these rows, and is counted with it.
        long = np.flatnonzero(np.diff(self.starts[len(pieces) :]) > self.seq_len).tolist()
        self.split = [
            (int(self.starts[len(pieces) + number]) // self.seq_len, number) for number in long
        ]

    def _make(self, builder: RowBuilder, count: int, done: int) -> list[Item]:
        """Makes ``count`` rows of the first documents."""
        seq_len, starts = self.seq_len, self.starts
        total = count * seq_len
        last = int(np.searchsorted(starts, total))  # documents that begin before the end
        tokens = [*(columns[0][a:b] for columns, a, b, _ in self.pieces), *self.views][:last]
        tokens[-1] = tokens[-1][: total - int(starts[last - 1])]
        begins = np.concatenate((starts[:last], np.arange(0, total, seq_len)))
        begins.sort()
        lengths = np.diff(begins, append=total)
        begins, lengths = begins[lengths > 0], lengths[lengths > 0]
        made = builder.full_rows(tokens, begins, lengths, count, done)
        document = np.searchsorted(starts, begins, side="right") - 1
        held = [(*origin[:3], origin[3] * PARTS, start) for _, start, _, origin in self.pieces]
        of_views = self.origins * np.array([1, 1, 1, PARTS, 0])
        origins = np.concatenate([np.array(held, dtype=np.int64).reshape(-1, 5), of_views])[
            document
        ]
        inside = begins - starts[document] + origins[:, 4]
        origins[:, 3] += -(-inside // seq_len)
        origins[:, 4] = lengths
        ends = np.searchsorted(begins, np.arange(seq_len, total + 1, seq_len)).tolist()
        lengths = lengths.astype(np.int32)
        rows: list[Item] = []
        for row, a, b in zip(made, [0, *ends], ends):
            row["seq_lens"] = lengths[a:b].copy()
            rows.append((row, origins[a:b]))
        return rows

    def row(self, documents: DocumentReader) -> Item:
        """The row delivered last; counts the split documents that begin in it."""
        while self.split and self.split[0][0] < self.delivered:
            number = self.split.pop(0)[1]
            documents.count_split(int(self.origins[number, 0]), self.began + number + 1)
        return self.rows[self.delivered - 1]

    def end_of(self, rows: int) -> tuple[int, int]:
        """Where the first ``rows`` rows end.

        Returns:
            The number of the input that they cut (or that comes next), and how many of its tokens
            are in them.
        """
        tokens = rows * self.seq_len
        document = int(np.searchsorted(self.starts, tokens, side="right")) - 1
        return self.began + document - len(self.pieces), tokens - int(self.starts[document])

    def left_over(self) -> list[Piece]:
        """The pieces after the last row."""
        number, offset = self.end_of(len(self.rows)) if self.rows else (self.began, 0)
        first = number - self.began
        left: list[Piece] = [] if self.rows else list(self.pieces)
        for view, origin in zip(self.views[first:], self.origins[first:].tolist()):
            left.append(((view,), 0, len(view), tuple(origin)))
        if offset:
            left[0] = (left[0][0], offset, *left[0][2:])
        return left

    def upstream(self, number: int) -> State:
        """The cursor's state before input ``number``, a multiple of `_EVERY`."""
        return (
            self.before[1]
            if number < self.began
            else [self.first_position + number - self.began, 0, self.block]
        )

    def snapshot(self, number: int) -> list[State]:
        """Equals `SafePoint.snapshot` before input ``number``."""
        grid = number - number % _EVERY
        return [number, number - grid, self.upstream(grid)]

    def state(self) -> dict[str, State]:
        """The state of `Concat` after the rows delivered so far, without ``"row"``."""
        number, offset = self.end_of(self.delivered)
        size = int(self.starts[number - self.began + len(self.pieces) + 1]) if offset else 0
        return {
            "source": self.snapshot(number),
            "offset": offset,
            "taken": int(offset > 0),
            "tokens": size - self.delivered * self.seq_len if offset else 0,
        }
