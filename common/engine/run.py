"""A run: its folder, its clock, its checkpoints. The trainer's own loop calls it; it calls nothing back."""

import fcntl
import json
import logging
import math
import os
import platform
import shlex
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

import torch
from rich.console import Console
from torch import Tensor

from hvp.common.config import flatten, to_yaml
from hvp.common.engine.checkpoint import DamagedCheckpoint, load_checkpoint, save_checkpoint, write_atomically
from hvp.common.engine.collapse import CollapseWatch
from hvp.common.engine.distributed import World, available_cores
from hvp.common.engine.log import NoLog, RunLog
from hvp.common.engine.signals import EXIT_CODES, StopSignals
from hvp.common.engine.timing import Stopwatch
from hvp.common.errors import Stopped, UserError
from hvp.common.sections import RunConfig
from hvp.common.views import MultiViewLoader, ViewBatch
from hvp.common.views.randomness import mix

logger = logging.getLogger(__name__)

CONFIG, RUN, LAST, PREVIOUS, LOCK = "config.yaml", "run.json", "last.pt", "previous.pt", ".lock"
"""Names in a run's folder."""

PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}


class Stateful(Protocol):
    """A module, optimiser or precision."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds PyTorch's generators, and gives the caller's back their state afterwards."""
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def available_workers(asked: int | None, device: torch.device, world: World = World()) -> int:
    """Loader processes: as asked, or as many as suit this process's share of the cores, at most 16; a quarter of the
    share where the CPU trains, too."""
    if asked is not None:
        return asked
    share = available_cores() // world.local_size
    return max(1, share // 4) if device.type == "cpu" else min(16, max(1, share))


@contextmanager
def claimed(out: Path, world: World, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Makes the run's folder and holds it: nothing of an earlier run is lost unasked, and no second run writes here.

    The lock belongs to the leader's process and goes with it, however it ends. It is a record lock rather than
    `flock()`, which loader workers would inherit and keep for the seconds that they outlive a killed run.

    Raises:
        UserError: the folder holds something and neither `resume` nor `overwrite` is given; overwriting a folder that
            is no run's; another run is at it; or it cannot be written.
    """
    with ExitStack() as held:
        with world.agreeing():
            if world.leader:
                held.enter_context(_claim(out, resume=resume, overwrite=overwrite))
        yield


@contextmanager
def _claim(out: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    try:
        occupied = out.exists() and any(path.name != LOCK for path in out.iterdir())
        if occupied and overwrite and not (out / CONFIG).is_file():
            raise UserError(f"{out}: holds files but no run (no {CONFIG}), so --overwrite leaves it alone")
        if occupied and not overwrite and not resume:
            raise UserError(
                f"{out}: is not empty. Go on with --resume, start over with --overwrite, or give another --out"
            )
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(f"{out}: cannot be used as output folder: {error.strerror}") from error
    with lock:
        _lock(out, lock)
        if overwrite:
            _empty(out)
        yield


def _empty(out: Path) -> None:
    try:
        for path in out.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be deleted: {error.strerror}") from error


def _lock(out: Path, lock: TextIO) -> None:
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        lock.seek(0)
        raise UserError(
            f"{out}: another run is writing here: {lock.read().strip() or 'it has just started'}. Wait for it to end, "
            "or give another --out"
        ) from error
    except OSError as error:
        logger.warning("%s: is on a file system without locks (%s): see to it that one run uses it", out, error)
    try:
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
    except OSError as error:
        raise UserError(f"{out}: cannot be used as output folder: {error.strerror}") from error


def read_run(out: Path) -> tuple[str, Path]:
    """The method of a run, and the file of its configuration.

    Raises:
        UserError: the folder holds no run.
    """
    try:
        method = json.loads((out / RUN).read_text(encoding="utf-8"))["method"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{out}: holds no run that can be resumed: {RUN} is missing or damaged. Give the folder that "
            "`hvp pretrain --out` named"
        ) from error
    return method, out / CONFIG


def describe_run(out: Path, method: str, config: RunConfig) -> None:
    """Writes what `read_run()` reads, into a folder that is `claimed()`."""
    about = {"method": method, "versions": versions()}
    write_atomically(out / RUN, lambda file: file.write(json.dumps(about).encode()))
    write_atomically(out / CONFIG, lambda file: file.write(to_yaml(config).encode()))


class Run:
    """One training run; a context manager around the trainer's loop.

    What the loop must do to be resumed exactly, stopped by signals, and ended by a bad loss before that reaches the
    weights:

        for epoch in run.epochs:
            for step, parts in run.steps(epoch):            # fetches; counts the last step as done; saves; stops
                ...                                         # forward, backward
                loss = run.check(loss)                      # mean over processes; raises before weights are touched
                ...                                         # optimiser step
                run.record(loss, lr=lr)                     # log

    with everything that changes during training in `parts`, and random numbers drawn from PyTorch's generators or from
    (seed, step) alone. With several processes all of them make these calls; the folder is the leader's.

    Args:
        method: name of the method, for the checkpoint.
        config: the resolved configuration; written to `config.yaml`.
        out: the run's folder, within `claimed()`.
        loader: gives the steps of an epoch.
        parts: what a checkpoint holds, by name: networks, losses with buffers, optimiser, precision.
        device: where the networks are.
        console: where progress goes.
        world: the processes of the run.
        resume: go on from the last checkpoint, if there is one.
        force: resume even though the configuration differs.
        on_row: told every row of the log once it is written; what it raises ends the run.
        temporary: the folder goes when the run ends, so a signal ends it without a checkpoint.

    Raises:
        UserError: no checkpoint in the folder can be read, or it does not fit the configuration.
    """

    def __init__(
        self,
        method: str,
        config: RunConfig,
        out: Path,
        loader: MultiViewLoader,
        parts: Mapping[str, Stateful],
        device: torch.device,
        console: Console,
        world: World,
        *,
        resume: bool = False,
        force: bool = False,
        on_row: Callable[[Mapping[str, Any]], None] | None = None,
        temporary: bool = False,
    ):
        self.out = out
        self.world = world
        self.step = 0
        """Optimiser steps done."""
        self.steps_per_epoch = loader.steps_per_epoch
        self.total_steps = config.train.epochs * loader.steps_per_epoch
        self.waiting = Stopwatch(torch.device("cpu"))
        self.selecting = Stopwatch(device)
        self.skipped: list[str] = []
        """Images that this process could not decode and replaced, in the order in which they were met."""
        self._method = method
        self._config = config
        self._loader = loader
        self._parts = dict(parts)
        self._device = device
        self._on_row = on_row
        self._temporary = temporary
        self._signals = StopSignals(leader=world.leader, saves=not temporary)
        self._stop: signal.Signals | None = None
        self._loss_sum, self._loss_count = 0.0, 0
        self._batches: list[ViewBatch] = []
        self._saved: int | None = None
        self._clock = time.perf_counter()
        if world.rank > 0:
            # Up to here all processes drew the same numbers, for equal weights. From here on each has its own stream.
            torch.manual_seed(mix(config.train.seed, world.rank))
        if resume:
            self._restore(console, force)
        self.log: RunLog = NoLog()
        with world.agreeing():
            if world.leader:
                describe_run(out, method, config)
                self.log = RunLog(out, console, total_steps=self.total_steps, first_step=self.step)
        self.collapse = CollapseWatch(self.log.note)

    def __enter__(self) -> "Run":
        self._signals.__enter__()
        self.log.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.log.__exit__(kind, error, trace)
        self._signals.__exit__(kind, error, trace)
        if kind is None:
            skipped = sorted({name for names in self.world.gather(self.skipped) for name in names})
            if skipped:
                listed = "\n".join(f"  {name}" for name in skipped)
                self.log.note(f"{len(skipped)} images could not be read and were replaced:\n{listed}")

    @property
    def row_due(self) -> bool:
        """Whether `record()` will write a row for this step; what only a row shows need not be computed otherwise."""
        done = self.step + 1
        return done % self._config.train.log_every == 0 or done == self.total_steps

    @property
    def last_checkpoint(self) -> Path:
        return self.out / LAST

    @property
    def epochs(self) -> range:
        """The epochs that are not finished yet."""
        return range(self.step // self.steps_per_epoch, self._config.train.epochs)

    def steps(self, epoch: int) -> Iterator[tuple[int, list[ViewBatch]]]:
        """The steps of an epoch that are not done yet, each with its parts (`train.accumulate` of them).

        When the loop asks for the next step, the last one counts as done; a checkpoint is written if one is due, or if
        a signal asked to stop.

        Raises:
            UserError: images cannot be read, or the checkpoint cannot be written.
            Stopped: a signal asked to stop.
        """
        batches = self._loader.epoch(epoch, start_step=self.step - epoch * self.steps_per_epoch)
        while True:
            with self.waiting.running(), self.world.agreeing():
                parts = next(batches, None)
            if parts is None:
                return
            self.skipped += [name for part in parts for name in part.skipped]
            self._batches = parts
            yield self.step, parts
            self.step += 1
            self.log.advance(self.step, epoch)
            saved = self._save_if_due()
            stop = self._signals.received if self.world.size == 1 else self._stop
            if stop is not None and self.step < self.total_steps:
                if not saved and not self._temporary:
                    self.save()
                go_on = "" if self._temporary else f" Go on with: hvp resume {shlex.quote(str(self.out))}"
                raise Stopped(
                    f"{stop.name}: stopped after step {self.step} of {self.total_steps}.{go_on}",
                    EXIT_CODES[stop],
                    self.world.leader,
                )

    def check(self, loss: Tensor, **values: float) -> float:
        """The loss of the step, mean over the processes; to be asked for before the optimiser's step.

        With several processes this is also where they agree on a signal.

        Args:
            loss: scalar, mean over this process's images.
            values: what else the message is to say of the step, such as the learning rate.

        Raises:
            UserError: the loss of a process is not finite. Weights and checkpoints are those of the step before, and
                the images are listed in `nonfinite.json`.
        """
        mine = loss.item()
        received = [float(self._signals.received is number) for number in EXIT_CODES]
        total, *stops = self.world.sum([mine, *received])
        self._stop = next((number for number, count in zip(EXIT_CODES, stops, strict=True) if count), None)
        if not math.isfinite(total):
            self._report_nonfinite(mine, values)
        return total / self.world.size

    def record(self, loss: float, **values: float | list[float]) -> None:
        """Takes a step's loss, and every `train.log_every` steps writes a row of the log.

        The row's loss is the mean since the last row; `values` are those of its step, mean over the processes.

        Raises:
            UserError: the row cannot be written.
        """
        done = self.step + 1
        self._loss_sum += loss
        self._loss_count += 1
        if not self.row_due:
            return
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        steps = self._loss_count
        row = {
            "loss": self._loss_sum / steps,
            **values,
            "images_per_s": steps * self._config.train.batch_size / seconds,
            "wait_share": self.waiting.take() / seconds,
            "select_share": self.selecting.take() / seconds,
        }
        row = {"step": done, "epoch": (done - 1) // self.steps_per_epoch, **self._mean(row)}
        with self.world.agreeing():
            self.log.write(row)
        self._loss_sum, self._loss_count = 0.0, 0
        if self._on_row is not None:
            self._on_row(row)

    def save(self, path: Path | None = None) -> None:
        """Writes a checkpoint that a resume continues from exactly: `last.pt`, whose predecessor is kept as
        `previous.pt`, unless told otherwise.

        Raises:
            UserError: it cannot be written; what was there before still is.
        """
        streams = self.world.gather(
            {
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state() if self._device.type == "cuda" else None,
                "skipped": self.skipped,
            }
        )
        content = {
            "method": self._method,
            "config": self._config.model_dump(mode="json"),
            "step": self.step,
            "epoch": self.step // self.steps_per_epoch,
            "steps_per_epoch": self.steps_per_epoch,
            "log": {"loss_sum": self._loss_sum, "loss_count": self._loss_count},
            "processes": streams,
            "versions": versions(),
            **{name: part.state_dict() for name, part in self._parts.items()},
        }
        with self.world.agreeing():
            if self.world.leader and path is not None:
                save_checkpoint(path, content)
            elif self.world.leader:
                save_checkpoint(self.last_checkpoint, content, previous=self.out / PREVIOUS)
        self._saved = self.step

    def _save_if_due(self) -> bool:
        train = self._config.train
        epochs, inside = divmod(self.step, self.steps_per_epoch)
        due = inside == 0 or bool(train.save_every and self.step % train.save_every == 0)
        if due:
            self.save()
        if inside == 0 and train.keep_every and epochs % train.keep_every == 0:
            self.save(self.out / f"epoch{epochs:04d}.pt")
        return due

    def _mean(self, row: Mapping[str, float | list[float]]) -> dict[str, float | list[float]]:
        """A row's numbers, mean over the processes."""
        if self.world.size == 1:
            return dict(row)
        flat = [number for value in row.values() for number in (value if isinstance(value, list) else [value])]
        means = iter(self.world.mean(flat))
        return {
            name: [next(means) for _ in value] if isinstance(value, list) else next(means)
            for name, value in row.items()
        }

    def _report_nonfinite(self, mine: float, values: Mapping[str, float]) -> None:
        """Names the step and its images, and ends the run in all processes."""
        source = self._loader.source
        images = [
            {"rank": self.world.rank, "index": index, "name": source.describe(index)}
            for part in self._batches
            for index in part.index.tolist()
        ]
        losses = self.world.gather((mine, [] if math.isfinite(mine) else images))
        bad = [rank for rank, (loss, _) in enumerate(losses) if not math.isfinite(loss)]
        listed = self.out / "nonfinite.json"
        with self.world.agreeing():
            where = f" on rank {', '.join(map(str, bad))}" if self.world.size > 1 else ""
            shown = "".join(f", {name} {value:g}" for name, value in values.items())
            about = {
                "step": self.step + 1,
                "loss": [str(losses[rank][0]) for rank in bad],
                **values,
                "images": [image for rank in bad for image in losses[rank][1]],
            }
            try:
                if self.world.leader:
                    write_atomically(listed, lambda file: file.write(json.dumps(about, indent=1).encode()))
                images_are = f"Its images are listed in {listed}"
            except UserError as error:
                images_are = str(error)
            good = self.last_checkpoint
            kept = (
                "There is no checkpoint yet"
                if self._saved is None
                else f"Last good checkpoint: {good}, step {self._saved}"
            )
            raise UserError(
                f"step {self.step + 1}: the loss is {losses[bad[0]][0]}{where}{shown}. {kept}. {images_are}.\n"
                "    Lower the learning rate or raise the precision. Resuming as it is repeats the step"
            )

    def _restore(self, console: Console, force: bool) -> None:
        content: dict[str, Any] | None = None
        with self.world.agreeing():
            content = _load_newest(self.out, console) if self.world.leader else None
        step = self.world.broadcast(None if content is None else content["step"])
        if step is None:
            if self.world.leader:
                console.print(
                    f"{self.out}: no checkpoint was written yet, so the run starts from the beginning", **PLAIN
                )
            return
        with self.world.agreeing():
            if content is None:
                content = _load_newest(self.out, Console(quiet=True))
            if content is None or content["step"] != step:
                raise UserError(f"{self.out}: the leader reads step {step} here, this machine does not. Is it shared?")
            self._check_fit(content, force)
            self._take_over(content)
        if self.world.leader:
            console.print(f"{self.last_checkpoint}: going on after step {self.step} of {self.total_steps}", **PLAIN)

    def _check_fit(self, content: Mapping[str, Any], force: bool) -> None:
        if content["method"] != self._method:
            raise UserError(f"{self.out}: is a run of {content['method']}, not of {self._method}")
        differences = _differences(content["config"], self._config.model_dump(mode="json"))
        if content["steps_per_epoch"] != self.steps_per_epoch:
            differences.append(
                f"steps per epoch: {content['steps_per_epoch']} in the checkpoint, {self.steps_per_epoch} now"
            )
        if differences and not force:
            listed = "\n".join(f"  {line}" for line in differences)
            raise UserError(
                f"{self.last_checkpoint}: belongs to another configuration:\n{listed}\n"
                "Resume with the same values, start a new run with another --out, or go on all the same with --force"
            )

    def _take_over(self, content: Mapping[str, Any]) -> None:
        """Everything that changes during training, as it was."""
        for name, part in self._parts.items():
            try:
                part.load_state_dict(content[name])
            except (RuntimeError, ValueError, KeyError) as error:  # with --force, another architecture
                raise UserError(f"{self.out}: {name} does not fit this configuration: {error}") from error
        self.step = self._saved = content["step"]
        self._loss_sum, self._loss_count = content["log"]["loss_sum"], content["log"]["loss_count"]
        streams, rank = content["processes"], self.world.rank
        if self.world.leader:
            self.skipped = [name for stream in streams for name in stream["skipped"]]
        if rank < len(streams):
            torch.set_rng_state(streams[rank]["torch"])
            if self._device.type == "cuda" and streams[rank]["cuda"] is not None:
                torch.cuda.set_rng_state(streams[rank]["cuda"])
        else:
            torch.manual_seed(mix(self._config.train.seed, rank, self.step))


def _load_newest(out: Path, console: Console) -> dict[str, Any] | None:
    """The last checkpoint, or where that is damaged or missing the one before; None where there is neither."""
    last, previous = out / LAST, out / PREVIOUS
    if not last.exists():
        # a crash between the two renames of a save
        return load_checkpoint(previous) if previous.exists() else None
    try:
        return load_checkpoint(last)
    except DamagedCheckpoint as error:
        if not previous.exists():
            raise
        content = load_checkpoint(previous)
        console.print(f"{error}\nTaking {previous} of step {content['step']} instead", **PLAIN)
        return content


def versions() -> dict[str, str]:
    """What a run was made with."""
    return {"hvp": version("hvp"), "torch": str(torch.__version__), "python": platform.python_version()}


# What may differ between a run and its continuation without changing what is computed.
FREE_TO_CHANGE = {
    *("data.workers", "train.save_every", "train.keep_every", "train.log_every", "train.device"),
    "train.sharding",
}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    old, new = flatten(before), flatten(now)
    keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key) and key not in FREE_TO_CHANGE]
    return [f"{key}: {old.get(key)} in the checkpoint, {new.get(key)} now" for key in keys]
