"""Patience: gives up on an endless input of which nothing is left."""

from __future__ import annotations

MAX_FRUITLESS = 100_000
"""Samples in a row of which nothing is left, after which a node gives up on an endless input."""


class Patience:
    """Counts what was read in a row and came to nothing.

    An input that ends needs no limit. Over one that never ends, a predicate that nothing passes
    would wait forever; the node raises an error instead.

    Attributes:
        endless: Whether the input never ends.
        limit: Count at which to give up; None for `MAX_FRUITLESS`.
        count: How much came to nothing since a node last set this to 0.

    >>> patience = Patience(endless=True, limit=3)
    >>> patience.exhausted_by(1), patience.exhausted_by(1), patience.exhausted_by(1)
    (False, False, True)
    """

    __slots__ = ("count", "endless", "limit")

    def __init__(self, endless: bool, limit: int | None = None) -> None:
        self.endless, self.limit = endless, MAX_FRUITLESS if limit is None else limit
        self.count = 0

    def exhausted_by(self, more: int) -> bool:
        """Count ``more`` fruitless reads; return whether it is time to give up."""
        self.count += more
        return self.endless and self.count >= self.limit
