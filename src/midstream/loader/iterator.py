"""One pass over a loader: messages of the readers in, batches out.

A message first changes the position (which publishes the state after it), then its batch is handed
out or its error raised. If anything is raised in between, Ctrl-C too, the change is undone.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn

from midstream.errors import MidstreamError, SourceError, WorkerError
from midstream.loader.position import Position
from midstream.loader.run import IteratorToken, Run
from midstream.pipeline.breadcrumbs import describe_trail
from midstream.pipeline.ledger import RecentFailures, add_counts, check_limits, failed_in
from midstream.transport.parcel import Parcel
from midstream.workers.liveness import exit_status, lost_in
from midstream.workers.messages import BATCH, FATAL, NOTHING, Message, unpack_turn
from midstream.workers.pool import Readers

log = logging.getLogger("midstream")

_FAILED = -1
"""Sent to the other ranks in place of a number of batches by a rank that cannot continue."""


class LoaderIterator:
    """Iterates over the batches of a loader.

    Args:
        run: Where the run stands.
        first: The pass to iterate.
        renew: Starts another pass from where the run stands now: after `DataLoader.set_weights`
            and `DataLoader.exclude` the iterator continues with it.
    """

    def __init__(self, run: Run, first: Pass, renew: Callable[[], Pass]) -> None:
        self._run, self._pass, self._renew = run, first, renew
        self._token = run.active = IteratorToken(weakref.ref(self))
        self._over = False  # whether `DataLoader.skip` continued into the next epoch

    def __iter__(self) -> LoaderIterator:
        return self

    def __len__(self) -> int:
        return self._run.length()

    def __next__(self) -> Any:
        if self._over:
            raise StopIteration
        if self._run.active is not self._token:
            self._reactivate()
        current = self._pass
        applied = current.position.applied
        current.settled = False
        current.taken.clear()
        try:
            return current.next_batch()
        except BaseException as error:
            current.recover(error, applied)
            raise

    @property
    def position(self) -> Position:
        """The position that this iterator moves."""
        return self._pass.position

    def end(self) -> None:
        """Raise StopIteration from now on."""
        self._over = True

    def _reactivate(self) -> None:
        """Continue with new readers after a change of the run; refuse if another iterator did."""
        run = self._run
        if run.must_restart is not self._token:
            raise RuntimeError(
                "this iterator was left behind: the loader was iterated again, closed, or a state"
                " was loaded after it was made. Use the newest one."
            )
        run.must_restart = None
        self._pass = self._renew()
        run.active = self._token


class Pass:
    """One pass: takes the messages of some readers and moves one position.

    Args:
        run: Where the run stands.
        position: Where the pass begins.
        readers: What reads.
        crumbs: What each worker was reading when it died (`midstream.pipeline.breadcrumbs`), int64;
            None where no process reads.

    Attributes:
        settled: Whether the call in progress has come to its result, which then stands.
        taken: The messages that the call in progress has taken.
    """

    def __init__(self, run: Run, position: Position, readers: Readers, crumbs: Any) -> None:
        self._run, self.position, self._readers, self._crumbs = run, position, readers, crumbs
        self._turns = readers.turns
        self._ready: deque[tuple[int, int, Message]] = deque()
        self._num_to_return = 0  # how many of `_ready` are to be returned or raised
        self._agreement = run.agreement(position.topology)
        # Whether one batch is held back, so that the last one is known when it is handed out.
        unsized = position.turns is None and not run.pipeline.infinite
        self._looks_ahead = unsized or self._agreement is not None
        self._ranks_asked = False  # whether the ranks were asked in this pass
        # How many more batches every rank has, as agreed for the call in progress.
        self._agreed_batches: int | None = None
        self._warnings_left: list[
            Message
        ] = []  # counted at the end; their warnings are still to come
        self._death_known = False
        self._ended = False
        self._broken: BaseException | None = None
        self._failures = RecentFailures()
        self._failures.begin(position.totals())
        self.settled = False
        self.taken: list[tuple[int, int, Message]] = []

    def next_batch(self) -> Any:  # noqa: RET503  `_finish` raises
        """Return the next batch.

        Raises:
            StopIteration: At the end of the epoch.
            SampleError: If user code failed on the next sample.
            MidstreamError: If reading cannot continue, too many samples failed, ...
        """
        position = self.position
        if self._broken is not None and not self._ready:
            raise self._explain(self._broken)
        if position.complete:
            self._finish()
        self._refill()
        while self._num_to_return:
            # What may raise comes before the message is taken and counted: nothing is lost then.
            number, lane, message = self._ready[0]
            if message.notes is not None:
                self._report(message)
            if message.kind == FATAL:
                self._fail(message.payload)
            returns = message.kind != NOTHING
            last = returns and self._ended and self._num_to_return == 1
            if self._agreement is not None:
                if message.kind == BATCH and not self._agree():
                    break
                last = message.kind == BATCH and self._agreed_batches == 1
            skipping = self._run.skipping
            position.apply(
                number, lane, message, last=last, skipped=skipping and message.kind == BATCH
            )
            self._agreed_batches = None
            self.taken.append(self._ready.popleft())
            self._num_to_return -= returns
            if not returns:
                continue
            if last and self._ended:
                self._count_rest()
            if message.kind == BATCH:
                return message.payload
            if not skipping:
                self._raise(message.payload.error())
            log.info("skip: passed over a failure: %s", message.payload.message)
            if last:
                break
            self._refill()
        if self._broken is not None:
            self._broken = self._explain(self._broken)
            self._report_failure_to_ranks()
            self._raise(self._broken)
        if self._agreement is None or self._agree() or self._ended:
            self._count_rest()
        position.finish()
        self._finish()  # raises

    def recover(self, error: BaseException, applied: int) -> None:
        """Undo what the failed call did, unless its result stands.

        Raises:
            BaseException: In place of ``error``, if it can be explained better.
        """
        if self.settled:
            return
        self.position.undo_to(applied)
        self._ready.extendleft(reversed(self.taken))
        self._num_to_return = sum(message.kind != NOTHING for _, _, message in self._ready)
        if not isinstance(error, Exception):  # Ctrl-C: a message may have been lost on its way here
            self._broken = RuntimeError(
                "reading was interrupted. To continue:"
                " loader.load_state_dict(loader.state_dict()), and iterate again"
            )
        elif not isinstance(error, StopIteration):
            explained = self._explain(error)
            if explained is not error:
                self._broken = explained
                raise explained from error

    def _raise(self, error: BaseException) -> NoReturn:
        """Raise an error that is the result of this call: the position stays after it."""
        self.settled = True
        try:
            raise error
        finally:
            del error  # the error's traceback holds this frame: a cycle would keep the workers

    def _finish(self) -> NoReturn:
        """The epoch is complete: give the warnings that are left, and let the workers end."""
        while self._warnings_left:
            message = self._warnings_left.pop()
            if message.notes is not None:
                self._report(message, counted=True)
        if not self._ended and not self._looks_ahead:
            self._ended = True
            with contextlib.suppress(StopIteration):
                while True:
                    next(self._turns)
        self._raise(StopIteration())

    def _fail(self, payload: tuple[str, str, bytes]) -> NoReturn:
        """A reader cannot continue: neither can this pass."""
        self._report_failure_to_ranks()
        self._broken = _rebuild(payload)
        self._ready.clear()
        self._num_to_return = 0
        self._raise(self._broken)

    # -- messages --------------------------------------------------------------------------------

    def _refill(self) -> None:
        """Take what the next call needs. An error is kept until all before it is handed out."""
        try:
            if self._broken is None:
                self._fetch(2 if self._looks_ahead else 1)
        except StopIteration:
            self._ended = True
        except Exception as error:
            self._broken = error

    def _fetch(self, count: int) -> None:
        """Take turns until ``count`` messages are there to be returned or raised."""
        while not self._ended:
            if self._num_to_return >= count and (
                self._agreement is None or self._in_hand() >= count
            ):
                break
            arrived = next(self._turns)
            if type(arrived) is Parcel and arrived.notice:
                self._run.log_once("memory", arrived.notice)
            number, lane, messages = unpack_turn(arrived)
            for message in messages:
                self._ready.append((number, lane, message))
                self._num_to_return += message.kind != NOTHING

    def _in_hand(self) -> int:
        """Batches that are ready. A failure to come counts too: it is raised in its turn."""
        batches = sum(message.kind in (BATCH, FATAL) for _, _, message in self._ready)
        return batches + (self._broken is not None)

    def _count_rest(self) -> None:
        """Nothing more will be handed out: count what was dropped at the end."""
        while self._ready and self._ready[0][2].kind == NOTHING:
            number, lane, message = self._ready[0]
            self.position.apply(number, lane, message, last=True)
            self.taken.append(self._ready.popleft())
            # A warning that a filter turned into an error must not cost the batch in hand.
            self._warnings_left.append(message)

    def _report(self, message: Message, *, counted: bool = False) -> None:
        """Give the warnings of a message, and check the limits of failed samples.

        Args:
            message: The message.
            counted: Whether its counts are in the position already.

        Raises:
            TooManyErrors: If a limit is passed.
        """
        assert message.notes is not None
        for key, text in message.notes.notices:
            self._run.warn_once(key, text, stacklevel=5)
        events, limits = message.notes.events, message.notes.limits
        if not limits:
            return
        position = self.position
        totals = position.totals()
        after = totals if counted else add_counts(totals, events)
        seen = position.seen() + (0 if counted else failed_in(events))
        try:
            check_limits(after, limits, self._failures, seen)
        except MidstreamError as error:
            self._broken = error
            self._report_failure_to_ranks()
            raise

    # -- other ranks -----------------------------------------------------------------------------

    def _report_failure_to_ranks(self) -> None:
        """Send the other ranks, where they wait for it, that this one cannot continue."""
        if self._agreement is not None and self._agreed_batches is None:
            self._agreed_batches = _FAILED
            if self._ranks_asked:
                self._agreement.least(_FAILED)
            else:
                self._agreement.all(_FAILED)

    def _agree(self) -> bool:
        """Whether every rank has a batch to hand out now.

        Sets `_agreed_batches`: 1 when the batch is the last for some rank.
        """
        assert self._agreement is not None
        if self._agreed_batches is None:
            have = min(2, self._in_hand())
            if self._ranks_asked:
                self._agreed_batches = self._agreement.least(have)
            else:
                found = self._agreement.all(have)
                self._ranks_asked, self._agreed_batches = True, min(found)
                empty = [rank for rank, count in enumerate(found) if count == 0]
                if empty and self.position.steps == 0 and self._agreed_batches >= 0:
                    self._refuse_empty(empty, len(found))
            if self._agreed_batches < 0:
                self._broken = WorkerError(
                    "another rank cannot continue reading; its own error says why"
                )
                self._raise(self._broken)
        return self._agreed_batches > 0

    def _refuse_empty(self, empty: list[int], ranks: int) -> NoReturn:
        names = ", ".join(f"rank {rank}" for rank in empty[:8])
        self._broken = SourceError(
            f"{names} of {ranks} {'have' if len(empty) > 1 else 'has'} no data in"
            f" epoch {self.position.epoch}: no rank could take a step"
            f" ({self._run.sources()}). Use fewer ranks, or give the"
            " sources more shards or rows."
        )
        self._raise(self._broken)

    # -- errors ----------------------------------------------------------------------------------

    def _explain(self, error: BaseException) -> BaseException:
        """A `WorkerError` in place of what torch raises when a worker died; other errors as is."""
        if isinstance(error, MidstreamError):
            return error
        dead, lost = [], lost_in(error)
        known = self._death_known or lost is not None
        for number, worker in enumerate(self._readers.workers):
            # That a dead worker's batch cannot be received may be noticed before its death is.
            worker.join(0 if known else 0.2)
            if worker.exitcode not in (None, 0) or (lost is not None and number in lost.numbers):
                status = exit_status(worker.exitcode)
                reading = ""
                if self._crumbs is not None:
                    crumbs = self._crumbs[number].numpy()
                    reading = describe_trail(crumbs, self.position.pipeline.names)
                doing = f" while working on {reading}" if reading else ""
                dead.append(f"worker {number} (pid {worker.pid}) {status}{doing}")
        self._death_known = True
        if dead or (isinstance(error, RuntimeError) and "DataLoader worker" in str(error)):
            return WorkerError(
                f"{'; '.join(dead) or error}.\nThe position is after the last batch handed out"
                f" (batch {self.position.steps} of epoch {self.position.epoch}). To continue from"
                " there: loader.load_state_dict(loader.state_dict()), and iterate again. A worker"
                " killed by SIGKILL often ran out of memory; SIGBUS is a full /dev/shm."
            )
        return error


def _rebuild(payload: tuple[str, str, bytes]) -> BaseException:
    """The error that ended a reader: itself where it could be pickled, else its text."""
    summary, text, data = payload
    if data:
        try:
            error = pickle.loads(data)
            if isinstance(error, MidstreamError):
                error.__cause__ = None
                return error
        except Exception:
            pass
    return WorkerError(
        f"reading failed, and not on one sample alone: {summary}\nThe position stays at the"
        " last batch handed out; after mending the cause, load a checkpoint or iterate the"
        f" loader again.\nOriginal traceback:\n{text}"
    )
