"""Fixture that runs a command line in this process. A folder's conftest.py imports it."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from hvp.cli.main import main


@dataclass
class Ran:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


@pytest.fixture
def hvp(monkeypatch, capsys, tmp_path) -> Callable[..., Ran]:
    """Return a function that runs `hvp`, or another command line, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object, main: Callable[[], None] = main) -> Ran:
        monkeypatch.setattr(sys, "argv", ["hvp", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Ran(code, out, err)

    return run
