"""Log of a run: metrics.jsonl and TensorBoard events.

Columns of a row of metrics.jsonl, of which a method has those that it knows:

    step, epoch                       counted from 1: the step is done, and belongs to that epoch
    seconds                           of training so far, all starts of the run together
    loss                              mean since the last row; everything below is of the row's own step
    loss_*                            parts of the loss
    lr, weight_decay, momentum, ...   what the schedules say
    grad_norm                         L2 norm of all gradients before clipping; absent where it is not finite
    spread                            how far features lie apart on the unit sphere: 1 in all directions, 0 collapsed
    fp16_scale, skipped_steps         the loss scale, and the steps it has cost so far
    images_per_s                      since the last row
    wait_share, select_share          shares of that time: waiting for the loader, selecting hard views
    peak_memory                       bytes so far, the largest of the processes: of the GPU's memory what PyTorch
                                      allocated; on the CPU the process itself, without loader workers
    kept_hist                         share of the images that keep each candidate view
    kept_loss, no_finite_loss         mean loss of the kept combinations, and images without a finite one
    easy_similarity, strong_similarity    mean cosine of the rescued images' views, and of the first and the strong one

Numbers are means over the processes. TensorBoard has the same ones in groups, by their meaning, and the configuration
as text.
"""

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from hvp.common.errors import UserError
from hvp.common.training.checkpoint import write_atomically
from hvp.common.training.progress import Progress

Row = Mapping[str, float | int | list[float]]

GROUPS = {
    "time": ("seconds", "images_per_s", "wait_share", "select_share"),
    "memory": ("peak_memory",),
    "select": ("kept_hist", "kept_loss", "no_finite_loss"),
    "rescue": ("easy_similarity", "strong_similarity"),
}
"""TensorBoard's groups and their columns; all others are in `train`."""

TAGS = {name: f"{group}/{name}" for group, names in GROUPS.items() for name in names}


class RunLog:
    """The log of one run; a context manager.

    Args:
        folder: the run's folder, which exists.
        progress: is shown as well.
        config: the configuration as YAML, for TensorBoard.
        steps_per_epoch: for rows of an earlier version.
        first_step: steps done before; rows of later steps, left by a run that stopped between two checkpoints, go.
    """

    def __init__(self, folder: Path, progress: Progress, *, config: str, steps_per_epoch: int, first_step: int):
        self._progress = progress
        self._path = folder / "metrics.jsonl"
        with _writing(folder):
            last = _drop_rows_after(self._path, first_step, steps_per_epoch)
            self._rows = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
            self._events = Events(folder / "tensorboard", config=config, first_step=first_step)
        self.seconds = float(last.get("seconds", 0.0))
        """Seconds of training up to the last row that an earlier start has left."""

    def __enter__(self) -> "RunLog":
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)
        self._events.close()
        # Every row was flushed when it was written; what a full disk refused then, closing would try again.
        with suppress(OSError):
            self._rows.close()

    def note(self, text: str) -> None:
        """One line for the person, above the progress."""
        self._progress.note(text)

    def advance(self, done: int, epoch: int) -> None:
        """`done` steps are done, the last of them in `epoch`, counted from 1."""
        self._progress.advance(done, epoch)

    def write(self, row: Row) -> None:
        """One row.

        Raises:
            UserError: the disk is full, or the folder is gone.
        """
        with _writing(self._path.parent):
            self._rows.write(json.dumps(row) + "\n")
            self._rows.flush()
            self._events.add(int(row["step"]), {name: value for name, value in row.items() if name != "step"})  # type: ignore[arg-type]
        self._progress.show(row)


class NoLog(RunLog):
    """The log of a process that writes and prints nothing."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def note(self, text: str) -> None: ...

    def advance(self, done: int, epoch: int) -> None: ...

    def write(self, row: Row) -> None: ...


class Events:
    """TensorBoard's event file, a file of its own for every start of the run.

    Written when a row is: TensorBoard's own writer keeps rows for minutes, which a crash loses, and meets a full disk
    in a thread.

    Args:
        folder: made if it is not there.
        config: the configuration as YAML, which TensorBoard shows as text.
        first_step: steps done before; TensorBoard drops what earlier files hold of later ones.
    """

    def __init__(self, folder: Path, *, config: str, first_step: int):
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "xb")  # noqa: SIM115 - closed in close()
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=first_step + 1, session_log=start))
        # as Markdown, in which four spaces make a line verbatim
        text = "".join(f"    {line}\n" for line in config.splitlines())
        self._write(Event(wall_time=time.time(), step=first_step, summary=text_pb("config", text)))

    def add(self, step: int, values: Row) -> None:
        """The numbers of a step; a list is the histogram of 0, 1, 2, ..., so often each."""
        summary = Summary()
        for name, value in values.items():
            tag = TAGS.get(name, f"train/{name}")
            if isinstance(value, list):
                summary.value.add(tag=tag, histo=_histogram(value))
            else:
                summary.value.add(tag=tag, simple_value=value)
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        # as with the rows, there is nothing left to write but what a full disk refused
        with suppress(OSError):
            self._file.close()

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()


def _histogram(counts: list[float]) -> HistogramProto:
    """A bucket of width 1 around 0, 1, 2, ..., with so much in each."""
    # TensorBoard drops empty buckets at the ends, and takes the smallest and largest value for the outer edges.
    filled = [i for i, count in enumerate(counts) if count] or [0]
    return HistogramProto(
        min=filled[0] - 0.5,
        max=filled[-1] + 0.5,
        num=sum(counts),
        sum=sum(i * count for i, count in enumerate(counts)),
        sum_squares=sum(i * i * count for i, count in enumerate(counts)),
        bucket_limit=[i + 0.5 for i in range(len(counts))],
        bucket=counts,
    )


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: the log cannot be written: {error.strerror or error}") from error


def _drop_rows_after(path: Path, step: int, steps_per_epoch: int) -> dict[str, Any]:
    """Keeps the rows up to `step` and returns the last of them; a last line cut off by a crash goes too."""
    last: dict[str, Any] = {}
    if not path.exists():
        return last
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            if row["step"] > step:
                break
            if "seconds" not in row:  # of an earlier version, which counted epochs from 0
                row["epoch"] = (row["step"] - 1) // steps_per_epoch + 1
        except (json.JSONDecodeError, KeyError, TypeError):
            break
        kept.append(json.dumps(row) + "\n")
        last = row
    write_atomically(path, lambda file: file.write("".join(kept).encode()))
    return last
