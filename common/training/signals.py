"""Signals that stop a run: it finishes its step, writes a checkpoint, and exits with the signal's exit code.

The command handles Ctrl-C from the moment it starts, so this module imports nothing slow.
"""

import atexit
import itertools
import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 75}
"""Exit code of the command after each signal. 130 and 143 are the shell's conventions. 75 (EX_TEMPFAIL, "try again
later") answers SIGUSR1, which batch systems send shortly before the time limit: queue the same command again with
--resume. Outside a run's steps nothing is saved, and SIGTERM kills the process as usual, which a shell also reports as
143."""

_asked = False
"""Whether a signal has already asked the command to stop."""


class StopSignals:
    """Context manager that records a stop signal and acknowledges it on stderr at once.

    A second SIGINT does not wait for the step. It goes to the previous handler: the command's handler ends the process,
    Python's own raises KeyboardInterrupt. Outside the main thread, where Python allows no handlers, nothing is caught.

    Args:
        leader: whether this process prints.
        saves: whether the run will write a checkpoint.
    """

    def __init__(self, *, leader: bool = True, saves: bool = True) -> None:
        self.received: signal.Signals | None = None
        self._leader, self._saves = leader, saves
        self._counted = itertools.count()
        self._process = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in EXIT_CODES}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        global _asked
        if os.getpid() != self._process:
            return  # a loader worker just after its fork; the main process will end it
        # next() is atomic: a second signal may interrupt this very function.
        first, _asked = next(self._counted) == 0, True
        if number == signal.SIGINT and not first:
            before = self._before[signal.SIGINT]
            if not callable(before):
                raise KeyboardInterrupt
            before(number, frame)
            return
        self.received = signal.Signals(number)
        if self._leader and first:
            message = f"{self.received.name}: stopping after this step" + (", saving" if self._saves else "")
            if number == signal.SIGINT:
                message += "; press again to stop without saving" if self._saves else "; press again to stop at once"
            _print_line(message)


class CommandInterrupts:
    """Context manager that handles SIGINT and SIGUSR1 for the whole `hvp` command, except during a run's steps.

    SIGUSR1 ends the process with its exit code. The first SIGINT raises KeyboardInterrupt, so that the work in progress
    cleans up after itself. During an import, which the exception could break in unpredictable ways, SIGINT ends the
    process instead. So does any later SIGINT, and one that arrives after the block while Python shuts down.
    """

    def __init__(self) -> None:
        self.raised = False
        """Whether KeyboardInterrupt was raised. Libraries may turn it into another exception as it propagates."""

        self._process = 0
        self._hook = sys.unraisablehook

    def __enter__(self) -> "CommandInterrupts":
        global _asked
        _asked, self._process = False, os.getpid()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._receive)
            signal.signal(signal.SIGUSR1, self._end)
            # Python removes handlers when it shuts down, and a signal would then replace the command's exit code.
            for number in (signal.SIGINT, signal.SIGUSR1):
                atexit.register(self._ignore, number)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _asked
        _asked = True
        sys.unraisablehook = self._hook

    def _receive(self, number: int, frame: FrameType | None) -> None:
        global _asked
        if os.getpid() != self._process:
            return
        if _asked:
            leave()
        if _importing(frame):
            say_interrupted()
            leave()
        _asked = self.raised = True
        raise KeyboardInterrupt

    def _end(self, number: int, _: FrameType | None) -> None:
        if os.getpid() == self._process:
            say_interrupted()
            leave(signal.Signals(number))

    def _ignore(self, number: signal.Signals) -> None:
        if os.getpid() == self._process:
            signal.signal(number, signal.SIG_IGN)

    def _unraisable(self, about: Any) -> None:
        """Handle a KeyboardInterrupt raised in a destructor or the like, which Python would print and ignore."""
        if issubclass(about.exc_type, KeyboardInterrupt):
            say_interrupted()
            leave()
        else:
            self._hook(about)


def leave(number: signal.Signals = signal.SIGINT) -> None:
    """End this process and its loader workers at once. Partly written files remain beside those they would replace."""
    if "multiprocessing" in sys.modules:
        with suppress(Exception):
            for child in sys.modules["multiprocessing"].active_children():
                child.kill()
    if os.isatty(2):
        _write("\x1b[?25h")  # a progress bar hides the cursor
    os._exit(EXIT_CODES[number])


def say_interrupted() -> None:
    """Print that the command was interrupted, from rank 0 of torchrun's or srun's processes only."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        _print_line("hvp: interrupted")


def _print_line(line: str) -> None:
    # A progress bar or the terminal's ^C may have left text on the current line.
    _write(f"\n{line}\n" if os.isatty(2) else f"{line}\n")


def _write(text: str) -> None:
    """Write to stderr without Python's buffers, which the signal may have interrupted in the middle of a write."""
    with suppress(OSError):
        os.write(2, text.encode())


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
