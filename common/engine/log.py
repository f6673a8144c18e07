"""What a run writes down while it trains: metrics.jsonl, TensorBoard events, and progress for the person who waits."""

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from hvp.common.engine.checkpoint import write_atomically
from hvp.common.errors import UserError

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
        self._path = folder / "metrics.jsonl"
        with _writing(folder):
            _drop_rows_after(self._path, first_step)
            self._rows = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
            self._events = Events(folder / "tensorboard", first_step=first_step)
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
        # Every row was flushed when it was written; what a full disk refused then, closing would try again.
        with suppress(OSError):
            self._rows.close()

    def note(self, text: str) -> None:
        """One line for the person, above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def advance(self, step: int, epoch: int) -> None:
        """Moves the bar: `step` steps are done, in epoch `epoch` (counted from 0)."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, epoch=epoch + 1)

    def write(self, row: Mapping[str, float | int | list[float]]) -> None:
        """One row: `step`, `epoch`, `loss`, `images_per_s`, the shares of time, and whatever else the trainer gives.

        Raises:
            UserError: the disk is full, or the folder is gone.
        """
        step = int(row["step"])  # type: ignore[arg-type]
        with _writing(self._path.parent):
            self._rows.write(json.dumps(row) + "\n")
            self._rows.flush()
            self._events.add(step, {name: value for name, value in row.items() if isinstance(value, float)})
        self._show(step, row)

    def _show(self, step: int, row: Mapping[str, float | int | list[float]]) -> None:
        digits = 0 if row["images_per_s"] >= 10 else 1  # type: ignore[operator]
        numbers = (
            f"loss {row['loss']:.4f}  {row['images_per_s']:.{digits}f} images/s  waiting {row['wait_share']:.0%}  "
            f"selecting {row['select_share']:.0%}"
        )
        if row.get("skipped_steps"):
            numbers += f"  overflows {row['skipped_steps']:.0f}"
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


class NoLog(RunLog):
    """The log of a process that writes and prints nothing."""

    def __init__(self) -> None: ...

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def note(self, text: str) -> None: ...

    def advance(self, step: int, epoch: int) -> None: ...

    def write(self, row: Mapping[str, float | int | list[float]]) -> None: ...


class Events:
    """TensorBoard's event file, a file of its own for every start of the run.

    Written when a row is: TensorBoard's own writer keeps rows for minutes, which a crash loses, and meets a full disk
    in a thread.

    Args:
        folder: made if it is not there.
        first_step: steps done before; TensorBoard drops what earlier files hold of later ones.
    """

    def __init__(self, folder: Path, *, first_step: int):
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "xb")  # noqa: SIM115 - closed in close()
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=first_step + 1, session_log=start))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of a step."""
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        # as with the rows, there is nothing left to write but what a full disk refused
        with suppress(OSError):
            self._file.close()

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: the log cannot be written: {error.strerror or error}") from error


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
