"""DataLoader: the class that users call. The work is done in other files.

loader/arguments.py   what the constructor's arguments mean
loader/run.py         where the run stands between passes: epoch, changes, loaded state
loader/checks.py      topologies and lanes that cannot be served
workers/pool.py       the readers: in this process, in threads, in processes
loader/iterator.py    one pass: messages of the readers in, batches out
loader/position.py    the position within an epoch, and how to undo the last messages
loader/render.py      a position as a checkpoint
loader/trainers.py    hooks that Lightning, Fabric and Accelerate look for
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any, Literal

import torch
from torch.utils.data.dataloader import _InfiniteConstantSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from midstream.checkpoint.progress import Progress, progress
from midstream.common.tables import MONO
from midstream.common.validation import require_int
from midstream.dataset import Dataset
from midstream.errors import Origin
from midstream.loader.arguments import (
    COMMON,
    ORDER,
    OWN,
    PASSED_THROUGH,
    Settings,
    build_pipeline,
    check_arguments,
    check_threads,
    runs_here,
)
from midstream.loader.checks import check_topology
from midstream.loader.iterator import LoaderIterator, Pass
from midstream.loader.position import Position, Trace
from midstream.loader.run import Run
from midstream.loader.trainers import (
    LIGHTNING_ALONE,
    AccelerateIterator,
    EpochHint,
    asked_by,
    not_registered,
    samples_of_last_round,
)
from midstream.pipeline import describe
from midstream.pipeline.passes import require_epochs
from midstream.sources import from_dataset
from midstream.workers.pool import Pool, Readers
from midstream.workers.processes import quiet_vital
from midstream.workers.readers import Runner
from midstream.workers.threads import Launch


class DataLoader(StatefulDataLoader):  # type: ignore[misc]
    """A drop-in ``torch.utils.data.DataLoader`` that resumes mid-stream, exactly.

    Takes a midstream dataset, or map-style data as torch does. The sequence of batches depends on
    the dataset, its seed, the epoch, the batch size and the number of lanes. It does not depend on
    the number of workers or how they are started.

    ``state_dict()`` may be called at any time and costs microseconds. ``load_state_dict()`` takes a
    state that was saved with any number of workers. Worker processes are not stopped by
    SIGINT, SIGTERM, SIGUSR1 and SIGUSR2, and end with the main process. The epoch in progress is `epoch`:

        for epoch in range(loader.epoch, num_epochs):
            for batch in loader:
                ...

    Args:
        dataset: A midstream dataset, or map-style data (with ``__len__`` and ``__getitem__``),
            which is lifted to ``from_dataset(data)``. With a ``sampler``, ``batch_sampler`` or
            ``generator``, and for other iterables, all arguments are passed to torchdata's
            ``StatefulDataLoader`` unchanged, and only its promises hold.
        batch_size: Samples per batch; None for no batches. Leave it out where the pipeline already
            ends in ``.batch``.
        shuffle: Shuffle with the seed ``torch.initial_seed()``, which is kept in the checkpoint.
        lanes: Number of logical sub-streams that the run is divided into. Fixed by the first run;
            by default 48, or what the sources and ranks need.
        rank: The data-parallel rank of this process. By default that of ``torch.distributed``, or
            the environment variable ``RANK``.
        world_size: Number of data-parallel ranks; likewise, ``WORLD_SIZE``.
        remainder: What to do with the last batches of a sized pipeline, where there are not enough
            for all ranks. ``"drop"`` leaves them out and counts them in `progress`. ``"pad"`` fills
            up with the first batches again, marked in `trace`. ``"uneven"`` lets some ranks make
            one batch more.
        strict_order: Refuse a number of ranks that does not divide the lanes of a stream: every
            sample would still come exactly once, but in another order.
        sync_end: End the epoch of a stream on all ranks at the same step. What some ranks have left
            is in the state and comes first in the next epoch. True, or the process group of the
            data-parallel ranks (any backend that takes CPU tensors). Costs one all-reduce of a
            number before each batch.
        worker_type: ``"process"``, or ``"thread"``: the ``num_workers`` readers are threads of this
            process, for reading that waits or works outside the GIL; see
            `midstream.workers.threads`. Order and checkpoints are the same.
        prefetch_factor: Batches that each worker has ready, by default 2; up to eight times as many
            where batches are small and quickly made. With ``num_workers=0``, one thread reads this
            many batches ahead while the model trains.
        collate_fn, drop_last, num_workers, ...: As in torch. ``in_order=False`` is refused.

    Raises:
        ValueError: On arguments that contradict each other or the pipeline.

    >>> import midstream as ms
    >>> loader = ms.DataLoader(ms.from_dataset(range(10)).shuffle(seed=1), batch_size=4)
    >>> batches = iter(loader)
    >>> first = next(batches)
    >>> state = loader.state_dict()
    >>> rest = list(batches)
    >>> loader.load_state_dict(state)
    >>> all(a.equal(b) for a, b in zip(loader, rest)), len(loader)
    (True, 3)
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Any = None,
        batch_sampler: Any = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        generator: torch.Generator | None = None,
        *,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        in_order: bool = True,
        snapshot_every_n_steps: int | None = 1,
        lanes: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        remainder: Literal["drop", "pad", "uneven"] = "drop",
        strict_order: bool = False,
        sync_end: Any = False,
        worker_type: Literal["process", "thread"] = "process",
    ) -> None:
        if isinstance(sampler, _InfiniteConstantSampler):
            # torch puts it in place of none; whoever rebuilds a loader from its attributes sees it.
            sampler = None
        given = dict(locals())
        common = {name: given[name] for name in COMMON}
        order = {name: given[name] for name in ORDER}
        own = {name: given[name] for name in OWN}
        if worker_type not in ("process", "thread"):
            raise ValueError(f"worker_type is 'process' or 'thread'; found {worker_type!r}")
        self._run: Run | None = None  # None: the arguments are passed to torchdata unchanged
        self._on_device: bool | None = None  # prepared by Accelerate: whether batches go there
        batching = (batch_size, shuffle, drop_last, collate_fn)
        if runs_here(dataset, **order):
            check_arguments(own, common, order)
            self._read_here(dataset, batching, common, own)
        else:
            self._pass_through(dataset, batching, common, order, own)

    def _pass_through(
        self,
        dataset: Any,
        batching: tuple[Any, Any, Any, Any],
        common: dict[str, Any],
        order: dict[str, Any],
        own: dict[str, Any],
    ) -> None:
        """Pass all arguments to torchdata's loader unchanged."""
        if own["worker_type"] == "thread":
            raise TypeError(PASSED_THROUGH.format("worker_type='thread'"))
        batch_size, shuffle, drop_last, collate_fn = batching
        with quiet_vital():
            super().__init__(
                dataset,
                batch_size,
                shuffle,
                collate_fn=collate_fn,
                drop_last=drop_last,
                **order,
                **common,
            )
        self.__dict__.update(own)

    def _read_here(
        self,
        dataset: Any,
        batching: tuple[Any, Any, Any, Any],
        common: dict[str, Any],
        own: dict[str, Any],
    ) -> None:
        """Read a midstream pipeline, or data that is lifted to one."""
        if common["num_workers"] == 0 and common["prefetch_factor"] is not None:
            own["prefetch_factor"] = common["prefetch_factor"]
            common["prefetch_factor"] = None  # torch knows it only for processes
        source = dataset if isinstance(dataset, Dataset) else from_dataset(dataset)
        pipeline, batch_size, drop_last, collate_fn, seed_from_torch = build_pipeline(
            source, *batching, torch.initial_seed()
        )
        with quiet_vital():
            super().__init__(source, None, collate_fn=collate_fn, **common)
        # torch refuses to set these after its constructor, and has other uses for them inside it.
        self.__dict__.update(own, batch_size=batch_size, drop_last=drop_last, collate_fn=collate_fn)
        self.__dict__["sampler"] = EpochHint(self)
        settings = Settings(*(getattr(self, name) for name in Settings._fields))
        self._run = Run(pipeline.node, settings, seed_from_torch)
        self._pool = Pool(self._run.log_once)
        self._started: tuple[Any, Position, Readers | Launch] | None = None
        require_epochs(self._run.running.bound)
        if self._pool.in_threads(self):
            check_threads(self._run.running.bound)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in Settings._fields and (run := self.__dict__.get("_run")) is not None:
            run.settings = run.settings._replace(**{name: value})

    def __copy__(self) -> DataLoader:
        """A loader that stands where this one does, and moves by itself from there."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        if self._run is not None:
            other.__dict__.update(_run=copy.copy(self._run), _pool=copy.copy(self._pool))
        return other

    @property
    def passes_through(self) -> bool:
        """Whether the arguments were passed to torchdata's ``StatefulDataLoader`` unchanged."""
        return self._run is None

    @property
    def run(self) -> Run:
        """Where the run stands: for adapters to trainers, and for tools.

        Raises:
            TypeError: If the arguments were passed to torchdata's loader.
        """
        return self._run_for("run")

    def _run_for(self, what: str) -> Run:
        """The run; an error that names ``what`` where there is none."""
        if self._run is None:
            raise TypeError(PASSED_THROUGH.format(what))
        return self._run

    # -- iterating -------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Batches of an epoch on this rank.

        Raises:
            TypeError: If it is unknown before reading, or there is no end.
        """
        return int(super().__len__()) if self._run is None else self._run.length()

    def __iter__(self) -> Any:
        if self._run is None:
            return super().__iter__()
        batches = LoaderIterator(self._run, self._new_pass(), self._new_pass)
        if self._on_device is None:
            return batches
        run, remainder = self._run, self.remainder
        return AccelerateIterator(
            self,
            batches,
            lambda: batches.position.complete,
            lambda: samples_of_last_round(batches.position, remainder, run.warn_once),
            self._on_device,
        )

    def _new_pass(self) -> Pass:
        """Begin a pass, with readers that were started early where they fit."""
        run, pool = self.run, self._pool
        if self._started is not None and self._fits(self._started[0]):
            (_, position, readers), self._started = self._started, None
        else:
            self._drop_started()
            position, readers = self._open()
        ready = readers.ready()
        pool.readers, self._iterator = ready, ready.iterator
        run.begin(position)
        crumbs = pool.runner.crumbs if pool.runner is not None else None
        return Pass(run, position, ready, crumbs)

    def _open(self, early: bool = False) -> tuple[Position, Readers | Launch]:
        """Start readers where the run stands now."""
        run, pool = self.run, self._pool
        topology = run.topology()
        run.agree_on_seed(topology)
        position, like_last = run.next_position(topology)
        check_topology(
            topology, position.num_lanes, run.settings, run.pipeline, run.sources, run.warn_once
        )
        pipeline = position.pipeline
        if like_last and pool.can_reuse(self, topology, run.running.node):
            pool.reuse(position.epoch)
        else:
            runner = Runner(
                pipeline.node,
                pipeline.paths,
                topology,
                position.num_lanes,
                position.epoch,
                position.plan(),
                run.turns(topology, 0),
            )
            runner.edits = run.changes.weights_set()
            self._iterator = None
            pool.renew(self, runner)
        readers = pool.start(self, pipeline.bound, early)
        if isinstance(readers, Readers):
            self._iterator = readers.iterator
        return position, readers

    def start(self) -> None:
        """Start the workers now, so that they read while the model loads.

        The next ``iter()`` uses them. Changes no state and no batch. Does nothing while an epoch is
        in progress, without workers, or if they are started already; a state that is loaded
        afterwards starts others. With several ranks and ``shuffle=True``, where the ranks have to
        agree on a seed, all of them have to call it.

        >>> import midstream as ms
        >>> data = ms.from_dataset(range(6))
        >>> loader = ms.DataLoader(data, batch_size=3, num_workers=1, worker_type="thread")
        >>> loader.start()
        >>> [batch.tolist() for batch in loader]
        [[0, 1, 2], [3, 4, 5]]
        """
        run, pool = self._run_for("start"), self._pool
        if self.num_workers == 0 and not pool.in_threads(self):
            return
        if run.position is not None and not run.position.complete and run.loaded is None:
            return
        if self._started is not None and self._fits(self._started[0]):
            return
        self._drop_started()
        position, readers = self._open(early=True)
        self._started = self._circumstances(), position, readers

    def _circumstances(self) -> tuple[Any, ...]:
        """Everything that the readers of the next pass depend on."""
        run = self.run
        return (
            run.loaded,
            run.position,
            run.pipeline,
            self._pool.readers,
            run.next_epoch,
            run.topology(),
        )

    def _fits(self, circumstances: tuple[Any, ...]) -> bool:
        """Whether readers that were started under these circumstances are still the right ones."""
        *objects, topology = circumstances
        *now, topology_now = self._circumstances()
        return topology == topology_now and all(a is b for a, b in zip(objects, now))

    def _drop_started(self) -> None:
        started, self._started = self._started, None
        if started is not None:
            started[2].shut()
            self._let_go()  # persistent workers were among them

    def _let_go(self) -> None:
        """The next pass needs other readers."""
        self._pool.let_go()
        self._iterator = None

    def close(self) -> None:
        """Shut the workers down. The position stays; iterating again starts new ones."""
        if self._run is None:
            iterator, self._iterator = self._iterator, None
            if iterator is not None and hasattr(iterator, "_shutdown_workers"):
                iterator._shutdown_workers()
            return
        self._drop_started()
        self._run.active = self._run.must_restart = None
        self._iterator = None
        self._pool.close()

    # -- epochs ----------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch in progress, or the next one when none is.

        After the last batch of epoch e it is e + 1.
        """
        return self._run_for("epoch").epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next ``iter()``.

        A hint that may be given repeatedly. The epoch in progress changes nothing. A loaded state
        that waits is kept. After a load an earlier epoch is ignored with a warning, because some
        trainers count from 0 again.
        """
        if self._run is not None:
            self._run.set_epoch(epoch)
            return
        for part in (self.sampler, getattr(self.batch_sampler, "sampler", None), self.dataset):
            if part is not None and hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    # -- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state after the batch last handed out: plain values, fresh each time.

        Starts no worker. After the last batch of epoch e it is the state before the first batch of
        epoch e + 1.

        Returns:
            A dict in the format described in `midstream.checkpoint`.
        """
        if self._run is None:
            return super().state_dict()  # type: ignore[no-any-return]
        if not self._run.guided and asked_by(
            sys._getframe(1), ".utilities.combined_loader", "_state_dicts"
        ):
            self._run.warn_once("lightning", LIGHTNING_ALONE)
        return self._run.state_dict()

    def state_at(self, step: int) -> dict[str, Any]:
        """The state after batch ``step`` of the epoch last iterated.

        For trainers that fetch more batches than they have trained.

        Args:
            step: Batches of the epoch that count as done, counted like ``steps_done`` of
                `state_dict`.

        Raises:
            ValueError: If it is too old (at least 64, at most 1,024 batches are kept), or not reached yet.
        """
        return self._run_for("state_at").state_at(step)

    def load_state_dict(self, state: Any, strict: bool = True) -> None:
        """Continue from ``state`` with the next ``iter()``. Iterators in use refuse ``next()`` then.

        Args:
            state: A state that ``state_dict()`` returned with any number of workers; a list of the
                states of all ranks; or these merged by `midstream.merge_states`. ``{}`` changes
                nothing. The batch size may have changed: random access continues at the position;
                in a stream every sample still comes exactly once, in another order.
            strict: With False, a mix right below the batch may have other weights, new inputs
                (read from their beginning) or fewer inputs. Other differences are still errors.

        Raises:
            CheckpointError: If the state is damaged, incomplete, or of another pipeline. Nothing is
                loaded then.
        """
        if self._run is None:
            super().load_state_dict(state)
            return
        if isinstance(state, dict) and not state:
            return
        self._run.load(state, strict)
        self._read_anew()
        self.sampler.forget()

    def _read_anew(self) -> None:
        """Drop the readers: the run is no longer where they read."""
        self._drop_started()
        self._let_go()
        self._pool.runner = None

    # -- changes ---------------------------------------------------------------------------------

    def set_weights(self, mix: str, weights: Mapping[str, float]) -> None:
        """Give a mix other weights from the next batch on, in this epoch and all that follow.

        The run continues exactly: no sample is lost or comes twice. The state holds the change, so
        that a checkpoint continues with it in any topology, and `midstream.weights_history` shows
        it. The rest of a schedule no longer applies. Batches that workers have made ahead are made
        again. Call it on every rank, after the same step.

        With random access, the next batch of all ranks is the first by the new weights. In a stream
        it is the next sample that the mix picks in each lane; samples that nodes above it hold
        (``shuffle(buffer_size=...)``, ``pack``) come first. `state_at` and `trace` answer only for
        the batches from here on.

        Args:
            mix: Its name (``interleave(..., name="mix")``) or path.
            weights: By the names of its datasets.

        Raises:
            ValueError: If there is no such mix, the weights do not fit it, or the change cannot be
                exact here, for example below a global shuffle. Nothing is changed then.
        """
        self._run_for("set_weights").set_weights(mix, weights)
        self._read_anew()

    def skip(self, num_batches: int) -> None:
        """Pass over the next batches, for example to get past a loss spike.

        Call it on every rank, after the same step. The batches are read and not handed out. The
        position moves on as if they had been, into the next epoch where this one ends. The state
        counts their samples as ``skipped`` (`SourceProgress.counts`) and in no other number. A
        failure in one of them is counted, not raised. May be called at any time: in a loop, its
        next batch is the one after them; after `load_state_dict` or before the first ``iter()``,
        the next ``iter()`` begins there.

        Args:
            num_batches: Batches of this rank.

        Raises:
            RuntimeError: If an epoch has no batch at all.

        >>> import midstream as ms
        >>> loader = ms.DataLoader(ms.from_dataset(range(10)), batch_size=2)
        >>> batches = iter(loader)
        >>> _ = next(batches)
        >>> loader.skip(2)
        >>> next(batches), loader.progress().sources["data"].counts
        (tensor([6, 7]), {'skipped': 4})
        """
        run = self._run_for("skip")
        require_int(num_batches, "num_batches", 0, "skip")
        token = run.active or run.must_restart
        loop: LoaderIterator | None = token.iterator() if token is not None else None
        iterator = loop
        if loop is not None and token is run.active and loop.position is not run.position:
            iterator = None  # it came to its end, and then the run was changed
        position = run.position
        if iterator is None and num_batches and position is not None and not position.complete:
            # Continue where a loop was left, not at the start of its epoch.
            self.load_state_dict(self.state_dict())
        made, fresh = False, False
        run.skipping = True
        try:
            while num_batches:
                if iterator is None:
                    iterator, made, fresh = iter(self), True, True
                try:
                    next(iterator)
                except StopIteration:
                    if fresh:
                        raise RuntimeError(
                            "skip: the epoch has no batch that could be passed over"
                        ) from None
                    iterator = None
                    continue
                num_batches -= 1
                fresh = False
        finally:
            run.skipping = False
            if made:
                if loop is not None:
                    loop.end()
                self.load_state_dict(self.state_dict())

    def exclude(self, origins: Iterable[Any]) -> None:
        """Leave single samples out from the next batch on. Their batches get shorter.

        All positions stay. An origin names one pass over its source: in the next epoch the same row
        comes again. The state holds the origins, so that a checkpoint continues without them in any
        topology, and counts those that were met (`SourceProgress.counts`: ``excluded``). Batches
        that workers have made ahead are made again. Call it on every rank, after the same step.
        `state_at` and `trace` answer only for the batches from here on.

        A sample is an element of a batch: a row made by ``pack`` is left out as a whole, and
        counted once, if it holds a piece that is named. A batch without any sample left does not
        come; in a stream the next batch of the lane comes in its place.

        Args:
            origins: Origins from `trace`, or tuples ``(source, epoch, row)`` or ``(source, epoch,
                row, part)``. At most 4,096 in a run; each takes about 16 bytes of every checkpoint.

        Raises:
            ValueError: If there is no such source, there are too many origins, or a node above the
                batches reads some batches again on a resume (for example a buffered shuffle of
                batches). Nothing is changed then.
            TypeError: If an element is not an origin.

        >>> import midstream as ms
        >>> loader = ms.DataLoader(ms.from_dataset(range(6), name="six"), batch_size=3)
        >>> loader.exclude([("six", 0, 4)])
        >>> [batch.tolist() for batch in loader], list(map(str, loader.excluded))
        ([[0, 1, 2], [3, 5]], ['six[4]'])
        """
        if self._run_for("exclude").exclude(origins):
            self._read_anew()

    @property
    def excluded(self) -> list[Origin]:
        """The samples that are left out."""
        return self._run_for("excluded").excluded_origins

    # -- looking ---------------------------------------------------------------------------------

    def progress(self) -> Progress:
        """How far this rank has come, by source: samples, epochs, failures, counted as delivered."""
        self._run_for("progress")
        return progress(self.state_dict())

    def trace(self, step: int | None = None) -> Trace:
        """Origins of the samples in the batch just returned, or in an earlier one.

        Args:
            step: The number of the batch in the epoch, from 1.

        Raises:
            ValueError: If that batch is not among the last ones (at least 64, at most 1,024).
        """
        position = self._run_for("trace").position
        if position is None:
            raise ValueError("no batch was handed out yet")
        return position.trace(step)

    def __repr__(self) -> str:
        if self._run is None:
            return f"DataLoader({type(self.dataset).__name__}, by torchdata's StatefulDataLoader)"
        return f"{_head(self)}\n{describe.tree(self._run.pipeline)}"

    def _repr_html_(self) -> str | None:
        if self._run is None:
            return None
        tree = Dataset(self._run.pipeline)._repr_html_()
        return f"<div><div style='{MONO}'>{escape(_head(self))}</div>{tree}</div>"

    # -- Accelerate ------------------------------------------------------------------------------

    @property
    def _is_accelerate_prepared(self) -> bool:
        """True, so that ``Accelerator.prepare`` takes the loader as it is.

        It also notes whether Accelerate wants the batches on the device.
        """
        if self._run is None:
            return False
        asking = sys._getframe(1)
        if asked_by(asking, "accelerate.accelerator", "prepare_data_loader"):
            wanted = asking.f_locals.get("device_placement")
            self._on_device = bool(
                asking.f_locals["self"].device_placement if wanted is None else wanted
            )
        return True

    @_is_accelerate_prepared.setter
    def _is_accelerate_prepared(self, value: bool) -> None:
        pass

    @property
    def use_stateful_dataloader(self) -> bool:
        """False, so that ``Accelerator.save_state`` does not save this loader by itself.

        There all ranks would write one file.
        """
        asking = sys._getframe(1)
        if (
            self._run is not None
            and asked_by(asking, "accelerate.checkpointing", "save_accelerator_state")
            and not_registered(self, asking)
        ):
            self._run.warn_once(
                "accelerate",
                "Accelerator.save_state saves the position in the data only of what is registered:"
                " accelerator.register_for_checkpointing(midstream.WholeRun(loader)). This"
                " checkpoint is without it, and a run that is resumed from it begins the data"
                " anew.",
            )
        return False


def _head(loader: DataLoader) -> str:
    """A loader in one line: its arguments and where it stands. Starts and reads nothing."""
    run = loader.run
    words = [f"batch_size={loader.batch_size}", f"num_workers={loader.num_workers}"]
    topology = run.topology()
    if topology.world_size > 1:
        words.append(f"rank {topology.rank} of {topology.world_size}")
    state = run.state_dict()
    try:
        length = f" of {len(loader):,}"
    except TypeError:
        length = ""
    if not run.pipeline.random_access:
        words.append(f"{state['num_lanes']} lanes")
    return (
        f"DataLoader({', '.join(words)}): epoch {loader.epoch}, batch"
        f" {state['steps_done']:,}{length}"
    )
