"""The quarantine: skipped samples and their errors, in JSON Lines files.

Every process appends to a file of its own, one system call per line. So lines of several processes
never mix, and a killed process leaves at most one incomplete line, which the reader ignores.
A sample is written when it is counted; a replay does not count it again. After a kill, the samples
skipped since the last checkpoint are read and written again: the reader removes duplicates.
"""

from __future__ import annotations

import json
import os
import reprlib
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from midstream.errors import Origin

__all__ = ["Quarantined", "Record", "read_quarantine", "write_record"]

_PREVIEW_CHARACTERS = 2000


class Record(NamedTuple):
    """A skipped sample before it is written: see `Quarantined`."""

    folder: str
    node: str
    origin: Origin | None
    function: str
    error_type: str
    message: str
    traceback: str
    sample: Any


class Quarantined(NamedTuple):
    """One skipped sample, as it was read from a quarantine.

    Attributes:
        origin: Where it came from; ``dataset.row(origin)`` fetches the row.
        node: Path of the node that failed on it.
        function: The function, with file and line.
        error_type: Name of the exception's class.
        message: The exception's text.
        traceback: The formatted traceback.
        preview: The sample that the function was called with, at most 2,000 characters.
    """

    origin: Origin | None
    node: str
    function: str
    error_type: str
    message: str
    traceback: str
    preview: str


def write_record(record: Record) -> str:
    """Append a record to this process's file.

    Returns:
        Why it could not be written, in words; empty when it was. (A full disk does not end a
        training run.)
    """
    line = {
        "origin": None if record.origin is None else list(record.origin),
        "node": record.node,
        "function": record.function,
        "error_type": record.error_type,
        "message": record.message,
        "traceback": record.traceback,
        "preview": _preview(record.sample),
    }
    try:
        os.makedirs(record.folder, exist_ok=True)
        path = os.path.join(
            record.folder, f"skipped-{os.environ.get('RANK', '0')}-{os.getpid()}.jsonl"
        )
        data = (json.dumps(line, ensure_ascii=True) + "\n").encode()
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            written = os.write(handle, data)
        finally:
            os.close(handle)
        if written < len(data):
            return f"the quarantine {path} took {written} of {len(data)} bytes; is the disk full?"
    except OSError as error:
        return f"a skipped sample could not be written to the quarantine {record.folder}: {error}"
    return ""


def read_quarantine(folder: str | os.PathLike[str]) -> list[Quarantined]:
    """Read the samples of a quarantine, sorted by node and origin, without duplicates.

    Args:
        folder: The folder that a node was given as ``quarantine``.

    Raises:
        FileNotFoundError: If there is no such folder.

    >>> import tempfile
    >>> import midstream as ms
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ds = ms.from_dataset([1, 0, 2], name="n").map(
    ...         lambda x: 1 // x, on_error="skip", quarantine=folder)
    ...     kept, found = list(ds), ms.read_quarantine(folder)
    >>> kept, [(one.error_type, ds.row(one.origin)) for one in found]
    ([1, 0], [('ZeroDivisionError', 0)])
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(
            f"there is no quarantine {root}: a folder that a node was given as quarantine=..."
        )
    found: dict[tuple[Any, ...], Quarantined] = {}
    unreadable = 0
    for path in sorted(root.glob("skipped-*.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                body = json.loads(line)
                origin = body.pop("origin")
                record = Quarantined(None if origin is None else Origin(*origin), **body)
            except (ValueError, TypeError, KeyError):
                unreadable += 1
                continue
            # Failures of whole batches have no origin: the preview distinguishes them.
            found.setdefault((record.node, record.origin or record.preview), record)
    if unreadable:
        warnings.warn(
            f"{root}: {unreadable} lines are incomplete or not records, and were ignored",
            RuntimeWarning,
            stacklevel=2,
        )
    return sorted(found.values(), key=lambda record: (record.node, record.origin or ()))


class _Shortened(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 20
        self.maxstring = self.maxother = 500
        self.maxlevel = 4

    def repr_ndarray(self, value: Any, level: int) -> str:
        """The first 20 numbers, with shape and dtype."""
        head = np.asarray(value).reshape(-1)[:20].tolist()
        return f"array({self.repr(head)}, shape={tuple(value.shape)}, dtype={value.dtype})"


def _preview(sample: Any) -> str:
    try:
        text = _Shortened().repr(sample)
    except Exception as error:  # user code may define __repr__
        text = f"<{type(sample).__qualname__}, whose repr raised {type(error).__qualname__}>"
    return text if len(text) <= _PREVIEW_CHARACTERS else f"{text[: _PREVIEW_CHARACTERS - 1]}…"
