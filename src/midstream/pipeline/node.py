"""Node: one operation of a pipeline; BoundNode and `bind`: a node within one tree.

    Node       describes one operation and its inputs; frozen, opens nothing until it is read
    BoundNode  a node with its path, salt and bound inputs in one tree; made by `bind`
    Selection  which positions of an input make up the samples that are asked of a node

A node is read in one of two ways. With random access, `Node._rows` returns the samples at an array
of positions, and a `midstream.pipeline.cursor.Cursor` iterates over them. As a stream,
`Node._iterate` returns an `Iterator` of the node's own. A subclass implements ``inputs`` (unless
its only input is the field ``source``), ``random_access``, and ``_length`` with ``_rows``, or
``_iterate``.

Samples travel between nodes with their origins. A sample that user code failed on is replaced by a
`midstream.pipeline.failures.FailedSample`: no exception of user code crosses a node, so no buffer
is left half filled.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from midstream.common.plain_state import State
from midstream.common.randomness import salt
from midstream.errors import Origin
from midstream.pipeline.breadcrumbs import Trail
from midstream.pipeline.iterator import Iterator, Lane
from midstream.pipeline.pickling import PickledByValue
from midstream.pipeline.rows import I64, U64, LazyBatches, Rows, Stash

T = TypeVar("T")


class Selection(NamedTuple):
    """Positions of one input that make up all or some of the samples asked of a node.

    Attributes:
        bound: The input.
        positions: Positions in the input, int64, shape [j].
        keys: uint64, shape [1] or [j]: see `Node._rows`.
        passes: int64, shape [1] or [j].
        indices: Which of the samples asked for they make up, int64, shape [j]; None: all of them,
            in order.
    """

    bound: BoundNode
    positions: I64
    keys: U64
    passes: I64
    indices: I64 | None = None

    def rows(self) -> Rows:
        """The samples at these positions."""
        return self.bound.rows(self.positions, self.keys, self.passes)


class BoundNode:
    """A node within one tree: its path, salt and bound inputs.

    Attributes:
        node: The node.
        path: Unique in the tree, like ``web/shuffle``; the prefix is the names chosen in interleave
            and concatenate.
        salt: 64 bits that depend on the path alone, so that two shuffles of one seed differ.
        inputs: The bound inputs by name; the key of a single input is the empty string.
        source: Index in ``names`` of a source, -1 for other nodes.
        names: The names of all sources in the tree; one list, shared by all its bound nodes.
        trail: In a worker: where the origins of the rows in progress are written.
        stash: Where a node that tracks metrics leaves their values, by origin; None while they are
            not collected.
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
        """The only input."""
        return self.inputs[""]

    def rows(self, positions: I64, keys: U64, passes: I64) -> Rows:
        """The samples at ``positions``. Arguments as for `Node._rows`."""
        rows = self.node._rows(self, positions, keys, passes)
        if self.trail is not None:
            self.trail.passed_on(rows.origins)
        return rows

    def lazy_rows(self, positions: I64, keys: U64, passes: I64) -> Rows | LazyBatches:
        """As `rows`, for a reader that takes the samples in order. See `Node._lazy_rows`."""
        rows = self.node._lazy_rows(self, positions, keys, passes)
        if rows is None:
            return self.rows(positions, keys, passes)
        if self.trail is not None:
            self.trail.passed_on(rows.origins)
        return rows

    def hint(self, positions: I64, keys: U64, passes: I64) -> None:
        """Prefetch hint: these positions will probably be read next. Sources may ignore it."""
        if self.node.takes_hints:
            self.node._hint(positions)
        for part in self.node._select(self, positions, keys, passes) or ():
            part.bound.hint(part.positions, part.keys, part.passes)

    def open(self, lane: Lane, key: int, pass_: int) -> Iterator:
        """The iterator of a node without random access; for any node, call
        `midstream.pipeline.cursor.iterate`.
        """
        return self.node._iterate(self, lane, key, pass_)

    @property
    def tracking(self) -> list[BoundNode]:
        """This node and those below it, as far as they track metrics."""
        if self._tracking is None:
            self._tracking = [bound for bound in self.walk() if bound.node.tracks]
        return self._tracking

    def origin(self, origin: Sequence[int]) -> Origin:
        """An origin of five integers, with the source's name in place of its index."""
        return Origin(self.names[origin[0]], *map(int, origin[1:]))

    def walk(self) -> Iterable[BoundNode]:
        """This node and all below it, top down."""
        yield self
        for child in self.inputs.values():
            yield from child.walk()


def unique_labels(labels: Iterable[str]) -> list[str]:
    """Labels with a number where one of them was there before.

    >>> unique_labels(["map", "filter", "map"])
    ['map', 'filter', 'map#2']
    """
    counts: dict[str, int] = {}
    unique = []
    for label in labels:
        counts[label] = counts.get(label, 0) + 1
        unique.append(label if counts[label] == 1 else f"{label}#{counts[label]}")
    return unique


def bind(root: Node) -> BoundNode:
    """Give every node of a tree its path, and every source its name and index.

    A chain of nodes with one input each shares a prefix; its labels are numbered from the source
    up, so that a verb added at the end renames no other node. Sources are indexed in the order of
    the inputs' names, not in that of a dict literal.

    Raises:
        ValueError: If two sources have the same name.
    """
    names: list[str] = []
    paths: dict[str, str] = {}  # of the sources, by name

    def build(node: Node, prefix: tuple[str, ...]) -> BoundNode:
        if not isinstance(node, Node):
            raise TypeError(
                f"{'/'.join(prefix) or 'a pipeline'} is made of nodes; found a"
                f" {type(node).__name__}. The node of a dataset is dataset.node"
            )
        chain = [node]
        while list(chain[-1].inputs()) == [""]:
            chain.append(chain[-1].inputs()[""])
        chain.reverse()
        below: BoundNode | None = None
        for item, label in zip(chain, unique_labels(item.label for item in chain)):
            bound = BoundNode(item, "/".join((*prefix, label)), names)
            if below is not None:
                bound.inputs[""] = below
            elif inputs := item.inputs():
                bound.inputs = dict.fromkeys(inputs, bound)  # keeps the order of the inputs
                for key in sorted(inputs):
                    bound.inputs[key] = build(inputs[key], (*prefix, key))
            else:
                name = getattr(item, "name", None) or "/".join(prefix) or "data"
                if name in paths:
                    raise ValueError(
                        f"two sources are named {name!r}: one at {paths[name]!r}, one at"
                        f" {bound.path!r}. Progress and origins refer to sources by name, so give"
                        " each source its own name=..."
                    )
                paths[name] = bound.path
                bound.source = len(names)
                names.append(name)
            below = bound
        assert below is not None
        return below

    return build(root, ())


def row_origins(bound: BoundNode, passes: I64, rows: I64) -> I64:
    """Origins of rows that a source is about to read, int64, shape [k, 5].

    Call it before reading: a dead worker's error names the rows that it was reading.

    Args:
        bound: The source.
        passes: int64, shape [1] or [k]: as `Node._rows` was given them.
        rows: Numbers of the rows, int64, shape [k].
    """
    origins = np.zeros((len(rows), 5), dtype=np.int64)
    origins[:, 0], origins[:, 1], origins[:, 2] = bound.source, passes, rows
    if bound.trail is not None:
        bound.trail.rows(origins)
    return origins


class Node:
    """An immutable description of one operation and its inputs; sources are the leaves of a tree.

    Subclasses are frozen dataclasses (``@dataclass(frozen=True, eq=False, repr=False)``). A node
    opens nothing until it is read, and holds no state but caches. `midstream.Dataset` wraps a node
    and adds the verbs.

    ``random_access``, ``infinite``, ``batch_rows`` and ``label`` are properties here. Where the
    answer of a subclass is constant, it is a plain class attribute, without an annotation, which
    would make it a field: ``random_access = False``.

    >>> import midstream as ms
    >>> node = ms.from_dataset(list("abcdef"), name="letters").shuffle(seed=1).take(4).node
    >>> node, node.inputs(), node.length()
    (take(n=4), {'': shuffle(seed=1)}, 4)
    """

    kind: ClassVar[str] = "dataset"
    """The verb that makes this node: its name in paths, trees and checkpoints."""
    one_to_one: ClassVar[bool] = False
    """Whether it gives one sample for each of its only input, in that order."""
    tracks: ClassVar[bool] = False
    """Whether it leaves metrics in `BoundNode.stash`. Such a node has a method ``kinds()``."""
    makes_parts: ClassVar[bool] = False
    """Whether its samples are parts of its input's, numbered by `Origin.part`."""
    takes_hints: ClassVar[bool] = False
    """Whether this is a source that takes prefetch hints: see `_hint`."""
    runs_user_iterable: ClassVar[bool] = False
    """Whether this is a source that runs user code, which may wait for something that the training
    loop does first.
    """

    # -- the tree ----------------------------------------------------------------------------------

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

    def spec_fields(self) -> dict[str, State]:
        """The fields that a checkpoint records of this node: plain values by name."""
        return {}

    @property
    def label(self) -> str:
        """The last part of the node's path: the verb, or the name that the node was given."""
        return self.kind

    def summary(self) -> str:
        """The node's line of a printed tree: its verb and arguments."""
        fields = ((key, value) for key, value in self.spec_fields().items() if key != "length")
        return f"{self.kind}({', '.join(f'{key}={_short(value)}' for key, value in fields)})"

    def __repr__(self) -> str:
        return self.summary()

    # -- size and kind -----------------------------------------------------------------------------

    @property
    def random_access(self) -> bool:
        """Whether the sample at any position can be produced. Known without opening anything."""
        return all(child.random_access for child in self.inputs().values())

    @property
    def infinite(self) -> bool:
        """Whether the stream never ends by itself."""
        return any(child.infinite for child in self.inputs().values())

    @property
    def batch_rows(self) -> int | None:
        """Samples per batch when the pipeline ends in ``.batch``, perhaps with one-to-one nodes
        after it; else None.
        """
        inputs = self.inputs()
        if not inputs:
            return None
        sizes = {child.batch_rows for child in inputs.values()}
        return sizes.pop() if len(sizes) == 1 else None

    def length(self) -> int | None:
        """Number of samples of a node with random access; None when it is infinite. Cached."""
        return self.cached("_known_length", self._length)

    def _length(self) -> int | None:
        """Computes `length`."""
        if self.one_to_one:
            return self.inputs()[""].length()
        raise NotImplementedError(f"{type(self).__name__} has no length")

    def block_sizes(self) -> I64 | None:
        """Sizes of the natural blocks, int64: reading one row costs as much as reading its block.
        None where every row can be read by itself.
        """
        return self.inputs()[""].block_sizes() if self.one_to_one else None

    def taken_of(self, name: str, count: int) -> int | None:
        """How many samples of the input ``name`` make up the first ``count`` samples of this node;
        None if unknown.
        """
        return count if self.one_to_one else None

    def passes_over(self, name: str, exact: bool) -> int:
        """The most passes over the input ``name`` in one pass over this node, for numbering.

        Args:
            name: Name of the input.
            exact: Whether lengths may be looked up; else an upper bound without them.
        """
        return 1

    def replay_bound(self) -> str:
        """The most that this node itself reads again on a resume, in words; empty for nothing."""
        return ""

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
        """The largest useful number of lanes and the source that limits it; None for no limit."""
        limits = [
            limit for child in self.inputs().values() if (limit := child.max_lanes()) is not None
        ]
        return min(limits) if limits else None

    # -- reading with random access ----------------------------------------------------------------

    def _rows(self, bound: BoundNode, positions: I64, keys: U64, passes: I64) -> Rows:
        """The samples at ``positions``.

        A node that only chooses and orders samples of its inputs implements `_select` instead.

        Args:
            bound: This node within its tree.
            positions: int64, shape [k], each in [0, length).
            keys: uint64, shape [1] or [k]: the seed key of the pass each position belongs to.
            passes: int64, shape [1] or [k]: the number of that pass, for origins.
        """
        parts = self._select(bound, positions, keys, passes)
        if parts is None:
            raise NotImplementedError(f"{type(self).__name__} has no random access")
        if len(parts) == 1:
            return parts[0].rows()
        return Rows.scatter(len(positions), [(part.indices, part.rows()) for part in parts])  # type: ignore[misc]

    def _select(
        self, bound: BoundNode, positions: I64, keys: U64, passes: I64
    ) -> list[Selection] | None:
        """The positions of the inputs that make up the samples at ``positions``; None if unknown.

        Arguments as for `_rows`. Prefetch hints reach the sources through it (`BoundNode.hint`).
        """
        return [Selection(bound.input, positions, keys, passes)] if self.one_to_one else None

    def _lazy_rows(
        self, bound: BoundNode, positions: I64, keys: U64, passes: I64
    ) -> Rows | LazyBatches | None:
        """As `_rows`, for a node with large samples, each of which may be made when it is taken.
        None: call `_rows` instead.
        """
        return None

    def wants_hints(self) -> bool:
        """Whether a prefetch hint is of use now. Asked once per chunk."""
        return False

    def _hint(self, positions: I64) -> None:
        """Prefetch hint for a source: these positions (int64, shape [k]) will probably be read
        next, in this order. It changes no sample.
        """

    # -- reading as a stream -----------------------------------------------------------------------

    def _iterate(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> Iterator:
        """The node's iterator in one lane, for one pass.

        Args:
            bound: This node within its tree; its input is iterated with
                `midstream.pipeline.cursor.iterate`.
            lane: The lane.
            key: The seed key of the pass, 64 bits.
            pass_: The number of the pass, for origins.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be read as a stream")

    # -- caches and pickling -----------------------------------------------------------------------

    _kept_slots: ClassVar[tuple[str, ...]] = ()
    """Caches that are pickled. All others are left out."""
    _by_value: ClassVar[tuple[str, ...]] = ()
    """Fields that are pickled by value, as callables are: see `PickledByValue`."""

    def cached(self, key: str, compute: Callable[[], T]) -> T:
        """The result of ``compute``, called once for this node and kept under ``key``."""
        if key not in self.__dict__:
            self._set(key, compute())
        value: T = self.__dict__[key]
        return value

    def _set(self, name: str, value: Any) -> None:
        """Set a cache. (The dataclass is frozen, so ordinary assignment is refused.)"""
        object.__setattr__(self, name, value)

    def _handle(self) -> Any:
        """The result of `_open`, called once per process."""
        pid = os.getpid()
        cached = self.__dict__.get("_opened")
        if cached is None or cached[0] != pid:
            cached = (pid, self._open())
            self._set("_opened", cached)
        return cached[1]

    def _open(self) -> Any:
        """Open the files or readers of a source."""
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


def _short(value: State) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_short(item)}" for key, item in value.items()) + "}"
    return repr(value) if isinstance(value, (str, float)) else str(value)
