"""Map: a function of one sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from midstream.common.plain_state import State
from midstream.common.randomness import fold, generator
from midstream.common.validation import require_callable, require_choice, require_int
from midstream.nodes.user_function import (
    RETURNED_NONE,
    Call,
    isolated_rng,
    origin_key,
    require_limit,
)
from midstream.pipeline.cursor import iterate
from midstream.pipeline.failures import ErrorRate, FailedSample, OnError, callable_name
from midstream.pipeline.iterator import Iterator, Lane
from midstream.pipeline.node import BoundNode, Node, require_dataset
from midstream.pipeline.rows import I64, U64, Item, Origins, Rows


@dataclass(frozen=True, eq=False, repr=False)
class Map(Node):
    """Every sample replaced by what a function returns; one to one, so random access is kept.

    State: none of its own.
    Resume: reads nothing again.
    """

    source: Node
    fn: Callable[..., Any]
    with_rng: bool = False
    isolate_rng: bool = False
    seed: int = 0
    on_error: OnError = "raise"
    max_errors: int | ErrorRate | None = None
    quarantine: str | None = None
    kind = "map"
    one_to_one = True

    def __post_init__(self) -> None:
        require_dataset(self.source, "map")
        require_callable(self.fn, "map")
        require_int(self.seed, "seed", -(1 << 63), "map")
        require_choice(self.on_error, "on_error", ("raise", "skip", "refill"), "map")
        require_limit(self.on_error, self.max_errors, self.quarantine, "map")

    @property
    def random_access(self) -> bool:
        """As the input, but ``on_error="refill"`` makes a stream: what fills a batch up depends on
        what failed.
        """
        return self.source.random_access and self.on_error != "refill"

    def spec_fields(self) -> dict[str, State]:
        """The function's name and every option that is not the default."""
        fields: dict[str, State] = {"fn": callable_name(self.fn)}
        if self.with_rng or self.isolate_rng:
            fields["rng"] = "argument" if self.with_rng else "global"
            fields["seed"] = int(self.seed)
        if self.on_error != "raise":
            fields["on_error"] = self.on_error
        return fields

    def _rows(self, bound: BoundNode, positions: I64, keys: U64, passes: I64) -> Rows:
        rows = bound.input.rows(positions, keys, passes)
        call = Call(
            bound,
            self.fn,
            self.on_error != "raise",
            self.max_errors,
            self._caller(bound),
            self.quarantine,
        )
        if rows.sizes is None and not self.with_rng and not self.isolate_rng:
            fn, out = self.fn, []
            for (
                sample
            ) in rows.samples:  # the fast path: no origin is looked at unless something fails
                if type(sample) is not FailedSample:
                    try:
                        value = fn(sample)
                        if value is not None:
                            out.append(value)
                            continue
                        error: Exception = TypeError(RETURNED_NONE)
                    except Exception as raised:
                        error = raised
                    out.append(call.failed(error, tuple(rows.origins[len(out)].tolist()), sample))
                else:
                    out.append(call(sample, tuple(rows.origins[len(out)].tolist())))
            return Rows(out, rows.origins)
        return Rows(
            [call(sample, origins) for sample, origins in rows.items()], rows.origins, rows.sizes
        )

    def _iterate(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> Iterator:
        return _MapIterator(self, bound, lane, key, pass_)

    def _caller(self, bound: BoundNode) -> Callable[[Any, Origins], Any]:
        """The function as it is called for one sample."""
        fn, seed = self.fn, fold(self.seed, bound.salt)
        if self.with_rng and self.isolate_rng:

            def call(sample: Any, origins: Origins) -> Any:
                key = origin_key(seed, origins)
                with isolated_rng(key):
                    return fn(sample, generator(key))

        elif self.with_rng:

            def call(sample: Any, origins: Origins) -> Any:
                return fn(sample, generator(origin_key(seed, origins)))

        elif self.isolate_rng:

            def call(sample: Any, origins: Origins) -> Any:
                with isolated_rng(origin_key(seed, origins)):
                    return fn(sample)

        else:

            def call(sample: Any, origins: Origins) -> Any:
                return fn(sample)

        return call


class _MapIterator(Iterator):
    def __init__(self, node: Map, bound: BoundNode, lane: Lane, key: int, pass_: int) -> None:
        self.source = iterate(bound.input, lane, key, pass_)
        self.call = Call(
            bound,
            node.fn,
            node.on_error != "raise",
            node.max_errors,
            node._caller(bound),
            node.quarantine,
        )

    def _next(self) -> Item:
        sample, origins = next(self.source)
        if type(sample) is FailedSample:
            return sample, origins
        return self.call(sample, origins), origins

    def _state(self) -> State:
        return self.source.snapshot()

    def _load(self, state: State) -> None:
        self.source.load(state)
