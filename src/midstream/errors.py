"""Every error midstream raises while it runs or resumes.

    MidstreamError
    ├── SampleError          user code raised on one sample; that sample is lost, the next one follows
    ├── TooManyErrors        more samples were skipped than ``max_errors`` allows
    ├── SourceError          a source cannot go on (a generator that died, a file that vanished)
    ├── WorkerError          something other than a sample failed inside a worker process
    └── CheckpointError      a state that this pipeline cannot take
        └── ReplayDiverged   what was read again on resume is not what was read before

Wrong arguments are ``ValueError`` or ``TypeError`` at construction. Everything here can be rebuilt
from its message alone, so it survives pickling from a worker process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Origin(NamedTuple):
    """Where a sample came from.

    Attributes:
        source: Name of the source in the pipeline's tree.
        epoch: The pass over that source (outer epoch and every enclosing ``repeat`` included), from
            0.
        row: Row of the source.
        part: What ``flat_map`` made of the row, or the piece that ``pack`` cut of it: 0 for the row
            itself, its first output or piece, then 1, 2, ...
        tokens: How many tokens of it a packed row has (its separator included); 0 where tokens are
            not counted.

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
    """Base of everything that can go wrong while a pipeline runs or resumes."""


class SampleError(MidstreamError, RuntimeError):
    """User code raised on one sample. The sample is lost; the next ``next()`` goes on with the one after it.

    ``__cause__`` is the original exception where it could be carried over from the worker process.

    Attributes:
        node: Path of the node whose code raised.
        origin: Where the sample came from, or None when a whole batch failed in its collate
            function.
        function: The callable as ``name @ file:line``.
        error_type: Qualified name of the original exception's type.
        original_message: ``str()`` of the original exception.
        original_traceback: The formatted traceback where it happened.
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
    """A source cannot deliver its next row, nor any after it."""


class WorkerError(MidstreamError, RuntimeError):
    """A worker process failed outside of user code for one sample; the message holds its traceback."""


class CheckpointError(MidstreamError, ValueError):
    """A state that this pipeline cannot take. Nothing was loaded."""


class ReplayDiverged(CheckpointError):
    """What a buffering node read again on resume is not what it had read when the state was saved."""


def bullet_list(lines: Sequence[Any]) -> str:
    """Lines of an error message, indented, one below the other."""
    return "".join(f"\n  - {line}" for line in lines)
