"""Hooks that Lightning, Fabric and Accelerate look for on a DataLoader.

    `EpochHint`             stands in place of a sampler: Lightning and Fabric call its ``set_epoch``
    `AccelerateIterator`    says which batch is the last, and moves batches to the device
    `asked_by`              finds which function of a trainer is calling

Adapters that need the trainer are files of their own: lightning.py, transformers.py. Nothing here
imports a trainer: when one is running, it has been imported.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from collections.abc import Iterator as Iter
from types import FrameType
from typing import Any

from torch.utils.data.dataloader import _InfiniteConstantSampler

from midstream.loader.position import Position

__all__ = ["LIGHTNING_ALONE", "AccelerateIterator", "EpochHint", "asked_by", "not_registered"]

LIGHTNING_ALONE = (
    "Lightning saves the state of this loader by itself, and what it saves is not always what was"
    " trained: of a loader without a length it is one batch too far; saved in a signal handler or"
    " after an error too; with several ranks it is rank 0's alone, which no other rank can load;"
    " and a checkpoint from the end of an epoch, or a use of trainer.estimated_stepping_batches, is"
    " not given back to the loader at all. Give the Trainer the callback that does:"
    " Trainer(callbacks=[midstream.lightning.ResumeCallback()])."
)


class EpochHint(_InfiniteConstantSampler):
    """In place of a sampler: for trainers that call ``loader.sampler.set_epoch(e)``.

    These trainers count from 0 in each run, or one too many after a resume. So the first call only
    sets the difference between their count and the loader's. A later call moves the loader on,
    where a finite epoch was left before its end, and never back.

    Args:
        loader: The loader, which is not kept alive.
    """

    def __init__(self, loader: Any) -> None:
        self._loader: weakref.ref[Any] = weakref.ref(loader)
        self._offset: int | None = None

    def forget(self) -> None:
        """Forget the difference: a state was loaded."""
        self._offset = None

    def set_epoch(self, epoch: int) -> None:
        """Note that the trainer begins ``epoch`` by its own count."""
        loader = self._loader()
        if loader is None or loader.run.guided:
            return
        if self._offset is None:
            self._offset = loader.run.epoch_in_use - epoch
        elif loader.run.left_midway and epoch + self._offset > loader.epoch:
            # The class's own method, where an adapter has put another one in its place.
            type(loader).set_epoch(loader, epoch + self._offset)


class AccelerateIterator:
    """Iterates for Accelerate: moves batches to the device, and marks the last one.

    The loader knows the last batch when it hands it out, so nothing is fetched ahead and its state
    stays what was trained.

    Args:
        loader: The loader.
        batches: Its iterator.
        last: Whether the batch just handed out was the last one.
        samples: At the last one: how many of the samples that the ranks have together come first
            and are no repeats; 0 for all, -1 where that is no number of first samples.
        on_device: Whether batches go to the device.

    Attributes:
        end_of_dataloader: Read by Accelerate, which takes this for its loader: whether the last
            batch is out.
        remainder: Read by Accelerate: ``samples``, for ``gather_for_metrics``. (The loader's own
        says what is to be done.)
    """

    def __init__(
        self,
        loader: Any,
        batches: Iter[Any],
        last: Callable[[], bool],
        samples: Callable[[], int],
        on_device: bool,
    ) -> None:
        from accelerate.state import AcceleratorState, GradientState
        from accelerate.utils import send_to_device

        self._loader, self._batches, self._last, self._samples = loader, batches, last, samples
        self._send, self._device = send_to_device, AcceleratorState().device if on_device else None
        self._gradients = GradientState()
        self.end_of_dataloader, self.remainder = False, -1
        self._gradients._add_dataloader(self)

    def __iter__(self) -> AccelerateIterator:
        return self

    def __len__(self) -> int:
        return len(self._loader)

    def __next__(self) -> Any:
        try:
            batch = next(self._batches)
        except StopIteration:
            self._gradients._remove_dataloader(self)
            raise
        if self._last():
            self.end_of_dataloader, self.remainder = True, self._samples()
        return batch if self._device is None else self._send(batch, self._device)


def asked_by(caller: FrameType | None, module: str, function: str) -> bool:
    """Whether a frame runs this function of a trainer.

    Args:
        caller: The frame.
        module: How the name of its module ends: lightning and pytorch_lightning are the same.
        function: The name of the function.
    """
    return (
        caller is not None
        and caller.f_code.co_name in (function, "<listcomp>")
        and str(caller.f_globals.get("__name__", "")).endswith(module)
    )


def not_registered(loader: Any, caller: FrameType | None) -> bool:
    """Whether ``Accelerator.save_state``, some frames up, saves without the state of this loader."""
    while caller is not None and caller.f_code.co_name != "save_state":
        caller = caller.f_back
    kept = (
        getattr(caller.f_locals.get("self"), "_custom_objects", None)
        if caller is not None
        else None
    )
    return kept is not None and not any(
        part is loader or getattr(part, "loader", None) is loader for part in kept
    )


def samples_of_last_round(
    position: Position, remainder: str, warn_once: Callable[[str, str], None]
) -> int:
    """The number that Accelerate calls the remainder of an epoch.

    So many samples of the last step, of all ranks in their order, come first and are no repeats.

    Args:
        position: Of the epoch.
        remainder: The loader's argument.
        warn_once: Warns by key.

    Returns:
        0 where all are no repeats; -1 where the repeats are not those that come last.
    """
    ranks = position.topology.world_size
    if ranks == 1 or position.total is None or position.turns is None or remainder == "uneven":
        return 0
    first = position.start + (position.turns - 1) * ranks
    repeats = max(0, first + ranks - position.total)
    in_order = position.start % ranks == 0 and not position.done_early
    samples = position.pipeline.samples(first, first + ranks)
    if samples is not None and in_order:
        return samples[0] if samples[0] < samples[1] else 0
    if not repeats:
        return 0
    reason = (
        "the epoch was begun on another number of ranks"
        if samples
        else "the pipeline does not end in .batch"
    )
    warn_once(
        "gather",
        f"the ranks have {repeats} batches twice in the last step of epoch {position.epoch}"
        " (remainder='pad'), and Accelerate's gather_for_metrics can leave out only what comes"
        f" last: {reason}. Leave out yourself what a rank has where loader.trace().padded is true.",
    )
    return -1
