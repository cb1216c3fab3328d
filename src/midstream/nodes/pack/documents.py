"""Turns samples into documents: tokens to be packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from midstream.errors import ReplayDiverged, SourceError
from midstream.nodes.pack.options import PackOptions
from midstream.nodes.pack.rows import Piece, as_dtype_of, first_source
from midstream.pipeline.cursor import Cursor
from midstream.pipeline.failures import FailedSample, SampleFailure
from midstream.pipeline.iterator import Lane
from midstream.pipeline.node import BoundNode
from midstream.pipeline.patience import Patience
from midstream.pipeline.rows import Origins, as_origin_array


class DocumentColumn(NamedTuple):
    """Documents that a cursor has read and not yet delivered, as one column.

    Attributes:
        values: All token ids that were read together; the first ``first`` are delivered already.
        lengths: int64, shape [usable]: lengths of the documents that can be taken from here,
            separators included.
        origins: int64, shape [len(values), 5].
        first: Index of the first document that can be taken.
        blocked: Whether the document after the usable ones is empty or too long, and so has to be
            taken as a single sample.
    """

    values: list[Any]
    lengths: npt.NDArray[np.int64]
    origins: npt.NDArray[np.int64]
    first: int
    blocked: bool


class DocumentReader:
    """Turns samples into documents, for both modes of `pack`.

    Checks the columns of a sample, adds the separator, and applies ``overflow`` to documents that
    are longer than a row. Documents that are split, cut short or dropped are counted.

    Attributes:
        options: The arguments of `Dataset.pack`.
        path: The node's path, for errors and counts.
        ids_only: Whether documents have no columns but their token ids.
    """

    def __init__(
        self, options: PackOptions, endless: bool, bound: BoundNode, lane: Lane, pass_: int
    ) -> None:
        self.options, self.path = options, bound.path
        self._bound, self._pass, self._ledger = bound, pass_, lane.ledger
        self._seq_len = int(options.seq_len)
        self._names = options.names
        self._separator = np.array(options.separator, dtype=np.int64)
        self.ids_only = len(self._names) == 1
        self._room = self._seq_len - len(options.separator)
        self._splits = options.overflow == "split"
        self._patience = Patience(endless)  # counts documents of which nothing was left

    def document(self, sample: Any, origins: Origins, number: int) -> Piece | FailedSample | None:
        """Makes the document of one sample.

        Args:
            sample: A dict, or token ids.
            origins: Of the sample.
            number: Number of the sample among the inputs of this lane, from 1.

        Returns:
            The document as one piece, longer than a row if it is to be split; a failed sample when
            its columns are unusable; None when nothing is left of it.
        """
        options, seq_len = self.options, self._seq_len
        if (
            self.ids_only and type(sample) is dict
        ):  # the fast path: token ids as a source gives them
            ids = sample.get(options.key)
            if (
                type(ids) is np.ndarray
                and ids.ndim == 1
                and ids.dtype.kind in "iu"
                and 0 < len(ids) <= self._room
            ):
                self._patience.count = 0
                if options.separator:
                    ids = np.concatenate((ids, self._separator))
                return (ids,), 0, len(ids), origins
        try:
            columns = self._columns(sample)
            size = len(columns[0])
            if size and options.separator:
                tails = [
                    self._separator,
                    *(np.repeat(column[-1:], len(self._separator)) for column in columns[1:]),
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
            origin = self._bound.origin(as_origin_array(origins)[0].tolist())
            return FailedSample(
                (SampleFailure(self.path, origin, f"pack({options.key!r})", error),)
            )
        if 0 < size <= seq_len:
            self._patience.count = 0
            return columns, 0, size, origins
        return self._unusual(columns, size, origins, number)

    def column(self, cursor: Cursor, most: int | None = None) -> DocumentColumn | None:
        """Documents that the cursor has ready as a column, at most ``most`` of them.

        Ends before the first document that is empty, or that is too long and not to be split. None
        where there is no such document, or the token ids are no column of integers. The cursor does
        not move: call ``cursor.advance`` for those that were taken.
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
        unusual = lengths == 0 if self._splits else (lengths == 0) | (lengths > self._room)
        usable = int(unusual.argmax()) if unusual.any() else len(lengths)
        if not usable:
            return None
        self._patience.count = 0
        return DocumentColumn(
            column.values,
            lengths[:usable] + len(self._separator),
            origins,
            first,
            usable < len(lengths),
        )

    def with_separator(self, documents: list[Any]) -> list[Any]:
        """Appends the separator to each document."""
        if not len(self._separator):
            return documents
        tail = as_dtype_of(documents[0], self._separator)
        return [np.concatenate((ids, tail)) for ids in documents]

    def count_split(self, source: int, number: int) -> None:
        """Counts input ``number`` as a document that was split."""
        self._ledger.count(self.path, self._pass, number, {f"split|{self.path}|{source}": 1})

    def _unusual(
        self, columns: tuple[npt.NDArray[Any], ...], size: int, origins: Origins, number: int
    ) -> Piece | None:
        """Handles an empty or over-long document: counts it, and cuts it where asked."""
        overflow, seq_len = self.options.overflow, self._seq_len
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
        self._ledger.count(self.path, self._pass, number, named)
        if kept:
            self._patience.count = 0
        elif self._patience.exhausted_by(1):
            raise SourceError(
                f"{self.path}: {self._patience.count:,} documents in a row were empty, or dropped"
                f" for having more than {seq_len:,} tokens, and the input never ends. Try it on a"
                " few samples"
            )
        return (columns, 0, kept, origins) if kept else None

    def _columns(self, sample: Any) -> tuple[npt.NDArray[Any], ...]:
        """Token ids and further columns of a sample, all of one length."""
        if type(sample) is not dict and not isinstance(sample, Mapping):
            if len(self._names) > 1:
                raise TypeError(
                    f"columns {self._names} are of a dict; found a sample that is"
                    f" {type(sample).__name__}"
                )
            return (_array(sample, "the sample", "iu"),)
        try:
            ids = _array(sample[self._names[0]], self._names[0], "iu")
            if len(self._names) == 1:
                return (ids,)
            columns = (ids, *(_array(sample[name], name, "iubf") for name in self._names[1:]))
        except KeyError as error:
            raise KeyError(
                f"the sample has no {error}; it has {sorted(map(str, sample))}. Give pack key=,"
                " columns= and mask= as they are named there; text is tokenized with .map before"
            ) from None
        if len({len(column) for column in columns}) > 1:
            lengths = ", ".join(
                f"{name!r} {len(column)}" for name, column in zip(self._names, columns)
            )
            raise ValueError(
                "columns of one document have one value per token each; found the lengths"
                f" {lengths}"
            )
        return columns


def _array(value: Any, name: str, kinds: str) -> npt.NDArray[Any]:
    """One value per token, as an array. An array is not copied."""
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
    """Raises `ReplayDiverged` if a replay holds another number of tokens than was saved."""
    if found != expected:
        raise ReplayDiverged(
            f"{path}: reading again gave other documents than before: expected {expected:,} tokens"
            f" held, found {found:,}. The data changed, or user code below failed on a document"
            " then and not now (or the reverse)."
        )
