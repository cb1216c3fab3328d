"""Puts pieces of documents into rows of fixed length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from midstream.nodes.pack.options import OUTPUT_COLUMNS, PackOptions
from midstream.pipeline.columns import rows_of_block
from midstream.pipeline.iterator import Lane
from midstream.pipeline.rows import PARTS, Item, Origins, as_origin_array

IGNORED = -100
"""The label that torch's cross entropy ignores."""

_MAX_ROWS, _MAX_TOKENS = 64, 1 << 14  # of rows that are made in one go

Piece = tuple[tuple[npt.NDArray[Any], ...], int, int, Origins]
"""Part of a document: ``(columns, start, stop, origins)``.

``columns`` are those of the whole document, token ids first; the piece is its tokens ``start`` to
``stop``; ``origins`` are those of the whole document.
"""


def first_source(origins: Origins) -> int:
    """The source number of the first row that a document was made of."""
    return int(as_origin_array(origins)[0, 0])


def cut_document(
    columns: tuple[npt.NDArray[Any], ...], size: int, seq_len: int, origins: Origins
) -> list[Piece]:
    """Cuts a document of ``size`` tokens into pieces of at most ``seq_len`` tokens."""
    if size <= seq_len:
        return [(columns, 0, size, origins)]
    return [
        (columns, start, min(start + seq_len, size), origins) for start in range(0, size, seq_len)
    ]


def as_dtype_of(ids: npt.NDArray[Any], tokens: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Casts pad or separator tokens to the dtype of a document's ids, if that dtype holds them.

    Arrays of one dtype are joined faster. Otherwise ``tokens`` are returned as they are.
    """
    return tokens.astype(ids.dtype) if int(tokens.max()) <= np.iinfo(ids.dtype).max else tokens


class RowBuilder:
    """Makes rows of pieces, for both modes of `pack`, and counts padding and dropped rows.

    Rows of documents without further columns can be made several at once, which takes fewer calls
    of numpy: `full_rows` and `rows`. `row` makes a single row of any pieces.

    Attributes:
        seq_len: Tokens in a row.
        group_size: Rows that are made at once. Under `batch` these are the rows of one batch, which
            then needs no copy; otherwise as many as have some thousand tokens.
    """

    def __init__(self, options: PackOptions, path: str, lane: Lane, pass_: int) -> None:
        self._path, self._pass, self._ledger = path, pass_, lane.ledger
        self.seq_len = int(options.seq_len)
        self._names, self._mask, self._pad_id = options.names, options.mask, options.pad_id
        self._positions = np.arange(self.seq_len, dtype=np.int64)
        self._unbatched = lane.block <= 1
        self.group_size = min(
            max(1, _MAX_TOKENS // self.seq_len) if self._unbatched else lane.block, _MAX_ROWS
        )

    def full_rows(
        self,
        tokens: list[npt.NDArray[Any]],
        starts: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        count: int,
        done: int,
    ) -> list[dict[str, npt.NDArray[Any]]]:
        """Makes ``count`` rows at once of documents without further columns.

        Args:
            tokens: Token ids that fill the rows exactly, one array after the other.
            starts: int64, shape [pieces]: where each piece starts, counted from the first row.
            lengths: int64, shape [pieces]: tokens of each piece.
            count: Number of rows.
            done: Rows made before, so that the rows of one batch are made together.

        Returns:
            The rows, without ``seq_lens``.
        """
        if len({each.dtype for each in tokens}) == 1:
            # Cast below: for many short arrays numpy's own cast takes twice as long.
            joined = np.concatenate(tokens)
        else:
            joined = np.empty(count * self.seq_len, dtype=np.int64)
            np.concatenate(tokens, out=joined, casting="unsafe")
        made: list[dict[str, npt.NDArray[Any]]] = []
        first = 0
        while len(made) < count:
            rows = min(self.group_size - (done + len(made)) % self.group_size, count - len(made))
            start, stop = len(made) * self.seq_len, (len(made) + rows) * self.seq_len
            last = int(np.searchsorted(starts, stop))
            ids, id_rows = rows_of_block((rows, self.seq_len), np.int64)
            labels, label_rows = rows_of_block((rows, self.seq_len), np.int64)
            positions, position_rows = rows_of_block((rows, self.seq_len), np.int64)
            ids.reshape(-1)[:] = joined[start:stop]
            labels[:] = ids
            labels.reshape(-1)[starts[first:last] - start] = IGNORED
            counted = [self._positions[:length] for length in lengths[first:last].tolist()]
            np.concatenate(counted, out=positions.reshape(-1))
            if self._unbatched:  # a row that is kept must not keep the whole group in memory
                id_rows, label_rows, position_rows = (
                    [row.copy() for row in column]
                    for column in (id_rows, label_rows, position_rows)
                )
            made += [
                dict(zip(OUTPUT_COLUMNS, arrays))
                for arrays in zip(id_rows, label_rows, position_rows)
            ]
            first = last
        return made

    def rows(self, rows: list[list[Piece]], fills: list[int], done: int) -> list[Item]:
        """Makes several rows of documents without further columns; equal to `row` for each.

        Args:
            rows: The pieces of each row.
            fills: Tokens of each row; the rest is padding.
            done: Rows made before.
        """
        seq_len, pieces = self.seq_len, [piece for row in rows for piece in row]
        padding = as_dtype_of(pieces[0][0][0], np.array([self._pad_id])).repeat(seq_len)
        tokens: list[npt.NDArray[Any]] = []
        for row, fill in zip(rows, fills):
            tokens += [columns[0][start:stop] for columns, start, stop, _ in row]
            if fill < seq_len:
                tokens.append(padding[fill:])
        lengths = np.fromiter(map(len, tokens), dtype=np.int64, count=len(tokens))
        made = self.full_rows(tokens, lengths.cumsum() - lengths, lengths, len(rows), done)
        sizes = np.array([stop - start for _, start, stop, _ in pieces], dtype=np.int32)
        origins = self._origins(pieces)
        one_each = len(origins) == len(pieces)
        items: list[Item] = []
        last = 0
        for row, fill, arrays in zip(rows, fills, made):
            first, last = last, last + len(row)
            arrays["labels"][fill:] = IGNORED
            arrays["seq_lens"] = sizes[first:last].copy()
            items.append((arrays, origins[first:last] if one_each else self._origins(row)))
        return items

    def row(self, pieces: list[Piece], number: int) -> Item:
        """Makes one row of pieces and counts its padding.

        Args:
            pieces: At most ``seq_len`` tokens.
            number: Number of the row in its lane, from 1.
        """
        seq_len, names = self.seq_len, self._names
        lengths = np.array([stop - start for _, start, stop, _ in pieces], dtype=np.int32)
        ends = lengths.cumsum()
        starts, total = ends - lengths, int(ends[-1])
        ids = np.empty(seq_len, dtype=np.int64)
        np.concatenate(
            [columns[0][a:b] for columns, a, b, _ in pieces], out=ids[:total], casting="unsafe"
        )
        labels = ids.copy()
        labels[starts] = IGNORED
        positions = self._positions.copy()
        positions[:total] -= starts.repeat(lengths)
        if total < seq_len:
            ids[total:], labels[total:] = self._pad_id, IGNORED
            positions[total:] -= total
            self.count_padding(number, total)
        row = {"input_ids": ids, "labels": labels, "position_ids": positions, "seq_lens": lengths}
        for index in range(1, len(names)):
            values = np.concatenate([columns[index][a:b] for columns, a, b, _ in pieces])
            if names[index] == self._mask:
                labels[:total][values == 0] = IGNORED
            else:
                column = np.zeros(
                    seq_len, dtype=np.float32 if values.dtype.kind == "f" else np.int64
                )
                column[:total] = values
                row[names[index]] = column
        return row, self._origins(pieces)

    def _origins(self, pieces: list[Piece]) -> npt.NDArray[np.int64]:
        """Origins of pieces: int64, shape [k, 5], the last column their tokens.

        When a document was made of several rows, all its tokens are counted with the first.
        """
        found: list[Any] = []
        for _, start, stop, origins in pieces:
            number = -(-start // self.seq_len)
            if type(origins) is tuple:
                source, pass_, row, part, _ = origins
                found.append((source, pass_, row, part * PARTS + number, stop - start))
            else:
                tokens = stop - start
                for source, pass_, row, part, _ in origins.tolist():
                    found.append((source, pass_, row, part * PARTS + number, tokens))
                    tokens = 0
        return np.array(found, dtype=np.int64)

    def count_dropped(self, pieces: list[Piece], number: int) -> None:
        """Counts the tokens of a row that is dropped at the end, and documents that are lost whole.

        A document is counted as dropped when its first piece is in this row: the row is the last
        one, so no other row holds any of it.
        """
        counts: dict[str, int] = {}
        for _, start, stop, origins in pieces:
            source = first_source(origins)
            for kind, count in (("tokens dropped", stop - start), ("dropped", int(start == 0))):
                if count:
                    key = f"{kind}|{self._path}|{source}"
                    counts[key] = counts.get(key, 0) + count
        self._count(number, counts)

    def count_padding(self, number: int, fill: int) -> None:
        """Counts the padding of row ``number``, of which ``fill`` tokens are no padding."""
        if fill < self.seq_len:
            self._count(number, {f"padding tokens|{self._path}|-1": self.seq_len - fill})

    def _count(self, number: int, counts: Mapping[str, int]) -> None:
        self._ledger.count(f"{self._path} rows", self._pass, number, counts)
