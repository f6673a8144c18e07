"""Signals that ask a run to stop: it finishes its step, writes a checkpoint, and exits with a code of its own."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 75}
"""What the command exits with after each of them. 130 and 143 are the shell's own; 75 (EX_TEMPFAIL, "try again later")
answers SIGUSR1, which batch systems send ahead of the time limit: queue the same command again with --resume."""


class StopSignals:
    """Remembers the signal while it is active; a context manager.

    A second SIGINT does not wait for the step: it raises KeyboardInterrupt at once. Outside the main thread, where
    Python allows no handlers, nothing is caught.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in EXIT_CODES}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
