"""Where a training run stands between passes over its loader: pipeline, changes, epoch, state."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from midstream.changes.adopt import adopt
from midstream.changes.excluded import require_excludable, with_excluded
from midstream.changes.running import running
from midstream.changes.weights import with_weights
from midstream.checkpoint.changes import NO_CHANGES, Changes
from midstream.checkpoint.differences import diff_specs
from midstream.checkpoint.merge import agreed, merge_states
from midstream.checkpoint.read import RunState, parse
from midstream.checkpoint.write import to_state
from midstream.dataset import Dataset
from midstream.distributed.agreement import Agreement
from midstream.distributed.collectives import broadcast, is_initialized
from midstream.distributed.topology import (
    Topology,
    batches_of_rank,
    choose_lanes,
    current_topology,
)
from midstream.errors import CheckpointError, Origin, bullet_list
from midstream.loader.arguments import Settings, shuffle_seed, spec_seed, with_seed
from midstream.loader.checks import check_lanes
from midstream.loader.position import Position
from midstream.loader.render import has_left_over, state_at
from midstream.loader.running_pipeline import RunningPipeline
from midstream.pipeline import describe
from midstream.pipeline.node import Node

log = logging.getLogger("midstream")


class IteratorToken:
    """Marks the iterator in use. Older iterators hold another token and refuse ``next()``.

    Pickles to a token without an iterator: a copy of a loader has none in use.

    Attributes:
        iterator: Returns the iterator that holds the token, or None when it is gone.
    """

    __slots__ = ("iterator",)

    def __init__(self, iterator: Callable[[], Any] = lambda: None) -> None:
        self.iterator = iterator

    def __reduce__(self) -> tuple[type[IteratorToken], tuple[()]]:
        return IteratorToken, ()


class Run:
    """A training run on one rank.

    It knows no loader, no worker and no iterator, so that it keeps none of them alive.

    Args:
        pipeline: What the loader reads, batches included.
        settings: The loader's arguments that say which batches are this rank's.
        seed_from_torch: Whether the seed of the shuffle was drawn from torch's generator.

    Attributes:
        pipeline: The pipeline as it was given.
        running: The pipeline with the changes of this run, and facts about it.
        changes: Changed weights and excluded samples, which last beyond the epoch.
        position: The position in the epoch last iterated; None before that.
        loaded: A loaded state that waits for the next ``iter()``, decoded and as plain values.
        next_epoch: The epoch of the next ``iter()``, where no state waits.
        trained: Position and step that an adapter declared as trained, for the next ``iter()``.
        guided: Whether an adapter declares what was trained.
        resumed_at: Epoch, batches and steps of the state that was loaded last.
        active: The token of the iterator in use.
        must_restart: The token of an iterator that has to start new readers at its next batch.
        skipping: Whether batches are passed over, not handed out.
    """

    def __init__(self, pipeline: Node, settings: Settings, seed_from_torch: bool) -> None:
        self.settings, self.seed_from_torch = settings, seed_from_torch
        self.changes = NO_CHANGES
        self._set_pipeline(pipeline)
        self.position: Position | None = None
        self.loaded: tuple[RunState, dict[str, Any]] | None = None
        self.was_loaded = False
        self.next_epoch = 0
        self.trained: tuple[Position, int] | None = None
        self.guided = False
        self.resumed_at = (0, 0, 0)
        self.active: IteratorToken | None = None
        self.must_restart: IteratorToken | None = None
        self.skipping = False
        self._agreement: Agreement | None = None
        self._noticed: set[str] = set()

    # -- notices ---------------------------------------------------------------------------------

    def warn_once(self, key: str, text: str, stacklevel: int = 5) -> None:
        """Warn, the first time that ``key`` is given."""
        if key not in self._noticed:
            self._noticed.add(key)
            warnings.warn(text, RuntimeWarning, stacklevel=stacklevel)

    def log_once(self, key: str, text: str) -> None:
        """Log a warning, the first time that ``key`` is given."""
        if key not in self._noticed:
            self._noticed.add(key)
            log.warning("%s", text)

    # -- pipeline and topology -------------------------------------------------------------------

    def _set_pipeline(self, pipeline: Node) -> None:
        self.pipeline = pipeline
        self.running = RunningPipeline(pipeline, self.changes)

    def _running_in(self, changes: Changes, epoch: int) -> RunningPipeline:
        """The pipeline that runs in an epoch."""
        if changes.adopted is None and not changes.weights_changed_in(epoch):
            return self.running
        return RunningPipeline(self.pipeline, changes, epoch)

    def topology(self) -> Topology:
        """Ranks and workers now."""
        settings = self.settings
        return current_topology(settings.rank, settings.world_size, settings.num_workers)

    @property
    def synced(self) -> bool:
        """Whether all ranks end their epochs at the same step, by ``sync_end``."""
        return self.settings.sync_end is not False and self.settings.sync_end is not None

    @property
    def endless(self) -> bool:
        """Whether the epoch has no end."""
        runs = (self.position.pipeline if self.position is not None else self.running).node
        return runs.infinite or (runs.random_access and runs.length() is None)

    def num_lanes(self, topology: Topology) -> int:
        """The number of lanes of this run."""
        if self.position is not None:
            return self.position.num_lanes
        asked = self.settings.lanes
        if asked is not None and asked < topology.world_size and self.pipeline.random_access:
            asked = None  # lanes only keep counts there, and every rank needs one
        return choose_lanes(asked, topology, self.pipeline.max_lanes())

    def turns(
        self, topology: Topology, start: int, pipeline: RunningPipeline | None = None
    ) -> int | None:
        """How many batches this rank makes from batch ``start`` on; None: unknown before reading."""
        runs = (pipeline or self.running).node
        total = runs.length() if runs.random_access else None
        if total is None:
            return None
        remainder = self.settings.remainder if topology.world_size > 1 else "uneven"
        return batches_of_rank(total, start, topology.rank, topology.world_size, remainder)

    def _even(self, topology: Topology, start: int, pipeline: RunningPipeline) -> bool:
        """Whether all ranks come to the end of the epoch at the same step."""
        if topology.world_size == 1 or self.synced:
            return True
        runs = pipeline.node
        total = runs.length() if runs.random_access else None
        if total is None:
            return runs.infinite
        return self.settings.remainder != "uneven" or (total - start) % topology.world_size == 0

    def agreement(self, topology: Topology) -> Agreement | None:
        """How the ranks end together, where ``sync_end`` asks for it; a collective at first use."""
        if not self.synced or topology.world_size == 1:
            return None
        if self._agreement is None:
            self._agreement = Agreement(self.settings.sync_end, topology.world_size)
        return self._agreement

    def agree_on_seed(self, topology: Topology) -> None:
        """Take rank 0's seed where torch gave it: ranks would shuffle in different orders.

        Raises:
            ValueError: If the ranks have no way to agree.
        """
        if not self.seed_from_torch or topology.world_size == 1 or self.was_loaded:
            return
        if not is_initialized():
            raise ValueError(
                "shuffle=True takes its seed from torch, and several ranks cannot agree on one"
                " without torch.distributed. Shuffle with a seed of your own:"
                " DataLoader(midstream.from_dataset(data).shuffle(seed), ...)"
            )
        own = shuffle_seed(self.pipeline)
        seed = broadcast(own)
        if seed != own:
            self._set_pipeline(with_seed(self.pipeline, seed))
        self.seed_from_torch = False  # agreed once

    def sources(self) -> str:
        """The sources in words, for errors."""
        return "; ".join(
            f"{bound.names[bound.source]}: {bound.node.summary()}"
            for bound in self.running.bound.walk()
            if bound.source >= 0
        )

    def length(self) -> int:
        """Batches of an epoch on this rank.

        Raises:
            TypeError: If it is unknown before reading, or there is no end.
        """
        topology = self.topology()
        position = self.position
        if position is not None and position.turns is not None and not position.complete:
            return position.first_step + position.turns
        if position is None and self.loaded is not None:
            run_state = self.loaded[0]
            pipeline = self._running_in(run_state.changes, self.epoch)
            turns = self.turns(topology, run_state.batches, pipeline)
            if turns is not None and not run_state.finished:
                return run_state.steps_done + turns
        turns = self.turns(topology, 0)
        if turns is None:
            len(Dataset(self.pipeline))  # raises, with the reason
            raise TypeError(
                "the length of this pipeline is known only by reading"
                f" it:\n{describe.tree(self.pipeline)}"
            )
        return turns

    # -- epochs ----------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch in progress, or the next one when none is."""
        if self.loaded is not None:
            return self.loaded[0].epoch + self.loaded[0].finished
        if self.position is not None and self.next_epoch == self.position.epoch:
            return self.position.epoch + self.position.complete
        return self.next_epoch

    @property
    def epoch_in_use(self) -> int:
        """The epoch in progress, even when its last batch was handed out."""
        position = self.position
        if position is not None and self.next_epoch == position.epoch:
            return position.epoch
        return self.epoch

    @property
    def left_midway(self) -> bool:
        """Whether some batches of a finite epoch were handed out, and not all."""
        position = self.position
        return (
            position is not None
            and not self.endless
            and not position.complete
            and position.steps > position.first_step
        )

    def set_epoch(self, epoch: Any) -> None:
        """See `DataLoader.set_epoch`."""
        if isinstance(epoch, bool) or not isinstance(epoch, (int, np.integer)) or epoch < 0:
            raise ValueError(f"epoch is an integer of at least 0; found {epoch!r}")
        epoch = int(epoch)
        if self.loaded is not None:
            if epoch != self.epoch:
                log.info(
                    "set_epoch(%d) is ignored: a loaded state of epoch %d waits", epoch, self.epoch
                )
            return
        now = self.epoch
        if epoch == now:
            return
        if self.was_loaded and epoch < now:
            warnings.warn(
                f"set_epoch({epoch}) is ignored: this run was resumed and is in epoch {now}. The"
                " epoch comes from the checkpoint; count from loader.epoch.",
                UserWarning,
                stacklevel=3,
            )
            return
        position = self.position
        if position is not None and epoch == position.epoch:
            # A complete epoch is wanted again: forget that it is complete.
            self.position = self.start_of(position.topology, position.num_lanes, epoch, position)
        self.next_epoch = epoch

    def start_of(
        self, topology: Topology, num_lanes: int, epoch: int, before: Position | None = None
    ) -> Position:
        """The position at the start of an epoch.

        Args:
            topology: Ranks and workers.
            num_lanes: Of the run.
            epoch: The epoch.
            before: The position whose counts and metrics continue.
        """
        pipeline = self._running_in(self.changes, epoch)
        return Position(
            pipeline,
            topology,
            num_lanes,
            epoch,
            self.turns(topology, 0, pipeline),
            None,
            dict(before.counts) if before is not None else None,
            before.tracked if before is not None else None,
            even=self._even(topology, 0, pipeline),
            keep=self.synced,
        )

    def _position_of(self, topology: Topology, run_state: RunState) -> Position:
        """The position that a checked state describes."""
        start, pipeline = run_state.batches, self._running_in(run_state.changes, run_state.epoch)
        return Position(
            pipeline,
            topology,
            run_state.num_lanes,
            run_state.epoch,
            self.turns(topology, start, pipeline),
            run_state,
            even=self._even(topology, start, pipeline),
            keep=self.synced,
        )

    def next_position(self, topology: Topology) -> tuple[Position, bool]:
        """Where the next pass begins, and whether that is the start of an epoch like the last.

        Living workers can read such an epoch without being started anew.
        """
        last = self.position
        if self.loaded is not None:
            run_state = self.loaded[0]
            there = self._position_of(topology, run_state)
            if run_state.finished:
                return self.start_of(topology, there.num_lanes, there.epoch + 1, there), False
            return there, False
        if last is None:
            return self.start_of(topology, self.num_lanes(topology), self.next_epoch), False
        follows = self.next_epoch in (last.epoch, last.epoch + 1)
        if last.complete and follows and has_left_over(last):
            return self._position_of(topology, parse(state_at(last, None))), False
        if last.complete:
            following = last.epoch + 1 if self.next_epoch == last.epoch else self.next_epoch
            return self.start_of(topology, last.num_lanes, following, last), True
        if self.next_epoch == last.epoch:
            if self.trained is not None and self.trained[0] is last:
                return self._position_of(topology, parse(state_at(last, self.trained[1]))), False
            if self.endless:
                return self._position_of(topology, parse(state_at(last, None))), False
            if last.steps > 0:
                self._warn_of_restart(last)
        return self.start_of(topology, last.num_lanes, self.next_epoch, last), True

    def silence_restart(self) -> None:
        """Do not warn when an epoch starts over: a trainer does that on purpose."""
        self._noticed.add("restart")

    def _warn_of_restart(self, last: Position) -> None:
        if "restart" not in self._noticed:
            self._noticed.add("restart")
            warnings.warn(
                f"the loader was left after batch {last.steps} of epoch {last.epoch} and is"
                " iterated again: the epoch starts over. To begin the next one call"
                f" loader.set_epoch({last.epoch + 1}); to continue where it was, load its"
                " state_dict().",
                UserWarning,
                stacklevel=6,
            )

    def begin(self, position: Position) -> None:
        """A pass begins at ``position``: a loaded state does not wait any longer."""
        self.position, self.loaded, self.trained = position, None, None
        self.next_epoch = position.epoch

    # -- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """See `DataLoader.state_dict`."""
        if self.loaded is not None:
            return copy.deepcopy(self.loaded[1])
        position = self.position
        if position is not None and self.next_epoch in (
            position.epoch,
            position.epoch + position.complete,
        ):
            return state_at(position, None)
        topology = self.topology()
        start = self.start_of(topology, self.num_lanes(topology), self.next_epoch, position)
        state = state_at(start, None)
        if position is None and (start.num_lanes % topology.world_size or not start.even):
            # torch.distributed.checkpoint loads only the keys that are here, and this rank may need
            # lanes of others.
            every = {f"{index:04d}": "" for index in range(start.num_lanes)}
            return {**state, "lanes": {**every, **state["lanes"]}}
        return state

    def state_at(self, step: int) -> dict[str, Any]:
        """See `DataLoader.state_at`."""
        if self.position is not None and self.loaded is None:
            return state_at(self.position, step)
        state = self.state_dict()
        if step != state["steps_done"]:
            raise ValueError(
                "nothing was handed out yet, so there is only the state after batch"
                f" {state['steps_done']}"
            )
        return state

    def load(self, state: Any, strict: bool) -> None:
        """See `DataLoader.load_state_dict`."""
        merged, run_state = agreed(
            merge_states(state) if isinstance(state, (list, tuple)) else state
        )
        pipeline = self.pipeline
        if run_state.fingerprint != describe.fingerprint(pipeline) and self.seed_from_torch:
            pipeline = with_seed(pipeline, spec_seed(run_state.spec))
        if run_state.fingerprint != describe.fingerprint(pipeline):
            merged = self._adopt(run_state, merged, pipeline, strict)
        # Raises before anything is changed.
        running(pipeline, run_state.changes, run_state.epoch)
        topology = self.topology()
        check_lanes(run_state, topology, self.settings, self.pipeline)
        if pipeline is not self.pipeline or run_state.changes.lasting != self.changes:
            self.changes = run_state.changes.lasting
            self._set_pipeline(pipeline)
        if pipeline.random_access and run_state.num_lanes < topology.world_size:
            # Here lanes only keep counts, and every rank needs one.
            run_state.num_lanes = merged["num_lanes"] = choose_lanes(None, topology, None)
        own = range(topology.rank, run_state.num_lanes, topology.world_size)
        keys = [f"{index:04d}" for index in own]
        merged["lanes"] = {key: merged["lanes"].get(key, "") for key in keys}
        self.active = self.must_restart = self.trained = None
        self._wait_with(run_state, merged)
        self.was_loaded = True
        self.resumed_at = (run_state.epoch, run_state.batches, run_state.steps_done)

    def _adopt(
        self, run_state: RunState, merged: dict[str, Any], pipeline: Node, strict: bool
    ) -> dict[str, Any]:
        """Let a state of another pipeline continue with this one, where that is possible.

        Raises:
            CheckpointError: If it is not, with the differences.
        """
        if run_state.finished:
            lines = diff_specs(run_state.spec, describe.spec(pipeline))
            raise CheckpointError(
                "this state was saved by another pipeline (saved →"
                f" here):{bullet_list(lines)}\nOnly the states of all ranks together can continue"
                " with this one."
            )
        lines = adopt(run_state, pipeline, strict=strict)
        if not pipeline.random_access:
            self.warn_once(
                "adopted",
                "continuing with another pipeline than was saved (saved →"
                f" here):{bullet_list(lines)}\nEvery sample still comes exactly once in this"
                " epoch, but in another order.",
                stacklevel=5,
            )
        log.info("continuing with another pipeline than was saved:%s", bullet_list(lines))
        return to_state(run_state, merged)

    def _wait_with(self, run_state: RunState, merged: dict[str, Any]) -> None:
        """Let a state wait for the next pass."""
        self.position = None
        self.next_epoch = run_state.epoch
        self.loaded = (run_state, merged)

    # -- changes ---------------------------------------------------------------------------------

    def set_weights(self, mix: str, weights: Mapping[str, float]) -> None:
        """See `DataLoader.set_weights`."""
        merged, run_state = agreed(self.state_dict())
        running_now = self._running_in(run_state.changes, run_state.epoch + run_state.finished)
        run_state.changes = with_weights(run_state, running_now.bound, mix, weights)
        merged.update(run_state.changes.texts)
        self._continue_from(run_state, merged)

    def exclude(self, origins: Iterable[Any]) -> bool:
        """See `DataLoader.exclude`. Whether it changed anything."""
        merged, run_state = agreed(self.state_dict())
        run_state.changes = with_excluded(run_state.changes, origins, self.running.names)
        merged.update(run_state.changes.texts)
        if run_state.changes.excluded == self.changes.excluded:
            return False
        require_excludable(self.pipeline)
        self._continue_from(run_state, merged)
        return True

    @property
    def excluded_origins(self) -> list[Origin]:
        """The samples that are left out."""
        changes = self.loaded[0].changes if self.loaded is not None else self.changes
        return list(changes.excluded)

    def _continue_from(self, run_state: RunState, merged: dict[str, Any]) -> None:
        """Read anew from a changed state of where the run stands; so does the iterator in use."""
        over = self.position is not None and self.position.complete and self.loaded is None
        self.changes = run_state.changes.lasting
        self._set_pipeline(self.pipeline)
        if not over and self.active is not None:
            self.active, self.must_restart = None, self.active
        self._wait_with(run_state, merged)
