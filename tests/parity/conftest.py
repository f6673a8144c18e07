"""Fail a run over the whole folder if a fixture was read by no test: unused reference numbers prove nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.parity import fixtures

HERE = Path(__file__).parent
OF_THE_FOLDER = {"test_other_networks.py", "test_unread_fixtures.py"}
"""Tests of these tests, which run over folders of their own."""
DESELECTED = pytest.StashKey[bool]()
UNREAD = pytest.StashKey[list[str]]()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and item.path.name not in OF_THE_FOLDER:
            item.config.stash[DESELECTED] = True


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if not _ran_the_whole_folder(session, exitstatus):
        return
    session.config.stash[UNREAD] = fixtures.unread()
    if session.config.stash[UNREAD]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    missed = terminalreporter.config.stash.get(UNREAD, [])
    if missed:
        terminalreporter.section("unread fixtures", red=True)
        terminalreporter.line(f"{len(missed)} in {fixtures.folder()} were read by no test: {', '.join(missed)}")


def _ran_the_whole_folder(session: pytest.Session, exitstatus: int) -> bool:
    """Whether every file was collected, no test was selected by name or mark, and the run was not cut short."""
    config = session.config
    stopped = session.shouldstop or session.shouldfail or config.getoption("collectonly")
    finished = not stopped and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    by_name = any("::" in arg for arg in config.args)
    collected = {item.path for item in session.items}
    return (
        finished
        and not by_name
        and not config.stash.get(DESELECTED, False)
        and collected.issuperset(file for file in HERE.glob("test_*.py") if file.name not in OF_THE_FOLDER)
    )
