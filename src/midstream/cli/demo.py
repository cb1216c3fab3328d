"""The main job: a small language model on this machine's own text, killed and resumed, compared bit for bit.

    pipeline, Model, train   what a training script has: copy these
    compare                  what exact means
    run                      the demonstration: three training processes, one after the other

Three processes train the same thing. One is left alone. One is killed by SIGKILL at a random step
inside an epoch. One goes on from the killed one's last checkpoint, with another number of workers.
Every step writes its loss and the origins of its samples to a ledger; the ledgers must agree. All
of it is in one file, so that it can be read and copied whole.
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
"""Longest piece of a line, in bytes, which are the tokens."""

BATCH = 16
"""Pieces in a batch."""


# ---------------------------------------------------------------------------------------------------------------------
# The data: real text that is on every machine with Python
# ---------------------------------------------------------------------------------------------------------------------


def code_lines(limit: int) -> list[str]:
    """Lines of the standard library's own sources."""
    lines: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        lines.extend(path.read_text(encoding="utf-8", errors="replace").splitlines())
        if len(lines) >= limit:
            break
    return lines[:limit]


def prose_lines(limit: int) -> list[str]:
    """Lines of Python's help texts."""
    from pydoc_data.topics import topics

    return [line for _, text in sorted(topics.items()) for line in text.splitlines()][:limit]


def long_enough(line: str) -> bool:
    """Whether there is something to learn from a line."""
    return len(line.strip()) >= 12


def pieces(line: str) -> list[dict[str, Any]]:
    """The bytes of a line, long ones cut; a single byte at the end is left out, for nothing follows
    it.
    """
    data = np.frombuffer(line.encode(), dtype=np.uint8).astype(np.int64)
    return [{"ids": data[start : start + PIECE]} for start in range(0, len(data) - 1, PIECE)]


def pipeline(rows: int) -> ms.Dataset:
    """Two sources mixed 7:3, shuffled, filtered, cut, and shuffled once more as a stream.

    Args:
        rows: Lines of each source.
    """
    code = ms.from_dataset(code_lines(rows)).shuffle(seed=1)
    prose = ms.from_dataset(prose_lines(rows)).shuffle(seed=1)
    mix = ms.interleave({"code": code, "prose": prose}, weights={"code": 7, "prose": 3})
    return mix.filter(long_enough).flat_map(pieces).shuffle(seed=2, buffer_size=960)


# ---------------------------------------------------------------------------------------------------------------------
# The training, in a process of its own
# ---------------------------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """Predicts the next byte."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(256, width)
        self.rnn = torch.nn.GRU(width, width, batch_first=True)
        self.head = torch.nn.Linear(width, 256)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean cross entropy over the bytes that are no padding.

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
    """What one training process is told.

    Attributes:
        folder: Where its ledger and the checkpoint are.
        name: Name of the run, and of its ledger.
        steps: After how many steps the training is done.
        workers: Worker processes of its loader.
        rows: Lines of each source.
        every: Steps between two checkpoints; 0 for none.
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
    """Train to the end, or until someone kills us. The loop is that of any PyTorch script."""
    torch.set_num_threads(1)  # sums are then always taken in one order
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
    """Write a checkpoint so that a kill at any moment leaves the old one or the new one, whole."""
    temporary = folder / "checkpoint.tmp"
    with temporary.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / "checkpoint.pt")


def load(folder: Path) -> dict[str, Any]:
    """The last checkpoint. Nothing in it needs pickle: tensors and plain values."""
    checkpoint: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return checkpoint


class Ledger:
    """One line of JSON for every step, written by the training, read while it goes on."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0
        self.entries: list[dict[str, Any]] = []

    def write(self, **entry: Any) -> None:
        """Add a line that no kill can take back."""
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """What was written since the last call, whole lines only."""
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
        """The training steps."""
        return [entry for entry in self.entries if "event" not in entry]

    def event(self, name: str) -> dict[str, Any]:
        """The entry of something else that happened."""
        return next(entry for entry in self.entries if entry.get("event") == name)


# ---------------------------------------------------------------------------------------------------------------------
# The comparison
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What the ledgers say.

    Attributes:
        exact: Whether every sample and every loss is the same.
        steps: Steps compared.
        samples: Samples compared.
        rolled_back: Steps the killed run did after its last checkpoint: lost with their weights,
            and done again.
        differences: The first ones, in words.
        details: How it came about: seed, kill, checkpoint, times.
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
    """Set the steps of the uninterrupted run against those of the two others.

    The killed run up to its checkpoint and the resumed one after it must be the whole run: the same
    steps, each with the same epoch, the same samples in the same order, and a loss of the same
    bits. What the killed run did after its checkpoint was rolled back, and must have been the same
    too.

    Args:
        whole: Steps of the uninterrupted run, as their ledger has them.
        killed: Steps of the killed one.
        resumed: Steps of the resumed one.
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


# ---------------------------------------------------------------------------------------------------------------------
# The demonstration
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A training step that was just done, for whoever watches."""

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
    """The demonstration, as a series of lines and steps to show; the last is the verdict.

    Args:
        steps: Training steps of a whole run.
        workers: Worker processes of the first two runs.
        resume_workers: Worker processes of the resumed run.
        seed: Chooses the step of the kill; random when left out.
        kill_at: That step itself.
        every: Steps between two checkpoints.
        rows: Lines of each source.
        folder: Where ledgers, logs and the checkpoint are kept; a temporary one, removed, when left
            out.

    Raises:
        ValueError: If nothing could be killed and resumed with such numbers.
        RuntimeError: If a training process fails by itself.
    """
    seed = random.SystemRandom().randrange(1 << 20) if seed is None else seed
    if kill_at is None and steps < every + 10:
        raise ValueError(
            f"{steps} steps leave no room for a kill after a checkpoint; give at least {every + 10}"
        )
    if kill_at is not None and not every < kill_at < steps:
        raise ValueError(
            f"the kill comes after the first checkpoint (step {every}) and before the last step"
            f" ({steps}); found {kill_at}"
        )
    with tempfile.TemporaryDirectory(prefix="midstream-demo-") as temporary:
        place = Path(folder or temporary).absolute()
        place.mkdir(parents=True, exist_ok=True)
        job = Job(str(place), "whole", steps, workers, rows, every)
        yield (
            f"A small language model on this machine's own text, {steps} steps of {BATCH} pieces;"
            f" seed {seed}"
        )

        whole = yield from watch(replace(job, every=0))
        epochs = [entry["epoch"] for entry in whole.steps]
        yield _row(
            "left alone",
            workers,
            f"to batch {epochs.count(epochs[-1])} of epoch {epochs[-1]}, {_losses(whole)}",
        )

        killed = yield from _kill(job, epochs, seed, kill_at)
        last, checkpoint = killed.steps[-1], load(place)
        batch = epochs[: last["step"]].count(last["epoch"])
        yield _row(
            "killed",
            workers,
            f"SIGKILL after step {last['step']} (batch {batch} of epoch {last['epoch']})",
        )
        size, whole_size = (
            len(json.dumps(checkpoint["loader"])),
            (place / "checkpoint.pt").stat().st_size,
        )
        yield (
            f"  its last checkpoint: step {checkpoint['step']}, {size:,} bytes for the data,"
            f" {whole_size:,} with the weights"
        )

        resumed = yield from watch(
            replace(job, name="resumed", workers=resume_workers, resume=True)
        )
        seconds, start = resumed.event("first batch")["seconds"], resumed.event("resume")["step"]
        yield _row(
            "resumed",
            resume_workers,
            f"first batch after {1000 * seconds:.0f} ms, {_losses(resumed)}",
        )
        yield (
            "Delivered in all, in pieces (7:3 is the mix of lines, before the filter and the cut):"
        )
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


def watch(job: Job, kill_at: int | None = None) -> Generator[Step, None, Ledger]:
    """Run a job in a process of its own, tell its steps, kill it after one of them; returns its ledger.

    Only the training process is killed; its workers notice that it is gone and end by themselves.

    Raises:
        RuntimeError: If it failed by itself. (It may be over before the signal comes; then its
        ledger is whole.)
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
            running = (
                process.poll() is None
            )  # asked before the ledger is read, so that its end is not missed
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
    """Kill a run, inside an epoch if no step was asked for. A machine that stalls may be late with the signal; then again.

    Args:
        job: The run that is left alone.
        epochs: The epoch of each of its steps.
        seed: Chooses the step.
        kill_at: The step that was asked for.
    """
    draw = random.Random(seed)
    for _ in range(3):
        Path(job.folder, "checkpoint.pt").unlink(missing_ok=True)
        step = kill_at or choose_kill(epochs, job.every, draw)
        ledger = yield from watch(replace(job, name="killed"), step)
        reached = len(ledger.steps)
        if reached < job.steps and (kill_at or inside_epoch(epochs, reached, 1)):
            return ledger
    raise RuntimeError("three times the signal came too late; give more steps, or kill earlier")


def choose_kill(epochs: list[int], every: int, draw: random.Random) -> int:
    """A random step after the first checkpoint, inside an epoch.

    Args:
        epochs: The epoch of each step of the run.
        every: Steps between two checkpoints.
        draw: Where the randomness comes from.
    """
    inside = [step for step in range(every + 1, len(epochs)) if inside_epoch(epochs, step, 4)]
    if not inside:
        raise ValueError(
            f"no step of {len(epochs)} is inside an epoch and after the first checkpoint; give more"
            " steps"
        )
    return draw.choice(inside)


def inside_epoch(epochs: list[int], step: int, margin: int) -> bool:
    """Whether the epoch of ``step`` (from 1) began before it and goes on for more than ``margin``
    steps after it.
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
