"""The node `Interleave`: several datasets mixed by weight, every prefix close to the shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from midstream.common.plain_state import Fragment, State, copy_plain, encode
from midstream.common.randomness import fold, pass_key
from midstream.common.validation import require_callable, require_choice, require_int, require_text
from midstream.nodes.mix.layout import PASSES, Layout
from midstream.nodes.mix.picks import Picks, draws_seed
from midstream.nodes.mix.weights import Weights, check_weights, quotas
from midstream.nodes.user_function import RAISE, Call
from midstream.pipeline.cursor import iterate
from midstream.pipeline.failures import FailedSample, callable_name
from midstream.pipeline.iterator import Iterator, Lane, replaying
from midstream.pipeline.node import BoundNode, Node, Selection, bind
from midstream.pipeline.passes import require_passes
from midstream.pipeline.rows import I64, U64, Item, pick

__all__ = ["Interleave", "Picks", "quotas"]

StoppingStrategy = Literal["first_exhausted", "all_exhausted", "all_exhausted_without_replacement"]
_STRATEGIES = ("first_exhausted", "all_exhausted", "all_exhausted_without_replacement")


@dataclass(frozen=True, eq=False, repr=False)
class Interleave(Node):
    """Mixes datasets by weight.

    A *pick* chooses the dataset of the next sample. Picks come in *blocks* of B picks; the *quota*
    q_c is the number of picks of dataset c in each block. The order of the picks in a block is its
    *pattern*: pick j of dataset c has the key (j + u) / q_c, u uniform in [0, 1), and the picks are
    sorted by key. There are 16 patterns, made once; a hash of the block's number chooses one. So
    the dataset and row at any position take one lookup: pick j of dataset c in block b gives its
    row b * q_c + j.

    A *phase* is a part of a schedule with one set of weights. In each phase blocks are counted from
    0, and every dataset continues at its next row.

    With ``weights_by`` there are no blocks. Each pick chooses the dataset that is furthest below
    its share of the tokens counted so far; a hash decides between equals. Counting starts again
    when the shares change.

    State: random access: none but the position. Stream: ``{"picks", "ended", "inputs": [[pass,
        flags, state], ...]}``, inputs ordered by name; with a schedule also ``"phase": [phase, its
        first pick, samples or tokens given]``; with ``weights_by`` each input has a fourth entry,
        what it has given since the shares changed.
    Resume: reads nothing again.
    """

    datasets: tuple[tuple[str, Node], ...]
    weights: Weights
    seed: int = 0
    stopping_strategy: StoppingStrategy = "first_exhausted"
    name: str | None = None
    weights_by: str | Callable[[Any], int] | None = None
    later: tuple[tuple[int, Weights], ...] = ()
    edited: bool = False
    kind = "interleave"

    def __post_init__(self) -> None:
        if not self.datasets:
            raise ValueError("interleave takes at least one dataset; found none")
        require_int(self.seed, "seed", -(1 << 63), "interleave")
        require_choice(self.stopping_strategy, "stopping_strategy", _STRATEGIES, "interleave")
        for key, _ in self.datasets:
            if not isinstance(key, str) or not key or "/" in key or "|" in key:
                raise ValueError(
                    f"interleave: a name is a string without '/' and '|'; found {key!r}"
                )
            require_text(key, "interleave: a name")
        if self.weights_by is not None and not isinstance(self.weights_by, str):
            require_callable(self.weights_by, "interleave: weights_by")
        for _, weights in self.phases:
            quotas(dict(weights))
        bind(self)

    def inputs(self) -> dict[str, Node]:
        """The datasets, by name."""
        return dict(self.datasets)

    def with_inputs(self, inputs: Mapping[str, Node]) -> Interleave:
        """See `Node.with_inputs`."""
        return dataclasses.replace(
            self, datasets=tuple((name, inputs[name]) for name, _ in self.datasets)
        )

    def taken_of(self, name: str, count: int) -> int:
        """See `Node.taken_of`.

        Raises:
            ValueError: If the input has started over among the first ``count`` samples.
        """
        layout, index = self.layout(), [key for key, _ in self.datasets].index(name)
        taken = int(layout.counts(count)[index])
        if layout.repeats[index] != 1 and taken > layout.lengths[index]:
            raise ValueError(
                f"set_weights: {name!r} has started over in this epoch; call it in the next one"
            )
        return taken

    @property
    def phases(self) -> tuple[tuple[int, Weights], ...]:
        """``(border, weights)`` of each phase; without a schedule there is one phase."""
        return ((0, self.weights), *self.later)

    @property
    def label(self) -> str:
        """The name given by the user, or "interleave"."""
        return self.name or self.kind

    @property
    def random_access(self) -> bool:
        """True if all inputs have random access and there is no ``weights_by``, which must read."""
        return self.weights_by is None and super().random_access

    @property
    def infinite(self) -> bool:
        """Whether no dataset that could end the mix ever ends."""
        used = {key for _, weights in self.phases for key, weight in weights if weight}
        at_the_end = {key for key, weight in self.phases[-1][1] if weight}
        if self.stopping_strategy == "first_exhausted":
            return all(dataset.infinite for key, dataset in self.datasets if key in used)
        return any(dataset.infinite for key, dataset in self.datasets if key in at_the_end)

    def spec_fields(self) -> dict[str, State]:
        """Weights by name, schedule, seed and strategy."""
        fields: dict[str, State] = {"weights": dict(self.weights), "seed": int(self.seed)}
        if self.later:
            fields["schedule"] = [[border, dict(weights)] for border, weights in self.later]
        if self.weights_by is not None:
            fields["weights_by"] = (
                self.weights_by
                if isinstance(self.weights_by, str)
                else callable_name(self.weights_by)
            )
        if self.name is not None:
            fields["label"] = self.name
        if self.stopping_strategy != "first_exhausted":
            fields["stopping_strategy"] = self.stopping_strategy
        return fields

    def picks(self, phase: int = 0) -> Picks:
        """The choice sequence of a phase. At most 8 are cached: a long one takes megabytes."""
        return self._picks(phase, self.phases[phase][1])

    def _picks(self, phase: int, weights: Weights) -> Picks:
        """The choice sequence for some weights, from the cache or new."""
        cached: dict[Any, Picks] = self.__dict__.get("_picks_made") or {}
        if (phase, weights) not in cached:
            while len(cached) >= 8:
                cached.pop(next(iter(cached)))
            cached[phase, weights] = Picks(dict(weights), self.draws(phase))
            self._set("_picks_made", cached)
        return cached[phase, weights]

    def draws(self, phase: int) -> int:
        """See `midstream.nodes.mix.picks.draws_seed`."""
        return draws_seed(self.seed, self.label, [key for key, _ in self.datasets], phase)

    def _length(self) -> int | None:
        return self.layout().length

    def layout(self) -> Layout:
        """The closed forms of the mix, computed once."""
        return self.cached("_layout_made", self._make_layout)

    def _make_layout(self) -> Layout:
        return Layout(
            [border for border, _ in self.phases],
            self.picks,
            [key for key, _ in self.datasets],
            [dataset.length() for _, dataset in self.datasets],
            self.stopping_strategy,
            many=self.edited,
        )

    def passes_over(self, name: str, exact: bool) -> int:
        """See `Node.passes_over`: more than one if datasets start over."""
        if self.stopping_strategy != "all_exhausted":
            return 1
        if not exact or not self.random_access:
            return PASSES
        return self.layout().repeats[list(self.inputs()).index(name)]

    def _select(self, bound: BoundNode, positions: I64, keys: U64, passes: I64) -> list[Selection]:
        layout = self.layout()
        source, inside = layout.locate(positions)
        parts: list[Selection] = []
        order = np.argsort(source, kind="stable")
        ends = np.flatnonzero(np.diff(source[order], append=-1)) + 1
        start = 0
        for end in ends.tolist():
            here = order[start:end]
            start = end
            index = int(source[here[0]])
            child = bound.inputs[self.datasets[index][0]]
            local, child_keys, child_passes = inside[here], pick(keys, here), pick(passes, here)
            if layout.repeats[index] > 1:
                require_passes(passes, layout.repeats[index])
                number, local = np.divmod(local, layout.lengths[index])
                child_keys = pass_key(child_keys, number)
                child_passes = child_passes * layout.repeats[index] + number
            parts.append(Selection(child, local, child_keys, child_passes, here))
        return parts

    def _iterate(self, bound: BoundNode, lane: Lane, key: int, pass_: int) -> Iterator:
        if self.weights_by is not None:
            return _MeasuredIterator(self, bound, lane, key, pass_)
        return _InterleaveIterator(self, bound, lane, key, pass_)


_YIELDED, _EXHAUSTED, _EMPTY = 1, 2, 4


class _Input:
    """One dataset of a mix, in a lane.

    Attributes:
        source: Its iterator.
        number: Passes over the dataset that are complete.
        flags: ``_YIELDED``: gave a sample in this pass. ``_EXHAUSTED``: has ended, at least once.
            ``_EMPTY``: a pass gave no sample.
    """

    __slots__ = ("flags", "number", "source")

    def __init__(self, source: Iterator) -> None:
        self.source, self.number, self.flags = source, 0, 0


class _InterleaveIterator(Iterator):
    """Picks by blocks and patterns; each lane has its own sequence of patterns."""

    def __init__(
        self, node: Interleave, bound: BoundNode, lane: Lane, key: int, pass_: int
    ) -> None:
        self.node, self.bound, self.lane, self.key, self.pass_ = node, bound, lane, key, pass_
        self.names = [name for name, _ in node.datasets]
        self.children = [_Input(self._open(name, 0)) for name in self.names]
        self.picks, self.ended = 0, False
        self.phase, self.start = 0, 0  # the phase of the schedule, and its first pick
        self.given = 0  # samples or tokens that the mix has given
        self.edits = lane.edits.of(bound.path) if lane.edits is not None else None
        self.edit = -1  # the number of the change in force
        self.may_change = bool(node.later) or self.edits is not None
        # The encoded state of each input, renewed only after the input was read: a mix may have
        # hundreds of inputs.
        self.texts = [""] * len(self.names)
        self.touched = set(range(len(self.names)))
        self.by_name = [index for _, index in sorted(zip(self.names, range(len(self.names))))]
        self._use(0, node.weights)

    def _open(self, name: str, number: int) -> Iterator:
        key = int(pass_key(np.array([self.key], dtype=np.uint64), np.array([number]))[0])
        pass_ = self.pass_
        # The number of passes is not known in advance.
        if self.node.stopping_strategy == "all_exhausted":
            require_passes(np.array([pass_]), PASSES)
            pass_ = pass_ * PASSES + number
        return iterate(self.bound.inputs[name], self.lane, key, pass_)

    # -- which weights --

    def _use(self, draws: int, weights: Weights) -> None:
        """Picks by ``weights`` from now on.

        Args:
            draws: Number of the phase; for changed weights -1 minus the number of the change.
            weights: By name, in the order of the datasets.
        """
        self.weights = weights
        self.choices = self.node._picks(draws, weights)
        self.pattern: list[int] = []
        self.pattern_of = -1

    def _update_weights(self) -> bool:
        """Applies changed weights or the next phase. Returns whether anything is left to pick."""
        node = self.node
        if self.edits is not None:
            number = self.edits.in_force(self.pass_, self.picks, live=not replaying())
            if number != self.edit:
                self.edit = number
                weights, first = self.edits.weights(number, self.pass_)
                self.start = first
                self._use(-1 - number, check_weights(weights, self.names, self.bound.path))
                self._check_end()
            if self.edit >= 0:
                return not self.ended
        while self.phase + 1 < len(node.phases) and self.given >= self.lane.share(
            node.phases[self.phase + 1][0]
        ):
            self._next_phase()
        return not self.ended

    def _next_phase(self) -> None:
        self.phase += 1
        self.start = self.picks
        self._use(self.phase, self.node.phases[self.phase][1])
        self._check_end()

    def _check_end(self) -> None:
        """Ends the mix or the phase if nothing is left to pick.

        Called when weights changed or a dataset ran out.
        """
        node, restarts = self.node, self.node.stopping_strategy == "all_exhausted"
        to_come = () if self.edit >= 0 else node.phases[self.phase + 1 :]
        here = [child for child, (_, weight) in zip(self.children, self.weights) if weight]
        wanted = {
            key for _, weights in ((0, self.weights), *to_come) for key, weight in weights if weight
        }
        live = [
            child
            for name, child in zip(self.names, self.children)
            if name in wanted and not child.flags & _EMPTY
        ]
        if not live or (
            all(child.flags & _EXHAUSTED for child in live)
            if node.stopping_strategy != "first_exhausted"
            else len(live) < len(wanted) and self._never_ends(wanted)
        ):
            self.ended = True
        elif all(child.flags & (_EMPTY if restarts else _EMPTY | _EXHAUSTED) for child in here):
            if to_come:
                self._next_phase()
            else:
                self.ended = True

    def _never_ends(self, wanted: set[str]) -> bool:
        """Whether the datasets that could end the mix have no rows in this lane."""
        ends = [
            child.flags
            for (name, data), child in zip(self.node.datasets, self.children)
            if name in wanted and not data.infinite
        ]
        return bool(ends) and all(flags & _EMPTY for flags in ends)

    # -- picking --

    def _choose(self) -> int:
        """The index of the dataset of this pick."""
        block, inside = divmod(self.picks - self.start, self.choices.block)
        if block != self.pattern_of:
            chosen = int(self.choices.choose(block, 1 + self.lane.index)[0])
            self.pattern, self.pattern_of = self.choices.of(chosen).tolist(), block
        return self.pattern[inside]

    def _next(self) -> Item:
        while not self.ended:
            if self.may_change and not self._update_weights():
                break
            index = self._choose()
            child = self.children[index]
            self.touched.add(index)
            if not child.flags & _EMPTY and (
                not child.flags & _EXHAUSTED or self.node.stopping_strategy == "all_exhausted"
            ):
                try:
                    item = next(child.source)
                    self.picks += 1
                    return self._counted(index, item)
                except StopIteration:
                    phase = self.phase
                    # Repeat the pick: the dataset starts over, or another phase has begun.
                    if self._ran_out(index, child) or self.phase != phase:
                        continue
            self.picks += 1
        raise StopIteration

    def _counted(self, index: int, item: Item) -> Item:
        self.children[index].flags |= _YIELDED
        self.given += 1
        return item

    def _ran_out(self, index: int, child: _Input) -> bool:
        """Handles the end of a dataset. Returns whether it starts over."""
        strategy = self.node.stopping_strategy
        if not child.flags & _YIELDED:
            child.flags |= _EMPTY
        else:
            child.flags |= _EXHAUSTED
            self.ended = strategy == "first_exhausted"
        if not self.ended:
            self._check_end()
        if self.ended or child.flags & _EMPTY or strategy != "all_exhausted":
            return False
        child.number += 1
        child.flags &= ~_YIELDED
        child.source = self._open(self.names[index], child.number)
        return True

    # -- state --

    def _input_state(self, index: int, child: _Input) -> list[State]:
        return [child.number, child.flags, child.source.snapshot()]

    def _state(self) -> State:
        for index in self.touched:
            self.texts[index] = encode(self._input_state(index, self.children[index]))
        self.touched.clear()
        inputs = ",".join([self.texts[index] for index in self.by_name])
        state: dict[str, State] = {
            "picks": self.picks,
            "ended": self.ended,
            "inputs": Fragment(f"[{inputs}]"),
        }
        if self.node.later:
            state["phase"], state["of"] = [self.phase, self.start, self.given], self.bound.path
        return state

    def _load_input(self, index: int, state: list[State]) -> None:
        """Loads further entries of an input's state, after pass, flags and iterator state."""

    def _load(self, state: State) -> None:
        self.picks, self.ended = state["picks"], state["ended"]
        if self.node.later:
            self.phase, self.start, self.given = state["phase"]
            self._use(self.phase, self.node.phases[self.phase][1])
        else:
            self._use(0, self.node.weights)
        self.edit = -1
        if self.edits is not None:
            self.edit = (
                self.edits.in_force(self.pass_, self.picks - 1, live=False) if self.picks else -1
            )
            if self.edit >= 0:
                weights, self.start = self.edits.weights(self.edit, self.pass_)
                self._use(-1 - self.edit, check_weights(weights, self.names, self.bound.path))
        self.touched = set(range(len(self.names)))
        inputs = (
            copy_plain(state["inputs"]) if type(state["inputs"]) is Fragment else state["inputs"]
        )
        if len(inputs) != len(self.names):
            raise ValueError(f"{len(inputs)} inputs of a mix of {len(self.names)}")
        for index, saved in zip(self.by_name, inputs):
            if saved is None:
                continue  # added since the state was saved: starts at its beginning
            child = self.children[index]
            self._load_input(index, saved)
            child.number, child.flags, source = saved[:3]
            child.source = self._open(self.names[index], child.number)
            child.source.load(source)


class _MeasuredIterator(_InterleaveIterator):
    """Picks the dataset that is furthest below its share of the tokens counted (``weights_by``)."""

    def __init__(
        self, node: Interleave, bound: BoundNode, lane: Lane, key: int, pass_: int
    ) -> None:
        by = node.weights_by
        self.counted = np.zeros(len(node.datasets), dtype=np.float64)
        super().__init__(node, bound, lane, key, pass_)
        self.call = Call(
            bound, by if callable(by) else len, RAISE, lambda sample, _: _measure(by, sample)
        )

    def _use(self, draws: int, weights: Weights) -> None:
        self.weights, self.seed = weights, fold(self.node.draws(draws), self.lane.index)
        self.counted[:] = 0
        self.touched = set(range(len(self.counted)))
        self.shares: Any = None

    def _check_end(self) -> None:
        super()._check_end()
        self.shares = None

    def _set_shares(self) -> None:
        """Computes the shares of datasets that can be picked; sets the counts of others to 0."""
        restarts = self.node.stopping_strategy == "all_exhausted"
        gone = (
            _EMPTY
            if restarts or self.node.stopping_strategy == "first_exhausted"
            else _EMPTY | _EXHAUSTED
        )
        left = np.array(
            [
                0.0 if child.flags & gone else weight
                for child, (_, weight) in zip(self.children, self.weights)
            ]
        )
        self.counted[left == 0] = 0
        self.touched = set(range(len(self.counted)))
        self.shares = left / left.sum()
        # Sorted by name, so that the order in which a mix is written does not matter.
        self.live = np.array(sorted(np.flatnonzero(left).tolist(), key=self.names.__getitem__))

    def _choose(self) -> int:
        if self.shares is None:
            self._set_shares()
        behind = (self.shares * self.counted.sum() - self.counted)[self.live]
        most = self.live[behind == behind.max()]
        if len(most) > 1:
            draw = (fold(self.seed, self.picks) >> 11) * 2.0**-53
            ends = np.cumsum(self.shares[most])
            return int(
                most[min(int(np.searchsorted(ends, draw * ends[-1], side="right")), len(most) - 1)]
            )
        return int(most[0])

    def _counted(self, index: int, item: Item) -> Item:
        size: Any = 0
        if type(item[0]) is not FailedSample:
            size = self.call(*item)
            if type(size) is FailedSample:
                item, size = (size, item[1]), 0
            self.counted[index] += size
            self.given += size
        # A dataset whose samples count 0 stays furthest behind. It must count as empty: if it
        # started over, nothing else would ever be picked.
        if size or self.node.stopping_strategy != "all_exhausted":
            self.children[index].flags |= _YIELDED
        return item

    def _ran_out(self, index: int, child: _Input) -> bool:
        starts_over = super()._ran_out(index, child)
        if not starts_over and not self.ended:
            self.counted[:] = 0
            self.touched = set(range(len(self.counted)))
        return starts_over

    def _input_state(self, index: int, child: _Input) -> list[State]:
        return [*super()._input_state(index, child), int(self.counted[index])]

    def _load_input(self, index: int, state: list[State]) -> None:
        if len(state) > 3:
            self.counted[index] = state[3]


def _measure(by: Any, sample: Any) -> int:
    """The tokens of a sample, by ``weights_by``."""
    size = len(sample[by]) if isinstance(by, str) else by(sample)
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 0:
        raise TypeError(
            "weights_by counts what a sample has, in whole numbers of at least 0; found"
            f" {size!r:.60}"
        )
    return int(size)
