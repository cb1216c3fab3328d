"""Fills rows by cutting documents: mode='concat'."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from midstream.common.plain_state import State
from midstream.nodes.pack.documents import Packer, require_tokens
from midstream.nodes.pack.rows import Piece
from midstream.pipeline.cursor import Cursor
from midstream.pipeline.failures import FailedSample
from midstream.pipeline.iterator import Iterator, SafePoint
from midstream.pipeline.rows import PARTS, Item

_EVERY = 16


class Concat(Iterator):
    """Documents joined and cut."""

    def __init__(self, packer: Packer, upstream: Iterator) -> None:
        self.packer, self.seq_len = packer, packer.seq_len
        self.source = SafePoint(upstream, packer.path, _EVERY)
        self.made = 0
        self.cursor = upstream if type(upstream) is Cursor and packer.bare else None
        self.ready: _Ready | None = None
        self._clear()

    def _clear(self) -> None:
        self.pieces: list[Piece] = []
        self.filled = 0
        self.rest: Piece | None = None  # what did not fit in of the document taken last
        self.start: State = (
            None  # the input before the row's first document; None while the row is empty
        )
        self.offset, self.taken = 0, 0

    def _next(self) -> Item:
        if self.ready is not None and self.ready.bound == len(self.ready.rows):
            self.ready = (
                None  # not before: its states do not know of documents taken beyond its last row
            )
        if self.ready is None and self.cursor is not None and self.rest is None:
            self._make_ready(self.cursor)
        if self.ready is not None:
            self.made += 1
            self.ready.bound += 1
            return self.ready.row(self.packer)
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
                document = self.packer.document(sample, origins, self.source.number)
            if type(document) is tuple:
                self._add(document)
                continue
            if not self.pieces:
                self.start = None
            if document is not None:
                return document, origins
        return self._emit()

    def _make_ready(self, cursor: Cursor) -> None:
        """Make several rows at once of documents that come as columns; what is left over is held as ever.

        At a document that is empty, or too long and not split, this ends, and they are taken one by
        one.
        """
        source, seq_len, packer = self.source, self.seq_len, self.packer
        began, before = source.number, (source.state_at, source.state)
        if (began % _EVERY and before[0] != began - began % _EVERY) or any(
            type(p[3]) is not tuple for p in self.pieces
        ):
            return
        views: list[Any] = []
        origins: list[Any] = []
        row_of_first, need = (
            0,
            (packer.together - self.made % packer.together) * seq_len - self.filled,
        )
        while need > 0:
            found = packer.ahead(cursor)
            if found is None:
                break
            ends = found.lengths.cumsum()
            taken = min(int(np.searchsorted(ends, need)) + 1, len(ends))
            if not views:
                row_of_first = cursor.number
            here = slice(found.first, found.first + taken)
            views.extend(packer.with_separator(found.values[here]))
            origins.append(found.origins[here])
            cursor.advance(taken)
            need -= int(ends[taken - 1])
            if found.odd and taken == len(ends):
                break
        if not views:
            return
        ready = _Ready(
            packer,
            self.pieces,
            views,
            np.concatenate(origins),
            began,
            row_of_first,
            cursor.block,
            before,
            self.made,
        )
        held = ready.held()
        source.number = began + len(views)
        source.state_at = source.number - source.number % _EVERY
        source.state = ready.upstream(source.state_at)
        if not ready.rows:
            if self.start is None:
                self.start, self.offset, self.taken = ready.snapshot(began), 0, 0
            self.taken += len(views)
        else:
            number, offset = ready.cut(len(ready.rows))
            self.start, self.offset = (ready.snapshot(number), offset) if held else (None, 0)
            self.taken = source.number - number if held else 0
            self.ready = ready
        self.pieces, self.filled = held, sum(stop - start for _, start, stop, _ in held)

    def _add(self, document: Piece) -> None:
        """Take a document into the row, as much of it as there is room for."""
        columns, start, stop, origins = document
        cut = start + self.seq_len - self.filled
        if stop > cut:
            self.rest = columns, cut, stop, origins
            stop = cut
        self.pieces.append((columns, start, stop, origins))
        self.filled += stop - start

    def _emit(self) -> Item:
        pieces, rest = self.pieces, self.rest
        self._clear()
        if rest is not None:
            self.start, self.offset, self.taken = self.source.before(), rest[1], 1
            self._add(rest)
        self.made += 1
        return self.packer.row(pieces, self.made)

    def _tokens(self) -> int:
        """Tokens held, to tell whether a replay found what was there."""
        return self.filled + (0 if self.rest is None else self.rest[2] - self.rest[1])

    def _last(self) -> Item:
        if self.pieces and self.packer.options.last == "pad":
            return self._emit()
        if self.pieces:
            self.made += 1
            self.packer.drop(self.pieces, self.made)
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
                document = self.packer.document(sample, origins, self.source.number)
            if type(document) is tuple:
                columns, _, stop, origins = document
                self._add((columns, self.offset if number == 0 else 0, stop, origins))
        require_tokens(self.packer.path, self._tokens(), state["tokens"])


class _Ready:
    """Rows made together, and the state after each, which is a formula: the input is a cursor.

    Attributes:
        rows: Each with its origins.
        at: How many were delivered.
        split: (row, document) of those that are longer than a row, until they are told.
    """

    def __init__(
        self,
        packer: Packer,
        pieces: list[Piece],
        views: list[Any],
        origins: npt.NDArray[np.int64],
        began: int,
        first: int,
        block: int,
        before: tuple[int, State],
        done: int,
    ) -> None:
        self.seq_len, self.pieces, self.views, self.origins = packer.seq_len, pieces, views, origins
        self.began, self.first, self.block, self.before = began, first, block, before
        sizes = [*(stop - start for _, start, stop, _ in pieces), *map(len, views)]
        self.starts = np.zeros(len(sizes) + 1, dtype=np.int64)
        np.cumsum(sizes, out=self.starts[1:])
        self.bound = 0
        count = int(self.starts[-1]) // self.seq_len
        self.rows: list[Item] = self._make(packer, count, done) if count else []
        # Those that are longer than a row all begin in one of these rows, and are told with it.
        long = np.flatnonzero(np.diff(self.starts[len(pieces) :]) > self.seq_len).tolist()
        self.split = [
            (int(self.starts[len(pieces) + number]) // self.seq_len, number) for number in long
        ]

    def _make(self, packer: Packer, count: int, done: int) -> list[Item]:
        seq_len, starts = self.seq_len, self.starts
        total = count * seq_len
        last = int(np.searchsorted(starts, total))  # documents that begin before the end
        tokens = [*(columns[0][a:b] for columns, a, b, _ in self.pieces), *self.views][:last]
        tokens[-1] = tokens[-1][: total - int(starts[last - 1])]
        begins = np.concatenate((starts[:last], np.arange(0, total, seq_len)))
        begins.sort()
        lengths = np.diff(begins, append=total)
        begins, lengths = begins[lengths > 0], lengths[lengths > 0]
        made = packer.block(tokens, begins, lengths, count, done)
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

    def row(self, packer: Packer) -> Item:
        """The row whose turn it is."""
        while self.split and self.split[0][0] < self.bound:
            number = self.split.pop(0)[1]
            packer.count_split(int(self.origins[number, 0]), self.began + number + 1)
        return self.rows[self.bound - 1]

    def cut(self, rows: int) -> tuple[int, int]:
        """The input in which so many rows end (or which comes next), and how many of its tokens are
        in them.
        """
        tokens = rows * self.seq_len
        document = int(np.searchsorted(self.starts, tokens, side="right")) - 1
        return self.began + document - len(self.pieces), tokens - int(self.starts[document])

    def held(self) -> list[Piece]:
        """What is left after the last row."""
        number, offset = self.cut(len(self.rows)) if self.rows else (self.began, 0)
        first = number - self.began
        left: list[Piece] = [] if self.rows else list(self.pieces)
        for view, origin in zip(self.views[first:], self.origins[first:].tolist()):
            left.append(((view,), 0, len(view), tuple(origin)))
        if offset:
            left[0] = (left[0][0], offset, *left[0][2:])
        return left

    def upstream(self, number: int) -> State:
        """The state of the cursor before an input on the grid of safe points."""
        return (
            self.before[1]
            if number < self.began
            else [self.first + number - self.began, 0, self.block]
        )

    def snapshot(self, number: int) -> list[State]:
        """As `SafePoint.snapshot` before an input."""
        grid = number - number % _EVERY
        return [number, number - grid, self.upstream(grid)]

    def state(self) -> dict[str, State]:
        """The state after the rows delivered so far, but for the number of the row."""
        number, offset = self.cut(self.bound)
        size = int(self.starts[number - self.began + len(self.pieces) + 1]) if offset else 0
        return {
            "source": self.snapshot(number),
            "offset": offset,
            "taken": int(offset > 0),
            "tokens": size - self.bound * self.seq_len if offset else 0,
        }
