"""Where commands print: results to stdout, progress to stderr, and every string as it is."""

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console


def result_console() -> "Console":
    """The console for results, on stdout. In a pipe or a file a row is as long as its text, so that `grep` sees all of
    it."""
    console = _plain()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 100_000
    return console


def progress_console() -> "Console":
    """The console for progress and remarks, on stderr."""
    return _plain(stderr=True)


def _plain(**options: Any) -> "Console":
    """A console to which `[/]` and `:cat:` are no more than parts of a path."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, **options)


def outlive_readers() -> None:
    """Let the command go on when nobody reads its output any more, as after `hvp pretrain ... 2>&1 | head -1`.

    What can no longer be shown is dropped: a run's checkpoints and a command's files are worth more. On stderr, whose
    lines are progress, so is what a full disk or a terminal that has been closed refuses.
    """
    sys.stdout = _outliving(sys.stdout, {errno.EPIPE})
    sys.stderr = _outliving(sys.stderr, {errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EDQUOT})


def _outliving(stream: TextIO, dropped: set[int]) -> TextIO:
    buffer: Any = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # with PYTHONUNBUFFERED there is none in between
    if not isinstance(raw, io.FileIO) or isinstance(raw, _Droppable):
        return stream  # not a file: a test's, or a notebook's
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
    """An open file that drops what cannot be written for one of the reasons in `dropped`."""

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
