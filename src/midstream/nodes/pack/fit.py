"""Fills rows with whole documents, a window at a time: mode="fit"."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

from midstream.common.plain_state import State
from midstream.nodes.pack.documents import DocumentReader, require_tokens
from midstream.nodes.pack.rows import Piece, RowBuilder, cut_document
from midstream.pipeline.cursor import Cursor
from midstream.pipeline.failures import FailedSample
from midstream.pipeline.iterator import Iterator
from midstream.pipeline.rows import Item


class Fit(Iterator):
    """Iterates rows of whole documents: fills a window, packs it by `best_fit`, emits its rows.

    Documents of a row that is not full enough wait: they are packed again with the next window.
    """

    def __init__(self, documents: DocumentReader, rows: RowBuilder, upstream: Iterator) -> None:
        self.documents, self.builder, self.upstream = documents, rows, upstream
        self.window = documents.options.fit_window
        self.cursor = upstream if type(upstream) is Cursor and documents.ids_only else None
        self.num_emitted = 0  # rows, so that the rows of one batch are made together
        self.least = documents.options.fit_min_fill * rows.seq_len  # tokens of a row that may leave
        self.number, self.made = 0, 0  # inputs before the window, row numbers used before it
        self.start: State = None
        self._clear()

    def _clear(self) -> None:
        """Starts an empty window."""
        self.waiting: list[Piece] = []  # pieces of the window before that were left for this one
        self.waiting_bits = 0  # bit i: input i of the window before waits
        self.before_waiting: State = None  # the input's state before that window
        self.held: dict[int, list[Piece]] = {}  # pieces of this window, by input
        self.taken = 0  # inputs of this window
        self.rows: list[list[Piece]] | None = None  # None until the window is packed
        self.delivered = 0  # of these rows
        self.fill: list[int] = []  # tokens of each row
        self.ready: list[Item] = []  # rows that are made, in reverse order
        self.tokens: int | None = 0  # all tokens held; None when not counted
        self.next_waiting: list[int] = []  # inputs of this window that wait for the next one

    def _next(self) -> Item:
        while True:
            if self.rows is None:
                while self.taken < self.window:
                    if self._take_column(self.window - self.taken):
                        continue
                    try:
                        item = self._take()
                    except StopIteration:
                        break
                    if item is not None:
                        return item
                self._pack()
            assert self.rows is not None
            if self.delivered < len(self.rows):
                row = self._row(self.rows)
                if self.delivered == len(self.rows):
                    self._roll()
                return row
            ended = self.taken < self.window
            self._roll()
            if ended:
                raise StopIteration

    def _row(self, rows: list[list[Piece]]) -> Item:
        """The next row of the window."""
        builder, index = self.builder, self.delivered
        number = self.made + 2 + index
        if not self.ready and self.documents.ids_only:
            size = builder.group_size - self.num_emitted % builder.group_size
            group = rows[index : index + size]
            self.ready = builder.rows(group, self.fill[index:], self.num_emitted)[::-1]
        self.delivered += 1
        self.num_emitted += 1
        if not self.ready:
            return builder.row(rows[index], number)
        builder.count_padding(number, self.fill[index])
        return self.ready.pop()

    def _take_column(self, most: int) -> bool:
        """Takes up to ``most`` documents that come as a column. Returns whether there were any."""
        found = None if self.cursor is None else self.documents.column(self.cursor, most)
        if found is None:
            return False
        assert self.cursor is not None
        if self.start is None:
            self.start = self.upstream.snapshot()
        reader, taken = self.documents, len(found.lengths)
        here = slice(found.first, found.first + taken)
        sizes, documents = found.lengths.tolist(), reader.with_separator(found.values[here])
        if not reader.options.separator:  # views: copied, for the reason given in `_split`
            whole, ends = np.concatenate(documents), found.lengths.cumsum().tolist()
            documents = [whole[end - size : end] for end, size in zip(ends, sizes)]
        for number, (ids, size, origins) in enumerate(
            zip(documents, sizes, found.origins[here].tolist()), self.taken
        ):
            self.held[number] = cut_document((ids,), size, self.builder.seq_len, tuple(origins))
            if size > self.builder.seq_len:
                reader.count_split(origins[0], self.number + number + 1)
        self.cursor.advance(taken)
        self.taken += taken
        self.tokens = None
        return True

    def _take(self) -> Item | None:
        """Takes one more input. Returns it when it failed: failures are passed on at once."""
        if self.start is None:
            self.start = self.upstream.snapshot()
        sample, origins = next(self.upstream)
        self.taken += 1
        document = sample
        if type(sample) is not FailedSample:
            document = self.documents.document(sample, origins, self.number + self.taken)
        if type(document) is tuple:
            self.held[self.taken - 1], self.tokens = self._split(document), None
            return None
        return None if document is None else (document, origins)

    def _split(self, document: Piece) -> list[Piece]:
        """Cuts a document into pieces of at most a row.

        Views are copied: held for a window, they would keep the whole chunks that they are part of.
        """
        columns, _, stop, origins = document
        columns = tuple(column if column.base is None else column.copy() for column in columns)
        return cut_document(columns, stop, self.builder.seq_len, origins)

    def _pack(self) -> None:
        """Packs the window into rows.

        The documents of a row that is not full enough wait for the next window, unless this is the
        last one or one of them has waited before.
        """
        numbers = [-1] * len(self.waiting) + [
            number for number, pieces in self.held.items() for _ in pieces
        ]
        pieces = [*self.waiting, *(piece for pieces in self.held.values() for piece in pieces)]
        lengths = [stop - start for _, start, stop, _ in pieces]
        rows = best_fit(lengths, self.builder.seq_len)
        fill = [sum(lengths[member] for member in row) for row in rows]
        self.next_waiting, self.delivered = [], 0
        if self.taken == self.window:
            for index, row in enumerate(rows):
                # Rows are ascending, so documents that waited (-1) come first.
                if fill[index] < self.least and numbers[row[0]] >= 0:
                    self.next_waiting.extend(numbers[member] for member in row)
                    fill[index] = 0
        elif rows and self.documents.options.last == "drop" and min(fill) < self.least:
            dropped = fill.index(min(fill))
            self.builder.count_dropped([pieces[member] for member in rows[dropped]], self.made + 1)
            fill[dropped] = 0
        self.rows = [
            [pieces[member] for member in row] for row, tokens in zip(rows, fill) if tokens
        ]
        self.fill = [tokens for tokens in fill if tokens]

    def _roll(self) -> None:
        """Starts the next window, with the documents that wait."""
        waiting = [self.held[number][-1] for number in sorted(self.next_waiting)]
        bits = sum(1 << number for number in self.next_waiting)
        start, self.number = self.start, self.number + self.taken
        self.made += 1 + len(self.rows or ())
        self._clear()
        self.start = None
        if waiting:
            self.waiting, self.waiting_bits = waiting, bits
            self.before_waiting, self.tokens = start, None

    def _tokens(self) -> int:
        """Tokens held; a replay must find as many."""
        if self.tokens is None:
            fresh = (piece for pieces in self.held.values() for piece in pieces)
            self.tokens = sum(
                stop - start for group in (self.waiting, fresh) for _, start, stop, _ in group
            )
        return self.tokens

    def _state(self) -> State:
        if self.start is None:
            self.start = self.upstream.snapshot()
        return {
            "source": self.before_waiting if self.waiting_bits else self.start,
            "waiting": f"{self.waiting_bits:x}",
            "number": self.number,
            "taken": self.taken,
            "tokens": self._tokens(),
            "rows": self.delivered,
            "row": self.made,
        }

    def _load(self, state: State) -> None:
        self._clear()
        self.upstream.load(state["source"])
        self.made, self.number, bits = state["row"], state["number"], int(state["waiting"], 16)
        self.start = None if bits else state["source"]
        if bits:
            self.number -= self.window
            self._read_again(self.window)
            waiting = [pieces[-1] for number, pieces in self.held.items() if bits >> number & 1]
            self._clear()
            self.waiting, self.waiting_bits = waiting, bits
            self.before_waiting, self.tokens = state["source"], None
            self.number, self.start = state["number"], self.upstream.snapshot()
        self._read_again(state["taken"])
        require_tokens(self.documents.path, self._tokens(), state["tokens"])
        if state["rows"]:
            self._pack()
            self.delivered = state["rows"]

    def _read_again(self, count: int) -> None:
        """Takes ``count`` inputs that were taken before the state was saved."""
        last = self.taken + count
        while self.taken < last:
            if self._take_column(last - self.taken):
                continue
            try:
                self._take()
            except StopIteration:
                return  # too few tokens, which `require_tokens` reports


_ROW_BITS = (1 << 32) - 1  # the row number in the integers of `best_fit`


def best_fit(lengths: list[int], size: int) -> list[list[int]]:
    """Packs lengths into rows by best fit decreasing (Johnson 1973).

    The longest come first. Each goes into the fullest row that has room for it, or into a new row.

    Args:
        lengths: Lengths to pack, each at most ``size``.
        size: Length of a row.

    Returns:
        The rows, each as ascending indices into ``lengths``, ordered by their first index.

    >>> best_fit([2, 3, 1, 4, 2], 6)
    [[0, 3], [1, 2, 4]]
    """
    rows: list[list[int]] = []
    room: list[int] = []  # (free tokens << 32) + row, ascending
    # The sort is stable: equal lengths stay in order.
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[index]
        fullest = bisect_left(room, length << 32)
        if fullest < len(room):
            found = room.pop(fullest)
            free, row = found >> 32, found & _ROW_BITS
            rows[row].append(index)
        else:
            free, row = size, len(rows)
            rows.append([index])
        if free > length:
            insort(room, (free - length << 32) + row)
    return sorted(map(sorted, rows))
