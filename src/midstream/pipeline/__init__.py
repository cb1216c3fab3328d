"""What a pipeline is and how one lane of it runs. Import from here to write nodes and sources.

A node derives from `Node` and is wrapped as ``midstream.Dataset(MyNode(source.node))``;
``notebooks/05_your_own_node.ipynb`` shows how.

The way of a sample, from a row of a parquet file to the training loop:

    sources/parquet.py      reads the row with its row group, as part of `Columns`
                            (pipeline/columns.py), and numbers its origin
    pipeline/rows.py        `Rows` carry columns or samples, with origins, from node to node
    nodes/map.py            turns columns into dicts and calls the user's function on each
    nodes/batch.py          cuts rows into batches; nodes/collate.py makes each of them tensors
    pipeline/cursor.py      requests chunks of positions from the last node with random access
                            (`Node._rows`, pipeline/node.py), and returns one item at a time;
                            nodes that only read forward are iterators over it
                            (pipeline/iterator.py)
    workers/readers.py      takes one batch per turn, and adds origins, counts and the lane's
                            state: a `Message` (workers/messages.py)
    transport/packing.py    pickles it, with large tensors beside the pickle in shared memory: a
                            `Parcel`, which leaves through torch's queue (workers/processes.py)
    transport/parcel.py     opens it in the main process; tensors are views of the shared memory
    loader/iterator.py      takes messages in order, records the batch as handed out
                            (loader/position.py), and returns it to the training loop
"""

from midstream.common.plain_state import MISSING
from midstream.errors import Origin
from midstream.pipeline.columns import Column, Columns
from midstream.pipeline.cursor import iterate
from midstream.pipeline.failures import FailedSample, SampleFailure
from midstream.pipeline.iterator import Iterator, Lane, SafePoint
from midstream.pipeline.node import BoundNode, Node, Selection, bind, row_origins
from midstream.pipeline.rows import Item, LazyBatches, Origins, Rows

__all__ = [
    "MISSING",
    "BoundNode",
    "Column",
    "Columns",
    "FailedSample",
    "Item",
    "Iterator",
    "Lane",
    "LazyBatches",
    "Node",
    "Origin",
    "Origins",
    "Rows",
    "SafePoint",
    "SampleFailure",
    "Selection",
    "bind",
    "iterate",
    "row_origins",
]
