"""The main job: a small language model on this machine's own text, killed and resumed, compared bit for bit.

Three processes train the same thing. One is left alone. One is killed by SIGKILL at a random step inside an epoch. One
goes on from the killed one's last checkpoint, with another number of workers. Every step writes its loss and the origins
of its samples to a ledger; the ledgers must agree.
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import midstream as ms

__all__ = ["Job", "Verdict", "compare", "pipeline", "run", "train"]

PIECE = 64
"""Longest piece of a line, in bytes, which are the tokens."""


# ---------------------------------------------------------------------------------------------------------------------
# The data: real text that is on every machine with Python
# ---------------------------------------------------------------------------------------------------------------------


def code_lines(limit: int = 4000) -> list[str]:
    """Lines of the standard library's own sources."""
    lines: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        lines.extend(path.read_text(encoding="utf-8", errors="replace").splitlines())
        if len(lines) >= limit:
            break
    return lines[:limit]


def prose_lines(limit: int = 4000) -> list[str]:
    """Lines of Python's help texts."""
    from pydoc_data.topics import topics

    return [line for _, text in sorted(topics.items()) for line in text.splitlines()][:limit]


def long_enough(line: str) -> bool:
    """Whether there is something to learn from a line."""
    return len(line.strip()) >= 12


def pieces(line: str) -> list[dict[str, Any]]:
    """The bytes of a line, long ones cut."""
    data = np.frombuffer(line.encode(), dtype=np.uint8).astype(np.int64)
    return [{"ids": data[start : start + PIECE]} for start in range(0, len(data), PIECE)]


def pipeline(rows: int) -> ms.Dataset:
    """Two sources mixed 7:3, shuffled, filtered, cut, and shuffled once more as a stream."""
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
        """Mean cross entropy over the bytes that are no padding."""
        ids, lengths = batch["ids"], batch["ids_lengths"]
        hidden, _ = self.rnn(self.embed(ids[:, :-1]))
        losses = torch.nn.functional.cross_entropy(self.head(hidden).transpose(1, 2), ids[:, 1:], reduction="none")
        real = torch.arange(1, ids.shape[1]) < lengths[:, None]
        return (losses * real).sum() / real.sum().clamp(min=1)


@dataclass(frozen=True)
class Job:
    """What one training process is told.

    Attributes:
        folder: Where its ledger is, and the checkpoint.
        ledger: Name of the ledger.
        steps: After how many steps the training is done.
        workers: Worker processes of its loader.
        rows: Lines of each source.
        every: Steps between two checkpoints; 0 for none.
        resume: Whether to start from the checkpoint.
    """

    folder: str
    ledger: str
    steps: int
    workers: int
    rows: int
    every: int
    resume: bool = False


def train(job: Job) -> None:
    """Train to the end, or until someone kills us. The loop is that of any PyTorch script."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = Path(job.folder)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = ms.DataLoader(pipeline(job.rows), batch_size=16, num_workers=job.workers, collate_fn=ms.pad)
    step, loaded_at = 0, 0.0
    if job.resume:
        checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step, loaded_at = checkpoint["step"], time.perf_counter()
        loader.load_state_dict(checkpoint["loader"])

    with (folder / job.ledger).open("a") as ledger:

        def write(**entry: Any) -> None:
            ledger.write(json.dumps(entry) + "\n")
            ledger.flush()
            os.fsync(ledger.fileno())

        write(event="start", step=step, pid=os.getpid())
        for epoch in range(loader.epoch, sys.maxsize):
            for batch in loader:
                if loaded_at:
                    write(event="resumed", seconds=time.perf_counter() - loaded_at)
                    loaded_at = 0.0
                loss = model.loss(batch)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                step += 1
                write(step=step, epoch=epoch, loss=float(loss).hex(), origins=loader.trace())
                if job.every and step % job.every == 0:
                    state = loader.state_dict()
                    save(
                        {
                            "model": model.state_dict(),
                            "optimizer": optimizer.state_dict(),
                            "step": step,
                            "loader": state,
                        },
                        folder,
                    )
                    write(
                        event="checkpoint", step=step, bytes=len(json.dumps(state)), spec=len(json.dumps(state["spec"]))
                    )
                if step == job.steps:
                    write(event="end", progress=str(loader.progress()))
                    loader.close()
                    return


def save(checkpoint: dict[str, Any], folder: Path) -> None:
    """Write a checkpoint so that a kill at any moment leaves the old one or the new one."""
    temporary = folder / "checkpoint.tmp"
    with temporary.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / "checkpoint.pt")


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
        rolled_back: Steps the killed run did after its last checkpoint: lost with their weights, and done again.
        differences: The first ones, in words.
    """

    exact: bool
    steps: int
    samples: int
    rolled_back: int
    differences: list[str]


def compare(
    whole: list[dict[str, Any]], killed: list[dict[str, Any]], resumed: list[dict[str, Any]], checkpoint: int
) -> Verdict:
    """Set the ledger of the uninterrupted run against the killed run up to its checkpoint and the resumed one after."""
    expected = {entry["step"]: entry for entry in whole}
    found = [entry for entry in killed if entry["step"] <= checkpoint] + resumed
    differences = []
    if [entry["step"] for entry in found] != [entry["step"] for entry in whole]:
        differences.append(
            f"steps: expected 1 to {len(whole)}, found {[entry['step'] for entry in found][:3]} ... "
            f"{[entry['step'] for entry in found][-3:]}"
        )
    for entry in found:
        reference = expected.get(entry["step"], {})
        for part in ("epoch", "origins", "loss"):
            if entry[part] != reference.get(part) and len(differences) < 5:
                differences.append(
                    f"step {entry['step']}: {part} differs: {_first_difference(reference.get(part), entry[part])}"
                )
    rolled_back = sum(entry["step"] > checkpoint for entry in killed)
    samples = sum(len(entry["origins"]) for entry in found)
    return Verdict(not differences, len(found), samples, rolled_back, differences)


def _first_difference(expected: Any, found: Any) -> str:
    if isinstance(expected, list) and isinstance(found, list):
        for number, (a, b) in enumerate(zip(expected, found)):
            if a != b:
                return f"sample {number}: expected {a}, found {b}"
        return f"expected {len(expected)} samples, found {len(found)}"
    return f"expected {expected}, found {found}"


# ---------------------------------------------------------------------------------------------------------------------
# The demonstration
# ---------------------------------------------------------------------------------------------------------------------


class Ledger:
    """Reads a ledger while its process writes it."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0
        self.entries: list[dict[str, Any]] = []

    def poll(self) -> list[dict[str, Any]]:
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

    def steps(self) -> list[dict[str, Any]]:
        """The training steps."""
        return [entry for entry in self.entries if "event" not in entry]

    def events(self, name: str) -> list[dict[str, Any]]:
        """The other entries of a name."""
        return [entry for entry in self.entries if entry.get("event") == name]


def choose_kill(steps: list[dict[str, Any]], every: int, seed: int) -> int:
    """A random step after the first checkpoint, inside an epoch."""
    inside = [
        entry["step"]
        for before, entry, after in zip(steps, steps[1:], steps[2:])
        if before["epoch"] == entry["epoch"] == after["epoch"] and entry["step"] > every
    ]
    if not inside:
        raise ValueError(
            f"there is no step inside an epoch after the first checkpoint; give more than {len(steps)} steps"
        )
    return int(random.Random(seed).choice(inside))


@dataclass(frozen=True)
class Told:
    """Something to show: a line, or the step that a run has reached."""

    line: str = ""
    run: str = ""
    step: int = 0
    loss: float = 0.0


def run(
    *,
    steps: int = 240,
    workers: int = 2,
    resume_workers: int = 1,
    seed: int | None = None,
    kill_at: int | None = None,
    rows: int = 1500,
    every: int = 20,
    folder: Path | None = None,
) -> Iterator[Told | Verdict]:
    """The demonstration, as a series of things to show; the last is the verdict.

    Args:
        steps: Training steps of a whole run.
        workers: Worker processes of the first two runs.
        resume_workers: Worker processes of the resumed run.
        seed: Chooses the step at which to kill; random when left out.
        kill_at: That step itself.
        rows: Lines of each source.
        every: Steps between checkpoints.
        folder: Where ledgers and checkpoint are kept; a temporary one, removed, when left out.

    Raises:
        RuntimeError: If a training process fails by itself.
    """
    with tempfile.TemporaryDirectory(prefix="midstream-demo-") as temporary:
        place = str(folder or temporary)
        Path(place).mkdir(parents=True, exist_ok=True)
        for name in ("whole", "killed", "resumed"):
            Path(place, name).unlink(missing_ok=True)
        seed = random.SystemRandom().randrange(1 << 30) if seed is None else seed
        yield Told(f"seed {seed}; {steps} steps of 16 pieces, checkpoint every {every}; 7 parts code, 3 parts prose")

        whole = Job(place, "whole", steps, workers, rows, 0)
        ledger = yield from _show(whole, None)
        reference = ledger.steps()
        epochs = reference[-1]["epoch"] + 1
        yield Told(
            f"uninterrupted, {workers} workers: {len(reference)} steps over {epochs} epochs, {_losses(reference)}"
        )

        kill_at = choose_kill(reference, every, seed) if kill_at is None else kill_at
        killed = yield from _show(Job(place, "killed", steps, workers, rows, every), kill_at)
        last = killed.events("checkpoint")[-1]
        lost = killed.steps()[-1]
        yield Told(
            f"killed by SIGKILL at step {lost['step']} (epoch {lost['epoch']}); last checkpoint at step {last['step']}: "
            f"{last['bytes']:,} bytes for the data, {last['spec']:,} of them the description of the pipeline"
        )

        resumed = yield from _show(Job(place, "resumed", steps, resume_workers, rows, every, True), None)
        seconds = resumed.events("resumed")[0]["seconds"]
        yield Told(
            f"resumed, {resume_workers} worker{'s' * (resume_workers != 1)}: first batch after {seconds * 1000:.0f} ms, then "
            f"to the end; {_losses(resumed.steps())}"
        )
        yield Told(resumed.events("end")[0]["progress"])
        yield compare(reference, killed.steps(), resumed.steps(), last["step"])


def _show(job: Job, kill_at: int | None) -> Any:
    """Run a job and pass on where it is; a generator that returns the ledger."""
    seen: list[Told] = []

    def tell(entry: dict[str, Any]) -> None:
        if "event" not in entry:
            seen.append(Told(run=job.ledger, step=entry["step"], loss=float.fromhex(entry["loss"])))

    watched = _Watch(job, tell, kill_at)
    for _ in watched:
        yield from seen
        seen.clear()
    yield from seen
    ledger, status = watched.ledger, watched.status
    if status != (0 if kill_at is None else -signal.SIGKILL):
        errors = (Path(job.folder) / f"{job.ledger}.err").read_text(errors="replace")
        raise RuntimeError(f"the {job.ledger} run ended with status {status}:\n{errors[-3000:]}")
    return ledger


class _Watch:
    """Runs a job in a process of its own, a poll at a time so that a screen can be kept alive, and kills it when told."""

    def __init__(self, job: Job, tell: Callable[[dict[str, Any]], None], kill_at: int | None) -> None:
        self.job, self.tell, self.kill_at = job, tell, kill_at
        self.ledger = Ledger(Path(job.folder) / job.ledger)
        self.status = 0

    def __iter__(self) -> Iterator[None]:
        with (Path(self.job.folder) / f"{self.job.ledger}.err").open("wb") as errors:
            command = [sys.executable, "-m", "midstream.demo", json.dumps(asdict(self.job))]
            process = subprocess.Popen(command, stdout=errors, stderr=errors)
            try:
                ended = False
                while not ended:
                    ended = process.poll() is not None
                    for entry in self.ledger.poll():
                        self.tell(entry)
                        if self.kill_at is not None and "event" not in entry and entry["step"] >= self.kill_at:
                            process.send_signal(signal.SIGKILL)
                            self.kill_at = None
                    yield
                    time.sleep(0.01)
            finally:
                if process.poll() is None:
                    process.kill()
                self.status = process.wait()


def _losses(steps: list[dict[str, Any]]) -> str:
    return f"loss {float.fromhex(steps[0]['loss']):.3f} → {float.fromhex(steps[-1]['loss']):.3f}"


if __name__ == "__main__":
    train(Job(**json.loads(sys.argv[1])))
