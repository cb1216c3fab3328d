"""Descriptions, their places in a tree, and what runs them.

    Node    a frozen description: a node with its inputs. Opens nothing until it is read.
    Place      a node at its place in one tree: path, salt, inputs. Made by `bind` when a tree is about to run.
    Rows       what the random-access face returns for an array of positions.
    Later      the same, where each sample is made when it is taken: batches.
    Iterator   the stream face, running in one lane. All state in fields, none in a generator's frame.
    Cursor     the one Iterator of every random-access dataset: reads chunks of positions ahead.
    Run        ``iter(dataset)``: one lane without a loader; what a bare StatefulDataLoader drives too.

A node implements ``inputs``, ``random_access``, ``length`` and then ``_rows`` (random access) or
``_iterate`` (stream). What flows between nodes is a pair ``(sample, origins)``. A sample that user
code failed on travels in band, as a `Hole` in its place, so no exception ever crosses a node and no
buffer is left half filled.

This file is the longest in the package: both faces, and every rule that all nodes share, read here
top to bottom.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from midstream.common.plain_state import State
from midstream.common.randomness import salt
from midstream.errors import Origin
from midstream.pipeline.breadcrumbs import Trail
from midstream.pipeline.iterator import Iterator, Lane
from midstream.pipeline.pickling import PickledByValue
from midstream.pipeline.rows import I64, U64, LazyBatches, Rows, Stash


class Selection(NamedTuple):
    """Positions of an input that make up (a part of) what is asked of a node.

    Attributes:
        place: The input.
        positions: Its positions, int64, shape [j].
        keys: uint64, shape [1] or [j]: see `Node._rows`.
        passes: int64, shape [1] or [j].
        here: Their places in what was asked for, int64, shape [j]; None where they are all of it,
        in order.
    """

    bound: BoundNode
    positions: I64
    keys: U64
    passes: I64
    here: I64 | None = None

    def rows(self) -> Rows:
        """The samples there."""
        return self.bound.rows(self.positions, self.keys, self.passes)


class BoundNode:
    """A node at its place in a tree.

    Attributes:
        node: The description.
        path: Unique in the tree, like ``web/shuffle``; the prefix is the names chosen in interleave
            and concatenate.
        salt: 64 bits that depend on the path alone: two shuffles of one seed differ.
        inputs: Places of the inputs, by name; the key of a single input is the empty string.
        source: Index in ``names`` of a source, -1 for other nodes.
        names: The names of all sources in the tree, shared by all its places.
        trail: In a worker: where it writes what it has in hand.
        stash: Where a node leaves what it tracked of the rows that are read, by origin; None while
        nobody takes it.
    """

    __slots__ = ("_tracking", "inputs", "names", "node", "path", "salt", "source", "stash", "trail")

    def __init__(self, node: Node, path: str, names: list[str]) -> None:
        self.node, self.path, self.names = node, path, names
        self.salt = salt(path)
        self.inputs: dict[str, BoundNode] = {}
        self.source = -1
        self.trail: Trail | None = None
        self.stash: Stash | None = None
        self._tracking: list[BoundNode] | None = None

    @property
    def input(self) -> BoundNode:
        """The place of the only input."""
        return self.inputs[""]

    def rows(self, positions: I64, keys: U64, passes: I64) -> Rows:
        """The random-access face. See `Node._rows`."""
        rows = self.node._rows(self, positions, keys, passes)
        if self.trail is not None:
            self.trail.passed_on(rows.origins)
        return rows

    def hint(self, positions: I64, keys: U64, passes: I64) -> None:
        """Tell the sources below, where they want to know, that these positions are read next. Only
        a hint.
        """
        if self.node.reads_ahead:
            self.node._hint(positions)
        for part in self.node._select(self, positions, keys, passes) or ():
            part.bound.hint(part.positions, part.keys, part.passes)

    def lazy_rows(self, positions: I64, keys: U64, passes: I64) -> Rows | LazyBatches:
        """The same, for a reader that takes samples in their order. See `Node._lazy_rows`."""
        rows = self.node._lazy_rows(self, positions, keys, passes)
        if rows is None:
            return self.rows(positions, keys, passes)
        if self.trail is not None:
            self.trail.passed_on(rows.origins)
        return rows

    def open(self, lane: Lane, key: int, pass_: int) -> Iterator:
        """The stream face of a node that has no random access. See `Node._iterate`; most callers
        want `iterate`.
        """
        return self.node._iterate(self, lane, key, pass_)

    @property
    def tracking(self) -> list[BoundNode]:
        """The places from here down that track metrics."""
        if self._tracking is None:
            self._tracking = [bound for bound in self.walk() if bound.node.tracks]
        return self._tracking

    def origin(self, origin: Sequence[int]) -> Origin:
        """Five integers with the source's name in place of its index."""
        return Origin(self.names[origin[0]], *map(int, origin[1:]))

    def walk(self) -> Iterable[BoundNode]:
        """This place and all below it, top down."""
        yield self
        for child in self.inputs.values():
            yield from child.walk()


def bind(root: Node) -> BoundNode:
    """Give every node of a tree its place.

    Raises:
        ValueError: If two sources have the same name.
    """
    names: list[str] = []
    where: dict[str, str] = {}

    def build(node: Node, prefix: tuple[str, ...]) -> BoundNode:
        chain = [node]
        while list(chain[-1].inputs()) == [""]:
            chain.append(chain[-1].inputs()[""])
        below: BoundNode | None = None
        seen: dict[str, int] = {}
        for item in reversed(chain):
            label = item.label
            seen[label] = seen.get(label, 0) + 1
            if seen[label] > 1:
                label = f"{label}#{seen[label]}"
            bound = BoundNode(item, "/".join((*prefix, label)), names)
            if below is not None:
                bound.inputs[""] = below
            elif inputs := item.inputs():
                bound.inputs = dict.fromkeys(inputs, bound)
                for key in sorted(
                    inputs
                ):  # sources are numbered by name, not by the order of a dict literal
                    bound.inputs[key] = build(inputs[key], (*prefix, key))
            else:
                name = getattr(item, "name", None) or "/".join(prefix) or "data"
                if name in where:
                    raise ValueError(
                        f"two sources are named {name!r}: one at {where[name]!r}, one at"
                        f" {bound.path!r}. Progress and origins are told by name, so give each"
                        " source its own name=..."
                    )
                where[name] = bound.path
                bound.source = len(names)
                names.append(name)
            below = bound
        assert below is not None
        return below

    return build(root, ())


class Node:
    """An immutable description of a stream of samples: a node of a tree with sources at its leaves.

    Subclasses are frozen dataclasses (``@dataclass(frozen=True, eq=False, repr=False)``). Every
    verb returns a new dataset. Nothing is opened until it is read.

    A dataset implements torchdata's ``Stateful`` protocol, so a bare ``StatefulDataLoader(ds,
    num_workers=k)`` resumes exactly on the same number of workers.

    >>> ds = ms.from_dataset(list("abcdef"), name="letters").shuffle(seed=1).take(4)
    >>> ds
    take(n=4)                                  # random access, 4
    └─ shuffle(seed=1)                         # random access, 6
       └─ letters: from_dataset(list, 6 rows)  # random access, 6
    >>> list(ds) == list(ds), len(ds)
    (True, 4)
    """

    kind: ClassVar[str] = "dataset"
    """The verb that makes this node: its name in paths, trees and checkpoints."""
    one_to_one: ClassVar[bool] = False
    """Whether it gives one sample for each of its only input, in that order."""
    tracks: ClassVar[bool] = False
    """Whether it leaves something in its place's stash. It has ``kinds()`` then."""
    reads_ahead: ClassVar[bool] = False
    """Whether this is a source that may read what comes next before it is asked for: see `_hint`."""
    may_wait: ClassVar[bool] = False
    """Whether this is a source that runs code of others, which may wait for what the training loop
    does first.
    """

    # -- what a node implements ---------------------------------------------------------------------------------------

    def inputs(self) -> dict[str, Node]:
        """The inputs by name. A single input has the empty name; sources have none."""
        source = getattr(self, "source", None)
        if isinstance(getattr(source, "node", None), Node):
            raise TypeError(
                f"{type(self).__name__} takes a node; found a {type(source).__name__}. Pass its"
                " .node, as in Dataset(MyNode(dataset.node))"
            )
        return {"": source} if isinstance(source, Node) else {}

    def with_inputs(self, inputs: Mapping[str, Node]) -> Node:
        """This node over other inputs: the one way to rewrite a tree.

        Args:
            inputs: One for each name in `inputs`.
        """
        return dataclasses.replace(self, source=inputs[""])  # type: ignore[type-var,call-arg,unused-ignore]

    def taken_of(self, name: str, count: int) -> int | None:
        """How many samples of the input ``name`` make up the first ``count`` samples of this node;
        None if unknown.
        """
        return count if self.one_to_one else None

    @property
    def random_access(self) -> bool:
        """Whether the sample at any position can be produced. Known without opening anything."""
        return all(child.random_access for child in self.inputs().values())

    @property
    def infinite(self) -> bool:
        """Whether the stream never ends by itself."""
        return any(child.infinite for child in self.inputs().values())

    def _length(self) -> int | None:
        """Number of samples of a random-access dataset; None when it is infinite."""
        if self.one_to_one:
            return self.inputs()[""].length()
        raise NotImplementedError(f"{type(self).__name__} has no length")

    def block_sizes(self) -> I64 | None:
        """Sizes of the natural blocks, in which reading one row costs a whole block; None where a
        block is a row.
        """
        return self.inputs()[""].block_sizes() if self.one_to_one else None

    def spec_fields(self) -> dict[str, State]:
        """What a checkpoint remembers of this node: plain values by name."""
        return {}

    def _rows(self, bound: BoundNode, positions: I64, keys: U64, passes: I64) -> Rows:
        """The samples at ``positions``.

        Args:
            at: This node's place.
            positions: int64, shape [k], each in [0, length).
            keys: uint64, shape [1] or [k]: the seed key of the pass each position belongs to.
            passes: int64, shape [1] or [k]: the number of that pass, for origins.

        What only chooses and orders rows of its inputs says so in `_select`, and needs no `_rows`
        of its own.
        """
        parts = self._select(bound, positions, keys, passes)
        if parts is None:
            raise NotImplementedError(f"{type(self).__name__} has no random access")
        if len(parts) == 1:
            return parts[0].rows()
        return Rows.scatter(len(positions), [(part.here, part.rows()) for part in parts])  # type: ignore[misc]

    def _select(
        self, bound: BoundNode, positions: I64, keys: U64, passes: I64
    ) -> list[Selection] | None:
        """The positions of the inputs that the samples at ``positions`` are made of; None where that is not known.

        Arguments as for `_rows`. So that sources can be told what comes next (`BoundNode.hint`).
        """
        return [Selection(bound.input, positions, keys, passes)] if self.one_to_one else None

    def wants_more(self) -> bool:
        """Whether `_hint` would be of use just now. Asked once a chunk."""
        return False

    def _hint(self, positions: I64) -> None:
        """Hear which positions (int64, shape [k]) are likely to be read next, in this order. May
        change no sample.
        """

    def _lazy_rows(
        self, bound: BoundNode, positions: I64, keys: U64, passes: I64
    ) -> Rows | LazyBatches | None:
        """As `_rows`, for a node whose samples are large: each may be made when it is taken. None:
        as `_rows` has them.
        """
        return None

    def _iterate(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> Iterator:
        """The running form in one lane, for one pass."""
        raise NotImplementedError(f"{type(self).__name__} cannot be read as a stream")

    def full_lanes(self, num_lanes: int, block: int) -> tuple[int, str]:
        """How many of the lanes 0, 1, 2, ... can have any data, and the reason in words."""
        if self.random_access:
            length = self.length()
            full = num_lanes if length is None else min(num_lanes, -(-length // block))
            return full, f"{self.label} has {length} rows, in blocks of {block}"
        return max(
            (child.full_lanes(num_lanes, block) for child in self.inputs().values()),
            key=lambda pair: pair[0],
        )

    def max_lanes(self) -> tuple[int, str] | None:
        """The largest useful number of lanes and the source that limits it, or None when nothing
        does.
        """
        limits = [
            limit for child in self.inputs().values() if (limit := child.max_lanes()) is not None
        ]
        return min(limits) if limits else None

    def length(self) -> int | None:
        """`_length`, asked once."""
        known = self.__dict__.get("_known_length")
        if known is None:
            known = (self._length(),)
            self._set("_known_length", known)
        length: int | None = known[0]
        return length

    # -- identity -----------------------------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """The node's name within its place: the verb, or the name it was given."""
        return self.kind

    @property
    def batch_rows(self) -> int | None:
        """Samples per element when the pipeline ends in ``.batch`` (perhaps with one-to-one nodes
        after it).
        """
        inputs = self.inputs()
        if not inputs:
            return None
        sizes = {child.batch_rows for child in inputs.values()}
        return sizes.pop() if len(sizes) == 1 else None

    def __repr__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """This node in one line of a tree: its arguments."""
        fields = ((key, value) for key, value in self.spec_fields().items() if key != "length")
        return f"{self.kind}({', '.join(f'{key}={_short(value)}' for key, value in fields)})"

    def passes_over(self, key: str, exact: bool) -> int:
        """How many passes over an input one pass over this node may take, for numbering; ``exact``:
        as its length says.
        """
        return 1

    def replay_bound(self) -> str:
        """What this node itself reads again on a resume, at most, in words; empty where nothing."""
        return ""

    # -- pickling and hidden slots ------------------------------------------------------------------------------------

    _kept_slots: ClassVar[tuple[str, ...]] = ()
    _by_value: ClassVar[tuple[str, ...]] = ()

    def _set(self, name: str, value: Any) -> None:
        """Set one of the few slots that are no fields: caches, handles, a state that waits."""
        object.__setattr__(self, name, value)

    def _handle(self) -> Any:
        """What `_open` returns, opened once per process."""
        pid = os.getpid()
        cached = self.__dict__.get("_opened")
        if cached is None or cached[0] != pid:
            cached = (pid, self._open())
            self._set("_opened", cached)
        return cached[1]

    def _open(self) -> Any:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        names = {field.name for field in dataclasses.fields(self)}  # type: ignore[arg-type,unused-ignore]
        kept = {
            key: value
            for key, value in self.__dict__.items()
            if key in names or key in self._kept_slots
        }
        for key, value in kept.items():
            if key in self._by_value or (callable(value) and not isinstance(value, (type, Node))):
                kept[key] = PickledByValue(value)
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            self._set(key, value.value if isinstance(value, PickledByValue) else value)


def require_dataset(value: Any, where: str) -> None:
    """Refuse what is not a dataset, and say how to make it one."""
    if not isinstance(value, Node):
        raise TypeError(
            f"{where} takes midstream datasets; found {type(value).__name__}. Wrap data with"
            " midstream.from_dataset(data), a stream with midstream.from_iterable(make, name=...)."
        )


def _short(value: State) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_short(item)}" for key, item in value.items()) + "}"
    return repr(value) if isinstance(value, (str, float)) else str(value)
