"""Map: a function of one sample."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from collections.abc import Iterator as Iter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from midstream.common.plain_state import MISSING, State
from midstream.common.randomness import fold, generator
from midstream.common.validation import require_callable, require_choice, require_int
from midstream.pipeline.cursor import iterate
from midstream.pipeline.failures import ErrorRate, Failure, Hole, OnError, callable_name, describe_callable
from midstream.pipeline.iterator import Iterator, Lane
from midstream.pipeline.node import Node, Place, require_dataset
from midstream.pipeline.rows import I64, U64, Item, Origins, Rows, as_origin_array


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
        """As the input, but ``on_error="refill"`` makes a stream: what fills a batch up depends on what failed."""
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

    def _rows(self, at: Place, positions: I64, keys: U64, passes: I64) -> Rows:
        rows = at.input.rows(positions, keys, passes)
        call = Call(at, self.fn, self.on_error != "raise", self.max_errors, self._caller(at), self.quarantine)
        if rows.sizes is None and not self.with_rng and not self.isolate_rng:
            fn, out = self.fn, []
            for sample in rows.samples:  # the fast path: no origin is looked at unless something fails
                if type(sample) is not Hole:
                    try:
                        value = fn(sample)
                        if value is not None:
                            out.append(value)
                            continue
                        error: Exception = TypeError(_NONE)
                    except Exception as raised:
                        error = raised
                    out.append(call.failed(error, tuple(rows.origins[len(out)].tolist()), sample))
                else:
                    out.append(call(sample, tuple(rows.origins[len(out)].tolist())))
            return Rows(out, rows.origins)
        return Rows([call(sample, origins) for sample, origins in rows.items()], rows.origins, rows.sizes)

    def _iterate(self, at: Place, lane: Lane, key: int, pass_: int) -> Iterator:
        return _MapIterator(self, at, lane, key, pass_)

    def _caller(self, at: Place) -> Callable[[Any, Origins], Any]:
        """The function as it is called for one sample."""
        fn, seed = self.fn, fold(self.seed, at.salt)
        if self.with_rng and self.isolate_rng:

            def call(sample: Any, origins: Origins) -> Any:
                key = _origin_key(seed, origins)
                with isolated_rng(key):
                    return fn(sample, generator(key))
        elif self.with_rng:

            def call(sample: Any, origins: Origins) -> Any:
                return fn(sample, generator(_origin_key(seed, origins)))
        elif self.isolate_rng:

            def call(sample: Any, origins: Origins) -> Any:
                with isolated_rng(_origin_key(seed, origins)):
                    return fn(sample)
        else:

            def call(sample: Any, origins: Origins) -> Any:
                return fn(sample)

        return call


_NONE = "the function returned None; a sample is what it returns (to drop samples, use .filter)"


class _MapIterator(Iterator):
    def __init__(self, node: Map, at: Place, lane: Lane, key: int, pass_: int) -> None:
        self.source = iterate(at.input, lane, key, pass_)
        self.call = Call(at, node.fn, node.on_error != "raise", node.max_errors, node._caller(at), node.quarantine)

    def _next(self) -> Item:
        sample, origins = next(self.source)
        if type(sample) is Hole:
            return sample, origins
        return self.call(sample, origins), origins

    def _state(self) -> State:
        return self.source.snapshot()

    def _load(self, state: State) -> None:
        self.source.load(state)


class Call:
    """User code applied to one sample: returns its value, or a `Hole` that says what went wrong."""

    __slots__ = ("at", "call", "fn", "label", "limit", "quarantine", "quiet", "trail")

    def __init__(
        self,
        at: Place,
        fn: Callable[..., Any],
        quiet: bool,
        limit: int | ErrorRate | None,
        call: Callable[[Any, Origins], Any],
        quarantine: str | None = None,
        label: str | None = None,
    ) -> None:
        self.at, self.fn, self.quiet, self.limit, self.call = at, fn, quiet, limit, call
        self.quarantine, self.label = quarantine, label  # the function in words; None: its name and place
        self.trail = at.trail

    def __call__(self, sample: Any, origins: Origins) -> Any:
        """Apply it; a hole keeps its errors and the function sees what is left of the sample."""
        if type(sample) is Hole:
            if sample.rest is MISSING:
                return sample
            value = self(sample.rest, origins)
            if type(value) is Hole:
                return Hole(sample.errors + value.errors, value.rest)
            return Hole(sample.errors, value)
        trail = self.trail
        if trail is not None:
            if type(origins) is tuple:
                trail.row(*origins)
            else:
                trail.rows(origins)
        try:
            value = self.call(sample, origins)
            if value is None:
                raise TypeError(_NONE)
        except Exception as error:
            return self.failed(error, origins, sample)
        return value

    def failed(self, error: BaseException, origins: Origins, sample: Any) -> Hole:
        """The hole in the sample's place."""
        if isinstance(error, StopIteration):  # it would end the stream of whoever re-raises it
            error = RuntimeError(f"the function raised StopIteration({error})").with_traceback(error.__traceback__)
        array = as_origin_array(origins)
        origin = self.at.origin(array[0].tolist()) if len(array) else None
        function = self.label or describe_callable(self.fn)
        failure = Failure(self.at.path, origin, function, error, quiet=self.quiet, limit=self.limit)
        failure.rows = array if len(array) > 1 else None
        return Hole((failure if self.quarantine is None else failure.quarantined(self.quarantine, error, sample),))


def require_limit(on_error: str, max_errors: int | ErrorRate | None, quarantine: str | None, where: str) -> None:
    """Refuse a limit or a quarantine that would do nothing."""
    if isinstance(max_errors, ErrorRate):
        require_int(max_errors.window, "the window of max_errors", 1, where)
        if not 0 < max_errors.rate < 1:
            raise ValueError(f"{where}: the rate of max_errors is in (0, 1); found {max_errors.rate!r}")
    elif max_errors is not None:
        require_int(max_errors, "max_errors", 0, where)
    if on_error == "raise" and max_errors is not None:
        raise ValueError(f'{where}: max_errors counts skipped samples, so it goes with on_error="skip"')
    if quarantine is not None:
        if not isinstance(quarantine, str):
            raise TypeError(f"{where}: quarantine is the path of a folder; found {quarantine!r}")
        if on_error == "raise":
            raise ValueError(f'{where}: quarantine keeps skipped samples, so it goes with on_error="skip"')


def _origin_key(seed: int, origins: Origins) -> int:
    return fold(seed, *as_origin_array(origins)[:, :4].ravel().tolist())


@contextlib.contextmanager
def isolated_rng(key: int) -> Iter[None]:
    """Global torch, numpy and random generators seeded by ``key`` inside, as they were after."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        torch.default_generator.manual_seed(key >> 1)
        np.random.seed(key & 0xFFFFFFFF)
        random.seed(key)
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
