"""Settings for the fuzz tests, and the command line run in this process under a time limit.

HVP_EXAMPLES sets the number of examples, drawn from `--hypothesis-seed`. Without it there are a few, always the same.
"""

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import HealthCheck, Phase, settings

from hvp.cli.main import main
from hvp.common.errors import UserError

EXAMPLES = int(os.environ.get("HVP_EXAMPLES", "0"))

SECONDS = 20
"""Seconds allowed for an example; it takes a fraction of one."""


def examples(few: int) -> settings:
    """Return the settings of a test with `few` examples by default."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=EXAMPLES or few,
        phases=(Phase.explicit, Phase.generate),  # examples are small, and shrinking one takes minutes
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=checks,
    )


@contextmanager
def time_limit(seconds: int = SECONDS) -> Iterator[None]:
    """Fail the test if the block takes longer."""

    def late(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"not done after {seconds} s", pytrace=False)

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Accept success or a `UserError` that names the file; fail on anything else, or when it takes too long."""
    with time_limit():
        try:
            yield
        except UserError as error:
            said = str(error)
        else:
            return
    assert str(path) in said
    assert "weights_only" not in said
    assert len(said) < 20_000


def hvp(*arguments: object) -> tuple[int, str]:
    """Run the command in this process and return its exit code and output; any other exception fails the test."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said), time_limit():
        patch.setattr(sys, "argv", ["hvp", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            return (end.code if isinstance(end.code, int) else int(end.code is not None)), said.getvalue()
    return 0, said.getvalue()
