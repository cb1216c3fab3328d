"""`check_resume`: whether a pipeline or loader resumes exactly where it was stopped."""

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
    """Checks that a pipeline or loader resumes exactly; else reports the first sample that differs.

    The target is read once without interruption. Then it is stopped at every batch, at the ends of
    epochs, many times in a row, and killed by SIGKILL in child processes. Each time it is made
    anew, loads the checkpoint, and must hand out the rest: the same samples in the same order, with
    the same content. A midstream pipeline is also resumed on every other number of workers and
    ranks that is given.

    Any other loader with ``state_dict`` and ``load_state_dict``, or an iterator with ``get_state``
    and ``set_state``, can be checked too. Its samples are known by their content alone, so they
    should differ from each other. It is also resumed on other numbers of workers; the result is
    shown but does not count, because such loaders do not promise it.

    Args:
        target: A dataset; a function without arguments that returns one; or a function that returns
            a loader and takes any of ``num_workers``, ``rank`` and ``world_size`` by keyword. It
            must be picklable if processes are killed.
        workers: Numbers of worker processes.
        ranks: Numbers of ranks, all run in this process.
        steps: Number of batches to read, over all ranks. By default 48, or three from every lane
            if the target is a midstream loader of a stream. To check the end of an epoch of a
            stream, give the pipeline little data.
        epochs: Largest number of epochs to read.
        kill: Whether to kill processes.
        batch_size: For datasets that do not end in ``.batch``.
        expected: The samples of an epoch in any order, if they are known. Then samples that are
            never handed out are noticed too.
        key: Function that names a sample of a foreign loader, and of ``expected``; by default
            samples are named by their content.
        seconds: About how long it may take. If there is not enough time for all cuts, fewer are
            tried, spread over the run, and the report says how many. None: all cuts.
        raises: Whether to raise an error if anything is not exact.
        progress: Whether to show progress; by default if there is a terminal, after a second.

    Returns:
        A report of all checks.

    Raises:
        ResumeError: If ``raises`` and something is not exact.
        TypeError: If ``target`` cannot be checked.
        ValueError: If it hands out nothing, or an argument is out of range.

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
        # Warnings of the loaders made here, and of torch about the number of cores.
        warnings.simplefilter("ignore")
        plan = Plan(
            target, workers, ranks, steps, Setup(epochs, batch_size, None, key), seconds, ticker
        )
        report = plan.run(kill, expected)
    if raises:
        report.raise_for_difference()
    return report
