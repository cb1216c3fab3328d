"""The demonstration: trains a small language model, kills it, resumes it, and compares every bit.

    pipeline, Model, train   the parts of a training script: copy these
    compare                  defines "exact"
    run                      runs three training processes, one after the other

Three processes train the same model on text that is on this machine. The first is not interrupted.
The second is killed by SIGKILL at a random step inside an epoch. The third resumes from the last
checkpoint of the second, with another number of workers. Every step writes its loss and the origins
of its samples to a ledger; the ledgers must agree. Everything is in one file, so that it can be
read and copied whole.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import midstream as ms

__all__ = ["Job", "Step", "Verdict", "compare", "pipeline", "run", "train"]

PIECE = 64
"""Length of the longest piece of a line in bytes. A byte is a token."""

BATCH = 16
"""Number of pieces in a batch."""


# --------------------------------------------------------------------------------------------------
# The data: real text that is on every machine with Python
# --------------------------------------------------------------------------------------------------


def code_lines(limit: int) -> list[str]:
    """Returns lines of the standard library's sources."""
    lines: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        lines.extend(path.read_text(encoding="utf-8", errors="replace").splitlines())
        if len(lines) >= limit:
            break
    return lines[:limit]


def prose_lines(limit: int) -> list[str]:
    """Returns lines of Python's help texts."""
    from pydoc_data.topics import topics

    return [line for _, text in sorted(topics.items()) for line in text.splitlines()][:limit]


def long_enough(line: str) -> bool:
    """Whether a line is long enough to learn from."""
    return len(line.strip()) >= 12


def pieces(line: str) -> list[dict[str, Any]]:
    """Returns the bytes of a line, cut into pieces of at most `PIECE`.

    A single byte at the end is left out, because no byte follows it.
    """
    data = np.frombuffer(line.encode(), dtype=np.uint8).astype(np.int64)
    return [{"ids": data[start : start + PIECE]} for start in range(0, len(data) - 1, PIECE)]


def pipeline(rows: int) -> ms.Dataset:
    """Builds the pipeline: two sources mixed 7:3, shuffled, filtered, cut, and shuffled again.

    Args:
        rows: Number of lines of each source.
    """
    code = ms.from_dataset(code_lines(rows)).shuffle(seed=1)
    prose = ms.from_dataset(prose_lines(rows)).shuffle(seed=1)
    mix = ms.interleave({"code": code, "prose": prose}, weights={"code": 7, "prose": 3})
    return mix.filter(long_enough).flat_map(pieces).shuffle(seed=2, buffer_size=960)


# --------------------------------------------------------------------------------------------------
# The training, in a process of its own
# --------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """Predicts the next byte."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(256, width)
        self.rnn = torch.nn.GRU(width, width, batch_first=True)
        self.head = torch.nn.Linear(width, 256)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the mean cross entropy over all bytes but padding.

        Args:
            batch: ``ids`` int64 [batch, length], at least 2 long; ``ids_lengths`` int64 [batch].
        """
        ids, lengths = batch["ids"], batch["ids_lengths"]
        hidden, _ = self.rnn(self.embed(ids[:, :-1]))
        losses = torch.nn.functional.cross_entropy(
            self.head(hidden).transpose(1, 2), ids[:, 1:], reduction="none"
        )
        real = torch.arange(1, ids.shape[1]) < lengths[:, None]
        return (losses * real).sum() / real.sum()


@dataclass(frozen=True)
class Job:
    """The settings of one training process.

    Attributes:
        folder: Folder of its ledger and of the checkpoint.
        name: Name of the run, and of its ledger.
        steps: Number of training steps.
        workers: Number of worker processes of its loader.
        rows: Number of lines of each source.
        every: Number of steps between two checkpoints; 0 for none.
        resume: Whether to start from the checkpoint.
    """

    folder: str
    name: str
    steps: int
    workers: int
    rows: int
    every: int
    resume: bool = False


def train(job: Job) -> None:
    """Trains a job to its end. The loop is that of any PyTorch script."""
    torch.set_num_threads(1)  # so that sums are always taken in the same order
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    folder, num_epochs = Path(job.folder), sys.maxsize  # as many as the steps need

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = ms.DataLoader(
        pipeline(job.rows), batch_size=BATCH, num_workers=job.workers, collate_fn=ms.pad
    )
    step = start = 0
    ledger = Ledger(folder / f"{job.name}.jsonl")
    if job.resume:
        checkpoint = load(folder)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step = start = checkpoint["step"]
        ledger.write(event="resume", step=step)
        loading = time.perf_counter()
        loader.load_state_dict(checkpoint["loader"])

    for epoch in range(loader.epoch, num_epochs):
        for batch in loader:
            if job.resume and step == start:
                ledger.write(event="first batch", seconds=time.perf_counter() - loading)

            loss = model.loss(batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
            ledger.write(
                step=step, epoch=epoch, loss=float(loss.detach()).hex(), origins=loader.trace()
            )

            if step == job.steps:
                ledger.write(event="end", progress=str(loader.progress()))
                loader.close()
                return
            if job.every and step % job.every == 0:
                checkpoint = {
                    "step": step,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "loader": loader.state_dict(),
                }
                save(checkpoint, folder)


def save(checkpoint: dict[str, Any], folder: Path) -> None:
    """Writes a checkpoint. A kill at any moment leaves the old one or the new one, whole."""
    temporary = folder / "checkpoint.tmp"
    with temporary.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(_checkpoint(folder))


def _checkpoint(folder: Path) -> Path:
    return folder / "checkpoint.pt"


def load(folder: Path) -> dict[str, Any]:
    """Loads the last checkpoint: tensors and plain values, so that pickle is not needed."""
    checkpoint: dict[str, Any] = torch.load(_checkpoint(folder), weights_only=True)
    return checkpoint


class Ledger:
    """A file with a line of JSON for every step, written by the training and read meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0
        self.entries: list[dict[str, Any]] = []

    def write(self, **entry: Any) -> None:
        """Adds a line and flushes it to disk, so that no kill can undo it."""
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """Returns the entries written since the last call, whole lines only."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self.offset += end
        fresh = [json.loads(line) for line in data[:end].splitlines()]
        self.entries.extend(fresh)
        return fresh

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The entries of training steps."""
        return [entry for entry in self.entries if "event" not in entry]

    def event(self, name: str) -> dict[str, Any]:
        """Returns the entry of an event: ``resume``, ``first batch`` or ``end``."""
        return next(entry for entry in self.entries if entry.get("event") == name)


# --------------------------------------------------------------------------------------------------
# The comparison
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """The result of comparing the ledgers.

    Attributes:
        exact: Whether every sample and every loss is the same.
        steps: Number of steps compared.
        samples: Number of samples compared.
        rolled_back: Number of steps that the killed run trained after its last checkpoint. They are
            lost with their weights, and trained again.
        differences: The first differences, as text.
        details: Seed, step of the kill, checkpoint, times.
    """

    exact: bool
    steps: int
    samples: int
    rolled_back: int
    differences: list[str]
    details: dict[str, Any] = field(default_factory=dict)


def compare(
    whole: list[dict[str, Any]],
    killed: list[dict[str, Any]],
    resumed: list[dict[str, Any]],
    checkpoint: int,
) -> Verdict:
    """Compares the steps of the uninterrupted run with those of the two others.

    The killed run up to its checkpoint and the resumed run after it must give the whole run: the
    same steps, each with the same epoch, the same samples in the same order, and a loss of the same
    bits. The steps that the killed run trained after its checkpoint were rolled back, and must be
    the same too.

    Args:
        whole: Steps of the uninterrupted run, as they are in its ledger.
        killed: Steps of the killed run.
        resumed: Steps of the resumed run.
        checkpoint: The step after which the checkpoint was taken.
    """
    kept = [entry for entry in killed if entry["step"] <= checkpoint]
    lost = killed[len(kept) :]
    differences = []
    expected, found = (
        [entry["step"] for entry in whole],
        [entry["step"] for entry in kept + resumed],
    )
    if found != expected:
        at = next(
            (i for i, (a, b) in enumerate(zip(expected, found)) if a != b),
            min(len(expected), len(found)),
        )
        words = [
            f"step {steps[at]}" if at < len(steps) else "the end" for steps in (expected, found)
        ]
        differences.append(f"after {at} steps: expected {words[0]}, found {words[1]}")
    reference = {entry["step"]: entry for entry in whole}
    for run, entries in (("killed", kept), ("resumed", resumed), ("killed", lost)):
        for entry in entries:
            for part in ("epoch", "origins", "loss"):
                here, there = entry[part], reference.get(entry["step"], {}).get(part)
                if here != there and entry["step"] in reference:
                    differences.append(
                        f"step {entry['step']} of the {run} run: {_difference(part, there, here)}"
                    )
    samples = sum(len(entry["origins"]) for entry in kept + resumed)
    return Verdict(not differences, len(found), samples, len(lost), differences[:5])


def _difference(part: str, expected: Any, found: Any) -> str:
    if part == "loss":
        return (
            f"the loss differs: expected {float.fromhex(expected)!r}, found"
            f" {float.fromhex(found)!r}"
        )
    if part == "epoch":
        return f"the epoch differs: expected {expected}, found {found}"
    for number, (a, b) in enumerate(zip(expected, found)):
        if a != b:
            return f"sample {number} differs: expected {ms.Origin(*a)}, found {ms.Origin(*b)}"
    return f"expected {len(expected)} samples, found {len(found)}"


# --------------------------------------------------------------------------------------------------
# The demonstration
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A training step that has just finished.

    Attributes:
        run: Name of the run.
        step: Number of the step, from 1.
        loss: Its loss.
    """

    run: str
    step: int
    loss: float


def run(
    *,
    steps: int = 240,
    workers: int = 2,
    resume_workers: int = 1,
    seed: int | None = None,
    kill_at: int | None = None,
    every: int = 20,
    rows: int = 1500,
    folder: Path | None = None,
) -> Iterator[str | Step | Verdict]:
    """Runs the demonstration. Yields lines and steps to show, and the verdict as the last item.

    Args:
        steps: Number of training steps of a whole run.
        workers: Number of worker processes of the first two runs.
        resume_workers: Number of worker processes of the resumed run.
        seed: Chooses the step of the kill; by default random.
        kill_at: The step of the kill itself.
        every: Number of steps between two checkpoints.
        rows: Number of lines of each source.
        folder: Folder in which ledgers, logs and the checkpoint are kept; by default a temporary
            one, which is removed.

    Raises:
        ValueError: If no run can be killed and resumed with these numbers.
        RuntimeError: If a training process fails by itself.
    """
    seed = random.SystemRandom().randrange(1 << 20) if seed is None else seed
    _check_kill(steps, every, kill_at)
    with tempfile.TemporaryDirectory(prefix="midstream-demo-") as temporary:
        path = Path(folder or temporary).absolute()
        path.mkdir(parents=True, exist_ok=True)
        job = Job(str(path), "whole", steps, workers, rows, every)
        yield (
            f"A small language model on this machine's own text, {steps} steps of {BATCH} pieces;"
            f" seed {seed}"
        )

        whole = yield from watch(replace(job, every=0))
        epochs = [entry["epoch"] for entry in whole.steps]
        batch = epochs.count(epochs[-1])
        text = f"to batch {batch} of epoch {epochs[-1]}, {_losses(whole)}"
        yield _row("left alone", workers, text)

        killed = yield from _kill(job, epochs, seed, kill_at)
        last, checkpoint = killed.steps[-1], load(path)
        batch = epochs[: last["step"]].count(last["epoch"])
        text = f"SIGKILL after step {last['step']} (batch {batch} of epoch {last['epoch']})"
        yield _row("killed", workers, text)
        size, whole_size = len(json.dumps(checkpoint["loader"])), _checkpoint(path).stat().st_size
        yield (
            f"  its last checkpoint: step {checkpoint['step']}, {size:,} bytes for the data,"
            f" {whole_size:,} with the weights"
        )

        job = replace(job, name="resumed", workers=resume_workers, resume=True)
        resumed = yield from watch(job)
        seconds, start = resumed.event("first batch")["seconds"], resumed.event("resume")["step"]
        text = f"first batch after {1000 * seconds:.0f} ms, {_losses(resumed)}"
        yield _row("resumed", resume_workers, text)
        yield "Delivered in all, in pieces (7:3 is the mix of lines, before the filter and the cut):"
        yield resumed.event("end")["progress"]
        if folder is not None:
            yield f"Ledgers, logs and checkpoint are in {folder}"
        details = {
            "seed": seed,
            "killed_after": last["step"],
            "resumed_after": start,
            "workers": workers,
            "resume_workers": resume_workers,
            "epochs": epochs[-1] + 1,
            "loader_state_bytes": size,
            "seconds_to_first_batch": round(seconds, 4),
        }
        yield replace(compare(whole.steps, killed.steps, resumed.steps, start), details=details)


def _check_kill(steps: int, every: int, kill_at: int | None) -> None:
    """Raises ValueError unless a run can be killed after its first checkpoint."""
    if kill_at is None and steps < every + 10:
        raise ValueError(
            f"{steps} steps leave no room for a kill after a checkpoint; give at least {every + 10}"
        )
    if kill_at is not None and not every < kill_at < steps:
        raise ValueError(
            f"the kill comes after the first checkpoint (step {every}) and before the last step"
            f" ({steps}); found {kill_at}"
        )


def watch(job: Job, kill_at: int | None = None) -> Generator[Step, None, Ledger]:
    """Runs a job in a child process, yields its steps, and kills it after one of them.

    Only the training process is killed; its workers notice that and end by themselves. The job may
    finish before the signal arrives; then its ledger is whole.

    Args:
        job: The settings of the training.
        kill_at: The step after which to kill the process.

    Returns:
        The ledger of the job.

    Raises:
        RuntimeError: If the process failed by itself.
    """
    ledger, log = (Path(job.folder) / f"{job.name}.{ending}" for ending in ("jsonl", "log"))
    ledger.unlink(missing_ok=True)
    reader = Ledger(ledger)
    with log.open("wb") as output:
        command = [sys.executable, "-m", "midstream.cli.demo", json.dumps(asdict(job))]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        running = True
        while running:
            # Asked before the ledger is read, so that its end is not missed.
            running = process.poll() is None
            for entry in reader.read():
                if "event" not in entry:
                    if entry["step"] == kill_at:
                        process.kill()
                    yield Step(job.name, entry["step"], float.fromhex(entry["loss"]))
            if running:
                time.sleep(0.01)
    finally:
        process.kill()
        status = process.wait()
    if status != 0 and not (kill_at and status == -signal.SIGKILL):
        raise RuntimeError(
            f"the {job.name} run ended with status"
            f" {status}:\n{log.read_text(errors='replace')[-3000:]}"
        )
    return reader


def _kill(
    job: Job, epochs: list[int], seed: int, kill_at: int | None
) -> Generator[Step, None, Ledger]:
    """Runs the job and kills it, inside an epoch unless ``kill_at`` is given.

    The signal may arrive too late on a busy machine; then it tries again, three times in all.

    Args:
        job: The uninterrupted run.
        epochs: The epoch of each of its steps.
        seed: Chooses the step.
        kill_at: The step of the kill, if it is given.
    """
    draw = random.Random(seed)
    for _ in range(3):
        _checkpoint(Path(job.folder)).unlink(missing_ok=True)
        step = kill_at or choose_kill(epochs, job.every, draw)
        ledger = yield from watch(replace(job, name="killed"), step)
        reached = len(ledger.steps)
        if reached < job.steps and (kill_at or inside_epoch(epochs, reached, 1)):
            return ledger
    raise RuntimeError("three times the signal came too late; give more steps, or kill earlier")


def choose_kill(epochs: list[int], every: int, draw: random.Random) -> int:
    """Chooses a random step after the first checkpoint, inside an epoch.

    Args:
        epochs: The epoch of each step of the run.
        every: Steps between two checkpoints.
        draw: The random generator.
    """
    inside = [step for step in range(every + 1, len(epochs)) if inside_epoch(epochs, step, 4)]
    if not inside:
        raise ValueError(
            f"no step of {len(epochs)} is inside an epoch and after the first checkpoint; give more"
            " steps"
        )
    return draw.choice(inside)


def inside_epoch(epochs: list[int], step: int, margin: int) -> bool:
    """Whether the epoch of ``step`` began before it and has more than ``margin`` steps after it.

    Args:
        epochs: The epoch of each step of the run.
        step: Number of the step, from 1.
        margin: Number of steps.
    """
    first, last = step - 1, step + 1 + margin
    return first >= 1 and last <= len(epochs) and len(set(epochs[first - 1 : last])) == 1


def _row(run: str, workers: int, text: str) -> str:
    return f"  {run:<10}  {workers} {'worker' if workers == 1 else 'workers':<7}  {text}"


def _losses(ledger: Ledger) -> str:
    first, last = (float.fromhex(ledger.steps[number]["loss"]) for number in (0, -1))
    return f"loss {first:.3f} → {last:.3f}"


if __name__ == "__main__":
    train(Job(**json.loads(sys.argv[1])))
