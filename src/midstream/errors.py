"""The errors that midstream raises while it runs or resumes, and Origin.

    MidstreamError
    ├── SampleError          user code raised on one sample, which is lost; the next one follows
    ├── TooManyErrors        more samples were skipped than ``max_errors`` allows
    ├── SourceError          a source cannot read its next row (a missing file, for instance)
    ├── WorkerError          reading cannot continue, for a reason outside one sample
    └── CheckpointError      a state that cannot be loaded into this pipeline
        └── ReplayDiverged   a resume read other data again than before the checkpoint

Wrong arguments raise ``ValueError`` or ``TypeError`` at construction. Every error here is rebuilt
from its message alone, so it survives pickling in a worker process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Origin(NamedTuple):
    """Where a sample came from: source, pass over it, row and part.

    Attributes:
        source: Name of the source in the pipeline's tree.
        epoch: Number of the pass over that source, from 0. It equals the epoch of the run where
            the source is read once in each; passes of every ``repeat`` and of a mix that starts
            over are counted together with it.
        row: Number of the row in the source.
        part: Number of the output of ``flat_map``, or of the piece cut by ``pack``, from 0; 0 for
            a whole row.
        tokens: Number of its tokens in a packed row, its separator included; 0 where tokens are not
            counted.

    >>> str(Origin("web", epoch=2, row=7))
    'web[7] epoch 2'
    """

    source: str
    epoch: int
    row: int
    part: int = 0
    tokens: int = 0

    def __str__(self) -> str:
        text = f"{self.source}[{self.row}]"
        if self.part:
            text += f" part {self.part}"
        if self.epoch:
            text += f" epoch {self.epoch}"
        if self.tokens:
            text += f" ({self.tokens} token{'s' * (self.tokens > 1)})"
        return text


class MidstreamError(Exception):
    """Base class of the errors that a pipeline raises while it runs or resumes."""


class SampleError(MidstreamError, RuntimeError):
    """User code raised on one sample. It is lost; the next ``next()`` returns the one after it.

    ``__cause__`` is the original exception where it could be pickled in the worker process.

    Attributes:
        node: Path of the node whose code raised.
        origin: Where the sample came from, or None when a whole batch failed in its collate
            function.
        function: The user's function as ``name @ file:line``; of a source, what failed: a function
            or a place in a file.
        error_type: Qualified name of the original exception's type.
        original_message: ``str()`` of the original exception.
        original_traceback: The formatted original traceback.
    """

    node: str = ""
    origin: Origin | None = None
    function: str = ""
    error_type: str = ""
    original_message: str = ""
    original_traceback: str = ""


class TooManyErrors(MidstreamError, RuntimeError):
    """More samples were skipped at one node than its ``max_errors`` allows."""


class SourceError(MidstreamError, RuntimeError):
    """A source cannot read its next row, nor any after it."""


class WorkerError(MidstreamError, RuntimeError):
    """Reading cannot continue, for a reason outside one sample.

    Raised for failures of worker processes and threads, and of other ranks. The message contains
    the traceback where there is one; a process that was killed left none.
    """


class CheckpointError(MidstreamError, ValueError):
    """A state cannot be loaded into this pipeline. Nothing was loaded."""


class ReplayDiverged(CheckpointError):
    """On resume, a buffering node read other data again than before the state was saved."""


def bullet_list(lines: Sequence[Any]) -> str:
    """Items of an error message as an indented list, one per line."""
    return "".join(f"\n  - {line}" for line in lines)
