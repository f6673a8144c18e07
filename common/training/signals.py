"""Signals that ask a run to stop: it finishes its step, writes a checkpoint, and exits with a code of its own.

The command handles Ctrl-C from its first moment on, so this module imports nothing that takes time.
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
"""What the command exits with after each of them. 130 and 143 are the shell's own; 75 (EX_TEMPFAIL, "try again later")
answers SIGUSR1, which batch systems send ahead of the time limit: queue the same command again with --resume. Outside a
run's steps nothing is saved, and SIGTERM kills as it does any program, which a shell calls 143, too."""

_asked = False
"""Whether a signal has asked the command to stop already."""


class StopSignals:
    """Remembers the signal while it is active, and acknowledges it on stderr at once; a context manager.

    A second SIGINT does not wait for the step. It goes to the handler that was there before: the command's ends the
    process, Python's own raises KeyboardInterrupt. Outside the main thread, where Python allows no handlers, nothing is
    caught.

    Args:
        leader: whether this is the process that prints.
        saves: whether the run is going to write a checkpoint.
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
            return  # a loader worker just after its fork; the main process ends it
        # Counting is one step: a second signal may interrupt this very function.
        first, _asked = next(self._counted) == 0, True
        if number == signal.SIGINT and not first:
            before = self._before[signal.SIGINT]
            if not callable(before):
                raise KeyboardInterrupt
            before(number, frame)
            return
        self.received = signal.Signals(number)
        if self._leader and first:
            words = f"{self.received.name}: stopping after this step" + (", saving" if self._saves else "")
            if number == signal.SIGINT:
                words += "; press again to stop without" if self._saves else "; press again to stop at once"
            _say(words)


class CommandInterrupts:
    """SIGINT and SIGUSR1 while the `hvp` command runs, other than in a run's steps; a context manager around all of it.

    SIGUSR1 ends the process, with its exit code. The first SIGINT raises KeyboardInterrupt, so that whatever is in
    progress cleans up behind itself; during an import, which that would break in some library's own way, it ends the
    process. So does any later one, and one after the end of the block, where Python cleans up.
    """

    def __init__(self) -> None:
        self.raised = False
        """Whether KeyboardInterrupt was raised. Libraries may turn it into another exception on its way."""

        self._process = 0
        self._hook = sys.unraisablehook

    def __enter__(self) -> "CommandInterrupts":
        global _asked
        _asked, self._process = False, os.getpid()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._receive)
            signal.signal(signal.SIGUSR1, self._end)
            # When Python cleans up at last it takes handlers back, and a signal would replace the command's exit code.
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
        """A KeyboardInterrupt that was raised in a destructor or the like, where Python would print and ignore it."""
        if issubclass(about.exc_type, KeyboardInterrupt):
            say_interrupted()
            leave()
        else:
            self._hook(about)


def leave(number: signal.Signals = signal.SIGINT) -> None:
    """Ends this process and its loader workers at once. Files that are being written stay as they are, beside those
    that they would have replaced."""
    if "multiprocessing" in sys.modules:
        with suppress(Exception):
            for child in sys.modules["multiprocessing"].active_children():
                child.kill()
    if os.isatty(2):
        _write("\x1b[?25h")  # a progress bar hides the cursor
    os._exit(EXIT_CODES[number])


def say_interrupted() -> None:
    """One of several processes says it, by the rank that torchrun or srun gave them."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        _say("hvp: interrupted")


def _say(line: str) -> None:
    # behind what a progress bar or the terminal's ^C has left there
    _write(f"\n{line}\n" if os.isatty(2) else f"{line}\n")


def _write(text: str) -> None:
    """Writes past Python's buffers, which a signal may find in the middle of a write."""
    with suppress(OSError):
        os.write(2, text.encode())


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
