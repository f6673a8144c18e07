"""Output of the commands: results to stdout, progress to stderr, and every string exactly as it is."""

import errno
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0
"""Time between two lines of a stage's progress without a terminal."""


def result_console() -> Console:
    """Return the console for results, on stdout. In a pipe or a file it never wraps, so `grep` sees whole rows."""
    console = _plain()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 100_000
    return console


def progress_console() -> Console:
    """Return the console for progress and remarks, on stderr."""
    return _plain(stderr=True)


def _plain(**options: Any) -> Console:
    """Return a console that prints `[/]` and `:cat:` literally, as parts of a path."""
    return Console(markup=False, emoji=False, highlight=False, **options)


def say(line: str) -> None:
    """Print a remark beside the result."""
    progress_console().print(line, soft_wrap=True)


def counted(number: int, noun: str) -> str:
    """Return `no epochs`, `1 epoch` or `2 epochs`."""
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


@contextmanager
def stage_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show the progress of each stage: a bar on a terminal, occasional lines elsewhere.

    Yields a function of a stage's name, the part done and the whole.
    """
    console = progress_console()
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        yield show


class _Lines:
    """Progress in lines: at the start of a stage, every ten seconds, and at its end."""

    def __init__(self) -> None:
        self._stage = ""
        self._started = self._shown = 0.0
        self._before = 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._started, self._before = stage, now, done
        elif done < total and now - self._shown < LINE_SECONDS:
            return
        self._shown = now
        elapsed, steps = now - self._started, done - self._before
        left = f", about {elapsed / steps * (total - done):.0f} s left" if steps and done < total else ""
        say(f"{stage}: {done} of {total}, {elapsed:.0f} s{left}")


def outlive_readers() -> None:
    """Keep the command running when nobody reads its output any more, as after `hvp pretrain ... 2>&1 | head -1`.

    Output that cannot be shown is dropped, because a run's checkpoints and a command's files matter more. On stderr,
    which carries progress only, so are lines that a full disk or a closed terminal refuses.
    """
    sys.stdout = _outliving(sys.stdout, {errno.EPIPE})
    sys.stderr = _outliving(sys.stderr, {errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EDQUOT})


def _outliving(stream: TextIO, dropped: set[int]) -> TextIO:
    buffer: Any = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # PYTHONUNBUFFERED leaves out the buffered layer
    if not isinstance(raw, io.FileIO) or isinstance(raw, _Droppable):
        return stream  # not a file, but a test's or a notebook's stream
    stream.flush()
    file: Any = _Droppable(raw.fileno(), dropped)
    return io.TextIOWrapper(
        file if buffer is raw else io.BufferedWriter(file),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=bool(stream.line_buffering),
        write_through=buffer is raw,
    )


class _Droppable(io.FileIO):
    """An open file that drops writes which fail with one of the error numbers in `dropped`."""

    def __init__(self, number: int, dropped: set[int]) -> None:
        super().__init__(number, "w", closefd=False)
        self._dropped = dropped

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in self._dropped:
                raise
            return len(data)
