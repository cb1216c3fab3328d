"""What a loader is to a trainer that knows nothing of it, without any trainer."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import midstream as ms


def finite() -> ms.Dataset:
    return ms.from_dataset(range(20), name="web").shuffle(3)


def left_after(loader: ms.DataLoader, steps: int) -> list[Any]:
    return [batch.tolist() for _, batch in zip(range(steps), loader)]


def test_what_trainers_look_at() -> None:
    loader = ms.DataLoader(finite(), batch_size=4, num_workers=1, drop_last=True)
    assert isinstance(loader, torch.utils.data.DataLoader) and isinstance(
        loader, StatefulDataLoader
    )
    assert isinstance(loader.dataset, IterableDataset)  # so that nobody puts a sampler for ranks in
    assert (loader.batch_size, loader.drop_last, loader.num_workers) == (4, True, 1)
    assert callable(loader.sampler.set_epoch) and loader.batch_sampler is None
    for name, parameter in inspect.signature(ms.DataLoader.__init__).parameters.items():
        if name != "self":
            assert hasattr(loader, name), name
            assert parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


@pytest.mark.parametrize("begins", [0, 3])
def test_a_trainer_that_leaves_epochs_early_gets_the_next_whatever_it_counts_from(
    begins: int,
) -> None:
    one = ms.DataLoader(finite(), batch_size=4)
    reference = [[batch.tolist() for batch in one] for _ in range(4)]
    loader = ms.DataLoader(finite(), batch_size=4)
    for epoch in range(3):
        loader.sampler.set_epoch(begins + epoch)
        assert left_after(loader, 2) == reference[epoch][:2]
        state = loader.state_dict()
    resumed = ms.DataLoader(finite(), batch_size=4)
    resumed.sampler.set_epoch(7)
    resumed.load_state_dict(state)
    for epoch in (2, 3):
        resumed.sampler.set_epoch(epoch - 2)  # from 0 again
        assert [batch.tolist() for batch in resumed] == reference[epoch][2 if epoch == 2 else 0 :]


def test_a_trainers_count_never_moves_an_epoch_that_is_whole_or_that_nothing_was_taken_of() -> None:
    one = ms.DataLoader(finite(), batch_size=4)
    reference = [[batch.tolist() for batch in one] for _ in range(3)]
    loader = ms.DataLoader(finite(), batch_size=4)
    for epoch in range(3):
        loader.sampler.set_epoch(5 * epoch)
        iter(loader)  # and once more, as Lightning does
        loader.sampler.set_epoch(5 * epoch + 1)
        assert [batch.tolist() for batch in loader] == reference[epoch]
    assert loader.epoch == 3


def test_a_pipeline_without_end_goes_on_where_it_stands() -> None:
    loader, whole = (ms.DataLoader(finite().repeat(), batch_size=4) for _ in range(2))
    reference = left_after(whole, 9)
    found = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        found += left_after(loader, 3)
    assert found == reference


def test_the_whole_run_of_one_rank_is_its_state() -> None:
    loader = ms.DataLoader(finite(), batch_size=4)
    left_after(loader, 2)
    assert ms.WholeRun(loader).state_dict() == loader.state_dict()
