"""The part of the order that is promised on another number of ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from midstream.testing.drivers import Item, Topology
from midstream.testing.recording import Recording


def without_errors(items: Sequence[Item]) -> list[Item]:
    """Returns the batches among items, without the errors."""
    return [item for item in items if not item.error]


def same_over_epochs(expected: Sequence[Item], found: Sequence[Item], *, longer: bool) -> bool:
    """Whether two runs hand out the same batches one after the other, wherever epochs end.

    Foreign loaders do not say in which epoch they are. After the last batch of an epoch, some
    resume with its rest, which is empty, and some with the next epoch. Both are right, and in the
    second case one epoch more is read.

    Args:
        expected: The items of the reference.
        found: The items of the resumed run.
        longer: Whether ``found`` may have more items.
    """
    if len(found) < len(expected) or (len(found) > len(expected) and not longer):
        return False
    return all(a.same(b._replace(epoch=a.epoch)) for a, b in zip(expected, found))


def promised_order(reference: Recording, topology: Topology) -> dict[int, int] | None:
    """Returns how many items of each epoch come in the same order on another number of ranks.

    The order of random access is promised for any number of ranks; that of a stream until its first
    lane has drained, if the numbers of ranks divide the number of lanes.

    Returns:
        Number of items by epoch; an epoch that is missing is ordered to its end. None if everything
        is.
    """
    if topology.ranks == reference.topology.ranks:
        return None
    if reference.random_access:
        return _before_errors(reference.items)
    if any(reference.num_lanes % ranks for ranks in (topology.ranks, reference.topology.ranks)):
        return dict.fromkeys({item.epoch for item in reference.items}, 0)
    return reference.ordered


def _before_errors(items: Sequence[Item]) -> dict[int, int] | None:
    """Returns the number of batches before the first error of each epoch.

    A rank that loses whole batches to errors is ahead of the others by that number, so the order
    after the error depends on the number of ranks.
    """
    ordered: dict[int, int] = {}
    counts: Counter[int] = Counter()
    for item in items:
        if item.error:
            ordered.setdefault(item.epoch, counts[item.epoch])
        else:
            counts[item.epoch] += 1
    return ordered or None


def droppable_batches(*runs: Recording | Topology) -> int:
    """Returns how many batches ranks may drop at the end of an epoch.

    Ranks drop them if there is not one for each rank.
    """
    recordings = [run for run in runs if isinstance(run, Recording)]
    if not any(run.drops for run in recordings):
        return 0
    ranks = [run.topology.ranks if isinstance(run, Recording) else run.ranks for run in runs]
    return max(ranks) - 1
