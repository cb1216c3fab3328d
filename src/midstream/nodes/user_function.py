"""Calls user code on one sample: on_error, max_errors, quarantine."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from collections.abc import Iterator as Iter
from typing import Any

import numpy as np
import torch

from midstream.common.plain_state import MISSING
from midstream.common.randomness import fold
from midstream.common.validation import require_int
from midstream.pipeline.failures import ErrorRate, FailedSample, SampleFailure, describe_callable
from midstream.pipeline.node import BoundNode
from midstream.pipeline.rows import Origins, as_origin_array

RETURNED_NONE = (
    "the function returned None; a sample is what it returns (to drop samples, use .filter)"
)


class Call:
    """User code applied to one sample: returns its value, or a `FailedSample` that says what went
    wrong.
    """

    __slots__ = ("bound", "call", "fn", "label", "limit", "quarantine", "quiet", "trail")

    def __init__(
        self,
        bound: BoundNode,
        fn: Callable[..., Any],
        quiet: bool,
        limit: int | ErrorRate | None,
        call: Callable[[Any, Origins], Any],
        quarantine: str | None = None,
        label: str | None = None,
    ) -> None:
        self.bound, self.fn, self.quiet, self.limit, self.call = bound, fn, quiet, limit, call
        self.quarantine, self.label = (
            quarantine,
            label,
        )  # the function in words; None: its name and place
        self.trail = bound.trail

    def __call__(self, sample: Any, origins: Origins) -> Any:
        """Apply it; a hole keeps its errors and the function sees what is left of the sample."""
        if type(sample) is FailedSample:
            if sample.rest is MISSING:
                return sample
            value = self(sample.rest, origins)
            if type(value) is FailedSample:
                return FailedSample(sample.errors + value.errors, value.rest)
            return FailedSample(sample.errors, value)
        trail = self.trail
        if trail is not None:
            if type(origins) is tuple:
                trail.row(*origins)
            else:
                trail.rows(origins)
        try:
            value = self.call(sample, origins)
            if value is None:
                raise TypeError(RETURNED_NONE)
        except Exception as error:
            return self.failed(error, origins, sample)
        return value

    def failed(self, error: BaseException, origins: Origins, sample: Any) -> FailedSample:
        """The hole in the sample's place."""
        if isinstance(error, StopIteration):  # it would end the stream of whoever re-raises it
            error = RuntimeError(f"the function raised StopIteration({error})").with_traceback(
                error.__traceback__
            )
        array = as_origin_array(origins)
        origin = self.bound.origin(array[0].tolist()) if len(array) else None
        function = self.label or describe_callable(self.fn)
        failure = SampleFailure(
            self.bound.path,
            origin,
            function,
            error,
            outcome="skip" if self.quiet else "raise",
            limit=self.limit,
        )
        failure.rows = array if len(array) > 1 else None
        return FailedSample(
            (
                (
                    failure
                    if self.quarantine is None
                    else failure.quarantined(self.quarantine, error, sample)
                ),
            )
        )


def require_limit(
    on_error: str, max_errors: int | ErrorRate | None, quarantine: str | None, where: str
) -> None:
    """Refuse a limit or a quarantine that would do nothing."""
    if isinstance(max_errors, ErrorRate):
        require_int(max_errors.window, "the window of max_errors", 1, where)
        if not 0 < max_errors.rate < 1:
            raise ValueError(
                f"{where}: the rate of max_errors is in (0, 1); found {max_errors.rate!r}"
            )
    elif max_errors is not None:
        require_int(max_errors, "max_errors", 0, where)
    if on_error == "raise" and max_errors is not None:
        raise ValueError(
            f'{where}: max_errors counts skipped samples, so it goes with on_error="skip"'
        )
    if quarantine is not None:
        if not isinstance(quarantine, str):
            raise TypeError(f"{where}: quarantine is the path of a folder; found {quarantine!r}")
        if on_error == "raise":
            raise ValueError(
                f'{where}: quarantine keeps skipped samples, so it goes with on_error="skip"'
            )


def origin_key(seed: int, origins: Origins) -> int:
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
