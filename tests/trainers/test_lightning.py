"""Lightning's Trainer and Fabric: cut at every step and epoch end, in handlers and after errors,
one rank and several.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.combined_loader import CombinedLoader

import midstream as ms
from midstream.lightning import ResumeCallback
from tests.helpers.torchrun import ledgers, torchrun

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning"
    ),  # Lightning's own, of torch and Python
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:Be aware that when using `ckpt_path`.*ModelCheckpoint:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:You are using the `dataloader_iter` step flavor:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.`.*"),
]


class Net(LightningModule):  # type: ignore[misc]
    """Learns nothing much, and notes what it was shown and its losses."""

    def __init__(
        self, *, estimate: bool = False, in_step: Callable[[int], Any] = lambda step: None
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[Any] = []
        self.losses: list[float] = []
        self.estimate, self.in_step = estimate, in_step

    def training_step(self, batch: Any) -> Any:
        ids = (
            {name: part.tolist() for name, part in batch.items()}
            if isinstance(batch, dict)
            else batch.tolist()
        )
        self.seen.append(ids)
        self.in_step(len(self.seen))
        x = next(iter(batch.values())) if isinstance(batch, dict) else batch
        loss = (self.layer(x[:, None] / 100.0) - 1).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        if self.estimate:
            assert self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), lr=0.1)


def sized() -> ms.Dataset:
    return ms.from_dataset(range(46), name="web").shuffle(3).batch(4)


def unsized() -> ms.Dataset:
    return (
        ms.from_dataset(range(60), name="web")
        .filter(lambda x: x % 4)
        .shuffle(4, buffer_size=96)
        .batch(4)
    )


def endless() -> ms.Dataset:
    return ms.from_dataset(range(20), name="web").shuffle(3).repeat().batch(4)


PIPELINES = {"sized": sized, "unsized": unsized, "endless": endless}


def fit(
    folder: Path,
    loader: Any,
    *,
    resume: Path | None = None,
    callbacks: tuple[Any, ...] = (),
    guided: bool = True,
    net: Net | None = None,
    **options: Any,
) -> Net:
    net = net or Net()
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*([ResumeCallback()] if guided else []), *callbacks],
        **{
            "enable_checkpointing": any(isinstance(part, ModelCheckpoint) for part in callbacks),
            **options,
        },
    )
    trainer.fit(net, loader, ckpt_path=resume)
    return net


def every_step(folder: Path, **options: Any) -> ModelCheckpoint:
    options = {"every_n_train_steps": 1, **options}
    return ModelCheckpoint(
        folder, filename="{step}", auto_insert_metric_name=False, save_top_k=-1, **options
    )


def checkpoints(folder: Path) -> dict[int, Path]:
    return {
        int(path.stem): path
        for path in sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem))
    }


LIMITS: dict[str, dict[str, Any]] = {
    "epochs": {"max_epochs": 3},
    "steps": {"max_steps": 30, "max_epochs": -1},
}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", PIPELINES)
def test_resumed_after_any_step_it_is_shown_what_an_uninterrupted_run_is(
    name: str, limit: str, tmp_path: Path
) -> None:
    options = LIMITS[limit] if name != "endless" else {**LIMITS[limit], "limit_train_batches": 7}
    whole = fit(
        tmp_path,
        ms.DataLoader(PIPELINES[name]()),
        callbacks=(every_step(tmp_path / "all"),),
        **options,
    )
    found = checkpoints(tmp_path / "all")
    assert list(found) == list(range(1, len(whole.seen) + 1)) and len(found) > 20
    for step, path in found.items():
        net = fit(tmp_path, ms.DataLoader(PIPELINES[name]()), resume=path, **options)
        assert net.seen == whole.seen[step:], f"from step {step}"
        assert net.losses == whole.losses[step:]


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_with_workers_and_resumed_again_and_again(name: str, tmp_path: Path) -> None:
    options = LIMITS["epochs"] if name != "endless" else {"max_epochs": 3, "limit_train_batches": 7}
    whole = fit(tmp_path, ms.DataLoader(PIPELINES[name]()), **options)
    done, path = 0, None
    for number, (workers, steps) in enumerate([(2, 5), (0, 1), (2, 6), (1, 2), (2, 40)]):
        callbacks = (every_step(tmp_path / str(number)),)
        loader = ms.DataLoader(
            PIPELINES[name](), num_workers=workers, persistent_workers=workers > 1
        )
        stop = Stop(steps)
        net = fit(tmp_path, loader, resume=path, callbacks=(*callbacks, stop), **options)
        loader.close()
        assert (
            net.seen == whole.seen[done : done + steps]
            and net.losses == whole.losses[done : done + steps]
        )
        done += len(net.seen)
        path = checkpoints(tmp_path / str(number))[done] if net.seen else path
    assert done == len(whole.seen)


class Stop(Callback):  # type: ignore[misc]
    """Stops after so many steps, as Lightning stops: with the loader where it was read to."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.should_stop = True


@pytest.mark.parametrize("name", ["sized", "unsized"])
def test_from_the_end_of_an_epoch_the_next_one_is_whole(name: str, tmp_path: Path) -> None:
    for kind, options in LIMITS.items():
        folder = tmp_path / kind
        saver = every_step(
            folder, every_n_train_steps=None, every_n_epochs=1, save_on_train_epoch_end=True
        )
        whole = fit(tmp_path, ms.DataLoader(PIPELINES[name]()), callbacks=(saver,), **options)
        found = checkpoints(folder)
        assert len(found) >= 2
        for step, path in found.items():
            assert (
                fit(tmp_path, ms.DataLoader(PIPELINES[name]()), resume=path, **options).seen
                == whole.seen[step:]
            )


@pytest.mark.parametrize("name", PIPELINES)
def test_a_schedule_that_asks_for_the_number_of_steps_costs_nothing(
    name: str, tmp_path: Path
) -> None:
    options = {
        "max_epochs": 2,
        "max_steps": 40,
        "limit_train_batches": 7 if name == "endless" else 1.0,
    }
    saver = every_step(tmp_path / "all", every_n_train_steps=3)
    whole = fit(
        tmp_path,
        ms.DataLoader(PIPELINES[name]()),
        callbacks=(saver,),
        net=Net(estimate=True),
        **options,
    )
    for step, path in checkpoints(tmp_path / "all").items():
        net = fit(
            tmp_path,
            ms.DataLoader(PIPELINES[name]()),
            resume=path,
            net=Net(estimate=True),
            **options,
        )
        assert net.seen == whole.seen[step:]


def _fail(step: int) -> None:
    if step == 9:
        raise OSError("the step fails")


@pytest.mark.parametrize("name", PIPELINES)
def test_a_checkpoint_of_an_error_has_the_batch_that_was_not_trained(
    name: str, tmp_path: Path
) -> None:
    options = {"max_epochs": 2, "limit_train_batches": 7 if name == "endless" else 1.0}
    whole = fit(tmp_path, ms.DataLoader(PIPELINES[name]()), **options)
    saver = ModelCheckpoint(tmp_path / "all", every_n_epochs=100, save_on_exception=True)
    with pytest.raises(OSError, match="the step fails"):
        fit(
            tmp_path,
            ms.DataLoader(PIPELINES[name]()),
            callbacks=(saver,),
            net=Net(in_step=_fail),
            **options,
        )
    (path,) = (tmp_path / "all").glob("*.ckpt")
    net = fit(tmp_path, ms.DataLoader(PIPELINES[name]()), resume=path, **options)
    assert net.seen == whole.seen[8:] and net.losses == whole.losses[8:]


def _scontrol(folder: Path) -> None:
    """Slurm's command, which does nothing."""
    (folder / "scontrol").write_text("#!/bin/sh\nexit 0\n")
    (folder / "scontrol").chmod(0o755)


def _slurm_signals(step: int) -> None:
    if step == 5:
        signal.raise_signal(signal.SIGUSR1)
    if step == 6:
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", PIPELINES)
def test_slurm_requeues_in_the_middle_of_a_step(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _scontrol(tmp_path)
    options = {"max_epochs": 2, "limit_train_batches": 7 if name == "endless" else 1.0}
    whole = fit(tmp_path, ms.DataLoader(PIPELINES[name]()), **options)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for key, value in {
        "JOB_ID": 1,
        "NTASKS": 1,
        "JOB_NAME": "train",
        "PROCID": 0,
        "LOCALID": 0,
        "NODEID": 0,
    }.items():
        monkeypatch.setenv(f"SLURM_{key}", str(value))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, ms.DataLoader(PIPELINES[name]()), net=Net(in_step=_slurm_signals), **options)
    signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "hpc_ckpt_1.ckpt").is_file()
    net = fit(tmp_path, ms.DataLoader(PIPELINES[name]()), **options)  # Lightning finds it by itself
    assert net.seen == whole.seen[4:] and net.losses == whole.losses[4:]


class Reads(Net):
    """Takes the iterator and reads it itself."""

    def training_step(self, dataloader_iter: Any) -> Any:
        batch, _, _ = next(dataloader_iter)
        return Net.training_step(self, batch)


@pytest.mark.parametrize("name", ["sized", "unsized"])
def test_a_training_step_that_reads_by_itself(name: str, tmp_path: Path) -> None:
    options = {"max_epochs": 2}
    whole = fit(
        tmp_path,
        ms.DataLoader(PIPELINES[name]()),
        callbacks=(every_step(tmp_path / "all"),),
        net=Reads(),
        **options,
    )
    for step, path in checkpoints(tmp_path / "all").items():
        net = fit(tmp_path, ms.DataLoader(PIPELINES[name]()), resume=path, net=Reads(), **options)
        assert net.seen == whole.seen[step:]


def small() -> ms.Dataset:
    return ms.from_dataset(range(1000, 1020), name="code").shuffle(5).batch(4)


def small_unsized() -> ms.Dataset:
    return ms.from_dataset(range(1000, 1020), name="code").filter(lambda x: True).batch(4)


PAIRS = {
    "sized": (sized, small),
    "unsized": (unsized, small_unsized),
    "mixed": (unsized, small),
    "endless": (sized, endless),
}


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
@pytest.mark.parametrize("pair", PAIRS)
def test_two_loaders_in_one(pair: str, mode: str, tmp_path: Path) -> None:
    def loaders() -> CombinedLoader:
        first, second = PAIRS[pair]
        return CombinedLoader({"a": ms.DataLoader(first()), "b": ms.DataLoader(second())}, mode)

    options: dict[str, Any] = {"max_epochs": 3}
    if pair == "endless":
        options["limit_train_batches"] = 9
    whole = fit(
        tmp_path, loaders(), callbacks=(every_step(tmp_path / "all"),), net=Pair(), **options
    )
    found = checkpoints(tmp_path / "all")
    assert len(found) >= 15
    for step, path in found.items():
        net = fit(tmp_path, loaders(), resume=path, net=Pair(), **options)
        assert net.seen == whole.seen[step:], f"from step {step}"


class Pair(Net):
    """Batches of a ``CombinedLoader``, of which one may be None."""

    def training_step(self, batch: Any) -> Any:
        return Net.training_step(
            self, {name: part for name, part in batch.items() if part is not None}
        )


def test_an_epoch_that_ends_early_is_over(tmp_path: Path) -> None:
    options = {"max_epochs": 3, "limit_train_batches": 5}
    whole = fit(
        tmp_path, ms.DataLoader(sized()), callbacks=(every_step(tmp_path / "all"),), **options
    )
    loader = ms.DataLoader(sized())
    for epoch in range(3):
        loader.set_epoch(epoch)
        first = [batch.tolist() for _, batch in zip(range(5), loader)]
        assert whole.seen[5 * epoch : 5 * epoch + 5] == first
    for step, path in checkpoints(tmp_path / "all").items():
        assert (
            fit(tmp_path, ms.DataLoader(sized()), resume=path, **options).seen == whole.seen[step:]
        )
    unguided = fit(tmp_path, ms.DataLoader(sized()), guided=False, **options)
    assert unguided.seen == whole.seen


@pytest.mark.parametrize("name", ["sized", "unsized"])
def test_accumulated_gradients_and_validation_change_nothing(name: str, tmp_path: Path) -> None:
    options = {
        "max_epochs": 2,
        "accumulate_grad_batches": 2,
        "val_check_interval": 4,
        "num_sanity_val_steps": 1,
    }
    saver = every_step(tmp_path / "all", every_n_train_steps=2)

    def loaders() -> Any:
        return ms.DataLoader(PIPELINES[name]())

    plain = fit(tmp_path, loaders(), max_epochs=2, accumulate_grad_batches=2)
    whole = fit(tmp_path, loaders(), callbacks=(saver,), net=Validated(), **options)
    assert whole.seen == plain.seen
    for path in checkpoints(tmp_path / "all").values():
        progress = torch.load(path, weights_only=False)["loops"]["fit_loop"][
            "epoch_loop.batch_progress"
        ]
        net = fit(tmp_path, loaders(), resume=path, net=Validated(), **options)
        assert net.seen == whole.seen[progress["total"]["processed"] :]
        assert net.losses == whole.losses[progress["total"]["processed"] :]


class Validated(Net):
    def val_dataloader(self) -> Any:
        return ms.DataLoader(small())

    def validation_step(self, batch: Any) -> None:
        assert len(batch)


def test_without_the_callback_lightning_warns_of_nothing_and_we_do(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="ResumeCallback") as found:
        whole = fit(
            tmp_path,
            ms.DataLoader(unsized()),
            callbacks=(every_step(tmp_path / "all"),),
            guided=False,
            max_epochs=1,
        )
    assert (
        sum("ResumeCallback" in str(warning.message) for warning in found) == 1
    )  # though there was a save at every step
    path = checkpoints(tmp_path / "all")[5]
    with pytest.warns(RuntimeWarning, match="without midstream's ResumeCallback"):
        rest = fit(tmp_path, ms.DataLoader(unsized()), resume=path, max_epochs=1)
    assert rest.seen == whole.seen[6:]  # one batch is lost, as the warnings say
    guided = tmp_path / "guided"
    fit(tmp_path, ms.DataLoader(unsized()), callbacks=(every_step(guided),), max_epochs=1)
    with pytest.warns(UserWarning, match="ResumeCallback"):  # Lightning's: a callback is missing
        fit(
            tmp_path,
            ms.DataLoader(unsized()),
            resume=checkpoints(guided)[5],
            guided=False,
            max_epochs=1,
        )


@pytest.mark.parametrize("name", ["sized", "unsized"])
def test_fabric_saves_and_loads_it_and_its_count_of_epochs_does_not_matter(
    name: str, tmp_path: Path
) -> None:
    one = ms.DataLoader(PIPELINES[name]())
    reference = [[batch.tolist() for batch in one] for _ in range(4)]

    def start() -> tuple[Fabric, ms.DataLoader, Any]:
        fabric = Fabric(accelerator="cpu", devices=1)
        loader = ms.DataLoader(PIPELINES[name]())
        return fabric, loader, fabric.setup_dataloaders(loader)

    fabric, loader, wrapped = start()
    for epoch in range(2):
        for number, batch in enumerate(wrapped):
            assert batch.tolist() == reference[epoch][number]
            if epoch == 1 and number == 4:
                fabric.save(tmp_path / "a.ckpt", {"loader": wrapped})
                fabric.save(tmp_path / "b.ckpt", {"loader": ms.WholeRun(wrapped)})
    for file in ("a.ckpt", "b.ckpt"):
        fabric, loader, wrapped = start()
        fabric.load(
            tmp_path / file, {"loader": wrapped if file == "a.ckpt" else ms.WholeRun(wrapped)}
        )
        found = [[batch.tolist() for batch in wrapped] for _ in range(loader.epoch, 4)]
        assert found == [reference[1][5:], *reference[2:]]
    # An epoch that is left early is over, as Fabric tells the sampler.
    fabric, loader, wrapped = start()
    for epoch in range(3):
        assert [batch.tolist() for _, batch in zip(range(3), wrapped)] == reference[epoch][:3]


class Kill(Callback):  # type: ignore[misc]
    """SIGKILL in the middle of a step; a ledger says which were trained."""

    def __init__(self, ledger: str, step: int) -> None:
        self.ledger, self.step = open(ledger, "a"), step  # noqa: SIM115

    def on_before_optimizer_step(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer: Any, net: Any, *args: Any) -> None:
        self.ledger.write(json.dumps([trainer.global_step, net.seen[-1], net.losses[-1]]) + "\n")
        self.ledger.flush()
        os.fsync(self.ledger.fileno())


def across() -> ms.Dataset:
    return (
        ms.from_dataset(range(386), name="web").filter(lambda x: x % 9).batch(4)
    )  # 48 lanes of two batches and a bit


def across_sized() -> ms.Dataset:
    return ms.from_dataset(range(400), name="web").shuffle(3).batch(4)


ACROSS = {"unsized": across, "sized": across_sized}


def _across(folder: str, name: str, attempt: str, death: str, resume: str) -> None:
    """What torchrun starts."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    saver = ModelCheckpoint(
        Path(folder, attempt),
        filename="{step}",
        auto_insert_metric_name=False,
        save_top_k=-1,
        every_n_train_steps=5,
    )
    killer = Kill(f"{folder}/{attempt}-{rank}", int(death) if rank == 0 else -1)
    loader = ms.DataLoader(ACROSS[name](), num_workers=1, sync_end=name == "unsized", lanes=48)
    fit(
        Path(folder),
        loader,
        resume=Path(resume) if resume else None,
        callbacks=(saver, killer),
        max_epochs=2,
        devices=int(os.environ["WORLD_SIZE"]),
        strategy="ddp",
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ACROSS)
def test_killed_on_two_ranks_it_goes_on_on_one_and_on_three(name: str, tmp_path: Path) -> None:
    def train(attempt: str, ranks: int, death: int = -1, resume: str = "") -> list[Any]:
        torchrun(__file__, ranks, "trainer", tmp_path, name, attempt, death, resume, dies=death > 0)
        lines = [[line[1] for line in rank] for rank in ledgers(tmp_path, attempt, ranks)]
        assert len({len(rank) for rank in lines}) == 1 or death > 0
        first = 20 % ranks if resume else 0  # the rank that makes the first batch
        return [ids for step in zip(*lines[first:], *lines[:first]) for ids in step]

    one = ms.DataLoader(ACROSS[name](), lanes=48)
    first, second = [[batch.tolist() for batch in one] for _ in range(2)]
    assert train("killed", 2, death=14)[:20] == first[:20]
    newest = str(tmp_path / "killed" / "10.ckpt")
    if name == "sized":
        alone = fit(tmp_path, ms.DataLoader(across_sized()), resume=Path(newest), max_epochs=2)
        assert alone.seen == first[20:] + second
        after = train("three", 3, resume=newest)
        assert after[:78] == first[20:98]  # the two that do not go round are dropped, and counted
        assert sorted(after[78:]) == sorted(second[:99])
    else:
        after = train("three", 3, resume=newest)
        assert after[:27] == first[20:47]
        seen = Counter(x for ids in [*first[:20], *after] for x in ids)
        rest = Counter(x for ids in first + second for x in ids) - seen
        assert (
            max(seen.values()) == 2 and sum(rest.values()) < 16
        )  # what some rank had left when another ended


def _slurm_signals_and_kills(step: int) -> None:
    if step == 5:
        signal.raise_signal(signal.SIGUSR1)
    if step == 6:
        os.kill(os.getpid(), signal.SIGKILL)


ENDS: dict[str, Any] = {"error": _fail, "requeue": _slurm_signals_and_kills, "": lambda step: None}


def _ended(folder: str, name: str, attempt: str, end: str, root: str, resume: str) -> None:
    """What torchrun starts, as srun would: twelve steps, unless all ranks come to the same end in
    one of them.
    """
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    if root:
        del os.environ["TORCHELASTIC_RUN_ID"]  # Lightning would take torchrun for its host
        os.environ["PATH"] = os.pathsep.join([folder, os.environ["PATH"]])
        ranks = os.environ["WORLD_SIZE"]
        slurm = {
            "JOB_ID": "1",
            "NTASKS": ranks,
            "NTASKS_PER_NODE": ranks,
            "JOB_NAME": "train",
            "NODEID": "0",
        }
        for key, value in {**slurm, "PROCID": rank, "LOCALID": rank}.items():
            os.environ[f"SLURM_{key}"] = value
    saver = ModelCheckpoint(Path(folder, attempt), every_n_epochs=100, save_on_exception=True)
    loader = ms.DataLoader(ACROSS[name](), num_workers=1, sync_end=name == "unsized", lanes=48)
    try:
        fit(
            Path(folder, root),
            loader,
            resume=Path(resume) if resume else None,
            callbacks=(saver, Kill(f"{folder}/{attempt}-{rank}", -1)),
            net=Net(in_step=ENDS[end]),
            max_steps=12,
            devices=int(os.environ["WORLD_SIZE"]),
            strategy="ddp",
        )
    except OSError as error:
        assert str(error) == "the step fails"
        os._exit(3)


@pytest.mark.slow
@pytest.mark.parametrize(("end", "name"), list(zip(["error", "requeue"], ACROSS, strict=True)))
def test_two_ranks_that_come_to_the_same_end_go_on_as_if_nothing_had_been(
    end: str, name: str, tmp_path: Path
) -> None:
    def run(attempt: str, end: str = "", root: str = "", resume: str = "") -> list[list[Any]]:
        torchrun(__file__, 2, "ended", tmp_path, name, attempt, end, root, resume, dies=end != "")
        return ledgers(tmp_path, attempt, 2)

    _scontrol(tmp_path)
    whole = run("whole")
    assert [len(rank) for rank in whole] == [12, 12]
    root = "slurm" if end == "requeue" else ""
    ended = run("ended", end, root)
    if end == "requeue":
        (path,) = (tmp_path / root).glob("*.ckpt")
        assert path.name == "hpc_ckpt_1.ckpt"
        rest, saved = run("rest", root=root), 4  # Lightning finds it by itself
    else:
        (path,) = (tmp_path / "ended").glob("*.ckpt")
        rest, saved = run("rest", resume=str(path)), 8
    for rank in range(2):  # samples and losses, bit for bit
        assert ended[rank][:saved] + rest[rank] == whole[rank]
        assert len(ended[rank]) == saved + (end == "requeue")


def _fabric(folder: str, name: str, attempt: str, death: str, resume: str) -> None:
    """What torchrun starts: sixteen steps, saved after every fifth."""
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy="ddp")
    fabric.launch()
    torch.manual_seed(0)
    net = torch.nn.Linear(1, 1)
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    loader = fabric.setup_dataloaders(ms.DataLoader(ACROSS[name](), num_workers=1, lanes=48))
    state = {"model": model, "optimizer": optimizer, "loader": ms.WholeRun(loader), "step": 0}
    if resume:
        fabric.load(resume, state)
    step = state["step"]
    with open(f"{folder}/{attempt}-{fabric.global_rank}", "w") as ledger:
        for batch in loader:
            loss = (model(batch[:, None] / 100.0) - 1).square().mean()
            fabric.backward(loss)
            if fabric.is_global_zero and step + 1 == int(death):
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            print(json.dumps([step, batch.tolist(), loss.item()]), file=ledger, flush=True)
            if step % 5 == 0:
                fabric.save(f"{folder}/{attempt}-{step}.ckpt", {**state, "step": step})
            if step == 16:
                break
    del (
        model,
        optimizer,
        state,
    )  # before what they talk through: torch hangs now and then when they go after it
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("name", ACROSS)
def test_fabric_killed_on_two_ranks_goes_on_on_two_and_on_three(name: str, tmp_path: Path) -> None:
    def run(attempt: str, ranks: int, death: int = -1, resume: str = "") -> list[list[Any]]:
        torchrun(__file__, ranks, "fabric", tmp_path, name, attempt, death, resume, dies=death > 0)
        return ledgers(tmp_path, attempt, ranks)

    reference = [batch.tolist() for batch in ms.DataLoader(ACROSS[name](), lanes=48)]
    whole = run("whole", 2)
    assert [line[1] for step in zip(*whole) for line in step] == reference[:32]
    killed = run("killed", 2, death=14)
    newest = str(tmp_path / "killed-10.ckpt")
    rest = run("rest", 2, resume=newest)
    assert [
        killed[rank][:10] + rest[rank] for rank in range(2)
    ] == whole  # the losses too, bit for bit
    three = run("three", 3, resume=newest)
    assert [[line[0] for line in rank] for rank in three] == [[11, 12, 13, 14, 15, 16]] * 3
    first = 20 % 3  # the rank that makes the next batch
    assert [line[1] for step in zip(*three[first:], *three[:first]) for line in step] == reference[
        20:38
    ]


if __name__ == "__main__":
    {"trainer": _across, "fabric": _fabric, "ended": _ended}[sys.argv[1]](*sys.argv[2:])
