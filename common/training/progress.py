"""Progress display of a run: one redrawn line in a terminal, occasional lines elsewhere."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from statistics import fmean
from types import TracebackType

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hvp.common.training.timing import duration

PLAIN_LINE_SECONDS = 10.0
RECENT_STEPS = 100
"""Most recent steps of each kind, whose mean predicts the duration of the next ones."""

GAP, SHORTEST_BAR = "  ", 8

SelectingSteps = Callable[[int], int]
"""Maps a step, counted from 0, to the number of steps from it to the run's end that select hard views."""


class TimeLeft:
    """Estimate of a run's remaining time, from its recent steps.

    Steps that select hard views take longer than the others, and the number left of each kind is known, so each kind
    has its own mean.

    Args:
        total_steps: optimiser steps of the whole run.
        selecting_steps: counts the remaining steps that select.
    """

    def __init__(self, total_steps: int, selecting_steps: SelectingSteps) -> None:
        self._total, self._selecting_steps = total_steps, selecting_steps
        self._recent: dict[bool, deque[float]] = {kind: deque(maxlen=RECENT_STEPS) for kind in (True, False)}

    def add(self, step: int, seconds: float) -> None:
        """Record the duration of a step, counted from 0."""
        selects = self._selecting_steps(step) > self._selecting_steps(step + 1)
        self._recent[selects].append(seconds)

    def after(self, done: int) -> str:
        """Return the time remaining after `done` steps, such as `1:23:45`.

        Until a step of one kind has been timed, such steps count as the other kind. A leading `>` then marks a lower
        bound (as before `selection.start`), a leading `<` an upper bound.
        """
        selecting = self._selecting_steps(done)
        counts = {True: selecting, False: self._total - done - selecting}
        means = {kind: fmean(seconds) for kind, seconds in self._recent.items() if seconds}
        if not means and done < self._total:
            return "-:--:--"
        left = sum(count * means.get(kind, means.get(not kind, 0.0)) for kind, count in counts.items())
        unknown = [kind for kind, count in counts.items() if count and kind not in means]
        return f"{'>' if True in unknown else '<' if unknown else ''}{duration(left)}"


class Progress:
    """Progress display of one run; a context manager.

    Both forms show the same fields, most important first. A terminal's line drops the last fields that do not fit and
    ends in a bar if there is room for one.

    Args:
        console: destination. A terminal gets the redrawn line; anything else at most one line every 10 seconds.
        total_steps, epochs: lengths of the whole run.
        first_step: steps already done.
        selecting_steps: counts the remaining steps that select, for the remaining time.
    """

    def __init__(
        self, console: Console, *, total_steps: int, epochs: int, first_step: int, selecting_steps: SelectingSteps
    ) -> None:
        self._console, self._total, self._epochs = console, total_steps, epochs
        self._time_left = TimeLeft(total_steps, selecting_steps)
        self._done, self._epoch = first_step, 1 + min(epochs - 1, first_step * epochs // total_steps)
        self._left = self._time_left.after(first_step)
        self._row: Mapping[str, object] = {}
        self._last_step: float | None = None
        self._last_plain = float("-inf")
        self._live: Live | None = None

    def __enter__(self) -> "Progress":
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(self, console=self._console)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def note(self, text: str) -> None:
        """Print a permanent line above the redrawn one."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def advance(self, done: int, epoch: int) -> None:
        """Report that `done` steps are finished, the last of them in `epoch`, counted from 1."""
        now = time.monotonic()
        # The first step includes starting the loader's workers, so its duration does not count.
        if self._last_step is not None:
            self._time_left.add(done - 1, now - self._last_step)
        self._last_step = now
        self._done, self._epoch = done, epoch
        self._left = self._time_left.after(done)

    def show(self, row: Mapping[str, object]) -> None:
        """Show a row of the log."""
        self._row = row
        now, done = time.monotonic(), int(row["step"])  # type: ignore[call-overload]
        if self._live is None and (now - self._last_plain >= PLAIN_LINE_SECONDS or done == self._total):
            self._last_plain = now
            self._done, self._epoch = done, int(row["epoch"])  # type: ignore[call-overload]
            self._left = self._time_left.after(done)
            self.note(GAP.join(self._fields()))

    def _fields(self) -> list[str]:
        """Return the fields of the line, most important first."""
        row = self._row
        fields = [f"step {self._done}/{self._total}", f"left {self._left}"]
        if row:
            fields.append(f"loss {row['loss']:.4f}")
        fields.append(f"epoch {self._epoch}/{self._epochs}")
        if row:
            fields.append(images_per_second(row["images_per_s"]))  # type: ignore[arg-type]
            if row.get("skipped_steps"):
                fields.append(f"overflows {row['skipped_steps']:.0f}")
            fields += [f"waiting {row['wait_share']:.0%}", f"selecting {row['select_share']:.0%}"]
        return fields

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the terminal's line."""
        text, *others = self._fields()
        for field in others:
            if len(text) + len(GAP) + len(field) > options.max_width:
                break
            text += GAP + field
        room = options.max_width - len(text) - len(GAP)
        line = Text(text, no_wrap=True, overflow="crop")
        if room < SHORTEST_BAR:
            yield line
            return
        table = Table.grid(padding=(0, len(GAP), 0, 0))
        table.add_row(line, ProgressBar(self._total, self._done, width=room))
        yield table


def images_per_second(rate: float) -> str:
    """Format a rate, such as `123 images/s`, with one decimal below 10."""
    return f"{rate:.{0 if rate >= 10 else 1}f} images/s"
