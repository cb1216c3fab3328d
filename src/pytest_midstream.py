"""pytest plugin of midstream: the fixture ``check_resume`` and the option ``--midstream-resume``.

    def test_my_pipeline_resumes(check_resume):
        check_resume(make_pipeline)

stops the pipeline at every batch in the test's own process, which takes a second or two. With
``--midstream-resume`` (before a release, or at night) it is also checked with workers, on other
numbers of ranks, and with kills.

Every pytest run loads this file, so midstream is imported only when the fixture is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

_QUICK: dict[str, Any] = {"workers": (0,), "ranks": (1, 2), "kill": False, "seconds": 20.0}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option ``--midstream-resume``."""
    group = parser.getgroup("midstream")
    group.addoption(
        "--midstream-resume",
        action="store_true",
        default=False,
        help="check_resume also starts workers, changes the numbers of workers and ranks, and kills"
        " processes (a minute each).",
    )


@pytest.fixture
def check_resume(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`midstream.testing.check_resume`, quick unless ``--midstream-resume`` is given.

    Options that are passed by name take precedence.
    """
    from midstream.testing import check_resume as check

    full = request.config.getoption("--midstream-resume")

    def checked(target: Any, **options: Any) -> Any:
        raises = options.pop("raises", True)
        report = check(target, raises=False, progress=False, **({} if full else _QUICK) | options)
        request.config.stash.setdefault(_KEY, []).append((request.node.nodeid, report))
        if raises:
            report.raise_for_difference()
        return report

    return checked


_KEY = pytest.StashKey[list[tuple[str, Any]]]()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Prints a line for every check."""
    reports = config.stash.get(_KEY, [])
    if not reports:
        return
    how = (
        "workers, ranks and kills"
        if config.getoption("--midstream-resume")
        else "quick; --midstream-resume does more"
    )
    terminalreporter.section(f"midstream: resume checks ({how})")
    for node, report in reports:
        cuts = sum(check.cuts for check in report.checks)
        terminalreporter.write_line(
            f"{node}: {report.headline()}; {cuts} resumes", green=report.exact, red=not report.exact
        )
