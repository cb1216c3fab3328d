"""Paths, patterns and URLs of files, and a bounded number of open files."""

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
"""Files kept open per source and process."""


class File(NamedTuple):
    """A file that was found.

    Attributes:
        path: Absolute, or in terms of its own file system.
        url: For a remote file the URL or pattern it was found by, which names the file system; ""
        for a local one.
    """

    path: str
    url: str = ""

    def __str__(self) -> str:
        if not self.url or "://" in self.path:
            return self.path
        return f"{self.url.split('://')[0]}://{self.path.lstrip('/')}"

    def open(self) -> Any:
        """A remote file, opened for reading bytes."""
        # Asked for anew each time: fsspec keeps file systems itself, and makes new ones in a forked
        # process.
        return fsspec.core.url_to_fs(self.url)[0].open(self.path, "rb")


class Closable(Protocol):
    """What `OpenFiles` holds."""

    def close(self) -> None:
        """Close it."""


F = TypeVar("F", bound=Closable)


class OpenFiles(Generic[F]):
    """Files by number, opened as they are needed; the ones used last, at most `MAX_OPEN_FILES`,
    stay open.
    """

    def __init__(self, open_file: Callable[[int], F]) -> None:
        self.open_file = open_file
        self.files: OrderedDict[int, F] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, number: int) -> F:
        """An open file."""
        file = self.files.get(number)
        if file is None:
            while len(self.files) >= MAX_OPEN_FILES:
                self.files.popitem(last=False)[1].close()
            file = self.files[number] = self.open_file(number)
        else:
            self.files.move_to_end(number)
        return file

    @contextlib.contextmanager
    def lend(self, number: int) -> Iterator[F]:
        """An open file for one thread alone; another one that asks for the same file meanwhile gets
        it opened again.
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


def plain_paths(paths: Paths, where: str) -> tuple[str, ...]:
    """Paths, patterns and URLs as strings. Looks at no file."""
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    if not isinstance(paths, Sequence) or not all(
        isinstance(path, (str, os.PathLike)) for path in paths
    ):
        raise TypeError(
            f"{where} takes a path, a pattern like 'data/*', a URL, or a list of these; found"
            f" {paths!r:.200}. (A set or a generator has no order of its own: give sorted(...).)"
        )
    plain = tuple(os.fspath(path) for path in paths)
    if not plain or not all(isinstance(path, str) and path for path in plain):
        raise ValueError(f"{where} takes one path or more, none of them empty; found {list(plain)}")
    for path in plain:
        require_text(path, f"{where}: a path")
    return plain


def is_remote(path: str) -> bool:
    """Whether a path is a URL that fsspec opens; ``file://`` is local."""
    return "://" in path and not path.startswith(("file://", "local://"))


def list_files(paths: tuple[str, ...], where: str) -> list[File]:
    """The files that paths, patterns and URLs stand for: in the order given, the matches of a pattern sorted.

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
                f"{where}: {name} is matched twice by {list(paths)}, so its rows would be there"
                " twice. Name it once; to see data more often use .repeat, or midstream.interleave"
                " with weights"
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
    if os.path.exists(path):  # before it is taken for a pattern: a name may contain brackets
        return [File(path)]
    return [
        File(match) for match in sorted(glob.glob(path, recursive=True)) if os.path.isfile(match)
    ]


def _list_remote(url: str) -> list[File]:
    system, path = fsspec.core.url_to_fs(url)
    if system.exists(path):  # before it is taken for a pattern: a URL may contain a question mark
        return [File(path, url)]
    return [File(match, url) for match in sorted(system.glob(path))] if glob.has_magic(path) else []


def count(number: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
