"""Exact resume in Hugging Face's ``Trainer``. Needs ``pip install 'midstream[transformers]'``.

The ``Trainer`` saves no position in the data: it counts steps, and on resume reads all batches
again. `ResumeMixin` saves the loader's state beside the weights. It extends four methods:

    get_train_dataloader   returns the loader, with the saved state loaded
    get_batch_samples      fetches all micro-batches of a step, and records the positions of the
                           loader before and after them
    _save_checkpoint       saves the position of ``global_step``, since a checkpoint on SIGTERM comes
                           in the middle of a step
    _inner_training_loop   receives the checkpoint, and keeps the ``Trainer`` from skipping batches
                           that the loader has skipped already
"""

from __future__ import annotations

import json
import os
from typing import Any

from midstream.checkpoint.store import write_whole
from midstream.checkpoint.whole_run import gather_states
from midstream.dataset import Dataset
from midstream.errors import CheckpointError
from midstream.loader.loader import DataLoader
from midstream.loader.position import Position
from midstream.loader.render import state_at
from midstream.sources import from_dataset

try:
    from transformers import trainer as _trainer
except ImportError:
    raise ImportError(
        "midstream.transformers needs transformers, which is not installed: pip install"
        " 'midstream[transformers]'"
    ) from None

__all__ = ["ResumeMixin", "ResumeTrainer"]

_FILE = "midstream.json"


class ResumeMixin:
    """Makes the training data of a ``Trainer`` resume exactly.

    Put it before a ``Trainer`` class: ``class Mine(ResumeMixin, SFTTrainer)``.

    ``train(resume_from_checkpoint=...)`` resumes with the batch after the last one that was
    trained, without reading the batches before it. This includes gradient accumulation, its
    remainder at the end of an epoch, and checkpoints on SIGTERM (``enable_jit_checkpoint``). If the
    data has a length, the number of ranks must stay the same, because the ``Trainer`` counts its
    steps by the length. Data without a length, under ``max_steps``, resumes on any number of ranks.

    ``train_dataset`` is a midstream dataset, with or without ``.batch``, or map-style data, which
    is shuffled by ``args.data_seed`` or ``args.seed``. Leave ``ignore_data_skip`` False: no batches
    are read to be skipped, and the steps are counted correctly.

    Raises:
        CheckpointError: On resuming from a checkpoint without the data's position, or of another
        number of ranks.
    """

    _loader: DataLoader | None = None
    _checkpoint: str | None = None
    _marks: dict[int, tuple[Position, int]] = {}  # noqa: RUF012  (replaced, never changed)

    def make_loader(self) -> DataLoader:
        """Makes the training loader. Override it to make another one."""
        args: Any = self.args  # type: ignore[attr-defined]
        data: Any = self.train_dataset  # type: ignore[attr-defined]
        options: dict[str, Any] = {
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory and args.device.type == "cuda",
            "persistent_workers": args.dataloader_persistent_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
        }
        if isinstance(data, Dataset) and data.batch_rows is not None:
            return DataLoader(data, **options)
        if not isinstance(data, Dataset):
            data = from_dataset(data).shuffle(
                args.data_seed if args.data_seed is not None else args.seed
            )
        collate = self.data_collator  # type: ignore[attr-defined]
        if args.remove_unused_columns:
            collate = self._get_collator_with_removed_columns(collate, description="training")  # type: ignore[attr-defined]
        return DataLoader(
            data,
            self._train_batch_size,  # type: ignore[attr-defined]
            collate_fn=collate,
            drop_last=args.dataloader_drop_last,
            **options,
        )

    def get_train_dataloader(self) -> Any:
        """Returns the loader, which resumes where the checkpoint was saved."""
        loader = self.make_loader()
        loader.set_epoch = loader.sampler.set_epoch  # type: ignore[method-assign]  # the Trainer counts epochs itself
        if self._checkpoint is not None:
            path = os.path.join(self._checkpoint, _FILE)
            try:
                with open(path, encoding="utf-8") as file:
                    kept = json.load(file)
                state, ranks = kept["state"], int(kept["ranks"])
            except (OSError, ValueError, LookupError, TypeError) as error:
                raise CheckpointError(
                    f"{path} cannot be read ({error}): this checkpoint has no position in the data."
                    " It was saved without midstream's ResumeMixin, or never finished; resume from"
                    " an older one."
                ) from error
            self._check_ranks(loader, ranks, path)
            loader.load_state_dict(state)
        self._loader, self._marks = loader, {}
        return loader

    def _check_ranks(self, loader: DataLoader, saved: int, path: str) -> None:
        """Refuses another number of ranks: the ``Trainer`` counts by the batches of one rank."""
        here = loader.run.topology().world_size
        if here == saved or not _trainer.has_length(loader):
            return
        step = self.state.global_step  # type: ignore[attr-defined]
        raise CheckpointError(
            f"{path} was saved on {saved} ranks, and there are {here}. This data has a length, and"
            " the Trainer counts epochs and steps by the length on one rank, so step"
            f" {step} would be another position. Start {saved} ranks; or resume in a loop of your"
            " own or in Accelerate, on any number of ranks:"
            f' loader.load_state_dict(json.load(open("{path}"))["state"]). To change the number of'
            " ranks under the Trainer, start the run with data without a length (.repeat()) and"
            " max_steps."
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetches the micro-batches of a step, and records the positions before and after them."""
        before = self._here()
        found = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        after = self._here()
        if before is not None and after is not None:
            step = self.state.global_step  # type: ignore[attr-defined]
            self._marks = {step: before, step + 1: after}
        return found

    def _here(self) -> tuple[Position, int] | None:
        current = self._loader.run.position if self._loader is not None else None
        return (current, current.steps) if current is not None else None

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        """Saves the position before the rest, so that every whole folder has it."""
        if self._loader is not None:
            (state,) = gather_states(lambda: [self._trained()])
            if self.args.should_save:  # type: ignore[attr-defined]
                name = f"checkpoint-{self.state.global_step}"  # type: ignore[attr-defined]
                folder = os.path.join(self._get_output_dir(trial=trial), name)  # type: ignore[attr-defined]
                os.makedirs(folder, exist_ok=True)
                kept = {"ranks": self._loader.run.topology().world_size, "state": state}
                write_whole(os.path.join(folder, _FILE), json.dumps(kept).encode())
        super()._save_checkpoint(model, trial, *args, **kwargs)  # type: ignore[misc]

    def _trained(self) -> dict[str, Any]:
        """Returns the state after the micro-batches of ``global_step`` steps."""
        loader = self._loader
        assert loader is not None
        mark = self._marks.get(self.state.global_step)  # type: ignore[attr-defined]
        current = loader.run.position
        if mark is None or current is None:
            return loader.state_dict()
        if mark[0] is current:
            return state_at(*mark)
        return state_at(current, current.first_step)

    def _inner_training_loop(
        self, *args: Any, resume_from_checkpoint: Any = None, **kwargs: Any
    ) -> Any:
        """Trains; keeps the checkpoint's path for `get_train_dataloader`."""
        skip = _trainer.skip_first_batches

        def skip_first_batches(dataloader: Any, num_batches: int = 0) -> Any:
            return dataloader if dataloader is self._loader else skip(dataloader, num_batches)

        self._checkpoint, _trainer.skip_first_batches = resume_from_checkpoint, skip_first_batches
        try:
            return super()._inner_training_loop(  # type: ignore[misc]
                *args, resume_from_checkpoint=resume_from_checkpoint, **kwargs
            )
        finally:
            self._checkpoint, _trainer.skip_first_batches = None, skip
            if self._loader is not None:
                self._loader.close()


class ResumeTrainer(ResumeMixin, _trainer.Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` with exact resume: see `ResumeMixin`."""
