"""Exact resume in Lightning's ``Trainer``. Needs ``pip install 'midstream[lightning]'``.

Lightning saves the states of its loaders by itself. `ResumeCallback` adds what is missing for an
exact resume:

    trained batches     Lightning reads a loader without a length one batch ahead, and a save in a
                        signal handler or after an error comes in the middle of a step. Marks record
                        the positions of the loaders after each of the last steps; the number of
                        trained batches selects the mark that is saved.
    all ranks           Lightning writes rank 0's states and loads them on all ranks. Here the lanes
                        of all ranks are gathered and merged.
    loading             Lightning does not load the states after the end of an epoch, nor if
                        ``trainer.estimated_stepping_batches`` was used.
    the epoch           The epoch is that of the loader's state, never of Lightning's count.

The merged states are stored where Lightning stores its own, so a checkpoint can be read by either.
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
except ImportError:  # Lightning's other package
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
    """Position of a loader after a step: after batch ``step`` of the epoch of ``position``."""

    position: Position
    step: int


class ResumeCallback(Callback):  # type: ignore[misc]
    """Makes the loaders of a ``Trainer`` resume exactly: ``Trainer(callbacks=[ResumeCallback()])``.

    Handles every `midstream.DataLoader` among the training loaders, alone or in a
    ``CombinedLoader``. Its saved position is that of the batches that were *trained*, with the
    lanes of all ranks. It resumes on any number of ranks and workers: in the middle of an epoch or
    at its end, after an error (``save_on_exception``), and from a save in Slurm's requeue signal.
    Other loaders are left as they are.

    With several ranks a save needs all of them, as in Lightning itself. So an error that is to be
    saved, or the signal, must reach all ranks in the same step, before or after the exchange of
    gradients. If one rank fails alone, or has made one exchange more when the signal arrives,
    Lightning waits until its process group times out, with or without this callback. (Without it,
    rank 0's file may be written before the wait.) Then resume from the last regular checkpoint.

    A ``training_step`` that takes ``dataloader_iter`` and fetches ahead by itself counts all
    fetched batches as trained.

    If Lightning ends an epoch early (``limit_train_batches``), the loader begins the next epoch. An
    infinite pipeline continues from its position.

    Raises:
        CheckpointError: On loading, if the loaders are not those that were saved; on saving, if the
            states of the ranks do not fit together.

    >>> from midstream.lightning import ResumeCallback
    >>> ResumeCallback().state_key
    'ResumeCallback'
    """

    def __init__(self) -> None:
        # States to resume from, one per stateful loader.
        self._saved: list[Any] | None = None
        # Which loaders of a `CombinedLoader` were at their end in that epoch.
        self._spent: list[bool] = []
        # By the number of trained batches; replaced, never changed.
        self._marks: dict[int, list[Mark]] = {}
        self._seen: dict[int, Mark] = {}
        self._group: Any = None

    def state_dict(self) -> dict[str, Any]:
        """Returns a small state, so that Lightning warns if a run resumes without this callback."""
        return {"format": 1}

    # -- loading -----------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Resets the callback, and creates the process group in which ranks agree."""
        if stage != "fit":
            return
        self._saved, self._spent, self._marks, self._seen = None, [], {}, {}
        if size_of_group() > 1:
            self._group = new_cpu_group()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keeps the states until training starts."""
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
        """Loads the states into the loaders, if Lightning did not."""
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
        self._pass_to(ours, start)

    def _on_all_ranks(self, true: bool) -> bool:
        """Whether a condition holds on all ranks.

        Ranks must start to read together, or they wait for each other for ever.
        """
        if self._group is None:
            return true
        return bool(smallest(int(true), self._group))

    def _fit_lengths(self, trainer: Any, ours: list[DataLoader]) -> None:
        """Corrects the lengths of an epoch that Lightning read before the states were loaded.

        On another number of ranks, the rest of the epoch has another length.
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

    # -- training ----------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Marks the positions that the loaders will have after this step."""
        fetcher = trainer.fit_loop._data_fetcher
        ahead = len(getattr(fetcher, "batches", ()))
        marks = []
        for index, loader in enumerate(_ours(trainer)):
            now = _mark(loader)
            seen = self._seen.get(index)
            if seen is not None and seen.position is now.position:
                gave = now.step > seen.step
            else:
                # Every loader gives a batch, but an exhausted one of mode "max_size".
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
        """Confirms the marks of the step, and passes them to the loaders."""
        ours, done = _ours(trainer), _trained(trainer)
        marks = self._marks.get(done)
        if marks is None or hasattr(trainer.fit_loop._data_fetcher, "iterator_wrapper"):
            marks = [_mark(loader) for loader in ours]
        if _epoch_over(trainer):
            marks = [_over(loader, mark) for loader, mark in zip(ours, marks)]
        self._marks = {**self._marks, done: marks}
        self._pass_to(ours, marks)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Silences a warning of validation loaders that are left early, as by the sanity check."""
        combined = trainer.fit_loop.epoch_loop.val_loop._combined_loader
        for loader in combined.flattened if combined is not None else ():
            if isinstance(loader, DataLoader):
                loader.run.silence_restart()

    def _pass_to(self, ours: list[DataLoader], marks: list[Mark]) -> None:
        """Passes the trained positions to the loaders, which continue there when iterated again."""
        for loader, mark in zip(ours, marks):
            if mark.position is loader.run.position:
                loader.run.trained = mark
            elif loader.run.position is not None and loader.run.next_epoch < mark.position.epoch:
                loader.set_epoch(mark.position.epoch)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Releases the loaders, and the process group."""
        if stage == "fit":
            for loader in _ours(trainer):
                loader.run.guided, loader.run.trained = False, None
            if self._group is not None:
                destroy_group(self._group)
                self._group = None

    # -- saving ------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Replaces the states by those of the trained batches, of all ranks."""
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
        """Returns which loaders are at their end in Lightning's epoch.

        Until the epoch is over, mode "max_size" reads them no more, and "max_size_cycle" has
        restarted them and waits for the others.
        """
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
                f"the weights to be saved have seen {done} batches, and this rank knows the positions"
                f" of its loaders after {sorted(self._marks)} batches only"
            )
        return [_state(loader, mark) for loader, mark in zip(ours, marks)]


def _trained(trainer: Any) -> int:
    """Returns the number of batches trained over all epochs.

    Lightning increases this count right after the optimizer's step.
    """
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)


def _epoch_over(trainer: Any) -> bool:
    return bool(trainer.fit_loop.epoch_loop._num_ready_batches_reached())


def _begin_next_epoch(loop: Any) -> None:
    """Begins the next epoch if the checkpoint was saved at the end of one.

    With ``max_steps`` Lightning resumes there as in the middle of an epoch, and ends the next epoch
    after one batch. Without it, Lightning does the same as this function.
    """
    progress = loop.epoch_progress.current
    if loop.restarting and progress.ready == progress.started == progress.processed > 0:
        loop._restarting = loop.epoch_loop.restarting = False
        loop.reset()


class _InTheMiddle:
    """A ``CombinedLoader`` whose next pass starts in the middle of an epoch.

    Args:
        combined: The loader.
        spent: Which of its loaders are at their end in that epoch.
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
    """Returns the position of a loader after Lightning's epoch; it ends a finite epoch early."""
    position = mark.position
    begun = position is loader.run.position and mark.step > position.first_step
    if loader.run.endless or not begun or (position.complete and mark.step == position.steps):
        return mark
    following = loader.run.start_of(
        position.topology, position.num_lanes, position.epoch + 1, position
    )
    return Mark(following, 0)


def _mark(loader: DataLoader, *, begun: bool = False) -> Mark:
    """Returns the position of a loader, or with ``begun`` that at which this pass began."""
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
    # It was iterated anew since, and none of that was trained: that pass began at this mark.
    return state_at(current, current.first_step)


def _stands_at(loader: DataLoader, state: Any, ahead: int) -> bool:
    """Whether a loader has loaded this state, and handed out at most ``ahead`` batches since."""
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
