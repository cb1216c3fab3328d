"""Dataset: the object users hold. Every verb, and reading without a loader.

Each verb wraps the node of this dataset in a new node and returns a new `Dataset`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from midstream.common.plain_state import State, copy_plain
from midstream.display.html import tree_html
from midstream.display.preview import Preview, preview
from midstream.distributed.foreign_loaders import divided_by_nobody, divided_by_trainer
from midstream.errors import Origin
from midstream.metrics.metric import Metric
from midstream.nodes.batch import Batch
from midstream.nodes.filter import Filter
from midstream.nodes.flat_map import FlatMap
from midstream.nodes.map import Map
from midstream.nodes.map_batched import MapBatched
from midstream.nodes.pack.options import PackOptions
from midstream.nodes.pack.pack import Pack
from midstream.nodes.repeat import Repeat
from midstream.nodes.shuffle import BufferedShuffle, Shuffle
from midstream.nodes.skip import Skip
from midstream.nodes.take import Take
from midstream.nodes.track import Track
from midstream.nodes.user_function import ErrorPolicy
from midstream.pipeline import describe
from midstream.pipeline.cursor import iterate
from midstream.pipeline.failures import ErrorRate, FailedSample, OnError
from midstream.pipeline.iterator import Lane
from midstream.pipeline.ledger import Ledger
from midstream.pipeline.node import BoundNode, Node, bind
from midstream.pipeline.passes import epoch_key
from midstream.pipeline.rows import I64
from midstream.pipeline.single_lane import SingleLaneIterator, check_run_state


class Dataset(IterableDataset[Any]):
    """An immutable description of a stream of samples. Opens no file until it is read.

    Every verb (`map`, `filter`, `shuffle`, ...) returns a new dataset. There are two kinds:

    - Random access: the length is known, and the sample at any position can be read directly.
      A resume reads nothing again.
    - Stream: read forward only, like a generator. Each verb says below whether it makes a stream.

    ``print(dataset)`` shows the tree of operations and the kind of each.

    Read it with `midstream.DataLoader`, or iterate over it without a loader. It also implements
    torchdata's ``Stateful`` protocol: a ``StatefulDataLoader(dataset, num_workers=k)`` resumes
    exactly with the same number of workers.

    Args:
        node: The last operation. Users call `midstream.from_dataset` and other sources instead;
            a node class of your own is wrapped as ``Dataset(MyNode(dataset.node))``.

    >>> import midstream as ms
    >>> ds = ms.from_dataset(list("abcdef"), name="letters").shuffle(seed=1).take(4)
    >>> ds
    take(n=4)                                  # random access, 4
    └─ shuffle(seed=1)                         # random access, 6
       └─ letters: from_dataset(list, 6 rows)  # random access, 6
    >>> list(ds) == list(ds), len(ds)
    (True, 4)
    """

    node: Node

    def __init__(self, node: Node) -> None:
        if not isinstance(node, Node):
            raise TypeError(
                f"Dataset wraps a node; found {type(node).__name__}. For data use"
                " midstream.from_dataset(data)"
            )
        self.__dict__["node"] = node
        self._epoch = 0
        self._warned = False  # of a loader that divides this dataset among ranks wrongly
        self._loaded: State = None  # a state for the next iter()
        self._left: State = None  # the last state of an iterator that was deleted
        self._run: Any = None  # weak reference to the iterator in use

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            raise dataclasses.FrozenInstanceError(
                f"a dataset is immutable, so {name!r} cannot be set: every verb returns a new one"
            )
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None, "_left": None}

    def __eq__(self, other: object) -> bool:
        return (
            self.fingerprint == other.fingerprint if isinstance(other, Dataset) else NotImplemented
        )

    def __hash__(self) -> int:
        return int(self.fingerprint, 16) >> 4

    def __repr__(self) -> str:
        return describe.tree(self.node)

    @property
    def fingerprint(self) -> str:
        """Hash of `spec`, as 16 hexadecimal digits. Datasets with one fingerprint are equal."""
        return describe.fingerprint(self.node)

    @property
    def random_access(self) -> bool:
        """Whether the sample at any position can be read directly. Opens nothing."""
        return self.node.random_access

    @property
    def infinite(self) -> bool:
        """Whether it never ends by itself."""
        return self.node.infinite

    @property
    def label(self) -> str:
        """The name of its last operation in paths: that of the verb, or the one it was given."""
        return self.node.label

    @property
    def batch_rows(self) -> int | None:
        """Samples per batch when the pipeline ends in `batch`, else None.

        One-to-one operations after ``batch`` keep it.
        """
        return self.node.batch_rows

    def spec(self) -> dict[str, State]:
        """Return the pipeline as plain data: nodes, names, seeds, weights, lengths.

        A callable is recorded by name only, so a checkpoint stays valid when its code is edited.
        """
        return describe.spec(self.node)

    def access(self) -> str:
        """Return in words: random access or stream, the length, and what a resume reads again.

        >>> import midstream as ms
        >>> ms.from_dataset(range(1000)).access()
        'random access, 1,000'
        """
        return describe.access(self.node)

    def __len__(self) -> int:
        """Number of samples in an epoch.

        Raises:
            TypeError: If the dataset is a stream, or never ends.
        """
        if not self.node.random_access:
            raise TypeError(f"the length of this pipeline is known only by reading it:\n{self!r}")
        length = self.node.length()
        if length is None:
            raise TypeError(f"this pipeline has no end, so it has no length:\n{self!r}")
        return length

    def __iter__(self) -> SingleLaneIterator:
        """Read the samples in the order of a single lane, from the start or from a loaded state.

        In a worker process of a torch or torchdata loader, each worker is one lane.
        """
        if not self._warned and divided_by_nobody(self._describe, sys._getframe(1)):
            self._warned = True
        worker = get_worker_info()
        index, num_lanes = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        run = SingleLaneIterator(self.node, index, num_lanes, self._epoch)
        loaded = self._loaded
        if loaded is not None:
            run.load_state_dict(loaded)
            self._loaded = None
        # Weak references: a cycle would keep open streams alive until the garbage collector runs,
        # in any thread.
        self._run = weakref.ref(run)
        self._left = None
        reference = weakref.ref(self)

        def keep_state(ended: SingleLaneIterator) -> None:
            dataset = reference()
            if (
                dataset is not None
                and dataset._run is not None
                and dataset._run() in (ended, None)
                and dataset._left is None
            ):
                dataset._left = ended.state_dict()

        run.on_end = keep_state
        return run

    def rows(self, positions: Sequence[int] | I64, epoch: int = 0) -> list[Any]:
        """Return the samples at some positions. Needs random access.

        Args:
            positions: Positions in [0, len(self)), in any order.
            epoch: Epoch whose order is used: a shuffle has another order in each.

        Raises:
            TypeError: If the pipeline is a stream.
            IndexError: If a position is out of range.
            SampleError: If user code raises on one of the samples.

        >>> import midstream as ms
        >>> ms.from_dataset([10, 20, 30]).map(lambda x: x + 1).rows([2, 0])
        [31, 11]
        """
        if not self.node.random_access:
            raise TypeError(
                f"only a random-access pipeline has rows; this one is a stream:\n{self!r}"
            )
        array = np.asarray(positions, dtype=np.int64).reshape(-1)
        length = self.node.length()
        if array.size and (array.min() < 0 or (length is not None and array.max() >= length)):
            raise IndexError(
                f"positions are in [0, {length}); found {array.min()} to {array.max()}"
            )
        if not array.size:
            return []
        samples = (
            bind(self.node).rows(array, epoch_key(epoch), np.array([epoch], dtype=np.int64)).samples
        )
        for sample in samples:
            if isinstance(sample, FailedSample):
                raise sample.errors[0].error()
        return samples

    def row(self, origin: Origin | Sequence[Any]) -> Any:
        """Return the row behind an origin as its source holds it, before any other operation.

        A row of a random-access source is read directly. A source that is a stream is read from the
        start of the row's shard.

        Args:
            origin: From `DataLoader.trace`, a `SampleError` or a quarantine: source, epoch, row.
                Further numbers are ignored.

        Raises:
            ValueError: If the pipeline has no source of that name.
            IndexError: If the source has no such row.
            SampleError: If the row cannot be read.

        >>> import midstream as ms
        >>> ds = ms.from_dataset(["a", "b", "c"], name="letters").shuffle(1).map(str.upper)
        >>> ds.row(ms.Origin("letters", epoch=0, row=2))
        'c'
        """
        source, _, row, *_ = origin
        root = bind(self.node)
        bound = next(
            (
                bound
                for bound in root.walk()
                if bound.source >= 0 and root.names[bound.source] == source
            ),
            None,
        )
        if bound is None:
            raise ValueError(
                f"there is no source {source!r} in this pipeline; its sources:"
                f" {', '.join(root.names)}"
            )
        sample = _row(bound, int(row))
        if type(sample) is FailedSample:
            raise sample.errors[0].error()
        return sample

    def _describe(self) -> str:
        return f"this dataset ({self.node.summary()} of {', '.join(bind(self.node).names)})"

    def state_dict(self) -> State:
        """Return the state of the iteration in progress, or of its start before any.

        Plain values, fresh each time. It holds positions and counters, never samples.

        >>> import midstream as ms
        >>> ds = ms.from_dataset(range(5))
        >>> run = iter(ds)
        >>> next(run), next(run)
        (0, 1)
        >>> state = ds.state_dict()
        >>> ds.load_state_dict(state)
        >>> list(ds)
        [2, 3, 4]
        """
        loaded = self._loaded
        if loaded is not None:
            return copy_plain(loaded)
        reference = self._run
        run = reference() if reference is not None else None
        left = self._left
        if run is None and left is not None:
            return copy_plain(left)
        if run is None:
            worker = get_worker_info()
            index, num_lanes = (worker.id, worker.num_workers) if worker is not None else (0, 1)
            run = SingleLaneIterator(self.node, index, num_lanes, self._epoch)
        return run.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Make the next ``iter()`` continue from ``state``. Applied once.

        Args:
            state: What `state_dict` returned.

        Raises:
            CheckpointError: If another pipeline wrote it, or it is no such state.
        """
        check_run_state(self.node, state)
        self._loaded = copy_plain(state)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next fresh ``iter()``. A loaded state brings its own epoch.

        Args:
            epoch: From 0. Shuffles have another order in each epoch.

        Raises:
            ValueError: If ``epoch`` is no integer of at least 0.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"epoch is an integer of at least 0; found {epoch!r}")
        if not self._warned and divided_by_trainer(self._describe, sys._getframe(1)):
            self._warned = True
        self._epoch = epoch

    def preview(self, n: int = 5) -> Preview:
        """Return the first samples as a table, with their origins.

        Changes no position, no state and no random generator.

        Args:
            n: Number of samples, at most. A sample that user code raises on is shown as its error.

        >>> import midstream as ms
        >>> rows = [{"id": i, "text": "ab" * i} for i in range(9)]
        >>> print(ms.from_dataset(rows, name="web").shuffle(1).preview(2))
        origin  id  text
        web[8]  8   'abababababababab'
        web[6]  6   'abababababab'
        """
        return preview(self.node, n)

    def _repr_html_(self) -> str:
        return tree_html(self.node)

    def shuffle(
        self, seed: int = 0, *, buffer_size: int | None = None, window_blocks: int | None = 16
    ) -> Dataset:
        """Put the samples in random order, a new one in every epoch and every pass of a `repeat`.

        Without ``buffer_size`` the result is random access: a permutation of all samples, computed
        by a formula in constant memory. With ``buffer_size`` the result is a stream: samples are
        held back, and none moves further than the buffer.

        Args:
            seed: Any integer. Two shuffles with one seed, in one pipeline, have different orders.
            buffer_size: Samples held back, summed over all lanes of the run. Needed over a stream.
                A resume reads about as many again.
            window_blocks: For sources that decode a block of rows at once (parquet row groups): how
                many blocks are mixed with each other. None: all of them.

        Raises:
            TypeError: If the input is a stream and ``buffer_size`` is not given.
            ValueError: If the input never ends and ``buffer_size`` is not given, or a number is
                below 1.

        >>> import midstream as ms
        >>> sorted(ms.from_dataset(range(5)).shuffle(seed=3))
        [0, 1, 2, 3, 4]
        """
        if buffer_size is None:
            return Dataset(Shuffle(self.node, seed, window_blocks))
        return Dataset(BufferedShuffle(self.node, seed, buffer_size))

    def map(
        self,
        fn: Callable[..., Any],
        *,
        with_rng: bool = False,
        isolate_rng: bool = False,
        seed: int = 0,
        on_error: OnError = "raise",
        max_errors: int | ErrorRate | None = None,
        quarantine: str | os.PathLike[str] | None = None,
        batched: bool = False,
        batch_size: int = 1000,
    ) -> Dataset:
        """Replace every sample by ``fn(sample)``.

        The result is random access where the input is. It is a stream with ``batched=True`` or
        ``on_error="refill"``.

        Args:
            fn: Returns the new sample. It replaces the old one, it is not merged into it. None is
                an error: to drop samples, use `filter`.
            with_rng: Call ``fn(sample, rng)`` with a ``numpy.random.Generator`` that depends on
                ``seed`` and the sample's origin. It draws the same numbers after any resume.
            isolate_rng: Seed the global generators of torch, numpy and ``random`` in the same way
                for the call, and restore them after it. For augmentations that draw from them.
            seed: Seed of ``with_rng`` and ``isolate_rng``.
            on_error: What to do when ``fn`` raises. ``"raise"``: raise `SampleError`; the next
                ``next()`` continues with the sample after it. ``"skip"``: drop the sample and count
                it; its batch is shorter. ``"refill"``: the same, but batches stay full.
            max_errors: With skip and refill: raise `TooManyErrors` after more than this many. A
                `midstream.ErrorRate` limits the share of failures among recent samples instead.
            quarantine: With skip and refill: folder to which every process writes the skipped
                samples, with origin, traceback and a preview. See `midstream.read_quarantine`.
            batched: Call ``fn`` with ``batch_size`` samples at once, as a dict of lists; as a list
                where samples are not dicts. It returns a dict of columns or a list of samples, of
                any length. When it raises, the whole group is lost.
            batch_size: With ``batched``: samples in a group. A resume reads a group again.

        Raises:
            TypeError: If ``fn`` is not callable.
            ValueError: If an option has no such value, ``max_errors`` or ``quarantine`` is given
                with ``on_error="raise"``, or a generator is requested with ``batched``.

        >>> import midstream as ms
        >>> list(ms.from_dataset([1, 2, 3]).map(lambda x: x * 10))
        [10, 20, 30]
        >>> rows = ms.from_dataset([{"text": "a b"}, {"text": "c"}])
        >>> def split(batch): return {"word": " ".join(batch["text"]).split()}
        >>> list(rows.map(split, batched=True, batch_size=2))
        [{'word': 'a'}, {'word': 'b'}, {'word': 'c'}]
        """
        errors = ErrorPolicy(on_error, max_errors, _path(quarantine))
        if batched:
            if with_rng or isolate_rng:
                raise ValueError(
                    "map: batched=True has no generator per sample; draw in a map without it, or"
                    " seed by what is in the batch"
                )
            return Dataset(MapBatched(self.node, fn, batch_size, errors))
        return Dataset(Map(self.node, fn, with_rng, isolate_rng, seed, errors))

    def filter(
        self,
        fn: Callable[[Any], Any],
        *,
        on_error: Literal["raise", "skip"] = "raise",
        max_errors: int | ErrorRate | None = None,
        quarantine: str | os.PathLike[str] | None = None,
    ) -> Dataset:
        """Keep the samples for which ``fn(sample)`` is true. The result is a stream.

        Dropped samples are counted by source (`DataLoader.progress`). A warning is given when fewer
        than 1 % of the first 1,000 samples pass. Over an endless input, 100,000 samples in a row
        that do not pass raise `SourceError`.

        Args:
            fn: The predicate.
            on_error: See `map`.
            max_errors: See `map`.
            quarantine: See `map`.

        Raises:
            TypeError: If ``fn`` is not callable.
            ValueError: As for `map`.

        >>> import midstream as ms
        >>> list(ms.from_dataset(range(6)).filter(lambda x: x % 2))
        [1, 3, 5]
        """
        return Dataset(Filter(self.node, fn, ErrorPolicy(on_error, max_errors, _path(quarantine))))

    def flat_map(
        self,
        fn: Callable[[Any], Iterable[Any]],
        *,
        on_error: Literal["raise", "skip"] = "raise",
        max_errors: int | ErrorRate | None = None,
        quarantine: str | os.PathLike[str] | None = None,
    ) -> Dataset:
        """Replace every sample by the samples that ``fn`` returns: none, one or many.

        The result is a stream. Samples of which nothing is left are counted by source.

        Args:
            fn: Returns an iterable of samples; it may be a generator function. All of them are held
                in memory until they are passed on.
            on_error: See `map`.
            max_errors: See `map`.
            quarantine: See `map`.

        Raises:
            TypeError: If ``fn`` is not callable.
            ValueError: As for `map`, or if ``flat_map``, ``pack`` and ``map(batched=True)`` are
                more than three deep.

        >>> import midstream as ms
        >>> list(ms.from_dataset(["ab", "", "c"]).flat_map(list))
        ['a', 'b', 'c']
        """
        return Dataset(FlatMap(self.node, fn, ErrorPolicy(on_error, max_errors, _path(quarantine))))

    def pack(
        self,
        seq_len: int,
        *,
        mode: Literal["concat", "fit"] = "concat",
        overflow: Literal["split", "truncate", "drop", "error"] = "split",
        key: str = "input_ids",
        columns: Sequence[str] = (),
        mask: str | None = None,
        separator: int | Sequence[int] | None = None,
        pad_id: int = 0,
        last: Literal["pad", "drop"] = "pad",
        window: int | None = None,
        min_fill: float | None = None,
    ) -> Dataset:
        """Pack tokenized documents into rows of ``seq_len`` tokens to train a language model.

        The result is a stream of dicts of numpy arrays: ``input_ids``, ``labels`` and
        ``position_ids``, each of shape [seq_len], and ``seq_lens``, the tokens of each document (or
        part of one) in the row. Labels are not shifted. They are -100 on padding and on the first
        token of each document, which would be predicted from another one. Use
        `midstream.document_mask` for attention within documents.

        Args:
            seq_len: Tokens per row.
            mode: ``"concat"``: join documents and cut at every ``seq_len`` tokens. ``"fit"``: cut
                no document that fits in a row, and pad.
            overflow: What happens to documents longer than ``seq_len``, separator included:
                ``"split"`` over rows, ``"truncate"``, ``"drop"`` or ``"error"``. Each is counted.
            key: Column of token ids. A sample that is not a dict is itself the token ids.
            columns: Further columns with one value per token, packed in the same way. They are 0 on
                padding; on a separator they have the document's last value.
            mask: Column with one value per token; where it is 0 the label is -100.
            separator: Token id or ids appended to every document.
            pad_id: Value of ``input_ids`` on padding.
            last: Whether to ``"pad"`` or ``"drop"`` the partial row at the end of a lane. Counted.
            window: For ``"fit"``: documents of a lane that are packed together. Default 256, at
                most 1,024.
            min_fill: For ``"fit"``: rows filled less than this share wait, once, for the next
                window. Default 0.95.

        Raises:
            TypeError: If an argument has another type.
            ValueError: If an option has no such value, or a number is out of range.

        >>> import midstream as ms
        >>> row = next(iter(ms.from_dataset([[11, 12, 13], [21, 22], [31]]).pack(4)))
        >>> row["input_ids"].tolist(), row["labels"].tolist()
        ([11, 12, 13, 21], [-100, 12, 13, -100])
        >>> row["position_ids"].tolist(), row["seq_lens"].tolist()
        ([0, 1, 2, 0], [3, 1])
        """
        ids = (
            ()
            if separator is None
            else (separator,)
            if not isinstance(separator, Iterable)
            else tuple(separator)
        )
        return Dataset(
            Pack(
                self.node,
                PackOptions(
                    seq_len,
                    mode,
                    overflow,
                    key,
                    tuple(columns),
                    mask,
                    ids,
                    pad_id,
                    last,
                    window,
                    min_fill,
                ),
            )
        )

    def track(self, **metrics: Callable[[Any], float] | Metric) -> Dataset:
        """Collect metrics of the samples, per source and in total. Changes no sample.

        Read them with `DataLoader.progress`. The result is random access where the input is. Totals
        are saved in the checkpoint, at most 1 KB per source and metric, once per rank. They are the
        same to the last bit for any number of ranks, workers and resumes.

        When a sample counts:

        - If the pipeline is random access from here on: when its batch is delivered, or when it
          fails in a later operation.
        - In a stream: when it passes this point. Operations that hold samples back (a buffered
          shuffle, `pack`) let it pass before it is delivered. To measure what the model saw, call
          ``track`` right before `batch` or `pack`.

        A sample made of rows of several sources, such as a mixed batch, counts in the total only.
        Without `midstream.DataLoader` no totals are kept.

        Args:
            **metrics: By name, one of: a function of a sample (count, sum, mean, min and max of the
                values it returns), `midstream.distribution` of a function (quantiles too), or
                `midstream.count` of a function (how often each value occurred).

        Raises:
            ValueError: If no metric is given, or an earlier ``track`` has one of the same name.
            TypeError: If a metric is not a function.

        >>> import midstream as ms
        >>> docs = ms.from_dataset([{"ids": [1, 2, 3]}, {"ids": [4]}], name="docs")
        >>> ds = docs.track(tokens=lambda row: len(row["ids"]))
        >>> loader = ms.DataLoader(ds, batch_size=2, collate_fn=list)
        >>> for batch in loader:
        ...     pass
        >>> loader.progress().sources["docs"].metrics["tokens"]
        {'count': 2, 'sum': 4, 'mean': 2, 'min': 1, 'max': 3}
        """
        return Dataset(Track.of(self.node, metrics))

    def repeat(self, num_epochs: int | None = None) -> Dataset:
        """Read the data ``num_epochs`` times, or without end.

        The result is random access where the input is. Every shuffle before it has a new order in
        each pass.

        Args:
            num_epochs: Number of passes; None: no end.

        Raises:
            ValueError: If ``num_epochs`` is below 1, or the input never ends.

        >>> import midstream as ms
        >>> list(ms.from_dataset([1, 2]).repeat(2))
        [1, 2, 1, 2]
        """
        return Dataset(Repeat(self.node, num_epochs))

    def take(self, n: int) -> Dataset:
        """Keep the first ``n`` samples.

        The result is random access where the input is. On a stream every lane takes its share of
        ``n``.

        Args:
            n: Number of samples, at most.

        Raises:
            ValueError: If ``n`` is below 0.

        >>> import midstream as ms
        >>> list(ms.from_dataset(range(9)).take(2))
        [0, 1]
        """
        return Dataset(Take(self.node, n))

    def skip(self, n: int) -> Dataset:
        """Leave out the first ``n`` samples.

        The result is random access where the input is. On a stream every lane skips its share of
        ``n``.

        Args:
            n: Number of samples.

        Raises:
            ValueError: If ``n`` is below 0.

        >>> import midstream as ms
        >>> list(ms.from_dataset(range(4)).skip(2))
        [2, 3]
        """
        return Dataset(Skip(self.node, n))

    def batch(
        self,
        batch_size: int,
        *,
        drop_last: bool = False,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> Dataset:
        """Group samples into batches.

        The result is random access where the input is. `midstream.DataLoader` with ``batch_size``
        does this for you.

        Args:
            batch_size: Samples per batch.
            drop_last: Drop and count the last batch when it is smaller. On a stream, the last batch
                of each lane.
            collate_fn: Makes a batch of a list of samples. The default follows torch's rules. For
                samples of different lengths use `midstream.pad`.

        Raises:
            TypeError: If ``collate_fn`` is not callable.
            ValueError: If ``batch_size`` is below 1.

        >>> import midstream as ms
        >>> list(ms.from_dataset([1, 2, 3]).batch(2))
        [tensor([1, 2]), tensor([3])]
        """
        return Dataset(Batch(self.node, batch_size, drop_last, collate_fn))


def _row(bound: BoundNode, row: int) -> Any:
    """Read one row of a source: the sample, or a `FailedSample`."""
    node = bound.node
    if node.random_access:
        length = node.length()
        if not 0 <= row < (length or 0):
            raise IndexError(
                f"source {bound.names[bound.source]!r} has the rows 0 to {(length or 0) - 1}; found"
                f" {row}"
            )
        return bound.rows(
            np.array([row], dtype=np.int64), epoch_key(0), np.zeros(1, dtype=np.int64)
        ).samples[0]
    limit = node.max_lanes()
    shards = limit[0] if limit is not None else 1
    # One lane for each shard: row r of shard s is row r * shards + s.
    for sample, origins in iterate(
        bound, Lane(row % shards, shards, 1, Ledger(writes=False)), 0, 0
    ):
        if origins[2] == row:
            return sample
        if origins[2] > row:
            break
    raise IndexError(f"source {bound.names[bound.source]!r} has no row {row}")


def _path(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else os.fspath(path)


def node_of(dataset: Any, where: str) -> Node:
    """The node of a dataset.

    Args:
        dataset: What a user passed.
        where: The function it was passed to, for the error.

    Raises:
        TypeError: If it is none; the error says how to make one.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{where} takes midstream datasets; found {type(dataset).__name__}. Wrap data with"
            " midstream.from_dataset(data), a stream with midstream.from_iterable(make, name=...),"
            " a node of your own with midstream.Dataset(node)."
        )
    return dataset.node
