"""A source over a callable that returns a fresh iterable: a stream that cannot seek."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Iterator as Iter
from dataclasses import dataclass
from typing import Any, Literal

from midstream.common.plain_state import State
from midstream.common.validation import require_callable, require_choice, require_int, require_name
from midstream.dataset import Dataset
from midstream.pipeline.failures import callable_name, describe_callable
from midstream.pipeline.iterator import Iterator, Lane
from midstream.pipeline.node import BoundNode, Node
from midstream.sources.shards import ShardIterator, Shards


def from_iterable(
    make_iterable: Callable[..., Iterable[Any]],
    *,
    name: str | None = None,
    num_shards: int = 1,
    split: Literal["shards", "stride"] = "shards",
) -> Dataset:
    """Make a stream from anything that can be iterated.

    Args:
        make_iterable: Returns a fresh iterable each time: called with no argument, or with the
            shard's number when ``num_shards`` is above 1.
        name: The source's name in progress, origins and errors.
        num_shards: Number of independent parts of the data. There are at most as many lanes, and so
            workers and ranks.
        split: ``"shards"``: shard i feeds lane i modulo the number of lanes. ``"stride"``: every
            lane reads everything and keeps its share. This allows any number of workers, but each
            of them reads all the data.

    An iterable cannot seek, so a resume reads each lane's shard in progress again from its start.

    >>> import midstream as ms
    >>> list(ms.from_iterable(lambda: iter("abc"), name="letters"))
    ['a', 'b', 'c']
    """
    require_callable(make_iterable, "from_iterable")
    require_name(name, "from_iterable")
    require_int(num_shards, "num_shards", 1, "from_iterable")
    require_choice(split, "split", ("shards", "stride"), "from_iterable")
    return Dataset(FromIterable(make_iterable, name, int(num_shards), split))


@dataclass(frozen=True, eq=False, repr=False)
class FromIterable(Node):
    """Samples of one fresh iterable per shard.

    Row r of shard s is row ``r * num_shards + s`` of the source.

    State: ``[shard, rows read of it, last row that raised, 0, None]``.
    Resume: reads all rows of the shard in progress again, up to the current one.
    """

    make_iterable: Callable[..., Iterable[Any]]
    name: str | None = None
    num_shards: int = 1
    split: str = "shards"
    kind = "from_iterable"
    runs_user_iterable = True
    random_access = False
    infinite = False  # not known, so assumed to end

    def spec_fields(self) -> dict[str, State]:
        """The callable's name and how it is split."""
        return {
            "fn": callable_name(self.make_iterable),
            "num_shards": self.num_shards,
            "split": self.split,
        }

    def full_lanes(self, num_lanes: int, block: int) -> tuple[int, str]:
        """One lane for each shard."""
        if self.split == "stride":
            return num_lanes, "every lane reads all"
        return min(num_lanes, self.num_shards), f"from_iterable has {self.num_shards} shards"

    def max_lanes(self) -> tuple[int, str] | None:
        """As many lanes as shards."""
        if self.split == "stride":
            return None
        return (
            self.num_shards,
            (
                f"source {self.name or self.kind!r} has {self.num_shards}"
                f" shard{'s' if self.num_shards > 1 else ''}. Use fewer workers, give from_iterable"
                " more shards (num_shards=n calls make_iterable(shard)), or split='stride', where"
                " every lane reads all and keeps its part"
            ),
        )

    def replay_bound(self) -> str:
        """See `Dataset.replay_bound`."""
        return "the shard in progress, from its start"

    def _iterate(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> Iterator:
        return ShardIterator(
            _IterableShards(self), bound, lane, pass_, self.num_shards, self.split == "stride"
        )


class _IterableShards(Shards):
    """The shards of a `FromIterable`."""

    def __init__(self, node: FromIterable) -> None:
        self.node = node
        self.function = describe_callable(node.make_iterable)

    def open(self, shard: int, state: State) -> Iter[Any]:
        make = self.node.make_iterable
        return iter(make(shard) if self.node.num_shards > 1 else make())
