"""Map: replaces every sample by what a function of it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from midstream.common.plain_state import State
from midstream.common.randomness import fold, generator
from midstream.common.validation import require_callable, require_int
from midstream.nodes.user_function import (
    RAISE,
    RETURNED_NONE,
    Call,
    ErrorPolicy,
    isolated_rng,
    origin_key,
)
from midstream.pipeline.cursor import iterate
from midstream.pipeline.failures import FailedSample, callable_name
from midstream.pipeline.iterator import Iterator, Lane, OneToOneIterator
from midstream.pipeline.node import BoundNode, Node
from midstream.pipeline.rows import I64, U64, Item, Origins, Rows


@dataclass(frozen=True, eq=False, repr=False)
class Map(Node):
    """Replaces every sample by what ``fn`` returns. Random access where the input is.

    ``on_error="refill"`` makes it a stream.

    State: the state of its input; none of its own.
    Resume: reads nothing again.
    """

    source: Node
    fn: Callable[..., Any]
    with_rng: bool = False
    isolate_rng: bool = False
    seed: int = 0
    errors: ErrorPolicy = RAISE
    kind = "map"
    one_to_one = True

    def __post_init__(self) -> None:
        require_callable(self.fn, "map")
        require_int(self.seed, "seed", -(1 << 63), "map")
        self.errors.check(("raise", "skip", "refill"), "map")

    @property
    def random_access(self) -> bool:
        """As the input, except with ``on_error="refill"``.

        Which samples fill a batch up is then known only after calling the function.
        """
        return self.source.random_access and self.errors.on_error != "refill"

    def spec_fields(self) -> dict[str, State]:
        """The function's name, and each option that is not the default."""
        fields: dict[str, State] = {"fn": callable_name(self.fn)}
        if self.with_rng or self.isolate_rng:
            fields["rng"] = "argument" if self.with_rng else "global"
            fields["seed"] = int(self.seed)
        return fields | self.errors.spec_fields()

    def _rows(self, bound: BoundNode, positions: I64, keys: U64, passes: I64) -> Rows:
        rows = bound.input.rows(positions, keys, passes)
        call = Call(bound, self.fn, self.errors, self._caller(bound))
        if rows.sizes is None and not self.with_rng and not self.isolate_rng:
            # The fast path: origins are used only where the function fails.
            fn, out = self.fn, []
            for sample in rows.samples:
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
        """Return a function of (sample, origins) that calls ``fn`` with its generator."""
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


class _MapIterator(OneToOneIterator):
    def __init__(self, node: Map, bound: BoundNode, lane: Lane, key: int, pass_: int) -> None:
        super().__init__(iterate(bound.input, lane, key, pass_))
        self.call = Call(bound, node.fn, node.errors, node._caller(bound))

    def _next(self) -> Item:
        sample, origins = next(self.source)
        if type(sample) is FailedSample:
            return sample, origins
        return self.call(sample, origins), origins
