"""Exact resume in Lightning's ``Trainer``; the package is imported here, and needs ``pip install 'midstream[lightning]'``.

Lightning saves the states of its loaders by itself. Four things it cannot know or does not do are
done here:

    what was trained       A loader without a length is read one batch ahead; a save in a signal handler or after an error
                           comes in the middle of a step. Marks say where the loaders stood after
                           each of the last steps, and the number of trained steps says which mark
                           holds.
    all ranks              It writes rank 0's states and gives them to all. Here every rank's lanes are gathered and merged.
    giving states back     It does not after the end of an epoch, nor when ``trainer.estimated_stepping_batches`` was used.
    the epoch              is that of the loader's state, never of Lightning's count.

The merged states go where Lightning keeps its own, so a checkpoint can be read by either.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import Any, NamedTuple

from midstream.checkpoint.whole_run import gather_states
from midstream.distributed.collectives import (
    broadcast,
    destroy_group,
    new_cpu_group,
    size_of_group,
    smallest,
)
from midstream.errors import CheckpointError
from midstream.loader.loader import DataLoader
from midstream.loader.position import Position
from midstream.loader.render import state_at

try:
    from lightning.pytorch import Callback
except ImportError:  # the same under its other name
    try:
        from pytorch_lightning import Callback
    except ImportError:
        raise ImportError(
            "midstream.lightning needs Lightning, which is not installed: pip install"
            " 'midstream[lightning]'"
        ) from None

__all__ = ["ResumeCallback"]

log = logging.getLogger("midstream")

_KEY = "midstream"
_MARKS = 4


class Mark(NamedTuple):
    """Where a loader stands when a step is done: after batch ``step`` of the epoch that
    ``position`` runs.
    """

    position: Position
    step: int


class ResumeCallback(Callback):  # type: ignore[misc]
    """Makes the loaders of a ``Trainer`` resume exactly: ``Trainer(callbacks=[ResumeCallback()])``.

    Every `midstream.DataLoader` among the training loaders (alone, or in a ``CombinedLoader``) is
    saved as of the batches that were *trained*, with the lanes of all ranks, and goes on there on
    any number of ranks and workers: in the middle of an epoch or at its end, after an error
    (``save_on_exception``), and from a save in Slurm's requeue signal. Other loaders are left as
    they are.

    With several ranks a save asks all of them, as Lightning itself does. So an error that is to be
    saved, or the signal, has to come to all of them in the same step, before or after its exchange
    of gradients. Where one rank fails alone, or one is an exchange further when the signal comes,
    Lightning waits until its process group gives up, with this callback or without (without it rank
    0's file may be written before it waits): the last regular checkpoint is what there is.

    A ``training_step`` that takes ``dataloader_iter`` and fetches ahead by itself is taken to have
    trained what it fetched.

    An epoch of the loader that Lightning ends early (``limit_train_batches``) is over: the next
    begins. A pipeline without end goes on where it stands.

    Raises:
        CheckpointError: On loading, if the loaders are others than those saved; on saving, if the
            ranks do not fit together.

    >>> from midstream.lightning import ResumeCallback
    >>> ResumeCallback().state_key
    'ResumeCallback'
    """

    def __init__(self) -> None:
        self._saved: list[Any] | None = None  # states to go on from, one per stateful loader
        self._spent: list[
            bool
        ] = []  # which loaders of a `CombinedLoader` had come to their end in that epoch
        self._marks: dict[
            int, list[Mark]
        ] = {}  # by the number of trained batches; replaced, never changed
        self._seen: dict[int, Mark] = {}
        self._group: Any = None

    def state_dict(self) -> dict[str, Any]:
        """So little that Lightning misses the callback when a run is resumed without it."""
        return {"format": 1}

    # -- loading ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Begin without memory; make the group in which ranks agree."""
        if stage != "fit":
            return
        self._saved, self._spent, self._marks, self._seen = None, [], {}, {}
        if size_of_group() > 1:
            self._group = new_cpu_group()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the states until training starts."""
        saved = (
            checkpoint.get("loops", {})
            .get("fit_loop", {})
            .get("state_dict", {})
            .get("combined_loader")
        )
        self._saved = saved or None
        kept = checkpoint.get(_KEY)
        self._spent = list(kept["spent"]) if kept is not None else []
        if (
            saved
            and kept is None
            and any(isinstance(state, dict) and "midstream" in state for state in saved)
        ):
            warnings.warn(
                "this checkpoint was saved without midstream's ResumeCallback: its data position"
                " may be some batches past what was trained",
                RuntimeWarning,
                stacklevel=2,
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Give the states to the loaders, where Lightning did not."""
        loop = trainer.fit_loop
        combined, fetcher = loop._combined_loader, loop._data_fetcher
        stateful = [loader for loader in combined.flattened if _stateful(loader)]
        ours = _ours(trainer)
        for loader in ours:
            loader.run.guided = True
        if self._saved is not None:
            if len(self._saved) != len(stateful):
                raise CheckpointError(
                    f"the checkpoint has the states of {len(self._saved)} loaders, and there are"
                    f" {len(stateful)} here that can take one. Give the Trainer the loaders that"
                    " were saved, in the same order."
                )
            pairs = list(zip(stateful, self._saved))
            ahead = fetcher.fetched
            done = all(
                _stands_at(loader, state, ahead) for loader, state in pairs if loader in ours
            )
            if not self._on_all_ranks(done and not any(self._spent)):
                for loader, state in pairs:
                    loader.load_state_dict(state)
                fetcher._combined_loader = _InTheMiddle(combined, self._spent)
                try:
                    iter(fetcher)
                finally:
                    fetcher._combined_loader = combined
            self._fit_lengths(trainer, ours)
            _begin_next_epoch(loop)
        self._saved = None
        start = [_mark(loader, begun=True) for loader in ours]
        self._marks = {_trained(trainer): start}
        self._tell(ours, start)

    def _on_all_ranks(self, true: bool) -> bool:
        """Ranks begin to read together, or wait for each other in vain."""
        if self._group is None:
            return true
        return bool(smallest(int(true), self._group))

    def _fit_lengths(self, trainer: Any, ours: list[DataLoader]) -> None:
        """Lightning took the length of an epoch before the state was there; on other ranks what is
        left of it differs.
        """
        loop = trainer.fit_loop
        combined, fetcher = loop._combined_loader, loop._data_fetcher
        if not isinstance(trainer.limit_train_batches, float) or combined.limits is None:
            return
        for index, loader in enumerate(combined.flattened):
            if loader in ours and trainer.limit_train_batches == 1.0:
                with contextlib.suppress(TypeError):
                    combined.limits[index] = max(combined.limits[index], len(loader))
        if fetcher.length is not None:
            fetcher.length = len(combined)
            fetcher.done = fetcher.fetched >= fetcher.length
            least = min if combined._mode == "min_size" else max
            loop.max_batches = max(
                fetcher.length, least(combined.limits)
            )  # the epochs to come may be longer

    # -- training -----------------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Mark where the loaders will stand when this step is done."""
        fetcher = trainer.fit_loop._data_fetcher
        ahead = len(getattr(fetcher, "batches", ()))
        marks = []
        for index, loader in enumerate(_ours(trainer)):
            now = _mark(loader)
            seen = self._seen.get(index)
            if seen is not None and seen.position is now.position:
                gave = now.step > seen.step
            else:  # an exhausted loader of mode "max_size" gives nothing any more, all others give a batch each time
                gave = (
                    trainer.fit_loop._combined_loader._mode != "max_size"
                    or now.step - now.position.first_step > 1
                )
            self._seen[index] = now
            marks.append(Mark(now.position, now.step - (ahead if gave else 0)))
        done = _trained(trainer)
        kept = {
            number: mark for number, mark in self._marks.items() if done - _MARKS < number <= done
        }
        self._marks = {**kept, done + 1: marks}

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step is done."""
        ours, done = _ours(trainer), _trained(trainer)
        marks = self._marks.get(done)
        if marks is None or hasattr(trainer.fit_loop._data_fetcher, "iterator_wrapper"):
            marks = [_mark(loader) for loader in ours]
        if _epoch_over(trainer):
            marks = [_over(loader, mark) for loader, mark in zip(ours, marks)]
        self._marks = {**self._marks, done: marks}
        self._tell(ours, marks)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """A validation loader is left early (by the sanity check, say) and begun again on purpose."""
        combined = trainer.fit_loop.epoch_loop.val_loop._combined_loader
        for loader in combined.flattened if combined is not None else ():
            if isinstance(loader, DataLoader):
                loader._warned_restart = True

    def _tell(self, ours: list[DataLoader], marks: list[Mark]) -> None:
        """Let the loaders know what was trained: they go on there when they are iterated again."""
        for loader, mark in zip(ours, marks):
            if mark.position is loader.run.position:
                loader.run.trained = mark
            elif loader.run.position is not None and loader.run.next_epoch < mark.position.epoch:
                loader.set_epoch(mark.position.epoch)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """The loaders are on their own again."""
        if stage == "fit":
            for loader in _ours(trainer):
                loader.run.guided, loader.run.trained = False, None
            if self._group is not None:
                destroy_group(self._group)
                self._group = None

    # -- saving -------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put in the states of what was trained, of all ranks."""
        kept = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
        if not kept.get("combined_loader") or not self._marks:
            return
        ours = _ours(trainer)
        done = _trained(trainer)
        if self._group is not None:
            done = broadcast(done, self._group)  # rank 0's weights are saved
        merged = iter(gather_states(lambda: self._states(ours, done), self._group))
        stateful = [
            loader for loader in trainer.fit_loop._combined_loader.flattened if _stateful(loader)
        ]
        kept["combined_loader"] = [
            next(merged) if loader in ours else state
            for loader, state in zip(stateful, kept["combined_loader"])
        ]
        checkpoint[_KEY] = {"spent": self._spent_now(trainer, done)}

    def _spent_now(self, trainer: Any, done: int) -> list[bool]:
        """Which loaders have come to their end in Lightning's epoch: until it is over, "max_size" takes no more of them, and
        "max_size_cycle" has begun them anew and waits for the others."""
        combined = trainer.fit_loop._combined_loader
        if combined._mode == "min_size" or _epoch_over(trainer):
            return []
        marks = iter(self._marks[done])
        begun = getattr(combined._iterator, "_consumed", None) or [False] * len(combined.flattened)
        spent = []
        for loader, anew in zip(combined.flattened, begun):
            mark = next(marks) if loader in _ours(trainer) else None
            spent.append(
                anew
                or (
                    mark is not None and mark.position.complete and mark.step == mark.position.steps
                )
            )
        return spent

    def _states(self, ours: list[DataLoader], done: int) -> list[dict[str, Any]]:
        marks = self._marks.get(done)
        if marks is None:
            raise CheckpointError(
                f"the weights to be saved have seen {done} batches, and this rank knows where its"
                f" loaders stood after {sorted(self._marks)}"
            )
        return [_state(loader, mark) for loader, mark in zip(ours, marks)]


def _trained(trainer: Any) -> int:
    """Batches trained in all, over all epochs: the count that Lightning moves on right after the
    optimizer's step.
    """
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)


def _epoch_over(trainer: Any) -> bool:
    return bool(trainer.fit_loop.epoch_loop._num_ready_batches_reached())


def _begin_next_epoch(loop: Any) -> None:
    """With ``max_steps`` Lightning takes the end of an epoch for its middle when it resumes there, and ends the next epoch
    after a batch. Without, it does what is done here."""
    progress = loop.epoch_progress.current
    if loop.restarting and progress.ready == progress.started == progress.processed > 0:
        loop._restarting = loop.epoch_loop.restarting = False
        loop.reset()


class _InTheMiddle:
    """A ``CombinedLoader`` whose next pass goes on in the middle of an epoch, in which some loaders
    are spent.
    """

    def __init__(self, combined: Any, spent: list[bool]) -> None:
        self._combined, self._spent = combined, spent

    def __len__(self) -> int:
        return len(self._combined)

    def __iter__(self) -> Any:
        batches = iter(self._combined)
        passed = self._combined._iterator
        if any(self._spent) and not all(self._spent) and hasattr(passed, "_consumed"):
            passed._consumed = list(self._spent)
        elif any(self._spent):
            passed.iterators = [
                iter(()) if spent else it for it, spent in zip(passed.iterators, self._spent)
            ]
        return batches


def _stateful(loader: Any) -> bool:
    return callable(getattr(loader, "state_dict", None)) and callable(
        getattr(loader, "load_state_dict", None)
    )


def _ours(trainer: Any) -> list[DataLoader]:
    combined = trainer.fit_loop._combined_loader
    loaders = combined.flattened if combined is not None else []
    return [
        loader for loader in loaders if isinstance(loader, DataLoader) and not loader.passes_through
    ]


def _over(loader: DataLoader, mark: Mark) -> Mark:
    """Where a loader stands when Lightning's epoch is over: a finite epoch that was left early is
    too.
    """
    position = mark.position
    begun = position is loader.run.position and mark.step > position.first_step
    if loader.run.endless or not begun or (position.complete and mark.step == position.steps):
        return mark
    following = loader.run.start_of(
        position.topology, position.num_lanes, position.epoch + 1, position
    )
    return Mark(following, 0)


def _mark(loader: DataLoader, *, begun: bool = False) -> Mark:
    """Where a loader stands that is being read, or where this pass over it began."""
    current = loader.run.position
    assert current is not None
    return Mark(current, current.first_step if begun else current.steps)


def _state(loader: DataLoader, mark: Mark) -> dict[str, Any]:
    current = loader.run.position
    if loader.run.loaded is not None:  # set_weights was called in this step
        state = loader.state_dict()
        if (state["epoch"], state["steps_done"]) == (mark.position.epoch, mark.step):
            return state
    if current is None or mark.position is current or not mark.position.applied:
        return state_at(mark.position, mark.step)
    # Iterated anew since, and nothing of that was trained: it began where this mark stands.
    return state_at(current, current.first_step)


def _stands_at(loader: DataLoader, state: Any, ahead: int) -> bool:
    """Whether a loader was given this state and nothing was taken of it but what Lightning reads
    ahead.
    """
    current = loader.run.position
    if (
        current is None
        or loader.run.loaded is not None
        or current.steps - current.first_step > ahead
    ):
        return False
    lanes = state_at(current, current.first_step)["lanes"]
    place = (current.epoch, current.first_step)
    return place == (state["epoch"], state["steps_done"]) and all(
        state["lanes"].get(key) == text for key, text in lanes.items()
    )
