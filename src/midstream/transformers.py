"""Exact resume in Hugging Face's ``Trainer``; imported here, and needs ``pip install 'midstream[transformers]'``.

The ``Trainer`` keeps no position in the data: it counts steps, and on resume reads again what was
read. Here the loader's state is saved beside the weights, and four of its methods are extended:

    get_train_dataloader   gives the loader, with the saved state in it
    get_batch_samples      fetches all micro-batches of a step; notes where the loader stood before and after
    _save_checkpoint       saves what belongs to ``global_step`` (a checkpoint on SIGTERM comes in the middle of a step)
    _inner_training_loop   knows the checkpoint, and keeps the ``Trainer`` from skipping batches once more
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
    """Put before a ``Trainer`` class, makes its training data resume exactly: ``class Mine(ResumeMixin, SFTTrainer)``.

    ``train(resume_from_checkpoint=...)`` goes on with the batch after the last one that was
    trained, without reading what came before it; gradient accumulation, its remainder at the end of
    an epoch, and checkpoints on SIGTERM (``enable_jit_checkpoint``) included. Where the data has a
    length the number of ranks stays the same, because the ``Trainer`` counts its steps by it; data
    without one, under ``max_steps``, goes on on any.

    ``train_dataset`` is a midstream dataset, with or without ``.batch``, or map-style data, which
    is shuffled by ``args.data_seed`` or ``args.seed``. Leave ``ignore_data_skip`` False: nothing is
    read to skip, and the steps are counted right.

    Raises:
        CheckpointError: On resuming from a checkpoint without the data's position, or of another
        number of ranks.
    """

    _loader: DataLoader | None = None
    _checkpoint: str | None = None
    _marks: dict[int, tuple[Position, int]] = {}  # noqa: RUF012  (replaced, never changed)

    def make_loader(self) -> DataLoader:
        """The training loader; to be replaced where another is wanted."""
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
        """The loader, which goes on where the checkpoint was saved."""
        loader = self.make_loader()
        loader.set_epoch = loader.sampler.set_epoch  # type: ignore[method-assign]  # the Trainer counts in its own way
        if self._checkpoint is not None:
            path = os.path.join(self._checkpoint, _FILE)
            try:
                with open(path, encoding="utf-8") as file:
                    kept = json.load(file)
                state, ranks = kept["state"], int(kept["ranks"])
            except (OSError, ValueError, LookupError, TypeError) as error:
                raise CheckpointError(
                    f"{path} cannot be read ({error}): this checkpoint does not say where the"
                    " training stood in its data. It was saved without midstream's ResumeMixin, or"
                    " never finished; resume from an older one."
                ) from error
            self._check_ranks(loader, ranks, path)
            loader.load_state_dict(state)
        self._loader, self._marks = loader, {}
        return loader

    def _check_ranks(self, loader: DataLoader, saved: int, path: str) -> None:
        """Batches of an epoch on a rank are what the ``Trainer`` finds epoch and step by."""
        here = loader._topology().world_size
        if here == saved or not _trainer.has_length(loader):
            return
        step = self.state.global_step  # type: ignore[attr-defined]
        raise CheckpointError(
            f"{path} was saved on {saved} ranks, and there are {here}. This data has a length, and"
            " the Trainer counts epochs "
            f"and steps by what one rank has of it, so it would take step {step} for another place."
            f" Start {saved} ranks; or "
            "go on in a loop of your own or in Accelerate:"
            f' loader.load_state_dict(json.load(open("{path}"))["state"]) takes '
            f"it on any number. A run of the Trainer that is to change its ranks begins with data"
            f" without a length "
            f"(.repeat()) and max_steps."
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch a step's micro-batches."""
        before = self._here()
        found = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        after = self._here()
        if before is not None and after is not None:
            step = self.state.global_step  # type: ignore[attr-defined]
            self._marks = {step: before, step + 1: after}
        return found

    def _here(self) -> tuple[Position, int] | None:
        current = self._loader._current if self._loader is not None else None
        return (current, current.steps) if current is not None else None

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        """Save the position first: a folder that is whole has it."""
        if self._loader is not None:
            (state,) = gather_states(lambda: [self._trained()])
            if self.args.should_save:  # type: ignore[attr-defined]
                name = f"checkpoint-{self.state.global_step}"  # type: ignore[attr-defined]
                folder = os.path.join(self._get_output_dir(trial=trial), name)  # type: ignore[attr-defined]
                os.makedirs(folder, exist_ok=True)
                kept = {"ranks": self._loader._topology().world_size, "state": state}
                write_whole(os.path.join(folder, _FILE), json.dumps(kept).encode())
        super()._save_checkpoint(model, trial, *args, **kwargs)  # type: ignore[misc]

    def _trained(self) -> dict[str, Any]:
        """The state after the micro-batches of ``global_step`` steps."""
        loader = self._loader
        assert loader is not None
        mark = self._marks.get(self.state.global_step)  # type: ignore[attr-defined]
        current = loader._current
        if mark is None or current is None:
            return loader.state_dict()
        return dict(
            mark[0].state_at(mark[1])
            if mark[0] is current
            else current.state_at(current.first_step)
        )

    def _inner_training_loop(
        self, *args: Any, resume_from_checkpoint: Any = None, **kwargs: Any
    ) -> Any:
        """Train, with the checkpoint at hand."""
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
