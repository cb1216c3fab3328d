"""Warnings for a dataset that several ranks read through a loader that is not midstream's.

    loader of torch or torchdata   every rank gets every sample
    Accelerate, dispatching        rank 0 reads ahead for all ranks, and all of them save their
                                   position in one file: not the position of the training
    Accelerate, not dispatching    every rank reads every sample and keeps its own; a resume reads
                                   all of them again

No trainer is imported here: the caller's frame shows which one is running.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

from midstream.distributed.ranks import rank_and_world_size
from midstream.errors import CheckpointError


def divided_by_trainer(what: Callable[[], str], caller: FrameType | None) -> bool:
    """Whether Accelerate divides this dataset among ranks.

    Accelerate calls ``set_epoch`` in the main process before it reads. Warns where the samples are
    right but a resume starts the epoch over.

    Args:
        what: Returns the dataset in words.
        caller: The frame that called ``set_epoch``.

    Raises:
        CheckpointError: If Accelerate would save another position than that of the training.
    """
    if caller is None or caller.f_globals.get("__name__") != "accelerate.data_loader":
        return False
    host: Any = caller.f_locals.get("self")
    kind = type(host).__name__
    if kind == "IterableDatasetShard" and host.num_processes > 1:
        _warn(
            f"Accelerate reads {what()} whole on each of {host.num_processes} ranks, which"
            " drops the samples of the others, and after a resume reads it again from the start of the epoch."
            f" {_INSTEAD}"
        )
        return True
    if kind != "DataLoaderDispatcher" or host.state.num_processes == 1:
        return False
    if not host.use_stateful_dataloader:
        _warn(
            f"Accelerate reads {what()} on rank 0 for {host.state.num_processes} ranks, and saves"
            f" no position in it: a resume reads it again from the start of the epoch. {_INSTEAD}"
        )
        return True
    raise CheckpointError(
        f"Accelerate reads {what()} on rank 0, ahead for {host.state.num_processes} ranks, and each"
        " rank writes the position of its own loader into one file. Expected a checkpoint of the"
        " batches trained; it would be several batches off, or the start of the data."
        f" {_INSTEAD}"
    )


def divided_by_nobody(what: Callable[[], str], caller: FrameType | None) -> bool:
    """Whether a loader of torch or torchdata is about to read this dataset whole on several ranks.

    Warns if so.

    Args:
        what: Returns the dataset in words.
        caller: The frame that called ``iter(dataset)``.
    """
    if (
        caller is None
        or caller.f_globals.get("__name__") != "torch.utils.data._utils.fetch"
        or (count := rank_and_world_size()[1]) < 2
    ):
        return False  # not a loader, or one rank
    while (
        caller is not None
    ):  # a forked worker has the stack of its parent: Accelerate may be in it
        if caller.f_globals.get("__name__") == "accelerate.data_loader":
            return False
        caller = caller.f_back
    _warn(
        f"each of {count} ranks reads {what()} whole, through a loader that is not midstream's: if"
        f" nothing else divides it, the training sees every sample {count} times."
        " midstream.DataLoader(dataset, batch_size) divides it among the ranks, and its position"
        " can be loaded on any number of ranks"
    )
    return True


_INSTEAD = (
    "Give it midstream's loader, which divides the samples and saves the batches trained: loader ="
    " accelerator.prepare(midstream.DataLoader(dataset, batch_size)), then"
    " accelerator.register_for_checkpointing(midstream.WholeRun(loader)). In Hugging Face's"
    " Trainer: midstream.transformers.ResumeTrainer"
)


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)
