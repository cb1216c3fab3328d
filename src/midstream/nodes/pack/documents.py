"""Samples as documents: tokens to be packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from midstream.common.plain_state import State
from midstream.common.validation import require_choice, require_int
from midstream.errors import ReplayDiverged, SourceError
from midstream.nodes.pack.rows import (
    IGNORED,
    MOST_PIECES,
    MOST_TOKENS,
    OUTPUT_COLUMNS,
    Piece,
    first_source,
)
from midstream.pipeline.columns import rows_of_block
from midstream.pipeline.cursor import Cursor
from midstream.pipeline.failures import FailedSample, SampleFailure
from midstream.pipeline.iterator import Lane
from midstream.pipeline.node import BoundNode
from midstream.pipeline.rows import PARTS, Item, Origins, as_origin_array

_GIVE_UP = 100_000


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


_WINDOW, _MAX_WINDOW = 256, 1024

_MIN_FILL = 0.95


@dataclass(frozen=True)
class PackOptions:
    """The arguments of `Dataset.pack`, checked."""

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

    def __post_init__(self) -> None:
        require_int(self.seq_len, "seq_len", 1, "pack")
        require_choice(self.mode, "mode", ("concat", "fit"), "pack")
        require_choice(self.overflow, "overflow", ("split", "truncate", "drop", "error"), "pack")
        require_choice(self.last, "last", ("pad", "drop"), "pack")
        for token in self.separator:
            require_int(token, "separator", 0, "pack")
        require_int(self.pad_id, "pad_id", 0, "pack")
        if len(self.separator) >= self.seq_len:
            raise ValueError(
                f"pack: a separator of {len(self.separator)} tokens leaves no room in"
                f" {self.seq_len}"
            )
        names = [self.key, *self.columns, *([] if self.mask is None else [self.mask])]
        if len(set(names)) < len(names) or any(not isinstance(name, str) for name in names):
            raise ValueError(f"pack: key, columns and mask are different names; found {names}")
        for name in self.columns:
            if name in OUTPUT_COLUMNS:
                raise ValueError(
                    f"pack: {name!r} is a column that pack makes. Rename yours with .map before it;"
                    " to leave tokens out of the labels, give mask= a column that is 0 there"
                )
        if self.window is not None:
            require_int(self.window, "window", 1, "pack")
            if self.window > _MAX_WINDOW:
                raise ValueError(
                    f"pack: window is at most {_MAX_WINDOW:,} documents, which a resume reads"
                    f" again; found {self.window}"
                )
        if self.min_fill is not None and not 0 <= self.min_fill <= 1:
            raise ValueError(
                f"pack: min_fill is a fraction of seq_len, 0 to 1; found {self.min_fill}"
            )
        if self.mode == "concat" and (self.window is not None or self.min_fill is not None):
            raise ValueError(
                'pack: window and min_fill are for mode="fit"; "concat" fills every row'
            )

    @property
    def fit_window(self) -> int:
        """Documents in a window of ``mode="fit"``."""
        return _WINDOW if self.window is None else int(self.window)

    @property
    def fit_min_fill(self) -> float:
        """Part of a row, 0 to 1, below which its documents wait for the next window."""
        return _MIN_FILL if self.min_fill is None else float(self.min_fill)

    def spec_fields(self) -> dict[str, State]:
        """Row length and mode, and every option that is not the default."""
        fields: dict[str, State] = {"seq_len": int(self.seq_len), "mode": self.mode}
        if self.mode == "fit":
            fields["window"], fields["min_fill"] = self.fit_window, self.fit_min_fill
        for name, default in _DEFAULTS.items():
            if (value := getattr(self, name)) != default:
                fields[name] = (
                    list(map(_plain, value)) if isinstance(value, tuple) else _plain(value)
                )
        return fields


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


class Packer:
    """What both modes do: documents of samples, rows of pieces, and the counting."""

    def __init__(
        self, options: PackOptions, endless: bool, bound: BoundNode, lane: Lane, pass_: int
    ) -> None:
        self.options, self.path, self.bound, self.pass_, self.ledger = (
            options,
            bound.path,
            bound,
            pass_,
            lane.ledger,
        )
        self.seq_len = int(options.seq_len)
        self.names = [
            options.key,
            *options.columns,
            *([] if options.mask is None else [options.mask]),
        ]
        self.separator = np.array(options.separator, dtype=np.int64)
        self.bare, self.room = len(self.names) == 1, self.seq_len - len(options.separator)
        self.places = np.arange(self.seq_len, dtype=np.int64)
        self.splits = options.overflow == "split"
        # Rows that are made together are a batch, which then needs no copy; of single ones, some
        # thousand tokens.
        self.alone = lane.block <= 1
        self.together = min(
            max(1, MOST_TOKENS // self.seq_len) if self.alone else lane.block, MOST_PIECES
        )
        self.endless = endless
        self.fruitless = 0

    def document(self, sample: Any, origins: Origins, number: int) -> Piece | FailedSample | None:
        """The document of input ``number``; None when nothing is left of it."""
        options, seq_len = self.options, self.seq_len
        if self.bare and type(sample) is dict:  # the hot path: a view, as a source gives it
            ids = sample.get(options.key)
            if (
                type(ids) is np.ndarray
                and ids.ndim == 1
                and ids.dtype.kind in "iu"
                and 0 < len(ids) <= self.room
            ):
                self.fruitless = 0
                if options.separator:
                    ids = np.concatenate((ids, self.separator))
                return (ids,), 0, len(ids), origins
        try:
            columns = self._columns(sample)
            size = len(columns[0])
            if size and options.separator:
                tails = [
                    self.separator,
                    *(np.repeat(column[-1:], len(self.separator)) for column in columns[1:]),
                ]
                columns = tuple(map(np.concatenate, zip(columns, tails)))
                size = len(columns[0])
            if size > seq_len and options.overflow == "error":
                raise ValueError(
                    f"the document has {size:,}"
                    f" tokens{' with its separator' if options.separator else ''}, and a row has "
                    f'{seq_len:,}; overflow="split", "truncate" or "drop" says what to do with such'
                    " documents"
                )
        except Exception as error:
            origin = self.bound.origin(as_origin_array(origins)[0].tolist())
            return FailedSample(
                (SampleFailure(self.path, origin, f"pack({options.key!r})", error),)
            )
        if 0 < size <= seq_len:
            self.fruitless = 0
            return columns, 0, size, origins
        return self._odd(columns, size, origins, number)

    def ahead(self, cursor: Cursor, most: int | None = None) -> _Ahead | None:
        """Documents that come as a column, up to the first that is empty, or too long and not
        split.
        """
        found = cursor.ready_columns()
        if found is None or self.options.key not in found[0].names:
            return None
        columns, origins, first = found
        column = columns.columns[columns.names.index(self.options.key)]
        if column.dtype is None or column.dtype.kind not in "iu":
            return None
        stop = columns.length if most is None else min(columns.length, first + most)
        lengths = column.lengths[first:stop]
        odd = lengths == 0 if self.splits else (lengths == 0) | (lengths > self.room)
        usable = int(odd.argmax()) if odd.any() else len(lengths)
        if not usable:
            return None
        self.fruitless = 0
        return _Ahead(
            column.values,
            lengths[:usable] + len(self.separator),
            origins,
            first,
            usable < len(lengths),
        )

    def with_separator(self, documents: list[Any]) -> list[Any]:
        """The same, each with the separator at its end."""
        if not len(self.separator):
            return documents
        tail = self._like(self.separator, documents[0])
        return [np.concatenate((ids, tail)) for ids in documents]

    def count_split(self, source: int, number: int) -> None:
        """Tell that input ``number`` was longer than a row."""
        self.ledger.count(self.path, self.pass_, number, {f"split|{self.path}|{source}": 1})

    def _odd(
        self, columns: tuple[npt.NDArray[Any], ...], size: int, origins: Origins, number: int
    ) -> Piece | None:
        """Empty and over-long documents."""
        overflow, seq_len = self.options.overflow, self.seq_len
        counts = {"emptied": 1}
        kept = 0
        if size and overflow == "split":
            counts, kept = {"split": 1}, size
        elif size and overflow == "truncate":
            counts, kept = {"truncated": 1, "tokens dropped": size - seq_len}, seq_len
        elif size:
            counts = {"dropped": 1, "tokens dropped": size}
        source = first_source(origins)
        named = {f"{kind}|{self.path}|{source}": count for kind, count in counts.items()}
        self.ledger.count(self.path, self.pass_, number, named)
        self.fruitless = 0 if kept else self.fruitless + 1
        if self.fruitless >= _GIVE_UP and self.endless:
            raise SourceError(
                f"{self.path}: {self.fruitless:,} documents in a row were empty, or dropped for"
                f" having more than {seq_len:,} tokens, and the input never ends. Try it on a few"
                " samples"
            )
        return (columns, 0, kept, origins) if kept else None

    def _columns(self, sample: Any) -> tuple[npt.NDArray[Any], ...]:
        """Token ids and further columns of a sample, of one length."""
        if type(sample) is not dict and not isinstance(sample, Mapping):
            if len(self.names) > 1:
                raise TypeError(
                    f"columns {self.names} are of a dict; found a sample that is"
                    f" {type(sample).__name__}"
                )
            return (_array(sample, "the sample", "iu"),)
        try:
            ids = _array(sample[self.names[0]], self.names[0], "iu")
            if len(self.names) == 1:
                return (ids,)
            columns = (ids, *(_array(sample[name], name, "iubf") for name in self.names[1:]))
        except KeyError as error:
            raise KeyError(
                f"the sample has no {error}; it has {sorted(map(str, sample))}. Give pack key=,"
                " columns= and mask= as they are named there; text is tokenized with .map before"
            ) from None
        if len({len(column) for column in columns}) > 1:
            lengths = ", ".join(
                f"{name!r} {len(column)}" for name, column in zip(self.names, columns)
            )
            raise ValueError(
                "columns of one document have one value per token each; found the lengths"
                f" {lengths}"
            )
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
            joined = np.concatenate(
                tokens
            )  # cast below: numpy's own cast takes twice as long for many short arrays
        else:
            joined = np.empty(count * self.seq_len, dtype=np.int64)
            np.concatenate(tokens, out=joined, casting="unsafe")
        made: list[dict[str, npt.NDArray[Any]]] = []
        bound = 0
        while len(made) < count:
            rows = min(self.together - (done + len(made)) % self.together, count - len(made))
            start, stop = len(made) * self.seq_len, (len(made) + rows) * self.seq_len
            last = int(np.searchsorted(begins, stop))
            ids, id_rows = rows_of_block((rows, self.seq_len), np.int64)
            labels, label_rows = rows_of_block((rows, self.seq_len), np.int64)
            positions, position_rows = rows_of_block((rows, self.seq_len), np.int64)
            ids.reshape(-1)[:] = joined[start:stop]
            labels[:] = ids
            labels.reshape(-1)[begins[bound:last] - start] = IGNORED
            places = [self.places[:length] for length in lengths[bound:last].tolist()]
            np.concatenate(places, out=positions.reshape(-1))
            if self.alone:  # whoever keeps one of them shall not keep all
                id_rows, label_rows, position_rows = (
                    [row.copy() for row in of] for of in (id_rows, label_rows, position_rows)
                )
            made += [
                dict(zip(OUTPUT_COLUMNS, of)) for of in zip(id_rows, label_rows, position_rows)
            ]
            bound = last
        return made

    def rows(self, rows: list[list[Piece]], fills: list[int], done: int) -> list[Item]:
        """Several rows of bare documents at once, as `row` makes each, with fewer of numpy's calls."""
        seq_len, pieces = self.seq_len, [piece for row in rows for piece in row]
        padding = self._like(np.array([self.options.pad_id]), pieces[0][0][0]).repeat(seq_len)
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

    def row(self, pieces: list[Piece], number: int) -> Item:
        """One row of these pieces, with their origins; ``number`` counts the lane's rows."""
        seq_len, names = self.seq_len, self.names
        lengths = np.array([stop - start for _, start, stop, _ in pieces], dtype=np.int32)
        ends = lengths.cumsum()
        starts, total = ends - lengths, int(ends[-1])
        ids = np.empty(seq_len, dtype=np.int64)
        np.concatenate(
            [columns[0][a:b] for columns, a, b, _ in pieces], out=ids[:total], casting="unsafe"
        )
        labels = ids.copy()
        labels[starts] = IGNORED
        positions = self.places.copy()
        positions[:total] -= starts.repeat(lengths)
        if total < seq_len:
            ids[total:], labels[total:] = self.options.pad_id, IGNORED
            positions[total:] -= total
            self.count_padding(number, total)
        row = {"input_ids": ids, "labels": labels, "position_ids": positions, "seq_lens": lengths}
        for index in range(1, len(names)):
            values = np.concatenate([columns[index][a:b] for columns, a, b, _ in pieces])
            if names[index] == self.options.mask:
                labels[:total][values == 0] = IGNORED
            else:
                column = np.zeros(
                    seq_len, dtype=np.float32 if values.dtype.kind == "f" else np.int64
                )
                column[:total] = values
                row[names[index]] = column
        return row, self._origins(pieces)

    def _origins(self, pieces: list[Piece]) -> npt.NDArray[np.int64]:
        """Origins of pieces; where a document was made of several rows, its tokens are counted with
        the first.
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

    def drop(self, pieces: list[Piece], number: int) -> None:
        """Count a row that is dropped at the end: its tokens, and the documents of which this was
        all.
        """
        counts: dict[str, int] = {}
        for _, start, stop, origins in pieces:
            source = first_source(origins)
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
    what = (
        f"an array of {array.dtype} and shape {array.shape}" if array.ndim else type(value).__name__
    )
    raise TypeError(
        f"{name} is {'token ids' if kinds == 'iu' else 'numbers'}, one for each token; found"
        f" {what}. Tokenize text, and bring other values into that form, with .map before .pack"
    )


def require_tokens(path: str, found: int, expected: int) -> None:
    if found != expected:
        raise ReplayDiverged(
            f"{path}: what was read again is not what was read before: expected {expected:,} tokens"
            f" held, found {found:,}. The data changed, or user code below failed on a document"
            " then and not now (or the reverse)."
        )
