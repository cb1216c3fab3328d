"""Pack: tokenized documents into rows of one length, with what attention and the loss need to keep them apart.

Two nodes' worth of code, for the two modes share all but how documents are held: `Packer` makes
documents of samples and rows of pieces, `Concat` and `Fit` are the iterators.
"""

from __future__ import annotations

from dataclasses import dataclass

from midstream.common.plain_state import State
from midstream.nodes.pack.concat import Concat
from midstream.nodes.pack.documents import Packer, PackOptions
from midstream.nodes.pack.fit import Fit
from midstream.nodes.parts import require_depth
from midstream.pipeline.cursor import iterate
from midstream.pipeline.iterator import Iterator, Lane
from midstream.pipeline.node import BoundNode, Node, require_dataset


@dataclass(frozen=True, eq=False, repr=False)
class Pack(Node):
    """Documents packed into rows of ``seq_len`` tokens. A stream: how many rows there will be is known by reading.

    A row is a dict of numpy arrays; integers come out as int64, other numbers as float32:

        input_ids      [seq_len]  the documents, then ``pad_id``
        labels         [seq_len]  the same ids, not shifted (the model shifts them); -100 where the mask is 0, on padding,
                                  and on each piece's first token, which would be predicted from
                                  another document
        position_ids   [seq_len]  from 0 for each piece, and for the padding, as attention over ``seq_lens`` sees them
        seq_lens       [pieces]   int32: tokens of each piece; they sum to the tokens that are no padding
        ...            [seq_len]  every further column, 0 on padding

    `collate` fills the ``seq_lens`` of a batch up with zeros; `midstream.document_mask` makes
    attention masks of them. A piece is a whole document, or as much of it as is in this row: the
    rest of a document that was cut neither sees what came before nor goes on counting positions.

    ``mode="concat"``, seq_len 4, documents a (3 tokens), b (3), c (5):

        a a a b | b b c c | c c c .        saved after the first row: safe point before b, offset 1

    ``mode="fit"`` takes a window of documents, longest first, each into the fullest row that can
    hold it:

        c c c c | a a a c | b b b .        c is longer than a row, so it was split (``overflow``); a and b are not cut

    Rows leave in the order of their first documents. Rows filled less than ``min_fill`` wait for
    the next window, where their documents are packed anew with others; no document waits twice.

    Per lane, the partial row at the end is padded or dropped (``last``); in ``"fit"`` that is the
    emptiest row of the last window, when it is filled less than ``min_fill``. Counted in
    `Progress`: tokens delivered per source, ``padding tokens``, documents ``split`` or
    ``truncated`` for being longer than a row, ``tokens dropped``, documents dropped (empty ones
    too).

    A document of unusable columns, or too long with ``overflow="error"``, is one lost sample.

    State: concat: ``{"source", "offset", "taken", "tokens", "row"}``: the input before the first
        document of the row in progress, tokens of it in earlier rows, inputs taken since, tokens
        held of them, rows made. fit: ``{"source", "waiting", "number", "taken", "tokens", "rows",
        "row"}``: the input before the window (or, where documents wait, before the one they are of,
        with one bit for each of its inputs), inputs before and in it, tokens held, rows of it
        delivered, row numbers used before it.
    Resume: concat reads at most 16 + 1 inputs again, and when saved after a failure those of the
        row in progress. fit reads at most two windows again. When tokens are not as many as they
        were: `ReplayDiverged`.
    """

    source: Node
    options: PackOptions
    kind = "pack"

    def __post_init__(self) -> None:
        require_dataset(self.source, "pack")
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
        """See `PackOptions.spec_fields`."""
        return self.options.spec_fields()

    def replay_bound(self) -> str:
        """See `Node.replay_bound`."""
        if self.options.mode == "concat":
            return "at most 17 inputs of a lane"
        return f"at most two windows of {self.options.fit_window:,} inputs of a lane"

    def _iterate(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> Iterator:
        options = self.options
        packer = Packer(options, self.source.infinite, bound, lane, pass_)
        upstream = iterate(bound.input, lane, key, pass_)
        if options.mode == "concat":
            return Concat(packer, upstream)
        return Fit(packer, upstream, options.fit_window, options.fit_min_fill)
