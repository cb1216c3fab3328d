"""Paths, globs and URLs, for the sources that read files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Union

import fsspec

from midstream.errors import SourceError

PathLike = Union[str, "os.PathLike[str]"]

__all__ = ["PathLike", "as_paths", "is_local", "open_file", "resolve"]


def as_paths(paths: PathLike | Sequence[PathLike], where: str) -> tuple[str, ...]:
    """Paths, globs or URLs as strings.

    Raises:
        TypeError: If they are something else.
        ValueError: If there are none.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    if not isinstance(paths, Sequence) or not all(isinstance(path, (str, os.PathLike)) for path in paths):
        raise TypeError(f"{where} takes a path, a glob, a URL or a list of them; found {paths!r:.80}")
    if not paths:
        raise ValueError(f"{where} takes at least one path; found none")
    return tuple(os.fspath(path) for path in paths)


def is_local(path: str) -> bool:
    """Whether a path is of this machine's file system."""
    return "://" not in path and "::" not in path


def resolve(patterns: Sequence[str], where: str) -> list[str]:
    """The files that paths, globs and URLs stand for: each pattern's in sorted order.

    Raises:
        FileNotFoundError: If one of them matches nothing.
    """
    files: list[str] = []
    for pattern in patterns:
        path = pattern if not is_local(pattern) else os.path.abspath(os.path.expanduser(pattern))
        fs, _, found = fsspec.get_fs_token_paths(path)
        matched = (
            sorted(found) if any(char in pattern for char in "*?[") else [name for name in found if fs.exists(name)]
        )
        if not matched:
            raise FileNotFoundError(f"{where}: {pattern!r} matches no file (working directory {os.getcwd()!r})")
        files.extend(name if is_local(pattern) else fs.unstrip_protocol(name) for name in matched)
    return files


def open_file(path: str, where: str) -> Any:
    """Open a file for reading bytes.

    Raises:
        SourceError: If it cannot be opened.
    """
    try:
        return fsspec.open(path, "rb").open()
    except Exception as error:
        raise SourceError(f"{where}: {path} cannot be opened: {type(error).__name__}: {error}") from error
