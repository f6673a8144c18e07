"""Log of a run: metrics.jsonl and TensorBoard events.

Columns of a row of metrics.jsonl; a column that does not apply to the run is absent:

    step, epoch                       last finished step and its epoch, both counted from 1
    seconds                           training time so far, over all starts of the run
    loss                              mean since the last row; everything below is of the row's own step
    loss_*                            parts of the loss
    lr, weight_decay, momentum, ...   scheduled values
    grad_norm                         L2 norm of all gradients before clipping; absent if not finite
    spread                            spread of the features over the unit sphere: 1 isotropic, 0 collapsed
    fp16_scale, skipped_steps         loss scale, and steps skipped so far because of it
    images_per_s                      throughput since the last row
    wait_share, select_share          shares of that time spent waiting for the loader and selecting hard views
    peak_memory                       bytes so far, the largest of the processes: on a GPU what PyTorch allocated; on
                                      the CPU the process itself, without loader workers
    kept_hist                         share of the images that keep each candidate view
    kept_loss, no_finite_loss         mean loss of the kept combinations, and number of images without a finite one
    easy_similarity, strong_similarity    mean cosine between the rescued images' two views, and between the first of
                                          them and the strong view

Numbers are means over the processes. TensorBoard shows the same numbers, grouped by topic, and the configuration as
text.
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
"""TensorBoard's groups and their columns; all other columns are in `train`."""

TAGS = {name: f"{group}/{name}" for group, names in GROUPS.items() for name in names}


class RunLog:
    """The log of one run; a context manager.

    Args:
        folder: the run's folder, which exists.
        progress: display that receives the rows as well.
        config: the configuration as YAML, for TensorBoard.
        steps_per_epoch: used to convert rows of an earlier version.
        first_step: steps already done. Rows of later steps, from a run that stopped between checkpoints, are dropped.
    """

    def __init__(self, folder: Path, progress: Progress, *, config: str, steps_per_epoch: int, first_step: int):
        self._progress = progress
        self._path = folder / "metrics.jsonl"
        with _writing(folder):
            last = _drop_rows_after(self._path, first_step, steps_per_epoch)
            self._rows = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
            self._events = Events(folder / "tensorboard", config=config, first_step=first_step)
        self.seconds = float(last.get("seconds", 0.0))
        """Seconds of training up to the last row of earlier starts."""

    def __enter__(self) -> "RunLog":
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)
        self._events.close()
        # Every row was flushed when it was written; close() would only retry a row that a full disk refused.
        with suppress(OSError):
            self._rows.close()

    def note(self, text: str) -> None:
        """Print one line for the user, above the progress."""
        self._progress.note(text)

    def advance(self, done: int, epoch: int) -> None:
        """Report that `done` steps are finished, the last of them in `epoch`, counted from 1."""
        self._progress.advance(done, epoch)

    def write(self, row: Row) -> None:
        """Write one row.

        Raises:
            UserError: the disk is full, or the folder is gone.
        """
        with _writing(self._path.parent):
            self._rows.write(json.dumps(row) + "\n")
            self._rows.flush()
            self._events.add(int(row["step"]), {name: value for name, value in row.items() if name != "step"})  # type: ignore[arg-type]
        self._progress.show(row)


class NoLog(RunLog):
    """A log that writes and prints nothing, for all processes but the leader."""

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
    """TensorBoard's event file, a new one for every start of the run.

    Each row is written immediately. TensorBoard's own writer buffers rows for minutes, which a crash loses, and hits a
    full disk in a background thread.

    Args:
        folder: created if missing.
        config: the configuration as YAML, which TensorBoard shows as text.
        first_step: steps already done; TensorBoard drops later steps found in earlier files.
    """

    def __init__(self, folder: Path, *, config: str, first_step: int):
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "xb")  # noqa: SIM115 - closed in close()
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=first_step + 1, session_log=start))
        # TensorBoard renders Markdown, where four leading spaces make a line verbatim.
        text = "".join(f"    {line}\n" for line in config.splitlines())
        self._write(Event(wall_time=time.time(), step=first_step, summary=text_pb("config", text)))

    def add(self, step: int, values: Row) -> None:
        """Write the values of a step; a list is a histogram, the counts of 0, 1, 2, and so on."""
        summary = Summary()
        for name, value in values.items():
            tag = TAGS.get(name, f"train/{name}")
            if isinstance(value, list):
                summary.value.add(tag=tag, histo=_histogram(value))
            else:
                summary.value.add(tag=tag, simple_value=value)
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        with suppress(OSError):  # as for the rows above
            self._file.close()

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()


def _histogram(counts: list[float]) -> HistogramProto:
    """Return a histogram with one bucket of width 1 around each of 0, 1, 2, and so on."""
    # TensorBoard drops empty buckets at the ends and takes the smallest and largest value as the outer edges.
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
    """Keep the rows up to `step` and return the last of them; a final line cut off by a crash is dropped, too."""
    last: dict[str, Any] = {}
    if not path.exists():
        return last
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            if row["step"] > step:
                break
            if "seconds" not in row:  # an earlier version, which counted epochs from 0
                row["epoch"] = (row["step"] - 1) // steps_per_epoch + 1
        except (json.JSONDecodeError, KeyError, TypeError):
            break
        kept.append(json.dumps(row) + "\n")
        last = row
    write_atomically(path, lambda file: file.write("".join(kept).encode()))
    return last
