"""Pipelines: nodes, rows, and the iterators that read one lane. Import from here to write nodes.

A node derives from `Node` and is wrapped as ``midstream.Dataset(MyNode(source.node))``;
``notebooks/05_your_own_node.ipynb`` shows how.

The way of a sample, from a row of a parquet file to the training loop (files relative to
src/midstream; loader/loader.py `_open` starts a pass, workers/pool.py its readers). The calls go
the other way: a reader asks the cursor, the cursor the last node, each node its input. `BoundNode`
(pipeline/node.py) connects the nodes.

    sources/parquet.py      reads rows out of row groups (sources/row_groups.py), numbers origins
    pipeline/rows.py        `Rows`: samples or columns (pipeline/columns.py), between two nodes
    nodes/map.py            turns columns into dicts and calls the user's function on each
    nodes/batch.py          cuts rows into `LazyBatches`
    nodes/collate.py        makes a batch when it is taken (`LazyBatches.item`)
    pipeline/cursor.py      reads chunks of positions (`BoundNode.lazy_rows`, which calls
                            `Node._lazy_rows` or `Node._rows`), returns one sample at a time;
                            streams have their own iterators instead (pipeline/iterator.py)
    workers/readers.py      a `Message` (workers/messages.py) per batch: origins, counts and, for
                            streams, the lane's state (random access: the batch number is enough)
    transport/packing.py    pickles it, large tensors beside it in shared memory: a `Parcel`
    transport/bundles.py    `Bundler`: parcels to a `Bundle`, for torch's queue
                            (workers/processes.py); `Unbundler`: back, in the main process
    transport/parcel.py     opens a parcel; tensors are views of the shared memory
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
