"""`check_resume`: whether a pipeline or loader, yours, goes on exactly where it was stopped."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from midstream.testing.drivers import Setup
from midstream.testing.plan import Plan, quiet_logs
from midstream.testing.report import ResumeReport
from midstream.testing.ticker import Ticker


def check_resume(
    target: Any,
    *,
    workers: Sequence[int] = (0, 2),
    ranks: Sequence[int] = (1, 2),
    steps: int | None = None,
    epochs: int = 2,
    kill: bool = True,
    batch_size: int = 4,
    expected: Iterable[Any] | None = None,
    key: Callable[[Any], Any] | None = None,
    seconds: float | None = 60.0,
    raises: bool = True,
    progress: bool | None = None,
) -> ResumeReport:
    """Prove that a pipeline or loader resumes exactly, or name the first sample that says otherwise.

    It is read once and left alone. Then it is stopped at every batch, at the ends of epochs, again
    and again, and killed by SIGKILL in processes of its own; each time it is made anew, given the
    checkpoint, and must hand out the rest: the same samples in the same order, with the same
    content. For a midstream pipeline also on every other number of workers and ranks that is named
    here.

    Any other loader with ``state_dict`` and ``load_state_dict``, or an iterator with ``get_state``
    and ``set_state``, can be checked too. Its samples are known by their content alone, so they had
    better differ. On another number of workers it is tried as well, which is shown and does not
    count, for nobody promised it.

    Args:
        target: A dataset; a function without arguments that returns one; or a function that returns
            a loader and takes any of ``num_workers``, ``rank`` and ``world_size`` by keyword. For
            the kills it has to be picklable.
        workers: Numbers of worker processes.
        ranks: Numbers of ranks, all run in this process.
        steps: How many batches are read, over all ranks; left out, 48, or three from every lane of
            your own loader of a stream. To see the end of an epoch there, check with little data:
            the pipeline is the same.
        epochs: How many epochs are read at most.
        kill: Whether processes are killed.
        batch_size: For datasets that do not end in ``.batch``.
        expected: The samples of an epoch in any order, where they are known: then what never comes
            is noticed too.
        key: Names a sample of a foreign loader, and of ``expected``; by default its content does.
        seconds: About how long it may take; where there is not enough time for all cuts they are
            spread out, and the report says how many there were. None: all cuts.
        raises: Whether anything that is not exact is an error.
        progress: Whether to show how far it is; by default where there is a terminal, after a
            second.

    Returns:
        What was tried and found.

    Raises:
        ResumeError: If ``raises`` and something is not exact.
        TypeError: If ``target`` is nothing that can be checked.
        ValueError: If it hands out nothing.

    >>> import midstream as ms
    >>> from midstream.testing import check_resume
    >>> ds = ms.from_dataset(range(40)).shuffle(seed=1).filter(lambda row: row % 3)
    >>> report = check_resume(ds, workers=(0,), kill=False)
    >>> report.exact, report.epochs, report.samples
    (True, 2, 52)
    """
    workers, ranks = tuple(sorted(set(workers))), tuple(sorted(set(ranks)))
    for name, values, least in (("workers", workers, 0), ("ranks", ranks, 1)):
        if not values or any(
            isinstance(v, bool) or not isinstance(v, int) or v < least for v in values
        ):
            raise ValueError(
                f"{name} are integers of at least {least}, one or more; found {values}"
            )
    if epochs < 1 or (steps is not None and steps < 1):
        raise ValueError(
            f"at least one step of one epoch is read; found steps={steps}, epochs={epochs}"
        )
    with Ticker(progress) as ticker, warnings.catch_warnings(), quiet_logs():
        # Of the loaders that are made again and again here, and of torch about the number of cores.
        warnings.simplefilter("ignore")
        plan = Plan(
            target, workers, ranks, steps, Setup(epochs, batch_size, None, key), seconds, ticker
        )
        report = plan.run(kill, expected)
    if raises:
        report.raise_for_difference()
    return report
