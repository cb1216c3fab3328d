"""The pipeline as data: paths and numbers of its nodes, and names of its sources.

A checkpoint names nodes by number, so its size does not depend on the length of names. Nodes are
numbered from the root down, inputs in the order of their names. The paths are those of
`midstream.pipeline.node.bind`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from midstream.common.plain_state import State
from midstream.pipeline.node import unique_labels

__all__ = ["Paths", "SpecNode", "short_value", "source_names", "walk"]


RAISED, DONE_EARLY = "told", "ahead"
"""Entries of a lane of random access: errors already raised, and batches done before their turn."""


class SpecNode(NamedTuple):
    """A node of a pipeline's spec.

    Attributes:
        path: As `midstream.pipeline.node.BoundNode` has it.
        spec: Of the node and the nodes below it.
        sources: Indices of the sources below it; of a source its own.
    """

    path: str
    spec: Mapping[str, Any]
    sources: range


def walk(
    spec: Mapping[str, Any], prefix: tuple[str, ...] = (), first: int = 0
) -> Iterator[SpecNode]:
    """All nodes of a pipeline's spec, from the root down.

    >>> import midstream as ms
    >>> shuffled = ms.from_dataset("xyz").shuffle(1).shuffle(2)
    >>> mix = ms.interleave({"b": ms.from_dataset("xy"), "a": shuffled})
    >>> [(node.path, list(node.sources)) for node in walk(mix.batch(2).spec())][1:4]
    [('interleave', [0, 1]), ('a/shuffle#2', [0]), ('a/shuffle', [0])]
    """
    chain = [spec]
    while list(chain[-1].get("inputs", ())) == [""]:
        chain.append(chain[-1]["inputs"][""])
    below, after = [], first
    for key, child in sorted(chain[-1].get("inputs", {}).items()):
        nodes = list(walk(child, (*prefix, key), after))
        after = nodes[0].sources.stop
        below += nodes
    chain.reverse()
    labels = unique_labels(str(node.get("label", node["node"])) for node in chain)
    sources = range(first, after + ("name" in chain[0]))
    here = [
        SpecNode("/".join((*prefix, label)), node, sources) for node, label in zip(chain, labels)
    ]
    yield from reversed(here)
    yield from below


def source_names(spec: State) -> list[str]:
    """Names of the sources of a pipeline, as a checkpoint numbers them."""
    if "name" in spec:
        return [spec["name"]]
    return [
        name for _, child in sorted(spec.get("inputs", {}).items()) for name in source_names(child)
    ]


class Paths:
    """Converts counts and marks between node paths and node numbers.

    A path that the pipeline does not have (of a removed source, or of a node that ran for a while)
    is kept as it is, behind a slash.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        nodes = list(walk(spec))
        self.paths = [node.path for node in nodes]
        self.only = [node.sources[0] if len(node.sources) == 1 else None for node in nodes]
        self.numbers = {path: number for number, path in enumerate(self.paths)}
        self._short: dict[str, tuple[str, str]] = {}

    def short_events(self, events: Mapping[str, int]) -> dict[str, State]:
        """Convert ``{"kind|path|source": n}`` to ``{kind: {"number|source": n}}``.

        The source is omitted where the node has only one.
        """
        packed: dict[str, dict[str, int]] = {}
        for key, count in events.items():
            known = self._short.get(key)
            if known is None:
                kind, path, source = key.split("|")
                number = self.numbers.get(path)
                if number is None:
                    known = kind, f"/{path}|{source}"
                else:
                    known = (
                        kind,
                        (str(number) if str(self.only[number]) == source else f"{number}|{source}"),
                    )
                self._short[key] = known
            packed.setdefault(known[0], {})[known[1]] = count
        return packed

    def events(self, packed: Any) -> dict[str, int]:
        """The inverse of `short_events`.

        Raises:
            ValueError: If ``packed`` cannot be its result.
        """
        events: dict[str, int] = {}
        try:
            for kind, counts in packed.items():
                for key, count in counts.items():
                    where, source = key.partition("|")[::2]
                    path = where[1:] if where[:1] == "/" else self.paths[_number(where)]
                    index = (
                        self.only[_number(where)]
                        if not source
                        else -1
                        if source == "-1"
                        else _number(source)
                    )
                    if (
                        type(count) is not int
                        or not 0 <= count < 1 << 62
                        or index is None
                        or "|" in kind
                    ):
                        raise ValueError(f"{kind} of {key}: {count!r}")
                    events[f"{kind}|{path}|{index}"] = count
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"no counts by node ({type(error).__name__}: {error})") from None
        return events

    def short_mark(self, mark: str) -> str:
        """A mark, which is a path or "path word", with the node's number in place of the path."""
        number = self.numbers.get(mark)
        if number is not None:
            return str(number)
        path, _, word = mark.rpartition(" ")
        number = self.numbers.get(path)
        return f"/{mark}" if number is None or "/" in word else f"{number} {word}"

    def short_marks(self, marks: Mapping[str, list[int]], epoch: int) -> dict[str, State]:
        """Convert ``{path: [pass, count]}`` to node numbers; see `short_value` for the values."""
        return {self.short_mark(mark): short_value(value, epoch) for mark, value in marks.items()}

    def marks(self, packed: Any, epoch: int) -> dict[str, list[int]]:
        """The inverse of `short_marks`.

        Raises:
            ValueError: If ``packed`` cannot be its result.
        """
        marks: dict[str, list[int]] = {}
        try:
            for key, value in packed.items():
                where, _, word = key.partition(" ")
                mark = (
                    key[1:]
                    if key[:1] == "/"
                    else self.paths[_number(where)] + (f" {word}" if word else "")
                )
                marks[mark] = [epoch, value] if type(value) is int else value
                if len(marks[mark]) != 2 or not all(type(number) is int for number in marks[mark]):
                    raise ValueError(f"{key}: {value!r}")
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"no marks of nodes ({type(error).__name__}: {error})") from None
        return marks


def short_value(value: list[int], epoch: int) -> State:
    """A mark's ``[pass, count]``; the count alone where the pass is the epoch."""
    return value[1] if value[0] == epoch else value


def _number(text: str) -> int:
    if not (text.isdecimal() and text.isascii()):
        raise ValueError(f"no number of a node: {text!r:.40}")
    return int(text)
