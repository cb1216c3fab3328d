"""Describes a pipeline: as plain data (`spec`, `fingerprint`), and in words (`tree`, `access`)."""

from __future__ import annotations

from midstream.common.plain_state import State
from midstream.common.plain_state import fingerprint as hash_of_spec
from midstream.pipeline.node import BoundNode, Node, bind


def spec(node: Node) -> dict[str, State]:
    """A pipeline as plain data: nodes, names, seeds, weights, lengths. `fingerprint` is its hash.

    A callable is recorded by its name only, so that editing a file does not void a checkpoint.
    """
    return _spec(bind(node))


def _spec(bound: BoundNode) -> dict[str, State]:
    fields: dict[str, State] = {"node": bound.node.kind, **bound.node.spec_fields()}
    if bound.source >= 0:
        fields["name"] = bound.names[bound.source]
    if bound.inputs:
        fields["inputs"] = {key: _spec(child) for key, child in bound.inputs.items()}
    return fields


def fingerprint(node: Node) -> str:
    """16 hexadecimal digits: the hash of `spec`. Computed once per node."""
    return node.cached("_fingerprint", lambda: hash_of_spec(spec(node)))


def access(node: Node) -> str:
    """The kind of access, the length, and how much a resume reads again, in words.

    >>> import midstream as ms
    >>> access(ms.from_dataset(range(1000)).node)
    'random access, 1,000'
    >>> access(ms.from_dataset(range(9)).filter(bool).shuffle(0, buffer_size=48).node)
    'stream, a resume reads again at most 54/lanes + 1 inputs of a lane'
    """
    if node.random_access:
        try:
            length = node.length()
        except Exception:  # an empty source or a missing file is reported when it is read
            return "random access"
        return "random access, endless" if length is None else f"random access, {length:,}"
    again = node.replay_bound()
    return (
        f"stream{', endless' if node.infinite else ''}"
        f"{f', a resume reads again {again}' if again else ''}"
    )


def tree(node: Node) -> str:
    """A pipeline as a tree: one line per node with its arguments and, after ``#``, its access."""
    lines = tree_lines(bind(node))
    width = min(72, max(len(line) for line, _ in lines))
    return "\n".join(f"{line.ljust(width)}  # {note}" for line, note in lines)


def tree_lines(bound: BoundNode) -> list[tuple[str, str]]:
    """The lines of a tree, top down: for each node its text with branches, and its access."""
    label = bound.node.summary()
    if bound.source >= 0:
        label = f"{bound.names[bound.source]}: {label}"
    lines = [(label, access(bound.node))]
    children = list(bound.inputs.values())
    for child in children:
        last = child is children[-1]
        (head, note), *tail = tree_lines(child)
        lines.append((f"{'└─ ' if last else '├─ '}{head}", note))
        lines.extend((f"{'   ' if last else '│  '}{line}", note) for line, note in tail)
    return lines
