"""Dataset: what users hold: a node, its verbs, and reading it without a loader."""

from __future__ import annotations

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
    """An immutable description of a stream of samples, and what can be done with it."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._epoch = 0
        self._divided = False
        self._waiting: State = None
        self._left: State = None
        self._run: Any = None

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
        """16 hexadecimal digits: the hash of `spec`. Datasets are equal when their fingerprints
        are.
        """
        return describe.fingerprint(self.node)

    @property
    def random_access(self) -> bool:
        """See `Node.random_access`."""
        return self.node.random_access

    @property
    def batch_rows(self) -> int | None:
        """See `Node.batch_rows`."""
        return self.node.batch_rows

    def spec(self) -> dict[str, State]:
        """The pipeline as plain data: nodes, names, seeds, weights, lengths.

        A callable is recorded by its name only, so that editing a file does not void a checkpoint.
        """
        return describe.spec(self.node)

    def access(self) -> str:
        """See `Node.access`."""
        return describe.access(self.node)

    def __len__(self) -> int:
        """Number of samples of an epoch.

        Raises:
            TypeError: If it cannot be known without reading, or there is no end.
        """
        if not self.node.random_access:
            raise TypeError(f"the length of this pipeline is known only by reading it:\n{self!r}")
        length = self.node.length()
        if length is None:
            raise TypeError(f"this pipeline has no end, so it has no length:\n{self!r}")
        return length

    def __iter__(self) -> SingleLaneIterator:
        """Read the samples in the order of a single lane, from the start or from a loaded state.

        In a worker of a bare StatefulDataLoader the worker is a lane.
        """
        if not self._divided and divided_by_nobody(self._in_words, sys._getframe(1)):
            self._divided = True
        worker = get_worker_info()
        index, num_lanes = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        run = SingleLaneIterator(self.node, index, num_lanes, self._epoch)
        waiting = self._waiting
        if waiting is not None:
            run.load_state_dict(waiting)
            self._waiting = None
        # Weak, for a cycle would keep open streams alive until the collector comes by, in whatever
        # thread.
        self._run = weakref.ref(run)
        self._left = None
        mine = weakref.ref(self)

        def keep(ended: SingleLaneIterator) -> None:
            owner = mine()
            if (
                owner is not None
                and owner._run is not None
                and owner._run() in (ended, None)
                and owner._left is None
            ):
                owner._left = ended.state_dict()

        run.on_end = keep
        return run

    def rows(self, positions: Sequence[int] | I64, epoch: int = 0) -> list[Any]:
        """The samples at some positions of a random-access pipeline.

        Args:
            positions: Positions in [0, len(self)).
            epoch: Which epoch's order to look at.

        Raises:
            TypeError: If the pipeline is a stream.
            IndexError: If a position is out of range.
            SampleError: If user code raises on one of them.

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
        """The raw row behind an origin: what its source holds, before any node.

        Args:
            origin: As `DataLoader.trace`, a `SampleError` or a quarantine tells it: source, epoch,
                row (further numbers do not matter here).

        Raises:
            ValueError: If the pipeline has no source of that name.
            IndexError: If the source has no such row.
            SampleError: If the row cannot be read.

        A source that is a stream is read from the start of the row's shard.

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

    def _in_words(self) -> str:
        return f"this dataset ({self.node.summary()} of {', '.join(bind(self.node).names)})"

    def state_dict(self) -> State:
        """The state of the iteration in progress (or, before any, of its start). Plain values,
        fresh each time.
        """
        waiting = self._waiting
        if waiting is not None:
            return copy_plain(waiting)
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
        """Let the next ``iter()`` continue from ``state``. Applied once.

        Raises:
            CheckpointError: If another pipeline wrote it.
        """
        check_run_state(self.node, state)
        self._waiting = copy_plain(state)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next fresh ``iter()`` (a loaded state brings its own)."""
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"epoch is an integer of at least 0; found {epoch!r}")
        if not self._divided and divided_by_trainer(self._in_words, sys._getframe(1)):
            self._divided = True
        self._epoch = epoch

    def preview(self, n: int = 5) -> Preview:
        """The first samples as a table, with their origins. Changes nothing: no position, no state, no random generator.

        Args:
            n: Samples, at most. One that user code fails on is shown as its error.

        >>> import midstream as ms
        >>> print(ms.from_dataset([{"id": i, "text": "ab" * i} for i in range(9)], name="web").shuffle(1).preview(2))
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
        """Shuffle: globally by a formula, or with ``buffer_size`` a stream, in bounded memory.

        Args:
            seed: Any integer. Every epoch and every pass of a ``repeat`` has its own order.
            buffer_size: Samples held back, over the whole run; needed for streams.
            window_blocks: Over sources with blocks larger than a row (parquet row groups): how many
                blocks are mixed with each other; None for a full permutation.

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
        """Replace every sample by ``fn(sample)``, or ``fn(sample, rng)`` with ``with_rng=True``.

        Args:
            fn: What it returns replaces the sample; None is an error.
            with_rng: Pass a ``numpy.random.Generator`` keyed by (seed, origin): the same after any
                resume.
            isolate_rng: Seed the global torch, numpy and random generators the same way around the
                call, and put them back after it: for augmentations that draw from them.
            seed: For the two above.
            on_error: ``"raise"``; ``"skip"``: the sample is left out and counted, its batch is
                shorter; ``"refill"``: the same, and batches stay full (makes the pipeline a
                stream).
            max_errors: With skip and refill: more than so many raise `TooManyErrors`;
                `midstream.ErrorRate` for a part of the last samples.
            quarantine: With skip and refill: a folder in which every process writes what it
                skipped, with origin, traceback and a preview (`midstream.read_quarantine`).
            batched: Give ``fn`` ``batch_size`` samples at once, as a dict of lists (samples that
                are no dicts: as a list); it returns a dict of columns, or a list of samples, of any
                number of rows. They replace the group's samples. Makes the pipeline a stream; a
                group is lost whole when ``fn`` raises.
            batch_size: For batched: samples in a group, which a resume reads again.

        Raises:
            ValueError: With batched, if an rng is asked for too.

        >>> import midstream as ms
        >>> list(ms.from_dataset([1, 2, 3]).map(lambda x: x * 10))
        [10, 20, 30]
        >>> rows = ms.from_dataset([{"text": "a b"}, {"text": "c"}])
        >>> list(rows.map(lambda batch: {"word": " ".join(batch["text"]).split()}, batched=True, batch_size=2))
        [{'word': 'a'}, {'word': 'b'}, {'word': 'c'}]
        """
        if batched:
            if with_rng or isolate_rng:
                raise ValueError(
                    "map: batched=True has no generator per sample; draw in a map without it, or"
                    " seed by what is in the batch"
                )
            return Dataset(
                MapBatched(self.node, fn, batch_size, on_error, max_errors, _path(quarantine))
            )
        return Dataset(
            Map(self.node, fn, with_rng, isolate_rng, seed, on_error, max_errors, _path(quarantine))
        )

    def filter(
        self,
        fn: Callable[[Any], Any],
        *,
        on_error: Literal["raise", "skip"] = "raise",
        max_errors: int | ErrorRate | None = None,
        quarantine: str | os.PathLike[str] | None = None,
    ) -> Dataset:
        """Keep the samples for which ``fn(sample)`` is true; what is dropped is counted. For the other arguments see `map`.

        >>> import midstream as ms
        >>> list(ms.from_dataset(range(6)).filter(lambda x: x % 2))
        [1, 3, 5]
        """
        return Dataset(Filter(self.node, fn, on_error, max_errors, _path(quarantine)))

    def flat_map(
        self,
        fn: Callable[[Any], Iterable[Any]],
        *,
        on_error: Literal["raise", "skip"] = "raise",
        max_errors: int | ErrorRate | None = None,
        quarantine: str | os.PathLike[str] | None = None,
    ) -> Dataset:
        """Replace every sample by the samples ``fn`` returns: none, one or many. For the other arguments see `map`.

        >>> import midstream as ms
        >>> list(ms.from_dataset(["ab", "", "c"]).flat_map(list))
        ['a', 'b', 'c']
        """
        return Dataset(FlatMap(self.node, fn, on_error, max_errors, _path(quarantine)))

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
        """Pack tokenized documents into rows of ``seq_len`` tokens: what a language model trains on.

        Args:
            seq_len: Tokens per row.
            mode: ``"concat"`` joins documents and cuts them at every ``seq_len`` tokens; ``"fit"``
                cuts no document that fits in a row, and pads.
            overflow: What becomes of documents longer than ``seq_len`` (separator included): all
                counted.
            key: The column of token ids; a sample that is no dict is its tokens itself.
            columns: Further columns of one value per token, packed alongside (0 on padding, on a
                separator the document's last value).
            mask: A column of one value per token: where it is 0 the label is -100.
            separator: Token id or ids put after every document, as part of it.
            pad_id: What ``input_ids`` has on padding.
            last: Whether the partial row at the end of a lane is padded or dropped, and counted.
            window: ``"fit"``: documents looked at together, in a lane; default 256, at most 1,024.
            min_fill: ``"fit"``: rows filled less than this wait, once, for the next window; default
                0.95.

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
        """Gather metrics of the samples, by source and over all: in `DataLoader.progress`, exact under resume.

        Changes no sample. The totals travel in the checkpoint (at most 1 KB per source and metric,
        once per rank) and are the same to the last bit on any ranks, workers and resumes.

        Args:
            **metrics: By name: a function of a sample (count, sum, mean, min and max of what it
                returns), `midstream.distribution` of one (quantiles too), or `midstream.count` of
                one (how often each value came).

        Where the pipeline has random access from here on, a sample counts when its batch is
        delivered (or when it fails further on); in a stream when it comes by here, which nodes that
        hold samples back (a buffered shuffle, ``pack``) do before it is delivered. To have what the
        model saw, put it right before ``batch`` or ``pack``. A sample made of rows of several
        sources (a mixed batch, say) counts over all only. A bare dataset (without
        `midstream.DataLoader`) keeps no totals.

        Raises:
            ValueError: If there is no metric, or one of that name further down.
            TypeError: If one is no function.

        >>> import midstream as ms
        >>> ds = ms.from_dataset([{"ids": [1, 2, 3]}, {"ids": [4]}], name="docs").track(tokens=lambda row: len(row["ids"]))
        >>> loader = ms.DataLoader(ds, batch_size=2, collate_fn=list)
        >>> for batch in loader:
        ...     pass
        >>> loader.progress().sources["docs"].metrics["tokens"]
        {'count': 2, 'sum': 4, 'mean': 2, 'min': 1, 'max': 3}
        """
        return Dataset(Track.of(self.node, metrics))

    def repeat(self, num_epochs: int | None = None) -> Dataset:
        """Go through the data ``num_epochs`` times, for ever when None; shuffles below draw a new order each pass.

        >>> import midstream as ms
        >>> list(ms.from_dataset([1, 2]).repeat(2))
        [1, 2, 1, 2]
        """
        return Dataset(Repeat(self.node, num_epochs))

    def take(self, n: int) -> Dataset:
        """The first ``n`` samples. On a stream every lane takes its share of them.

        >>> import midstream as ms
        >>> list(ms.from_dataset(range(9)).take(2))
        [0, 1]
        """
        return Dataset(Take(self.node, n))

    def skip(self, n: int) -> Dataset:
        """All but the first ``n`` samples. On a stream every lane skips its share of them.

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

        Args:
            batch_size: Samples per batch.
            drop_last: Leave out the last batch when it is smaller (on a stream: of each lane),
                counted.
            collate_fn: Makes a batch of a list of samples; by default torch's rules.
                `midstream.pad` is the ready answer for samples of different lengths.

        >>> import midstream as ms
        >>> list(ms.from_dataset([1, 2, 3]).batch(2))
        [tensor([1, 2]), tensor([3])]
        """
        return Dataset(Batch(self.node, batch_size, drop_last, collate_fn))


def _row(bound: BoundNode, row: int) -> Any:
    """A row of a source, or a `FailedSample`."""
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
