"""`check_dataset`: the laws that every dataset obeys, also with nodes and sources of your own.

Each law is a function that takes a function that makes the dataset, and raises `LawError` if the
dataset breaks it. midstream's tests run them on every node and source; `check_dataset` runs them on
yours.
"""

from __future__ import annotations

import json
import pickle
import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

import midstream as ms
from midstream.dataset import Dataset
from midstream.errors import bullet_list
from midstream.pipeline.failures import SampleFailure
from midstream.pipeline.iterator import Lane
from midstream.pipeline.ledger import Ledger
from midstream.pipeline.node import bind
from midstream.pipeline.passes import epoch_key
from midstream.pipeline.rows import as_origin_array
from midstream.pipeline.single_lane import LaneOutput, SingleLaneIterator
from midstream.testing.content import plain
from midstream.testing.counting import counting_reads

__all__ = ["LAWS", "LawError", "check_dataset"]

Make = Callable[[], Dataset]
Where = tuple[int, int]

LANES: tuple[Where, ...] = ((0, 1), (1, 3))
"""The lanes on which the laws of one lane are tried: the only one, and one of three."""


class LawError(AssertionError):
    """Raised if a dataset breaks a law."""


def run(ds: Dataset, lane: Where = (0, 1), epoch: int = 0) -> SingleLaneIterator:
    """Returns an iterator over the samples of one lane."""
    return SingleLaneIterator(ds.node, lane[0], lane[1], epoch)


def rest(iterator: Iterator[Any]) -> list[Any]:
    """Returns all remaining samples as plain values."""
    return [plain(sample) for sample in iterator]


def through_json(state: Any) -> Any:
    """Returns a state as it is after it was written to a file and read."""
    return json.loads(json.dumps(state))


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise LawError(text)


def _same(found: list[Any], expected: list[Any], title: str) -> None:
    if found == expected:
        return
    index = next(
        (i for i, (a, b) in enumerate(zip(found, expected)) if a != b),
        min(len(found), len(expected)),
    )
    texts = [
        f"{samples[index]!r:.120}" if index < len(samples) else "the end"
        for samples in (expected, found)
    ]
    raise LawError(
        f"{title}: sample {index + 1} after it differs: expected {texts[0]}, found {texts[1]}"
    )


def states_along(ds: Dataset, lane: Where = (0, 1)) -> tuple[list[Any], list[Any]]:
    """Returns all samples of a lane, and the states before the first and after each."""
    whole = run(ds, lane)
    samples, states = [], [through_json(whole.state_dict())]
    for sample in whole:
        samples.append(plain(sample))
        states.append(through_json(whole.state_dict()))
    return samples, states


def same_description_same_samples(make: Make) -> None:
    """The same description yields the same samples, each time it is read."""
    ds = make()
    first = rest(iter(ds))
    _require(bool(first), "the dataset is empty, so nothing can be checked")
    _same(rest(iter(ds)), first, "read once more")
    _same(rest(iter(make())), first, "made and read once more")


def restore_at_every_step(make: Make, lane: Where = (0, 1)) -> None:
    """A run restored at any step continues identically."""
    samples, states = states_along(make(), lane)
    _require(bool(samples), f"lane {lane[0]} of {lane[1]} is empty")
    for step, state in enumerate(states):
        resumed = run(make(), lane)
        resumed.load_state_dict(state)
        _same(
            rest(resumed),
            samples[step:],
            f"lane {lane[0]} of {lane[1]}, resumed after sample {step}",
        )


def states_do_not_depend_on_resumes(make: Make) -> None:
    """The states after a resume are those of the run that was not interrupted."""
    ds = make()
    whole = run(ds)
    states = [whole.state_dict(), *(whole.state_dict() for _ in whole)]
    for step in range(0, len(states), 7):
        resumed = run(ds)
        resumed.load_state_dict(states[step])
        found = [resumed.state_dict(), *(resumed.state_dict() for _ in resumed)]
        _same(found, states[step:], f"states of a run resumed after sample {step}")


def chained_resumes(make: Make, lane: Where = (0, 1)) -> None:
    """A second and third resume continue identically."""
    ds = make()
    expected = rest(run(ds, lane))
    for stride in (1, 2, 3, 5):
        found: list[Any] = []
        state = None
        for _ in range(4):
            part = run(ds, lane)
            if state is not None:
                part.load_state_dict(state)
            found.extend(plain(sample) for _, sample in zip(range(stride), part))
            state = through_json(part.state_dict())
        part = run(ds, lane)
        part.load_state_dict(state)
        found.extend(rest(part))
        _same(found, expected, f"four pieces of {stride}, then the rest")


def fresh_states_restore(make: Make) -> None:
    """A state before the first sample, and right after a load, restores."""
    ds = make()
    expected = rest(run(ds))
    fresh = run(ds)
    state = fresh.state_dict()
    for _ in range(3):
        fresh = run(ds)
        fresh.load_state_dict(state)
        state = fresh.state_dict()
    _same(rest(fresh), expected, "loaded and saved three times before the first sample")


def the_end_is_a_state(make: Make, lane: Where = (0, 1)) -> None:
    """A state at and after the end yields nothing."""
    ds = make()
    whole = run(ds, lane)
    at_the_end = [whole.state_dict() for _ in whole][-1]
    after_the_end = whole.state_dict()
    for state in (at_the_end, after_the_end, after_the_end):
        resumed = run(ds, lane)
        resumed.load_state_dict(state)
        _same(rest(resumed), [], "resumed at the end")
        _same(rest(resumed), [], "resumed at the end, and asked again")
        again = run(ds, lane)
        again.load_state_dict(resumed.state_dict())
        _same(rest(again), [], "resumed at the end, twice")


def load_then_state_is_the_state(make: Make) -> None:
    """``load_state_dict(s)`` and then ``state_dict()`` gives ``s``."""
    ds = make()
    whole = run(ds)
    for _ in zip(range(5), whole):
        pass
    state = whole.state_dict()
    resumed = run(make())
    resumed.load_state_dict(state)
    for text in ("right after a load", "asked again"):
        _require(
            resumed.state_dict() == state,
            f"{text}: expected {state!r:.200}, found {resumed.state_dict()!r:.200}",
        )
    whole.load_state_dict(state)  # onto an iterator that is running
    _require(
        whole.state_dict() == state,
        f"loaded while running: expected {state!r:.200}, found {whole.state_dict()!r:.200}",
    )


def loading_goes_back(make: Make) -> None:
    """Loading onto a running iterator goes back."""
    whole = run(make())
    state = whole.state_dict()
    samples = rest(whole)
    whole.load_state_dict(state)
    _same(rest(whole), samples, "the first state was loaded at the end")


def plain_types(value: Any) -> bool:
    """Whether a value consists of plain JSON types."""
    if isinstance(value, dict):
        return all(type(key) is str and plain_types(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(plain_types, value))
    return value is None or type(value) in (int, str, bool, float)


def state_is_plain_and_shares_nothing(make: Make) -> None:
    """A state is plain JSON with the same keys each time, and shares nothing with the iterator."""
    whole = run(make())
    keys = set(whole.state_dict())
    kept = []
    for _, _ in zip(range(12), whole):
        state = whole.state_dict()
        _require(plain_types(state), f"the state has other than plain JSON values: {state!r:.300}")
        _require(
            set(state) == keys, f"the state's keys change: {sorted(keys)}, then {sorted(state)}"
        )
        kept.append((state, json.dumps(state)))
        _overwrite(whole.state_dict())  # a caller may change the state it was given
    _require(
        all(json.dumps(state) == text for state, text in kept),
        "a state changed after it was handed out",
    )
    _same(rest(whole), rest(run(make()))[12:], "states were written over by the caller")


def _overwrite(value: Any) -> None:
    if isinstance(value, dict):
        for item in value.values():
            _overwrite(item)
        value.clear()
    elif isinstance(value, list):
        for item in value:
            _overwrite(item)
        value.clear()


def state_is_small(make: Make) -> None:
    """A state is at most 300 bytes over random access, 1 KB and 64 bytes per source for a stream."""
    ds = make()
    limit = 300 if ds.random_access else 1024 + 64 * len(bind(ds.node).names)
    whole = run(ds)
    largest = max(len(json.dumps(whole.state_dict(), separators=(",", ":"))) for _ in whole)
    _require(
        largest <= limit,
        f"a state of {largest} bytes, and the limit is {limit}: positions belong in it, no data",
    )


def state_does_not_grow(make: Make) -> None:
    """Sixty resumes do not make the state grow."""
    ds = make()
    state = run(ds).state_dict()
    keys, sizes = set(state), []
    for _ in range(60):
        part = run(ds)
        part.load_state_dict(state)
        next(part, None)
        state = part.state_dict()
        _require(
            set(state) == keys, f"the state's keys change: {sorted(keys)}, then {sorted(state)}"
        )
        sizes.append(len(json.dumps(state)))
    # More digits, no more entries.
    _require(
        max(sizes[30:]) <= max(sizes[:30]) + 40,
        f"from {max(sizes[:30])} to {max(sizes[30:])} bytes",
    )


def pickling_keeps_everything(make: Make) -> None:
    """Description and state survive pickling."""
    ds = make()
    copy = pickle.loads(pickle.dumps(ds))
    _require(copy == ds and hash(copy) == hash(ds), "the unpickled dataset is another one")
    _same(rest(iter(copy)), rest(iter(ds)), "unpickled")
    whole = run(ds)
    next(whole)
    state = pickle.loads(pickle.dumps(whole.state_dict()))
    resumed = run(copy)
    resumed.load_state_dict(state)
    _same(rest(resumed), rest(whole), "unpickled, with an unpickled state")


def items(ds: Dataset, lane: Where = (0, 1), epoch: int = 0) -> list[tuple[Any, list[ms.Origin]]]:
    """Returns the samples of a lane, each with the origins of the rows it was made of."""
    bound = bind(ds.node)
    output = LaneOutput(bound, Lane(*lane, 1, Ledger()), int(epoch_key(epoch)[0]), epoch)
    out: list[tuple[Any, list[ms.Origin]]] = []
    while True:
        try:
            sample, origins = output.next()
        except StopIteration:
            return out
        _require(not isinstance(sample, SampleFailure), f"user code failed: {sample}")
        out.append((sample, [bound.origin(origin) for origin in as_origin_array(origins).tolist()]))


def no_origin_comes_twice(make: Make) -> None:
    """No origin comes twice in an epoch, and two epochs share none."""
    both: Counter[ms.Origin] = Counter()
    for epoch in (0, 1):
        for sample, origins in items(make(), epoch=epoch):
            _require(bool(origins), f"a sample has no origin: {plain(sample)!r:.100}")
            both.update(origins)
    twice = [str(origin) for origin, count in both.items() if count > 1]
    _require(not twice, f"origins that came more than once in two epochs: {twice[:5]}")


def looking_changes_nothing(make: Make) -> None:
    """Printing, measuring, saving, pickling and reading it elsewhere change nothing."""
    expected = rest(run(make()))
    ds = make()
    whole = run(ds)
    found = []
    for sample in whole:
        found.append(plain(sample))
        if len(found) in (1, 4, 9):
            repr(ds)
            ds._repr_html_()
            _ = ds == make()
            if ds.random_access:
                len(ds)
                ds.rows([0])
            whole.state_dict()
            for _ in zip(range(3), iter(ds)):
                pass
            pickle.dumps(ds)
    _same(found, expected, "looked at while it ran")


def global_generators_are_untouched(make: Make) -> None:
    """The global generators of torch, numpy and random are not drawn from."""

    def states() -> list[Any]:
        return [
            torch.get_rng_state().tolist(),
            random.getstate(),
            pickle.dumps(np.random.get_state(legacy=False)),
        ]

    before = states()
    ds = make()
    whole = run(ds)
    for _ in zip(range(20), whole):
        whole.state_dict()
    loader = ms.DataLoader(ds, lanes=12)
    for _ in zip(range(3), loader):
        loader.state_dict()
    for name, one, other in zip(("torch", "random", "numpy"), before, states()):
        _require(
            one == other,
            f"the global generator of {name} was drawn from: draw from a generator keyed by the row"
            " (map's with_rng=True)",
        )


def every_lane_has_its_own(make: Make, num_lanes: int = 3) -> None:
    """No origin comes twice over all lanes."""
    seen = Counter(
        origin
        for lane in range(num_lanes)
        for _, origins in items(make(), (lane, num_lanes))
        for origin in origins
    )
    twice = [str(origin) for origin, count in seen.items() if count > 1]
    _require(not twice, f"origins that came more than once over {num_lanes} lanes: {twice[:5]}")


def rows_are_the_stream(make: Make) -> None:
    """Random access: rows at any positions are those of the stream, and ``len()`` counts them."""
    ds = make()
    if not ds.random_access:
        return
    samples = rest(iter(ds))
    length = len(ds)
    _require(length == len(samples), f"len() is {length}, and {len(samples)} samples come")
    order = random.Random(0).sample(range(length), length)
    for size in (1, 3, length):
        for start in range(0, length, size):
            positions = order[start : start + size]
            expected = [samples[position] for position in positions]
            try:
                found = [plain(sample) for sample in ds.rows(positions)]
            except ms.SampleError:
                continue  # user code failed on one: rows() raises where the stream skips
            _same(found, expected, f"rows at {positions[:6]}…")


LAWS: tuple[Callable[..., None], ...] = (
    same_description_same_samples,
    restore_at_every_step,
    states_do_not_depend_on_resumes,
    chained_resumes,
    fresh_states_restore,
    the_end_is_a_state,
    load_then_state_is_the_state,
    loading_goes_back,
    state_is_plain_and_shares_nothing,
    state_is_small,
    state_does_not_grow,
    pickling_keeps_everything,
    no_origin_comes_twice,
    looking_changes_nothing,
    global_generators_are_untouched,
    every_lane_has_its_own,
    rows_are_the_stream,
)
"""All laws. Those with a parameter ``lane`` are tried on every lane of `LANES`."""

_MOST = 400
"""Largest number of samples of a dataset that is checked."""


def check_dataset(
    dataset: Dataset | Make, *, replay: int | None = None, raises: bool = True
) -> list[str]:
    """Checks a dataset against all laws, to test a node or source of your own.

    It takes seconds for a hundred samples.

    Args:
        dataset: A finite dataset of 10 to 400 samples; or a function that makes it anew each time.
        replay: Largest number of source rows that a resume reads again, as your node states it.
            Given, it is checked too.
        raises: Whether to raise an error if a law is broken.

    Returns:
        A text for each broken law; empty if none is.

    Raises:
        LawError: If ``raises`` and a law is broken; names all broken laws.
        TypeError: If ``dataset`` is not a dataset and makes none.
        ValueError: If the dataset is infinite, or has too many samples to stop at every one.

    >>> import midstream as ms
    >>> from midstream.testing import check_dataset
    >>> check_dataset(ms.from_dataset(range(30)).shuffle(seed=1).filter(lambda row: row % 2))
    []
    """
    if isinstance(dataset, Dataset):
        data = pickle.dumps(dataset)

        def make() -> Dataset:
            made: Dataset = pickle.loads(data)
            return made

    else:
        make = dataset
    first = make()
    if not isinstance(first, Dataset):
        raise TypeError(
            "check_dataset takes a midstream dataset, or a function that makes one; found"
            f" {type(first).__name__}"
        )
    if first.node.infinite or len(list(islice(iter(first), _MOST + 1))) > _MOST:
        raise ValueError(
            f"every law is checked at every sample: give at most {_MOST} samples, for example with"
            f" .take(100)\n{first!r}"
        )
    broken = []
    laws = [
        (law, where)
        for law in LAWS
        for where in (LANES if "lane" in law.__annotations__ else (None,))
    ]
    for law, where in laws:
        try:
            if where is None:
                law(make)
            else:
                law(make, where)
        except Exception as error:
            title = (law.__doc__ or law.__name__).strip().splitlines()[0]
            text = str(error) if isinstance(error, LawError) else f"{type(error).__name__}: {error}"
            broken.append(f"{title} {text}")
    # A cursor may read as many rows again in advance.
    if replay is not None and (read := rows_read_again(make)) > 2 * (replay + 16):
        broken.append(
            f"A resume reads at most {replay} source rows again. It read {read}, those read ahead"
            " included."
        )
    if broken and raises:
        raise LawError(f"{len(broken)} laws are broken by\n{first!r}{bullet_list(broken)}")
    return broken


def rows_read_again(make: Make) -> int:
    """Returns the largest number of source rows that a resume reads before its first sample."""
    _, states = states_along(make())
    most = 0
    for state in states[:: max(1, len(states) // 16)]:
        resumed = run(make())
        resumed.load_state_dict(state)
        with counting_reads() as reads:
            next(resumed, None)
        most = max(most, reads.rows)
    return most
