"""The node `Pack`: tokenized documents as rows of one length, ready for training.

The two modes are the iterators `Concat` and `Fit`. They share the first and the last step:
`DocumentReader` turns samples into documents, `RowBuilder` turns pieces of documents into rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from midstream.common.plain_state import State
from midstream.nodes.pack.concat import Concat
from midstream.nodes.pack.documents import DocumentReader
from midstream.nodes.pack.fit import Fit
from midstream.nodes.pack.options import PackOptions
from midstream.nodes.pack.rows import RowBuilder
from midstream.nodes.parts import require_depth
from midstream.pipeline.cursor import iterate
from midstream.pipeline.iterator import Iterator, Lane
from midstream.pipeline.node import BoundNode, Node


@dataclass(frozen=True, eq=False, repr=False)
class Pack(Node):
    """Packs documents into rows of ``seq_len`` tokens. A stream: its length is not known ahead.

    A row is a dict of numpy arrays. Integers come out as int64, other numbers as float32:

        input_ids      [seq_len]  the documents, then ``pad_id``
        labels         [seq_len]  the same ids, not shifted (the model shifts them); -100 where the
                                  mask is 0, on padding, and on each piece's first token, which
                                  would be predicted from another document
        position_ids   [seq_len]  start at 0 for each piece, and for the padding
        seq_lens       [pieces]   int32: tokens of each piece; their sum is the tokens of the row
        ...            [seq_len]  every further column, 0 on padding

    A piece is a whole document, or the part of a document that is in this row. Each piece is a
    sequence of its own: it does not attend to earlier pieces, and its positions start at 0, also
    when it continues a document of the row before. `collate` pads the ``seq_lens`` of a batch with
    zeros; `midstream.document_mask` makes attention masks of them.

    ``mode="concat"`` joins documents and cuts at ``seq_len``. With ``seq_len`` 4 and documents a
    (3 tokens), b (3), c (5):

        a a a b | b b c c | c c c .        saved after the first row: safe point before b, offset 1

    ``mode="fit"`` takes a window of documents, longest first, and puts each into the fullest row
    that can hold it. Here c is longer than a row, so it is split (``overflow``); a and b are not:

        c c c c | a a a c | b b b .

    Rows leave in the order of their first documents. The documents of a row filled less than
    ``min_fill`` wait and are packed again with the next window; no document waits twice.

    At the end of each lane the partial row is padded or dropped (``last``). In ``"fit"`` that is
    the emptiest row of the last window, if it is filled less than ``min_fill``.

    `Progress` counts tokens delivered per source, ``padding tokens``, documents ``split`` or
    ``truncated`` because they are longer than a row, ``tokens dropped``, and documents dropped or
    empty. A document with unusable columns, or too long with ``overflow="error"``, is one failed
    sample.

    State: concat: ``{"source", "offset", "taken", "tokens", "row"}``: the input's state before the
        first document of the row in progress, tokens of that document in earlier rows, inputs taken
        since, tokens held of them, rows made. fit: ``{"source", "waiting", "number", "taken",
        "tokens", "rows", "row"}``: the input's state before the window (or, if documents wait,
        before the window that they come from), one bit for each input of that window (set where it
        waits), inputs before this window, inputs in it, tokens held, rows of it delivered, row
        numbers used before it.
    Resume: concat reads at most 16 + 1 inputs again; saved after a failure, also those of the row
        in progress. fit reads at most two windows again. When the number of tokens held differs:
        `ReplayDiverged`.
    """

    source: Node
    options: PackOptions
    kind = "pack"
    makes_parts = True

    def __post_init__(self) -> None:
        require_depth(self)

    @property
    def random_access(self) -> bool:
        """Never."""
        return False

    @property
    def batch_rows(self) -> int | None:
        """None: the output is rows, not batches."""
        return None

    def spec_fields(self) -> dict[str, State]:
        """See `PackOptions.spec_fields`."""
        return self.options.spec_fields()

    def replay_bound(self) -> str:
        """See `Node.replay_bound`."""
        if self.options.mode == "concat":
            return "at most 17 inputs of a lane"
        return f"at most two windows of {self.options.fit_window:,} inputs of a lane"

    def _iterate(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> Iterator:
        options = self.options
        documents = DocumentReader(options, self.source.infinite, bound, lane, pass_)
        rows = RowBuilder(options, bound.path, lane, pass_)
        upstream = iterate(bound.input, lane, key, pass_)
        mode = Concat if options.mode == "concat" else Fit
        return mode(documents, rows, upstream)
