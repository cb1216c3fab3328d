"""Fills rows without cutting documents: mode='fit'."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

from midstream.common.plain_state import State
from midstream.nodes.pack.documents import Packer, require_tokens
from midstream.nodes.pack.rows import Piece, cut_document
from midstream.pipeline.cursor import Cursor
from midstream.pipeline.failures import FailedSample
from midstream.pipeline.iterator import Iterator
from midstream.pipeline.rows import Item


class Fit(Iterator):
    """Documents packed whole, a window at a time, best fit decreasing."""

    def __init__(self, packer: Packer, upstream: Iterator, window: int, min_fill: float) -> None:
        self.packer, self.upstream, self.window = packer, upstream, window
        self.cursor = upstream if type(upstream) is Cursor and packer.bare else None
        self.given = 0  # rows, to make together what is a batch
        self.least = min_fill * packer.seq_len
        self.number, self.made = 0, 0  # inputs before the window, row numbers used before it
        self.start: State = None
        self._clear()

    def _clear(self) -> None:
        """Nothing is held."""
        self.waiting: list[Piece] = []  # pieces of the window before that wait, and
        self.bits = 0  # which of its inputs they are of
        self.back: State = None  # and the input before it
        self.held: dict[int, list[Piece]] = {}  # pieces of this window, by input
        self.taken = 0
        self.rows: list[list[Piece]] | None = None  # once the window is packed
        self.bound = 0
        self.fill: list[int] = []  # tokens of each
        self.ready: list[Item] = []  # those of them that are made, the next one last
        self.tokens: int | None = 0  # all that are held, once counted
        self.next_waiting: list[int] = []  # inputs of this window that wait for the next

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
            if self.bound < len(self.rows):
                row = self._row(self.rows)
                if self.bound == len(self.rows):
                    self._roll()
                return row
            ended = self.taken < self.window
            self._roll()
            if ended:
                raise StopIteration

    def _row(self, rows: list[list[Piece]]) -> Item:
        """The next row of the window."""
        packer, number = self.packer, self.made + 2 + self.bound
        if not self.ready:
            group = rows[self.bound : self.bound + packer.together - self.given % packer.together]
            self.ready = (
                packer.rows(group, self.fill[self.bound :], self.given)[::-1] if packer.bare else []
            )
        bound, self.bound = self.bound, self.bound + 1
        self.given += 1
        if not self.ready:
            return packer.row(rows[bound], number)
        packer.count_padding(number, self.fill[bound])
        return self.ready.pop()

    def _take_column(self, most: int) -> bool:
        """Hold up to so many documents that come as a column; whether there were any."""
        found = None if self.cursor is None else self.packer.ahead(self.cursor, most)
        if found is None:
            return False
        assert self.cursor is not None
        if self.start is None:
            self.start = self.upstream.snapshot()
        packer, taken = self.packer, len(found.lengths)
        here = slice(found.first, found.first + taken)
        sizes, documents = found.lengths.tolist(), packer.with_separator(found.values[here])
        if not packer.options.separator:  # copied, as by `_split`
            whole, ends = np.concatenate(documents), found.lengths.cumsum().tolist()
            documents = [whole[end - size : end] for end, size in zip(ends, sizes)]
        for number, (ids, size, origins) in enumerate(
            zip(documents, sizes, found.origins[here].tolist()), self.taken
        ):
            self.held[number] = cut_document((ids,), size, packer.seq_len, tuple(origins))
            if size > packer.seq_len:
                packer.count_split(origins[0], self.number + number + 1)
        self.cursor.advance(taken)
        self.taken += taken
        self.tokens = None
        return True

    def _take(self) -> Item | None:
        """Hold one more document; a failure is passed on at once."""
        if self.start is None:
            self.start = self.upstream.snapshot()
        sample, origins = next(self.upstream)
        self.taken += 1
        document = sample
        if type(sample) is not FailedSample:
            document = self.packer.document(sample, origins, self.number + self.taken)
        if type(document) is tuple:
            self.held[self.taken - 1], self.tokens = self._split(document), None
            return None
        return None if document is None else (document, origins)

    def _split(self, document: Piece) -> list[Piece]:
        """A document in pieces of at most a row, copied: a view would keep its whole chunk in
        memory.
        """
        columns, _, stop, origins = document
        columns = tuple(column if column.base is None else column.copy() for column in columns)
        return cut_document(columns, stop, self.packer.seq_len, origins)

    def _pack(self) -> None:
        """Make the window's rows; those that are not full enough wait, unless this is the end or
        one has waited.
        """
        numbers = [-1] * len(self.waiting) + [
            number for number, pieces in self.held.items() for _ in pieces
        ]
        pieces = [*self.waiting, *(piece for pieces in self.held.values() for piece in pieces)]
        lengths = [stop - start for _, start, stop, _ in pieces]
        rows = best_fit(lengths, self.packer.seq_len)
        fill = [sum(lengths[member] for member in row) for row in rows]
        self.next_waiting, self.bound = [], 0
        if self.taken == self.window:
            for index, row in enumerate(rows):
                if (
                    fill[index] < self.least and numbers[row[0]] >= 0
                ):  # ascending: what waited comes first
                    self.next_waiting.extend(numbers[member] for member in row)
                    fill[index] = 0
        elif rows and self.packer.options.last == "drop" and min(fill) < self.least:
            dropped = fill.index(min(fill))
            self.packer.drop([pieces[member] for member in rows[dropped]], self.made + 1)
            fill[dropped] = 0
        self.rows = [
            [pieces[member] for member in row] for row, tokens in zip(rows, fill) if tokens
        ]
        self.fill = [tokens for tokens in fill if tokens]

    def _roll(self) -> None:
        """On to the next window."""
        waiting = [self.held[number][-1] for number in sorted(self.next_waiting)]
        bits = sum(1 << number for number in self.next_waiting)
        back, self.number = self.start, self.number + self.taken
        self.made += 1 + len(self.rows or ())
        self._clear()
        self.start = None
        if waiting:
            self.waiting, self.bits, self.back, self.tokens = waiting, bits, back, None

    def _tokens(self) -> int:
        """Tokens held, to tell whether a replay found what was there."""
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
            "source": self.back if self.bits else self.start,
            "waiting": f"{self.bits:x}",
            "number": self.number,
            "taken": self.taken,
            "tokens": self._tokens(),
            "rows": self.bound,
            "row": self.made,
        }

    def _load(self, state: State) -> None:
        self._clear()
        self.upstream.load(state["source"])
        self.made, self.number, bits = state["row"], state["number"], int(state["waiting"], 16)
        self.start = None if bits else state["source"]
        if bits:
            self.number -= self.window
            self._again(self.window)
            waiting = [pieces[-1] for number, pieces in self.held.items() if bits >> number & 1]
            self._clear()
            self.waiting, self.bits, self.back, self.tokens = waiting, bits, state["source"], None
            self.number, self.start = state["number"], self.upstream.snapshot()
        self._again(state["taken"])
        require_tokens(self.packer.path, self._tokens(), state["tokens"])
        if state["rows"]:
            self._pack()
            self.bound = state["rows"]

    def _again(self, count: int) -> None:
        """Take inputs that were taken before."""
        last = self.taken + count
        while self.taken < last:
            if self._take_column(last - self.taken):
                continue
            try:
                self._take()
            except StopIteration:
                return  # the tokens tell


_ROW = (1 << 32) - 1


def best_fit(lengths: list[int], size: int) -> list[list[int]]:
    """Best fit decreasing (Johnson 1973): the longest first, each into the fullest row that has room, else a new one.

    Args:
        lengths: Lengths to be packed, each at most ``size``.
        size: Room in a row.

    Returns:
        The rows, as ascending indices into ``lengths``, in the order of their first.

    >>> best_fit([2, 3, 1, 4, 2], 6)
    [[0, 3], [1, 2, 4]]
    """
    rows: list[list[int]] = []
    room: list[int] = []  # free tokens and row in one integer, ascending
    for index in sorted(
        range(len(lengths)), key=lengths.__getitem__, reverse=True
    ):  # stable: equals stay in order
        length = lengths[index]
        place = bisect_left(room, length << 32)
        if place < len(room):
            found = room.pop(place)
            free, row = found >> 32, found & _ROW
            rows[row].append(index)
        else:
            free, row = size, len(rows)
            rows.append([index])
        if free > length:
            insort(room, (free - length << 32) + row)
    return sorted(map(sorted, rows))
