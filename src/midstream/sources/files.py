"""Turns paths, patterns and URLs into files, and keeps a bounded number of files open."""

from __future__ import annotations

import contextlib
import glob
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import fsspec

from midstream.common.validation import require_text

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

MAX_OPEN_FILES = 32
"""Upper limit of the files that one source keeps open in one process."""


class File(NamedTuple):
    """A local or remote file that was found.

    Attributes:
        path: Of a local file the absolute path; of a remote one its path in its file system.
        url: Of a remote file the URL or pattern that it matched, which names the file system; of a
            local one "".
    """

    path: str
    url: str = ""

    def __str__(self) -> str:
        if not self.url or "://" in self.path:
            return self.path
        return f"{self.url.split('://')[0]}://{self.path.lstrip('/')}"

    def open(self) -> Any:
        """Open a remote file for reading bytes."""
        # Not cached here: fsspec caches file systems, and makes new ones in a forked process.
        return fsspec.core.url_to_fs(self.url)[0].open(self.path, "rb")


class Closable(Protocol):
    """Anything that `OpenFiles` can hold."""

    def close(self) -> None:
        """Close it."""


OpenFile = TypeVar("OpenFile", bound=Closable)


class OpenFiles(Generic[OpenFile]):
    """Opens files when they are needed, and keeps the `MAX_OPEN_FILES` most recently used open.

    Args:
        open_file: Opens the file with a number.
    """

    def __init__(self, open_file: Callable[[int], OpenFile]) -> None:
        self.open_file = open_file
        self.files: OrderedDict[int, OpenFile] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, number: int) -> OpenFile:
        """The open file with this number. For use in one thread only."""
        file = self.files.get(number)
        if file is None:
            while len(self.files) >= MAX_OPEN_FILES:
                self.files.popitem(last=False)[1].close()
            file = self.files[number] = self.open_file(number)
        else:
            self.files.move_to_end(number)
        return file

    @contextlib.contextmanager
    def lend(self, number: int) -> Iterator[OpenFile]:
        """The open file with this number, for the calling thread only.

        If another thread asks for the same file meanwhile, the file is opened a second time.
        """
        with self.lock:
            file = self.files.pop(number, None)
            while file is None and len(self.files) >= MAX_OPEN_FILES:
                self.files.popitem(last=False)[1].close()
        if file is None:
            file = self.open_file(number)
        try:
            yield file
        finally:
            with self.lock:
                spare = self.files.pop(number, None)
                self.files[number] = file
                while len(self.files) > MAX_OPEN_FILES:
                    self.files.popitem(last=False)[1].close()
            if spare is not None:
                spare.close()


def paths_as_text(paths: Paths, where: str) -> tuple[str, ...]:
    """Check paths, patterns and URLs and return them as strings, without a look at the disk.

    Args:
        where: The function that was called with them, for messages.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    if not isinstance(paths, Sequence) or not all(
        isinstance(path, (str, os.PathLike)) for path in paths
    ):
        raise TypeError(
            f"{where} takes a path, a pattern like 'data/*', a URL, or a list of these; found"
            f" {paths!r:.200}. (A set or a generator has no fixed order: give sorted(...).)"
        )
    plain = tuple(os.fspath(path) for path in paths)
    if not plain or not all(isinstance(path, str) and path for path in plain):
        raise ValueError(f"{where} takes one path or more, none of them empty; found {list(plain)}")
    for path in plain:
        require_text(path, f"{where}: a path")
    return plain


def is_remote(path: str) -> bool:
    """Whether a path is a URL of a remote file system; ``file://`` is local."""
    return "://" in path and not path.startswith(("file://", "local://"))


def list_files(paths: tuple[str, ...], where: str) -> list[File]:
    """Find the files of paths, patterns and URLs, in the order given.

    The matches of a pattern are sorted.

    Raises:
        FileNotFoundError: If one of them matches nothing.
        IsADirectoryError: If one of them is a folder.
        ValueError: If a file is matched twice.
    """
    files: list[File] = []
    for path in paths:
        found = _list_remote(path) if is_remote(path) else _list_local(path, where)
        if not found:
            pattern = "no file matches the pattern" if glob.has_magic(path) else "there is no file"
            base = "" if is_remote(path) or os.path.isabs(path) else f" in {os.getcwd()!r}"
            raise FileNotFoundError(f"{where}: {pattern} {path!r}{base}")
        files.extend(found)
    seen: set[str] = set()
    for name in map(str, files):
        if name in seen:
            raise ValueError(
                f"{where}: {name} is matched twice by {list(paths)}, so each of its rows would be"
                " read twice. Name it once; to see data more often use .repeat, or"
                " midstream.interleave with weights"
            )
        require_text(name, f"{where}: the name of a file")
        seen.add(name)
    return files


def _list_local(path: str, where: str) -> list[File]:
    if "://" in path:
        path = fsspec.core.strip_protocol(path)
    path = os.path.abspath(os.path.expanduser(path))
    if os.path.isdir(path):
        raise IsADirectoryError(
            f"{where}: {path!r} is a folder. Give a pattern, like {os.path.join(path, '*')!r}"
        )
    if os.path.exists(path):  # checked first, because a file name may contain brackets
        return [File(path)]
    return [
        File(match) for match in sorted(glob.glob(path, recursive=True)) if os.path.isfile(match)
    ]


def _list_remote(url: str) -> list[File]:
    system, path = fsspec.core.url_to_fs(url)
    if system.exists(path):  # checked first, because a URL may contain a question mark
        return [File(path, url)]
    return [File(match, url) for match in sorted(system.glob(path))] if glob.has_magic(path) else []


def plural(number: int, noun: str) -> str:
    """A number with its noun: ``1 file``, ``2 files``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
