"""Pack: tokenized documents into rows of one length, with what attention and the loss need to keep them apart.

Two nodes' worth of code, for the two modes share all but how documents are held: `_Packer` makes documents of samples and rows
of pieces, `_Concat` and `_Fit` are the iterators.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from midstream.common.plain_state import State
from midstream.common.validation import require_choice, require_int
from midstream.errors import ReplayDiverged, SourceError
from midstream.nodes.flat_map import require_depth
from midstream.pipeline.columns import rows_of_block
from midstream.pipeline.cursor import Cursor, iterate
from midstream.pipeline.failures import Failure, Hole
from midstream.pipeline.iterator import Iterator, Lane, SafePoint
from midstream.pipeline.node import Node, Place, require_dataset
from midstream.pipeline.rows import PARTS, Item, Origins, as_origin_array

IGNORED = -100
_EVERY = 16
_MOST, _TOKENS = 64, 1 << 14
_GIVE_UP = 100_000
_WINDOW, _MAX_WINDOW = 256, 1024
_MIN_FILL = 0.95
_MADE = ("input_ids", "labels", "position_ids", "seq_lens")

_Piece = tuple[tuple[npt.NDArray[Any], ...], int, int, Origins]
"""Part of a document: its columns (token ids first), the tokens from where to where, and the document's origins."""


@dataclass(frozen=True, eq=False, repr=False)
class Pack(Node):
    """Documents packed into rows of ``seq_len`` tokens. A stream: how many rows there will be is known by reading.

    A row is a dict of numpy arrays; integers come out as int64, other numbers as float32:

        input_ids      [seq_len]  the documents, then ``pad_id``
        labels         [seq_len]  the same ids, not shifted (the model shifts them); -100 where the mask is 0, on padding,
                                  and on each piece's first token, which would be predicted from another document
        position_ids   [seq_len]  from 0 for each piece, and for the padding, as attention over ``seq_lens`` sees them
        seq_lens       [pieces]   int32: tokens of each piece; they sum to the tokens that are no padding
        ...            [seq_len]  every further column, 0 on padding

    `collate` fills the ``seq_lens`` of a batch up with zeros; `midstream.document_mask` makes attention masks of them. A piece
    is a whole document, or as much of it as is in this row: the rest of a document that was cut neither sees what came
    before nor goes on counting positions.

    ``mode="concat"``, seq_len 4, documents a (3 tokens), b (3), c (5):

        a a a b | b b c c | c c c .        saved after the first row: safe point before b, offset 1

    ``mode="fit"`` takes a window of documents, longest first, each into the fullest row that can hold it:

        c c c c | a a a c | b b b .        c is longer than a row, so it was split (``overflow``); a and b are not cut

    Rows leave in the order of their first documents. Rows filled less than ``min_fill`` wait for the next window, where
    their documents are packed anew with others; no document waits twice.

    Per lane, the partial row at the end is padded or dropped (``last``); in ``"fit"`` that is the emptiest row of the last
    window, when it is filled less than ``min_fill``. Counted in `Progress`: tokens delivered per source, ``padding tokens``,
    documents ``split`` or ``truncated`` for being longer than a row, ``tokens dropped``, documents dropped (empty ones too).

    A document of unusable columns, or too long with ``overflow="error"``, is one lost sample.

    State: concat: ``{"source", "offset", "taken", "tokens", "row"}``: the input before the first document of the row in
        progress, tokens of it in earlier rows, inputs taken since, tokens held of them, rows made.
        fit: ``{"source", "waiting", "number", "taken", "tokens", "rows", "row"}``: the input before the window (or, where
        documents wait, before the one they are of, with one bit for each of its inputs), inputs before and in it, tokens
        held, rows of it delivered, row numbers used before it.
    Resume: concat reads at most 16 + 1 inputs again, and when saved after a failure those of the row in progress. fit reads at
        most two windows again. When tokens are not as many as they were: `ReplayDiverged`.
    """

    source: Node
    seq_len: int
    mode: str = "concat"
    overflow: str = "split"
    key: str = "input_ids"
    columns: tuple[str, ...] = ()
    mask: str | None = None
    separator: tuple[int, ...] = ()
    pad_id: int = 0
    last: str = "pad"
    window: int | None = None
    min_fill: float | None = None
    kind = "pack"

    def __post_init__(self) -> None:
        require_dataset(self.source, "pack")
        require_int(self.seq_len, "seq_len", 1, "pack")
        require_choice(self.mode, "mode", ("concat", "fit"), "pack")
        require_choice(self.overflow, "overflow", ("split", "truncate", "drop", "error"), "pack")
        require_choice(self.last, "last", ("pad", "drop"), "pack")
        for token in self.separator:
            require_int(token, "separator", 0, "pack")
        require_int(self.pad_id, "pad_id", 0, "pack")
        if len(self.separator) >= self.seq_len:
            raise ValueError(f"pack: a separator of {len(self.separator)} tokens leaves no room in {self.seq_len}")
        names = [self.key, *self.columns, *([] if self.mask is None else [self.mask])]
        if len(set(names)) < len(names) or any(not isinstance(name, str) for name in names):
            raise ValueError(f"pack: key, columns and mask are different names; found {names}")
        for name in self.columns:
            if name in _MADE:
                raise ValueError(
                    f"pack: {name!r} is a column that pack makes. Rename yours with .map before it; to leave tokens out of "
                    f"the labels, give mask= a column that is 0 there"
                )
        if self.window is not None:
            require_int(self.window, "window", 1, "pack")
            if self.window > _MAX_WINDOW:
                raise ValueError(
                    f"pack: window is at most {_MAX_WINDOW:,} documents, which a resume reads again; found {self.window}"
                )
        if self.min_fill is not None and not 0 <= self.min_fill <= 1:
            raise ValueError(f"pack: min_fill is a fraction of seq_len, 0 to 1; found {self.min_fill}")
        if self.mode == "concat" and (self.window is not None or self.min_fill is not None):
            raise ValueError('pack: window and min_fill are for mode="fit"; "concat" fills every row')
        require_depth(self)

    @property
    def random_access(self) -> bool:
        """Never."""
        return False

    @property
    def batch_rows(self) -> int | None:
        """What comes out are rows, not batches."""
        return None

    def spec_fields(self) -> dict[str, State]:
        """Row length and mode, and every option that is not the default."""
        fields: dict[str, State] = {"seq_len": int(self.seq_len), "mode": self.mode}
        if self.mode == "fit":
            fields["window"], fields["min_fill"] = _fit_options(self)
        for name, default in _DEFAULTS.items():
            if (value := getattr(self, name)) != default:
                fields[name] = list(map(_plain, value)) if isinstance(value, tuple) else _plain(value)
        return fields

    def reads_again(self) -> str:
        """See `Dataset.reads_again`."""
        if self.mode == "concat":
            return "at most 17 inputs of a lane"
        return f"at most two windows of {_fit_options(self)[0]:,} inputs of a lane"

    def _iterate(self, at: Place, lane: Lane, key: int, pass_: int) -> Iterator:
        packer = _Packer(self, at, lane, pass_)
        upstream = iterate(at.input, lane, key, pass_)
        return _Concat(packer, upstream) if self.mode == "concat" else _Fit(packer, upstream, *_fit_options(self))


_DEFAULTS: dict[str, Any] = {
    "overflow": "split",
    "key": "input_ids",
    "columns": (),
    "mask": None,
    "separator": (),
    "pad_id": 0,
    "last": "pad",
}


def _plain(value: Any) -> State:
    return int(value) if isinstance(value, np.integer) else value


def _fit_options(node: Pack) -> tuple[int, float]:
    """Window and min_fill, defaults filled in."""
    window = _WINDOW if node.window is None else int(node.window)
    return window, _MIN_FILL if node.min_fill is None else float(node.min_fill)


class _Ahead(NamedTuple):
    """Documents that a cursor has ahead as a column.

    Attributes:
        values: Those that were read together.
        lengths: int64, of the usable ones ahead, with their separators.
        origins: int64, shape [k, 5], of all values.
        first: The number of the first one ahead.
        odd: Whether what follows the usable ones has to be taken by itself.
    """

    values: list[Any]
    lengths: npt.NDArray[np.int64]
    origins: npt.NDArray[np.int64]
    first: int
    odd: bool


class _Packer:
    """What both modes do: documents of samples, rows of pieces, and the counting."""

    def __init__(self, node: Pack, at: Place, lane: Lane, pass_: int) -> None:
        self.node, self.path, self.at, self.pass_, self.ledger = node, at.path, at, pass_, lane.ledger
        self.seq_len = int(node.seq_len)
        self.names = [node.key, *node.columns, *([] if node.mask is None else [node.mask])]
        self.separator = np.array(node.separator, dtype=np.int64)
        self.bare, self.room = len(self.names) == 1, self.seq_len - len(node.separator)
        self.places = np.arange(self.seq_len, dtype=np.int64)
        self.splits = node.overflow == "split"
        # Rows that are made together are a batch, which then needs no copy; of single ones, some thousand tokens.
        self.alone = lane.block <= 1
        self.together = min(max(1, _TOKENS // self.seq_len) if self.alone else lane.block, _MOST)
        self.endless = node.source.infinite
        self.fruitless = 0

    def document(self, sample: Any, origins: Origins, number: int) -> _Piece | Hole | None:
        """The document of input ``number``; None when nothing is left of it."""
        node, seq_len = self.node, self.seq_len
        if self.bare and type(sample) is dict:  # the hot path: a view, as a source gives it
            ids = sample.get(node.key)
            if type(ids) is np.ndarray and ids.ndim == 1 and ids.dtype.kind in "iu" and 0 < len(ids) <= self.room:
                self.fruitless = 0
                if node.separator:
                    ids = np.concatenate((ids, self.separator))
                return (ids,), 0, len(ids), origins
        try:
            columns = self._columns(sample)
            size = len(columns[0])
            if size and node.separator:
                tails = [self.separator, *(np.repeat(column[-1:], len(self.separator)) for column in columns[1:])]
                columns = tuple(map(np.concatenate, zip(columns, tails)))
                size = len(columns[0])
            if size > seq_len and node.overflow == "error":
                raise ValueError(
                    f"the document has {size:,} tokens{' with its separator' if node.separator else ''}, and a row has "
                    f'{seq_len:,}; overflow="split", "truncate" or "drop" says what to do with such documents'
                )
        except Exception as error:
            origin = self.at.origin(as_origin_array(origins)[0].tolist())
            return Hole((Failure(self.path, origin, f"pack({node.key!r})", error),))
        if 0 < size <= seq_len:
            self.fruitless = 0
            return columns, 0, size, origins
        return self._odd(columns, size, origins, number)

    def ahead(self, cursor: Cursor, most: int | None = None) -> _Ahead | None:
        """Documents that come as a column, up to the first that is empty, or too long and not split."""
        found = cursor.ahead_by_column()
        if found is None or self.node.key not in found[0].names:
            return None
        columns, origins, first = found
        column = columns.columns[columns.names.index(self.node.key)]
        if column.dtype is None or column.dtype.kind not in "iu":
            return None
        stop = columns.length if most is None else min(columns.length, first + most)
        lengths = column.lengths[first:stop]
        odd = lengths == 0 if self.splits else (lengths == 0) | (lengths > self.room)
        usable = int(odd.argmax()) if odd.any() else len(lengths)
        if not usable:
            return None
        self.fruitless = 0
        return _Ahead(column.values, lengths[:usable] + len(self.separator), origins, first, usable < len(lengths))

    def with_separator(self, documents: list[Any]) -> list[Any]:
        """The same, each with the separator at its end."""
        if not len(self.separator):
            return documents
        tail = self._like(self.separator, documents[0])
        return [np.concatenate((ids, tail)) for ids in documents]

    def count_split(self, source: int, number: int) -> None:
        """Tell that input ``number`` was longer than a row."""
        self.ledger.count(self.path, self.pass_, number, {f"split|{self.path}|{source}": 1})

    def _odd(self, columns: tuple[npt.NDArray[Any], ...], size: int, origins: Origins, number: int) -> _Piece | None:
        """Empty and over-long documents."""
        overflow, seq_len = self.node.overflow, self.seq_len
        counts = {"emptied": 1}
        kept = 0
        if size and overflow == "split":
            counts, kept = {"split": 1}, size
        elif size and overflow == "truncate":
            counts, kept = {"truncated": 1, "tokens dropped": size - seq_len}, seq_len
        elif size:
            counts = {"dropped": 1, "tokens dropped": size}
        source = _source(origins)
        named = {f"{kind}|{self.path}|{source}": count for kind, count in counts.items()}
        self.ledger.count(self.path, self.pass_, number, named)
        self.fruitless = 0 if kept else self.fruitless + 1
        if self.fruitless >= _GIVE_UP and self.endless:
            raise SourceError(
                f"{self.path}: {self.fruitless:,} documents in a row were empty, or dropped for having more than {seq_len:,} "
                f"tokens, and the input never ends. Try it on a few samples"
            )
        return (columns, 0, kept, origins) if kept else None

    def _columns(self, sample: Any) -> tuple[npt.NDArray[Any], ...]:
        """Token ids and further columns of a sample, of one length."""
        if type(sample) is not dict and not isinstance(sample, Mapping):
            if len(self.names) > 1:
                raise TypeError(f"columns {self.names} are of a dict; found a sample that is {type(sample).__name__}")
            return (_array(sample, "the sample", "iu"),)
        try:
            ids = _array(sample[self.names[0]], self.names[0], "iu")
            if len(self.names) == 1:
                return (ids,)
            columns = (ids, *(_array(sample[name], name, "iubf") for name in self.names[1:]))
        except KeyError as error:
            raise KeyError(
                f"the sample has no {error}; it has {sorted(map(str, sample))}. Give pack key=, columns= and mask= as they "
                f"are named there; text is tokenized with .map before"
            ) from None
        if len({len(column) for column in columns}) > 1:
            lengths = ", ".join(f"{name!r} {len(column)}" for name, column in zip(self.names, columns))
            raise ValueError(f"columns of one document have one value per token each; found the lengths {lengths}")
        return columns

    def block(
        self,
        tokens: list[npt.NDArray[Any]],
        begins: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        count: int,
        done: int,
    ) -> list[dict[str, npt.NDArray[Any]]]:
        """Rows that are filled by ``tokens`` one after the other; ``begins`` and ``lengths`` are of what lies in them.

        ``done`` rows were made before, so that those of one batch are made together.
        """
        if len({each.dtype for each in tokens}) == 1:
            joined = np.concatenate(tokens)  # cast below: numpy's own cast takes twice as long for many short arrays
        else:
            joined = np.empty(count * self.seq_len, dtype=np.int64)
            np.concatenate(tokens, out=joined, casting="unsafe")
        made: list[dict[str, npt.NDArray[Any]]] = []
        at = 0
        while len(made) < count:
            rows = min(self.together - (done + len(made)) % self.together, count - len(made))
            start, stop = len(made) * self.seq_len, (len(made) + rows) * self.seq_len
            last = int(np.searchsorted(begins, stop))
            ids, id_rows = rows_of_block((rows, self.seq_len), np.int64)
            labels, label_rows = rows_of_block((rows, self.seq_len), np.int64)
            positions, position_rows = rows_of_block((rows, self.seq_len), np.int64)
            ids.reshape(-1)[:] = joined[start:stop]
            labels[:] = ids
            labels.reshape(-1)[begins[at:last] - start] = IGNORED
            places = [self.places[:length] for length in lengths[at:last].tolist()]
            np.concatenate(places, out=positions.reshape(-1))
            if self.alone:  # whoever keeps one of them shall not keep all
                id_rows, label_rows, position_rows = (
                    [row.copy() for row in of] for of in (id_rows, label_rows, position_rows)
                )
            made += [dict(zip(_MADE, of)) for of in zip(id_rows, label_rows, position_rows)]
            at = last
        return made

    def rows(self, rows: list[list[_Piece]], fills: list[int], done: int) -> list[Item]:
        """Several rows of bare documents at once, as `row` makes each, with fewer of numpy's calls."""
        seq_len, pieces = self.seq_len, [piece for row in rows for piece in row]
        padding = self._like(np.array([self.node.pad_id]), pieces[0][0][0]).repeat(seq_len)
        tokens: list[npt.NDArray[Any]] = []
        for row, fill in zip(rows, fills):
            tokens += [columns[0][start:stop] for columns, start, stop, _ in row]
            if fill < seq_len:
                tokens.append(padding[fill:])
        lengths = np.fromiter(map(len, tokens), dtype=np.int64, count=len(tokens))
        made = self.block(tokens, lengths.cumsum() - lengths, lengths, len(rows), done)
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

    def _like(self, tokens: npt.NDArray[np.int64], ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Tokens of our own in the dtype of a document's, where that holds them."""
        return tokens.astype(ids.dtype) if int(tokens.max()) <= np.iinfo(ids.dtype).max else tokens

    def row(self, pieces: list[_Piece], number: int) -> Item:
        """One row of these pieces, with their origins; ``number`` counts the lane's rows."""
        seq_len, names = self.seq_len, self.names
        lengths = np.array([stop - start for _, start, stop, _ in pieces], dtype=np.int32)
        ends = lengths.cumsum()
        starts, total = ends - lengths, int(ends[-1])
        ids = np.empty(seq_len, dtype=np.int64)
        np.concatenate([columns[0][a:b] for columns, a, b, _ in pieces], out=ids[:total], casting="unsafe")
        labels = ids.copy()
        labels[starts] = IGNORED
        positions = self.places.copy()
        positions[:total] -= starts.repeat(lengths)
        if total < seq_len:
            ids[total:], labels[total:] = self.node.pad_id, IGNORED
            positions[total:] -= total
            self.count_padding(number, total)
        row = {"input_ids": ids, "labels": labels, "position_ids": positions, "seq_lens": lengths}
        for index in range(1, len(names)):
            values = np.concatenate([columns[index][a:b] for columns, a, b, _ in pieces])
            if names[index] == self.node.mask:
                labels[:total][values == 0] = IGNORED
            else:
                column = np.zeros(seq_len, dtype=np.float32 if values.dtype.kind == "f" else np.int64)
                column[:total] = values
                row[names[index]] = column
        return row, self._origins(pieces)

    def _origins(self, pieces: list[_Piece]) -> npt.NDArray[np.int64]:
        """Origins of pieces; where a document was made of several rows, its tokens are counted with the first."""
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

    def drop(self, pieces: list[_Piece], number: int) -> None:
        """Count a row that is dropped at the end: its tokens, and the documents of which this was all."""
        counts: dict[str, int] = {}
        for _, start, stop, origins in pieces:
            source = _source(origins)
            for kind, count in (("tokens dropped", stop - start), ("dropped", int(start == 0))):
                if count:
                    key = f"{kind}|{self.path}|{source}"
                    counts[key] = counts.get(key, 0) + count
        self._of_row(number, counts)

    def count_padding(self, number: int, fill: int) -> None:
        """Tell what is no token in a row."""
        if fill < self.seq_len:
            self._of_row(number, {f"padding tokens|{self.path}|-1": self.seq_len - fill})

    def _of_row(self, number: int, counts: Mapping[str, int]) -> None:
        self.ledger.count(f"{self.path} rows", self.pass_, number, counts)


def _array(value: Any, name: str, kinds: str) -> npt.NDArray[Any]:
    """One value per token, as an array: what a source gives as a view stays one."""
    array = value if type(value) is np.ndarray else np.asarray(value)
    if array.ndim == 1 and (array.dtype.kind in kinds or not len(array)):
        return array
    what = f"an array of {array.dtype} and shape {array.shape}" if array.ndim else type(value).__name__
    raise TypeError(
        f"{name} is {'token ids' if kinds == 'iu' else 'numbers'}, one for each token; found {what}. Tokenize text, and bring "
        f"other values into that form, with .map before .pack"
    )


def _source(origins: Origins) -> int:
    return int(as_origin_array(origins)[0, 0])


class _Concat(Iterator):
    """Documents joined and cut."""

    def __init__(self, packer: _Packer, upstream: Iterator) -> None:
        self.packer, self.seq_len = packer, packer.seq_len
        self.source = SafePoint(upstream, _EVERY)
        self.made = 0
        self.cursor = upstream if type(upstream) is Cursor and packer.bare else None
        self.ready: _Ready | None = None
        self._clear()

    def _clear(self) -> None:
        self.pieces: list[_Piece] = []
        self.filled = 0
        self.rest: _Piece | None = None  # what did not fit in of the document taken last
        self.start: State = None  # the input before the row's first document; None while the row is empty
        self.offset, self.taken = 0, 0

    def _next(self) -> Item:
        if self.ready is not None and self.ready.at == len(self.ready.rows):
            self.ready = None  # not before: its states do not know of documents taken beyond its last row
        if self.ready is None and self.cursor is not None and self.rest is None:
            self._make_ready(self.cursor)
        if self.ready is not None:
            self.made += 1
            self.ready.at += 1
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
            if type(sample) is not Hole:
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

        At a document that is empty, or too long and not split, this ends, and they are taken one by one.
        """
        source, seq_len, packer = self.source, self.seq_len, self.packer
        began, before = source.number, (source.state_at, source.state)
        if (began % _EVERY and before[0] != began - began % _EVERY) or any(
            type(p[3]) is not tuple for p in self.pieces
        ):
            return
        views: list[Any] = []
        origins: list[Any] = []
        row_of_first, need = 0, (packer.together - self.made % packer.together) * seq_len - self.filled
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
            cursor.pass_by(taken)
            need -= int(ends[taken - 1])
            if found.odd and taken == len(ends):
                break
        if not views:
            return
        ready = _Ready(
            packer, self.pieces, views, np.concatenate(origins), began, row_of_first, cursor.block, before, self.made
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

    def _add(self, document: _Piece) -> None:
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
        if self.pieces and self.packer.node.last == "pad":
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
            if type(sample) is not Hole:
                document = self.packer.document(sample, origins, self.source.number)
            if type(document) is tuple:
                columns, _, stop, origins = document
                self._add((columns, self.offset if number == 0 else 0, stop, origins))
        _require_tokens(self.packer.path, self._tokens(), state["tokens"])


class _Ready:
    """Rows made together, and the state after each, which is a formula: the input is a cursor.

    Attributes:
        rows: Each with its origins.
        at: How many were delivered.
        split: (row, document) of those that are longer than a row, until they are told.
    """

    def __init__(
        self,
        packer: _Packer,
        pieces: list[_Piece],
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
        self.at = 0
        count = int(self.starts[-1]) // self.seq_len
        self.rows: list[Item] = self._make(packer, count, done) if count else []
        # Those that are longer than a row all begin in one of these rows, and are told with it.
        long = np.flatnonzero(np.diff(self.starts[len(pieces) :]) > self.seq_len).tolist()
        self.split = [(int(self.starts[len(pieces) + number]) // self.seq_len, number) for number in long]

    def _make(self, packer: _Packer, count: int, done: int) -> list[Item]:
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
        origins = np.concatenate([np.array(held, dtype=np.int64).reshape(-1, 5), of_views])[document]
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

    def row(self, packer: _Packer) -> Item:
        """The row whose turn it is."""
        while self.split and self.split[0][0] < self.at:
            number = self.split.pop(0)[1]
            packer.count_split(int(self.origins[number, 0]), self.began + number + 1)
        return self.rows[self.at - 1]

    def cut(self, rows: int) -> tuple[int, int]:
        """The input in which so many rows end (or which comes next), and how many of its tokens are in them."""
        tokens = rows * self.seq_len
        document = int(np.searchsorted(self.starts, tokens, side="right")) - 1
        return self.began + document - len(self.pieces), tokens - int(self.starts[document])

    def held(self) -> list[_Piece]:
        """What is left after the last row."""
        number, offset = self.cut(len(self.rows)) if self.rows else (self.began, 0)
        first = number - self.began
        left: list[_Piece] = [] if self.rows else list(self.pieces)
        for view, origin in zip(self.views[first:], self.origins[first:].tolist()):
            left.append(((view,), 0, len(view), tuple(origin)))
        if offset:
            left[0] = (left[0][0], offset, *left[0][2:])
        return left

    def upstream(self, number: int) -> State:
        """The state of the cursor before an input on the grid of safe points."""
        return self.before[1] if number < self.began else [self.first + number - self.began, 0, self.block]

    def snapshot(self, number: int) -> list[State]:
        """As `SafePoint.snapshot` before an input."""
        grid = number - number % _EVERY
        return [number, number - grid, self.upstream(grid)]

    def state(self) -> dict[str, State]:
        """The state after the rows delivered so far, but for the number of the row."""
        number, offset = self.cut(self.at)
        size = int(self.starts[number - self.began + len(self.pieces) + 1]) if offset else 0
        return {
            "source": self.snapshot(number),
            "offset": offset,
            "taken": int(offset > 0),
            "tokens": size - self.at * self.seq_len if offset else 0,
        }


def _pieces(columns: tuple[npt.NDArray[Any], ...], size: int, room: int, origins: Origins) -> list[_Piece]:
    """A document in pieces of at most a row."""
    if size <= room:
        return [(columns, 0, size, origins)]
    return [(columns, start, min(start + room, size), origins) for start in range(0, size, room)]


class _Fit(Iterator):
    """Documents packed whole, a window at a time, best fit decreasing."""

    def __init__(self, packer: _Packer, upstream: Iterator, window: int, min_fill: float) -> None:
        self.packer, self.upstream, self.window = packer, upstream, window
        self.cursor = upstream if type(upstream) is Cursor and packer.bare else None
        self.given = 0  # rows, to make together what is a batch
        self.least = min_fill * packer.seq_len
        self.number, self.made = 0, 0  # inputs before the window, row numbers used before it
        self.start: State = None
        self._clear()

    def _clear(self) -> None:
        """Nothing is held."""
        self.waiting: list[_Piece] = []  # pieces of the window before that wait, and
        self.bits = 0  # which of its inputs they are of
        self.back: State = None  # and the input before it
        self.held: dict[int, list[_Piece]] = {}  # pieces of this window, by input
        self.taken = 0
        self.rows: list[list[_Piece]] | None = None  # once the window is packed
        self.at = 0
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
            if self.at < len(self.rows):
                row = self._row(self.rows)
                if self.at == len(self.rows):
                    self._roll()
                return row
            ended = self.taken < self.window
            self._roll()
            if ended:
                raise StopIteration

    def _row(self, rows: list[list[_Piece]]) -> Item:
        """The next row of the window."""
        packer, number = self.packer, self.made + 2 + self.at
        if not self.ready:
            group = rows[self.at : self.at + packer.together - self.given % packer.together]
            self.ready = packer.rows(group, self.fill[self.at :], self.given)[::-1] if packer.bare else []
        at, self.at = self.at, self.at + 1
        self.given += 1
        if not self.ready:
            return packer.row(rows[at], number)
        packer.count_padding(number, self.fill[at])
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
        if not packer.node.separator:  # copied, as by `_split`
            whole, ends = np.concatenate(documents), found.lengths.cumsum().tolist()
            documents = [whole[end - size : end] for end, size in zip(ends, sizes)]
        for number, (ids, size, origins) in enumerate(zip(documents, sizes, found.origins[here].tolist()), self.taken):
            self.held[number] = _pieces((ids,), size, packer.seq_len, tuple(origins))
            if size > packer.seq_len:
                packer.count_split(origins[0], self.number + number + 1)
        self.cursor.pass_by(taken)
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
        if type(sample) is not Hole:
            document = self.packer.document(sample, origins, self.number + self.taken)
        if type(document) is tuple:
            self.held[self.taken - 1], self.tokens = self._split(document), None
            return None
        return None if document is None else (document, origins)

    def _split(self, document: _Piece) -> list[_Piece]:
        """A document in pieces of at most a row, copied: a view would keep its whole chunk in memory."""
        columns, _, stop, origins = document
        columns = tuple(column if column.base is None else column.copy() for column in columns)
        return _pieces(columns, stop, self.packer.seq_len, origins)

    def _pack(self) -> None:
        """Make the window's rows; those that are not full enough wait, unless this is the end or one has waited."""
        numbers = [-1] * len(self.waiting) + [number for number, pieces in self.held.items() for _ in pieces]
        pieces = [*self.waiting, *(piece for pieces in self.held.values() for piece in pieces)]
        lengths = [stop - start for _, start, stop, _ in pieces]
        rows = best_fit(lengths, self.packer.seq_len)
        fill = [sum(lengths[member] for member in row) for row in rows]
        self.next_waiting, self.at = [], 0
        if self.taken == self.window:
            for index, row in enumerate(rows):
                if fill[index] < self.least and numbers[row[0]] >= 0:  # ascending: what waited comes first
                    self.next_waiting.extend(numbers[member] for member in row)
                    fill[index] = 0
        elif rows and self.packer.node.last == "drop" and min(fill) < self.least:
            dropped = fill.index(min(fill))
            self.packer.drop([pieces[member] for member in rows[dropped]], self.made + 1)
            fill[dropped] = 0
        self.rows = [[pieces[member] for member in row] for row, tokens in zip(rows, fill) if tokens]
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
            self.tokens = sum(stop - start for group in (self.waiting, fresh) for _, start, stop, _ in group)
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
            "rows": self.at,
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
        _require_tokens(self.packer.path, self._tokens(), state["tokens"])
        if state["rows"]:
            self._pack()
            self.at = state["rows"]

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
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):  # stable: equals stay in order
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


def _require_tokens(path: str, found: int, expected: int) -> None:
    if found != expected:
        raise ReplayDiverged(
            f"{path}: what was read again is not what was read before: expected {expected:,} tokens held, found {found:,}. The "
            f"data changed, or user code below failed on a document then and not now (or the reverse)."
        )
