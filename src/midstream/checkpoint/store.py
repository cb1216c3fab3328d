"""save, load, latest: checkpoints in a folder or behind a URL, committed whole or not at all.

    <root>/step-000000001200/
        rank-00000-of-00002-<lineage>-<hash>.json   {"rank", "world_size", "state_file", "loader"}:
                                                    "loader" is the state of the rank
        rank-00001-of-00002-<lineage>-<hash>.json
        state-<hash>.pt                             the argument ``state`` of `save` on rank 0
        checkpoint.json                             the marker, written last:
                                                    {"midstream_checkpoint": 1, "world_size": 2,
                                                    "files": [names of the files above]}

Ranks do not wait for each other. Each writes its file; the rank that then finds the files of all
ranks writes the marker. A process may be killed at any moment.

The name of a file has the hash of its content, so no file is ever overwritten. It also has the
lineage of the attempt: where the run was resumed, with how many ranks and lanes, and its pipeline.
So a file that a dead attempt left is never combined with those of another lineage. Files of the
same lineage may be combined: they are of the same step of the same run.

A local file is written under a temporary name, synced and renamed, and its folder is synced. With
other fsspec file systems an object appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import secrets
import warnings
from typing import Any

import fsspec
import torch

from midstream.checkpoint.read import parse
from midstream.errors import CheckpointError

__all__ = ["latest", "load", "save"]

_MARKER = "checkpoint.json"
_VERSION = 1
_RANK = re.compile(r"rank-([0-9]{5,12})-of-([0-9]{5,12})-([0-9a-f]{8})-[0-9a-f]{32}\.json")
_FOLDER = re.compile(r"(?:epoch-\d{6}-batch|step)-\d{12}")


def save(
    root: str | os.PathLike[str],
    loader: Any,
    *,
    global_step: int | None = None,
    step: int | None = None,
    state: Any = None,
    keep: int | None = None,
) -> str:
    """Save the position of a loader. Call it on every rank after the same training step.

    No rank waits for another. The checkpoint is committed when the file of the last rank is
    written; until then `latest` returns the one before.

    Args:
        root: Folder of the run's checkpoints, or a URL that fsspec supports.
        loader: The `DataLoader`.
        global_step: The training step, the same on all ranks. It names the checkpoint
            ``step-...``. Without it the loader's epoch and step do, which needs all ranks to end
            their epochs at the same step.
        step: The last batch of the epoch that was trained, where more were fetched
            (`DataLoader.state_at`).
        state: Anything that ``torch.save`` can write, for example model and optimizer. Rank 0
            writes it under the same marker.
        keep: Number of committed checkpoints to keep, the newest ones; None keeps all.

    Returns:
        Path or URL of the checkpoint.

    Raises:
        ValueError: If ``keep`` is below 1, or ``global_step`` is needed and missing.

    >>> import tempfile
    >>> import midstream as ms
    >>> loader = ms.DataLoader(ms.from_dataset(range(10)), batch_size=2)
    >>> first = next(iter(loader))
    >>> with tempfile.TemporaryDirectory() as root:
    ...     _ = ms.checkpoint.save(root, loader, state={"weights": torch.ones(1)})
    ...     again = ms.DataLoader(ms.from_dataset(range(10)), batch_size=2)
    ...     extra = ms.checkpoint.load(root, again)
    >>> next(iter(again)), extra["weights"]
    (tensor([2, 3]), tensor([1.]))
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep is at least 1, or None for all; found {keep}")
    found = loader.state_dict() if step is None else loader.state_at(step)
    topology = loader.run.topology()
    rank, ranks = topology.rank, topology.world_size
    if global_step is None:
        if parse(found).finished:
            raise ValueError(
                "this rank has reached its end of the epoch and other ranks may not have, so epoch"
                " and step do not name the same checkpoint on all ranks: pass global_step, the"
                " training step"
            )
        name = f"epoch-{found['epoch']:06d}-batch-{found['steps_done']:012d}"
    else:
        name = f"step-{global_step:012d}"
    store = _Store(root)
    store.make(name)
    state_file = None
    if rank == 0 and state is not None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        state_file = store.write(name, "state-{}.pt", buffer.getvalue())
    body = {"rank": rank, "world_size": ranks, "state_file": state_file, "loader": found}
    lineage = _hash(
        repr((loader.run.resumed_at, ranks, found["num_lanes"], found["fingerprint"])).encode()
    )[:8]
    mine = store.write(name, f"rank-{rank:05d}-of-{ranks:05d}-{lineage}-{{}}.json", _json(body))
    if _commit(store, name, mine, ranks, lineage) and keep is not None:
        _prune(store, name, keep)
    return store.full(name)


def latest(root: str | os.PathLike[str]) -> str | None:
    """Path or URL of the newest committed checkpoint; None if there is none.

    A committed checkpoint with damaged files is skipped with a warning.
    """
    store = _Store(root)
    for name in reversed(store.names()):
        if _FOLDER.fullmatch(name) is None or not store.exists(name, _MARKER):
            continue
        try:
            _verified(store, name)
        except CheckpointError as error:
            warnings.warn(f"{error} Trying the checkpoint before it.", RuntimeWarning, stacklevel=2)
            continue
        return store.full(name)
    return None


def load(
    path: str | os.PathLike[str],
    loader: Any = None,
    *,
    strict: bool = True,
    weights_only: bool = True,
    map_location: Any = None,
) -> Any:
    """Load a checkpoint into a loader. Call it on every rank.

    The numbers of ranks and workers may differ from those at the time of `save`.

    Args:
        path: A checkpoint, or a folder of checkpoints, of which `latest` is loaded.
        loader: The `DataLoader`; None to only return the extra state.
        strict: As in `DataLoader.load_state_dict`.
        weights_only: As in ``torch.load``; False runs any code that the checkpoint contains.
        map_location: As in ``torch.load``.

    Returns:
        The argument ``state`` of `save` on rank 0; None if it had none.

    Raises:
        CheckpointError: If there is no checkpoint, or it is damaged, incomplete, or of another
            pipeline. Then nothing was loaded.
    """
    _, bodies, extra = _read(path)
    if loader is not None:
        loader.load_state_dict([body.get("loader") for body in bodies], strict=strict)
    return (
        torch.load(io.BytesIO(extra[0]), map_location, weights_only=weights_only) if extra else None
    )


def states(path: str | os.PathLike[str]) -> tuple[str, list[Any]]:
    """Read the states of all ranks without a loader.

    Args:
        path: As in `load`.

    Returns:
        Path or URL of the checkpoint, and the states.

    Raises:
        CheckpointError: If there is no checkpoint, or it is damaged.
    """
    found, bodies, _ = _read(path)
    return found, [body.get("loader") for body in bodies]


def _read(path: str | os.PathLike[str]) -> tuple[str, list[dict[str, Any]], list[bytes]]:
    """Path of a checkpoint, decoded files of its ranks, and the extra state as bytes, if any."""
    path = os.fspath(path)
    root, _, name = path.rstrip("/").rpartition("/")
    if _FOLDER.fullmatch(name) is None:
        newest = latest(path)
        if newest is None:
            raise CheckpointError(
                f"there is no committed checkpoint in {path}. Where a run may be new, check"
                " midstream.checkpoint.latest(...) first: it returns None."
            )
        root, _, name = newest.rpartition("/")
    store = _Store(root or ".")
    files = _verified(store, name)
    bodies = [_parsed(name, file, data) for file, data in files.items() if file.startswith("rank-")]
    return (
        store.full(name),
        bodies,
        [data for file, data in files.items() if file.startswith("state-")],
    )


class _Store:
    """Files in the folders of one root."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.url = os.fspath(root).rstrip("/") or "/"
        self.files, self.root = fsspec.core.url_to_fs(self.url)
        self.local = "file" in (
            self.files.protocol
            if isinstance(self.files.protocol, tuple)
            else (self.files.protocol,)
        )

    def full(self, name: str) -> str:
        return f"{self.url.rstrip('/')}/{name}"

    def path(self, *parts: str) -> str:
        return "/".join([self.root.rstrip("/"), *parts])

    def names(self, *parts: str) -> list[str]:
        """Names in a folder, sorted; empty if there is no such folder."""
        self.files.invalidate_cache()
        try:
            found = self.files.ls(self.path(*parts), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(entry.rstrip("/").rpartition("/")[2] for entry in found)

    def exists(self, *parts: str) -> bool:
        return parts[-1] in self.names(*parts[:-1])

    def make(self, name: str) -> None:
        self.files.makedirs(self.path(name), exist_ok=True)
        if self.local:
            _sync(self.root)

    def read(self, *parts: str) -> bytes:
        return bytes(self.files.cat_file(self.path(*parts)))

    def write(self, folder: str, pattern: str, data: bytes) -> str:
        """Write a file whole or not at all; returns its name, the pattern with the data's hash."""
        name = pattern.format(_hash(data))
        path = self.path(folder, name)
        if not self.local:
            self.files.pipe_file(path, data)
            return name
        write_whole(path, data)
        return name

    def remove(self, *parts: str) -> None:
        """Remove a file, which another rank may be removing at the same time."""
        try:
            self.files.rm_file(self.path(*parts))
        except FileNotFoundError:
            pass

    def remove_folder(self, name: str) -> None:
        """Remove a checkpoint, its marker first: a half-removed checkpoint is not committed.

        Other ranks may be removing it at the same time.
        """
        self.remove(name, _MARKER)
        if self.local:
            try:
                _sync(self.path(name))
            except FileNotFoundError:
                return  # another rank has removed all of it
        for file in self.names(name):
            self.remove(name, file)
        try:
            self.files.rmdir(self.path(name))
        except OSError:
            pass  # removed by another rank, or no folder in an object store


def write_whole(path: str, data: bytes) -> None:
    """Write a local file whole or not at all, even if the process is killed.

    The file is written under a temporary name, synced and renamed; then its folder is synced.
    """
    folder = os.path.dirname(path) or "."
    temporary = os.path.join(folder, f".{secrets.token_hex(8)}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(handle, view) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(temporary, path)
    _sync(folder)


def _sync(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _commit(store: _Store, name: str, mine: str, ranks: int, lineage: str) -> bool:
    """Write the marker if the files of all ranks exist. Returns whether they do."""
    found: dict[int, str] = {}
    for file in store.names(name):
        match = _RANK.fullmatch(file)
        if match and int(match[2]) == ranks and match[3] == lineage:
            found[int(match[1])] = file
    found[int(_RANK.fullmatch(mine)[1])] = mine  # type: ignore[index]
    if len(found) < ranks:
        return False
    state_file = _parsed(name, found[0], store.read(name, found[0])).get("state_file")
    files = [*found.values(), *([state_file] if state_file else [])]
    marker = {"midstream_checkpoint": _VERSION, "world_size": ranks, "files": sorted(files)}
    store.write(name, _MARKER, _json(marker))
    return True


def _prune(store: _Store, newest: str, keep: int) -> None:
    """Remove all checkpoints before ``newest`` but the last ``keep - 1`` committed ones.

    Checkpoints that were never committed are removed too.
    """
    older = [name for name in store.names() if _FOLDER.fullmatch(name) and name < newest]
    committed = [name for name in older if store.exists(name, _MARKER)]
    kept = set(committed[len(committed) - keep + 1 :] if keep > 1 else ())
    for name in older:
        if name not in kept:
            store.remove_folder(name)


def _parsed(name: str, file: str, data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise CheckpointError(f"{name}/{file} is damaged: it is no JSON object: {data[:40]!r}.")
    return body


def _verified(store: _Store, name: str) -> dict[str, bytes]:
    """Read all files of a checkpoint and compare them with their hashes.

    Returns:
        Their contents by file name.

    Raises:
        CheckpointError: If the checkpoint is not committed, or a file is missing or damaged.
    """
    if not store.exists(name, _MARKER):
        raise CheckpointError(
            f"{store.full(name)} is no committed checkpoint: {_MARKER} is missing."
        )
    try:
        marker = _parsed(name, _MARKER, store.read(name, _MARKER))
        version, ranks, files = (
            marker.get(key) for key in ("midstream_checkpoint", "world_size", "files")
        )
        if version != _VERSION:
            raise CheckpointError(
                f"{name}/{_MARKER} has format {version!r:.20}; this midstream reads {_VERSION}."
            )
        if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
            raise CheckpointError(f"{name}/{_MARKER} is damaged: it lists no files: {files!r:.60}.")
        found = [match for match in map(_RANK.fullmatch, files) if match]
        # The count is compared first: a damaged number may be of any size.
        whole = type(ranks) is int and ranks == len(found) > 0
        if not whole or sorted(int(match[1]) for match in found) != list(range(len(found))):
            raise CheckpointError(
                f"{name}/{_MARKER} is damaged: it lists the files of {len(found)} of {ranks!r:.20}"
                " ranks."
            )
        content = {}
        for file in files:
            if not re.fullmatch(r"(rank|state)-[\w-]+\.(json|pt)", file):
                raise CheckpointError(
                    f"{name}/{_MARKER} is damaged: {file!r:.60} is no name of a checkpoint file."
                )
            content[file] = store.read(name, file)
            if _hash(content[file]) != file.rpartition("-")[2].partition(".")[0]:
                raise CheckpointError(
                    f"{name}/{file} is damaged: its content does not have the hash in its name."
                )
    except OSError as error:
        raise CheckpointError(
            f"{store.full(name)} cannot be read: {type(error).__name__}: {error}."
        ) from error
    return content
