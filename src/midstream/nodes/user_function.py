"""Calls user code on one sample, with on_error, max_errors and quarantine."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from collections.abc import Iterator as Iter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from midstream.common.plain_state import MISSING, State
from midstream.common.randomness import fold
from midstream.common.validation import require_choice, require_int
from midstream.pipeline.failures import (
    ErrorRate,
    FailedSample,
    OnError,
    SampleFailure,
    describe_callable,
)
from midstream.pipeline.node import BoundNode
from midstream.pipeline.rows import Origins, as_origin_array

RETURNED_NONE = (
    "the function returned None; a sample is what it returns (to drop samples, use .filter)"
)


@dataclass(frozen=True)
class ErrorPolicy:
    """How a node handles samples that its function raises on.

    Attributes:
        on_error: ``"raise"``; ``"skip"``: leave the sample out and count it; ``"refill"``: the
            same, and batches over random access stay full.
        max_errors: More skipped samples than this raise `TooManyErrors`; None: no limit.
        quarantine: Folder to which skipped samples are written, or None.
    """

    on_error: OnError = "raise"
    max_errors: int | ErrorRate | None = None
    quarantine: str | None = None

    @property
    def skips(self) -> bool:
        """Whether a failed sample is counted instead of raised."""
        return self.on_error != "raise"

    def check(self, choices: Sequence[str], where: str) -> None:
        """Refuse an unknown ``on_error``, and a limit or a quarantine that would do nothing.

        Args:
            choices: Values of ``on_error`` that the verb takes.
            where: The verb, for errors.
        """
        require_choice(self.on_error, "on_error", choices, where)
        max_errors, quarantine = self.max_errors, self.quarantine
        if isinstance(max_errors, ErrorRate):
            require_int(max_errors.window, "the window of max_errors", 1, where)
            if not 0 < max_errors.rate < 1:
                raise ValueError(
                    f"{where}: the rate of max_errors is in (0, 1); found {max_errors.rate!r}"
                )
        elif max_errors is not None:
            require_int(max_errors, "max_errors", 0, where)
        if not self.skips and max_errors is not None:
            raise ValueError(
                f'{where}: max_errors counts skipped samples, so it goes with on_error="skip"'
            )
        if quarantine is not None:
            if not isinstance(quarantine, str):
                raise TypeError(
                    f"{where}: quarantine is the path of a folder; found {quarantine!r}"
                )
            if not self.skips:
                raise ValueError(
                    f'{where}: quarantine keeps skipped samples, so it goes with on_error="skip"'
                )

    def spec_fields(self) -> dict[str, State]:
        """The field that a checkpoint records: ``on_error`` where it is not the default."""
        return {"on_error": self.on_error} if self.skips else {}


RAISE = ErrorPolicy()
"""The default: a sample that the function raises on is an error."""


class Call:
    """Applies user code to one sample and returns its value, or a `FailedSample` where it raised.

    Args:
        bound: The node that calls it.
        fn: The user's function, as errors name it.
        errors: How samples that it raises on are handled.
        call: Calls the function with (sample, origins).
        label: The function in words; None: its name, file and line.
    """

    __slots__ = ("bound", "call", "errors", "fn", "label", "trail")

    def __init__(
        self,
        bound: BoundNode,
        fn: Callable[..., Any],
        errors: ErrorPolicy,
        call: Callable[[Any, Origins], Any],
        label: str | None = None,
    ) -> None:
        self.bound, self.fn, self.errors, self.call = bound, fn, errors, call
        self.label, self.trail = label, bound.trail

    def __call__(self, sample: Any, origins: Origins) -> Any:
        """Return the function's value for a sample.

        Of a `FailedSample` the errors are kept, and the function gets what is left of the sample.
        """
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
        """Return the replacement of a sample that the function raised on."""
        if isinstance(error, StopIteration):  # raised again, it would end the stream silently
            error = RuntimeError(f"the function raised StopIteration({error})").with_traceback(
                error.__traceback__
            )
        array = as_origin_array(origins)
        origin = self.bound.origin(array[0].tolist()) if len(array) else None
        function = self.label or describe_callable(self.fn)
        policy = self.errors
        failure = SampleFailure(
            self.bound.path,
            origin,
            function,
            error,
            outcome="skip" if policy.skips else "raise",
            limit=policy.max_errors,
        )
        failure.rows = array if len(array) > 1 else None
        if policy.quarantine is not None:
            failure.quarantined(policy.quarantine, error, sample)
        return FailedSample((failure,))


def origin_key(seed: int, origins: Origins) -> int:
    """Return the 64-bit key from which a sample's random numbers are drawn."""
    return fold(seed, *as_origin_array(origins)[:, :4].ravel().tolist())


@contextlib.contextmanager
def isolated_rng(key: int) -> Iter[None]:
    """Seed the global generators of torch, numpy and ``random``; restore them on exit."""
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
