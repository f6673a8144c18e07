"""What a run writes down while it trains: metrics.jsonl, TensorBoard events, and progress for the person who waits."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from hvp.common.engine.checkpoint import write_atomically

PLAIN_LINE_SECONDS = 10.0


class RunLog:
    """The log of one run; a context manager.

    Args:
        folder: the run's folder, which exists.
        console: where progress goes. A terminal gets a bar; anything else a line every 10 seconds at most.
        total_steps: optimiser steps of the whole run.
        first_step: steps done before; rows of later steps, left by a run that stopped between two checkpoints, go.
    """

    def __init__(self, folder: Path, console: Console, *, total_steps: int, first_step: int = 0):
        self._console = console
        self._total = total_steps
        self._first = first_step
        self._started = time.monotonic()
        self._last_plain = float("-inf")
        path = folder / "metrics.jsonl"
        _drop_rows_after(path, first_step)
        self._rows = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> "RunLog":
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("", total=self._total, completed=self._first, epoch=0, numbers="")
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._events.close()
        self._rows.close()

    def note(self, text: str) -> None:
        """One line for the person, above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def advance(self, step: int, epoch: int) -> None:
        """Moves the bar: `step` steps are done, in epoch `epoch` (counted from 0)."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, epoch=epoch + 1)

    def write(self, row: Mapping[str, float | int | list[float]]) -> None:
        """One row: `step`, `epoch`, `loss`, `images_per_s`, the shares of time, and whatever else the trainer gives."""
        self._rows.write(json.dumps(row) + "\n")
        self._rows.flush()
        step = int(row["step"])  # type: ignore[arg-type]
        for name, value in row.items():
            if isinstance(value, float):
                self._events.add_scalar(name, value, step)
        self._show(step, row)

    def _show(self, step: int, row: Mapping[str, float | int | list[float]]) -> None:
        digits = 0 if row["images_per_s"] >= 10 else 1  # type: ignore[operator]
        numbers = (
            f"loss {row['loss']:.4f}  {row['images_per_s']:.{digits}f} images/s  waiting {row['wait_share']:.0%}  "
            f"selecting {row['select_share']:.0%}"
        )
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, numbers=numbers)
            return
        now = time.monotonic()
        if now - self._last_plain >= PLAIN_LINE_SECONDS or step == self._total:
            self._last_plain = now
            left = (now - self._started) / max(1, step - self._first) * (self._total - step)
            minutes, seconds = divmod(round(left), 60)
            hours, minutes = divmod(minutes, 60)
            epoch = int(row["epoch"])  # type: ignore[arg-type]
            self.note(
                f"step {step}/{self._total}  epoch {epoch + 1}  {numbers}  left {hours}:{minutes:02}:{seconds:02}"
            )


def _drop_rows_after(path: Path, step: int) -> None:
    """Keeps the rows up to `step`; a last line cut off by a crash goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (json.JSONDecodeError, KeyError, TypeError):
            break
        kept.append(line + "\n")
    write_atomically(path, lambda file: file.write("".join(kept).encode()))
