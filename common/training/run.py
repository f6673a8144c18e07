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
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

import torch
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer

from hvp.common.config.resolving import flatten, to_yaml
from hvp.common.config.sections import RunConfig
from hvp.common.data import ImageSource, same_dataset
from hvp.common.data.workers import Hanging, NoBatch, WaitInterrupted
from hvp.common.errors import Stopped, UserError
from hvp.common.training.archive import DamagedCheckpoint, require_file
from hvp.common.training.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from hvp.common.training.collapse import CollapseWatch
from hvp.common.training.distributed import World, available_cores
from hvp.common.training.log import NoLog, RunLog
from hvp.common.training.optimizers import squared_gradient_norm
from hvp.common.training.peak_memory import peak_memory
from hvp.common.training.progress import Progress, images_per_second
from hvp.common.training.selecting import selecting_steps
from hvp.common.training.signals import EXIT_CODES, StopSignals
from hvp.common.training.timing import Stopwatch, duration
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


class Claim:
    """A run's hold on its folder.

    Args:
        out: the folder.
        lock: its lock file, open and locked; None in a process that writes nothing there.
    """

    def __init__(self, out: Path, lock: TextIO | None = None):
        self._out = out
        self._lock = lock

    def check(self) -> None:
        """Sees to it that the folder is still the one that was claimed; to be called before something is written.

        Raises:
            UserError: it was removed, and perhaps another run has begun in a new one of that name.
        """
        if self._lock is None:
            return
        try:
            if os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self._out / LOCK)):
                return
            now = "another run has begun in a new folder of that name"
        except (FileNotFoundError, NotADirectoryError):
            now = f"its {LOCK} is gone"
        raise UserError(
            f"{self._out}: was removed while this run was writing into it: {now}. It ends here and has "
            "written nothing more. Start it again with another --out"
        )


@contextmanager
def claimed(out: Path, world: World, *, resume: bool, overwrite: bool) -> Iterator[Claim]:
    """Makes the run's folder and holds it: nothing of an earlier run is lost unasked, and no second run writes here.

    The lock belongs to the leader's process and goes with it, however it ends. It is a record lock rather than
    `flock()`, which loader workers would inherit and keep for the seconds that they outlive a killed run.

    Raises:
        UserError: the folder holds something and neither `resume` nor `overwrite` is given; overwriting a folder that
            is no run's; another run is at it; or it cannot be written.
    """
    with ExitStack() as held:
        claim = Claim(out)
        with world.agreeing():
            if world.leader:
                claim = held.enter_context(_claim(out, resume=resume, overwrite=overwrite))
        yield claim


@contextmanager
def _claim(out: Path, *, resume: bool, overwrite: bool) -> Iterator[Claim]:
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
        yield Claim(out, lock)


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
        require_file(out / RUN)
        method = json.loads((out / RUN).read_text(encoding="utf-8"))["method"]
    except (OSError, ValueError, KeyError, TypeError, DamagedCheckpoint) as error:
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


def describe_images(source: ImageSource) -> dict[str, Any]:
    """Identity of a run's images, for its checkpoints."""
    return {"name": source.name, "images": len(source)}


class Run:
    """One training run; a context manager around the trainer's loop.

    What the loop must do to be resumed exactly, stopped by signals, and ended by a bad loss before that reaches the
    weights:

        for epoch in run.epochs:
            for step, parts in run.steps(epoch):            # fetches; counts the last step as done; saves; stops
                ...                                         # forward, backward
                loss = run.check(loss, optimizer)           # mean over processes; raises before weights are touched
                ...                                         # clipping, optimiser step
                run.record(loss, lr=lr)                     # log

    with everything that changes during training in `parts`, and random numbers drawn from PyTorch's generators or from
    (seed, step) alone. With several processes all of them make these calls; the folder is the leader's.

    Args:
        method: name of the method, for the checkpoint.
        config: the resolved configuration; written to `config.yaml`.
        out: the run's folder, within `claimed()`.
        claim: the hold on it that this gave.
        loader: gives the steps of an epoch.
        parts: what a checkpoint holds, by name: networks, losses with buffers, optimiser, precision.
        device: where the networks are.
        console: where progress goes.
        world: the processes of the run.
        resume: go on from the last checkpoint, if there is one.
        force: resume even though the configuration differs.
        data_moved: resume with the same images in another place.
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
        claim: Claim,
        loader: MultiViewLoader,
        parts: Mapping[str, Stateful],
        device: torch.device,
        console: Console,
        world: World,
        *,
        resume: bool = False,
        force: bool = False,
        data_moved: bool = False,
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
        self.grad_norm: float | None = None
        """L2 norm of the step's gradients before clipping, over all parameters; None if it is not finite."""
        self._method = method
        self._config = config
        self._claim = claim
        self._loader = loader
        self._parts = dict(parts)
        self._device = device
        self._on_row = on_row
        self._temporary = temporary
        self._signals = StopSignals(leader=world.leader, saves=not temporary)
        self._stop: signal.Signals | None = None
        self._loss_sum, self._loss_count = 0.0, 0
        """Loss of the steps since the last row."""
        self._epoch_loss_sum, self._epoch_loss_count = 0.0, 0
        """Loss of the epoch's steps so far."""
        self._batches: list[ViewBatch] = []
        self._saved: int | None = None
        self._started = self._clock = time.perf_counter()
        self._clock_step = 0
        """Steps that were done when the clock was read for the last row."""
        self._last_is_whole = True
        if world.rank > 0:
            # Up to here all processes drew the same numbers, for equal weights. From here on each has its own stream.
            torch.manual_seed(mix(config.train.seed, world.rank))
        if resume:
            self._restore(console, force, data_moved)
        self._clock_step = self.step
        self.log: RunLog = NoLog()
        with world.agreeing():
            if world.leader:
                describe_run(out, method, config)
                selects = config.combination_slots().num_combinations > 1
                progress = Progress(
                    console,
                    total_steps=self.total_steps,
                    epochs=config.train.epochs,
                    first_step=self.step,
                    selecting_steps=selecting_steps(config.selection, self.total_steps) if selects else lambda step: 0,
                )
                self.log = RunLog(
                    out,
                    progress,
                    config=to_yaml(config),
                    steps_per_epoch=self.steps_per_epoch,
                    first_step=self.step,
                )
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
        a signal asked to stop. A signal also ends a wait for the loader, and so does a loader that hangs for
        `data.timeout` seconds or has died; the steps done by then are saved.

        Raises:
            UserError: images cannot be read, or the checkpoint cannot be written.
            NoBatch: the loader hangs or has died.
            Stopped: a signal asked to stop.
        """
        batches = self._loader.epoch(
            epoch,
            start_step=self.step - epoch * self.steps_per_epoch,
            stopped=lambda: self._signals.received is not None,
        )
        first_step, started = self.step, time.perf_counter()
        while True:
            parts, stop = self._fetch(batches)
            if stop is None:
                if parts is None:
                    return
                self.skipped += [name for part in parts for name in part.skipped]
                self._batches = parts
                yield self.step, parts
                self.step += 1
                self.log.advance(self.step, epoch + 1)
                if self.step % self.steps_per_epoch == 0:
                    self._note_epoch(epoch, self.step - first_step, time.perf_counter() - started)
                saved = self._save_if_due()
                stop = self._signals.received if self.world.size == 1 else self._stop
            else:
                saved = self._nothing_to_save
            if stop is not None and self.step < self.total_steps:
                if not saved and not self._temporary:
                    self.save()
                go_on = "" if self._temporary else f" Go on with: hvp resume {shlex.quote(str(self.out))}"
                raise Stopped(
                    f"{stop.name}: stopped after step {self.step} of {self.total_steps}.{go_on}",
                    EXIT_CODES[stop],
                    self.world.leader,
                )

    def _fetch(self, batches: Iterator[list[ViewBatch]]) -> tuple[list[ViewBatch] | None, signal.Signals | None]:
        """The next step's parts, None at the end of the epoch; or the signal that ended a process's wait for them."""
        parts: list[ViewBatch] | None = None
        mistake: UserError | None = None
        stop: signal.Signals | None = None
        with self.waiting.running():
            try:
                parts = next(batches, None)
            except WaitInterrupted:
                stop = self._signals.received
            except UserError as error:
                if self.world.size == 1 and not isinstance(error, NoBatch):
                    raise
                mistake = error
            # one exchange in all, for what `World.agreeing()` would exchange and for the signal
            bad, lost, *stops = self.world.sum(
                [mistake is not None, isinstance(mistake, NoBatch), *(stop is number for number in EXIT_CODES)]
            )
        if lost:
            with suppress(UserError):  # which would hide what happened
                if not self._nothing_to_save:
                    self.save()
            if isinstance(mistake, NoBatch):
                mistake = self._with_advice(mistake)
        if bad:
            with self.world.agreeing():
                if mistake is not None:
                    raise mistake
        return parts, next((number for number, count in zip(EXIT_CODES, stops, strict=True) if count), None)

    @property
    def _nothing_to_save(self) -> bool:
        return self.step in (0, self._saved)

    def _with_advice(self, error: NoBatch) -> NoBatch:
        lines = [str(error)]
        if isinstance(error, Hanging):
            lines.append("Storage that is only slow may have more time: --set data.timeout=SECONDS, or 0 for ever.")
        if self._saved is not None:
            lines.append(f"Step {self._saved} is saved. Go on with: hvp resume {self.out}")
        return type(error)("\n    ".join(lines))

    def check(self, loss: Tensor, optimizer: torch.optim.Optimizer, **values: float) -> float:
        """The loss of the step, mean over the processes; to be asked for before clipping and the optimiser's step.

        Leaves the gradients' norm in `grad_norm`. With several processes this is also where they agree on a signal.

        Args:
            loss: scalar, mean over this process's images.
            optimizer: its gradients are of their true size (`Precision.unscale()`).
            values: what else the message is to say of the step, such as the learning rate.

        Raises:
            UserError: the loss of a process, or the norm of the gradients, is not finite. With fp16 a norm may be: the
                gradient scaler leaves that step out. Weights and checkpoints are those of the step before, and the
                images are listed in `nonfinite.json`.
        """
        square = squared_gradient_norm(optimizer, self.world.size)
        mine, square_part = torch.stack((loss.detach().double(), square.to(loss.device))).tolist()
        received = [float(self._signals.received is number) for number in EXIT_CODES]
        total, squared_norm, *stops = self.world.sum([mine, square_part, *received])
        self._stop = next((number for number, count in zip(EXIT_CODES, stops, strict=True) if count), None)
        finite = math.isfinite(squared_norm)
        self.grad_norm = math.sqrt(squared_norm) if finite else None
        if not math.isfinite(total) or (not finite and self._config.train.precision != "fp16"):
            self._report_nonfinite(mine, squared_norm, values)
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
        self._epoch_loss_sum += loss
        self._epoch_loss_count += 1
        if not self.row_due:
            return
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        steps, self._clock_step = done - self._clock_step, done
        mine: dict[str, float | list[float]] = {
            "loss": self._loss_sum / self._loss_count,
            **values,
            "images_per_s": steps * self._config.train.batch_size / seconds,
            "wait_share": self.waiting.take() / seconds,
            "select_share": self.selecting.take() / seconds,
        }
        if self.grad_norm is not None:
            mine["grad_norm"] = self.grad_norm
        row: dict[str, Any] = {
            "step": done,
            "epoch": (done - 1) // self.steps_per_epoch + 1,
            "seconds": self.log.seconds + now - self._started,
            **self._mean(mine),
            "peak_memory": max(self.world.gather(peak_memory(self._device))),
        }
        with self.world.agreeing():
            self._claim.check()
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
            "epoch": self.step // self.steps_per_epoch,  # so many are finished
            "steps_per_epoch": self.steps_per_epoch,
            "log": {
                "loss_sum": self._loss_sum,
                "loss_count": self._loss_count,
                "epoch_loss_sum": self._epoch_loss_sum,
                "epoch_loss_count": self._epoch_loss_count,
            },
            "processes": streams,
            "data": describe_images(self._loader.source),
            "versions": versions(),
            **{name: part.state_dict() for name, part in self._parts.items()},
        }
        with self.world.agreeing():
            self._claim.check()
            if self.world.leader and path is not None:
                save_checkpoint(path, content)
            elif self.world.leader:
                # a damaged last.pt, after which previous.pt was taken, must not take its place
                previous = self.out / PREVIOUS if self._last_is_whole else None
                save_checkpoint(self.last_checkpoint, content, previous)
                self._last_is_whole = True
        self._saved = self.step

    def _note_epoch(self, epoch: int, steps: int, seconds: float) -> None:
        """The line that stays of an epoch: its mean loss, and what its steps took since the last start of the run."""
        loss = self._epoch_loss_sum / max(1, self._epoch_loss_count)
        self._epoch_loss_sum, self._epoch_loss_count = 0.0, 0
        rate = images_per_second(steps * self._config.train.batch_size / seconds)
        self.log.note(
            f"epoch {epoch + 1}/{self._config.train.epochs}: loss {loss:.4f}, {steps} "
            f"step{'' if steps == 1 else 's'} in {duration(seconds)}, {rate}"
        )

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

    def _report_nonfinite(self, mine: float, squared_norm: float, values: Mapping[str, float]) -> None:
        """Names the step and its images, and ends the run in all processes.

        Gradients have been averaged, so that of a gradient alone all processes' images are listed.
        """
        source = self._loader.source
        images = [
            {"rank": self.world.rank, "index": index, "name": source.describe(index)}
            for part in self._batches
            for index in part.index.tolist()
        ]
        losses = self.world.gather(mine)
        bad = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        listed_ranks = bad or range(self.world.size)
        lists = self.world.gather(images if self.world.rank in listed_ranks else [])
        listed = self.out / "nonfinite.json"
        with self.world.agreeing():
            where = f" on rank {', '.join(map(str, bad))}" if self.world.size > 1 and bad else ""
            shown = "".join(f", {name} {value:g}" for name, value in values.items())
            norm = str(math.sqrt(squared_norm)) if squared_norm >= 0 else "nan"
            what = (
                f"the loss is {losses[bad[0]]}{where}" if bad else f"the loss is {losses[0]:g}, but its gradient {norm}"
            )
            about = {
                "step": self.step + 1,
                "loss": [str(losses[rank]) for rank in listed_ranks],
                "gradient_norm": norm,
                **values,
                "images": [image for of_rank in lists for image in of_rank],
            }
            try:
                self._claim.check()
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
                f"step {self.step + 1}: {what}{shown}. {kept}. {images_are}.\n"
                "    Lower the learning rate or raise the precision. Resuming as it is repeats the step"
            )

    def _restore(self, console: Console, force: bool, data_moved: bool) -> None:
        content: dict[str, Any] | None = None
        with self.world.agreeing():
            if self.world.leader:
                content, self._last_is_whole = _load_newest(self.out, console)
        step = self.world.broadcast(None if content is None else content["step"])
        if step is None:
            if self.world.leader:
                console.print(
                    f"{self.out}: no checkpoint was written yet, so the run starts from the beginning", **PLAIN
                )
            return
        with self.world.agreeing():
            if content is None:
                content, _ = _load_newest(self.out, Console(quiet=True))
            if content is None or content["step"] != step:
                raise UserError(f"{self.out}: the leader reads step {step} here, this machine does not. Is it shared?")
            self._check_fit(content, force, data_moved)
            self._take_over(content)
        if self.world.leader:
            console.print(f"{self.last_checkpoint}: going on after step {self.step} of {self.total_steps}", **PLAIN)

    def _check_fit(self, content: Mapping[str, Any], force: bool, data_moved: bool) -> None:
        if content["method"] != self._method:
            raise UserError(f"{self.out}: is a run of {content['method']}, not of {self._method}")
        before, now = content["config"], self._config.model_dump(mode="json")
        free = FREE_TO_CHANGE | ({"data.path"} if data_moved else set())
        differences = _differences(before, now, free)
        steps = content["steps_per_epoch"]
        # early versions did not count the images; but for them, the number of steps follows from the batch size alone
        images = content.get("data") or {"name": before.get("data", {}).get("path"), "images": None}
        here = describe_images(self._loader.source)
        if images["images"] != here["images"] and (images["images"] or steps != self.steps_per_epoch):
            differences.append(
                f"images: {images['name']} in the checkpoint, {here['name']} now; steps per epoch: {steps} and "
                f"{self.steps_per_epoch}"
            )
        if differences and not force:
            listed = "\n".join(f"  {line}" for line in differences)
            moved = any(line.startswith("data.path:") for line in differences)
            raise UserError(
                f"{self.last_checkpoint}: belongs to another configuration:\n{listed}\n"
                "Resume with the same values, start a new run with another --out, or go on all the same with --force"
                + (f". If the same images have moved: hvp resume {self.out} --data DIR" if moved else "")
            )

    def _take_over(self, content: Mapping[str, Any]) -> None:
        """Everything that changes during training, as it was."""
        for name, part in self._parts.items():
            try:
                part.load_state_dict(content[name])
                _check_moments(getattr(part, "part", part))
            except Exception as error:  # with --force, another architecture; or whatever stands in the entry's place
                raise UserError(f"{self.out}: {name} does not fit this configuration: {error}") from error
        self.step = self._saved = content["step"]
        log = content["log"]
        self._loss_sum, self._loss_count = log["loss_sum"], log["loss_count"]
        # a checkpoint of an earlier version, or of an upstream's, does not know the epoch's
        self._epoch_loss_sum, self._epoch_loss_count = log.get("epoch_loss_sum", 0.0), log.get("epoch_loss_count", 0)
        streams, rank = content["processes"], self.world.rank
        if self.world.leader:
            self.skipped = [name for stream in streams for name in stream["skipped"]]
        if rank < len(streams):
            try:
                torch.set_rng_state(streams[rank]["torch"])
                if self._device.type == "cuda" and streams[rank]["cuda"] is not None:
                    torch.cuda.set_rng_state(streams[rank]["cuda"])
            except RuntimeError as error:
                raise DamagedCheckpoint(f"{self.out}: its random numbers are not PyTorch's: {error}") from error
        else:
            torch.manual_seed(mix(self._config.train.seed, rank, self.step))


def _check_moments(part: object) -> None:
    """Sees to it that an optimiser's moments are its parameters', which PyTorch does not.

    Raises:
        ValueError: they are not.
    """
    if not isinstance(part, Optimizer):
        return
    for parameter, moments in part.state.items():
        for name, value in moments.items():
            shape = list(value.shape) if isinstance(value, Tensor) else value
            if name != "step" and value is not None and shape != list(parameter.shape):
                raise ValueError(f"{name} is {shape!r:.80}, of a parameter of shape {list(parameter.shape)}")


def _load_newest(out: Path, console: Console) -> tuple[dict[str, Any] | None, bool]:
    """The last checkpoint, or where that is damaged or missing the one before, None where there is neither; and whether
    no damaged one was passed over.

    Raises:
        DamagedCheckpoint: there are some, but none is whole.
        UserError: one cannot be read.
    """
    problems: list[str] = []
    for path in (out / LAST, out / PREVIOUS):
        if not path.exists():  # last.pt is missing after a crash between the two renames of a save
            continue
        try:
            content = load_checkpoint(path)
        except DamagedCheckpoint as error:
            problems.append(str(error))
            continue
        if problems:
            console.print(f"{problems[0]}\nTaking {path} of step {content['step']} instead", **PLAIN)
        return content, not problems
    if not problems:
        return None, True
    kept = max(out.glob("epoch*.pt"), default=None)
    way = f"Copy {kept} to {out / LAST} to go on from there" if kept else "Start over with hvp pretrain --overwrite"
    raise DamagedCheckpoint("\n".join(problems) + f"\nNo checkpoint of this run can be gone on from. {way}")


def versions() -> dict[str, str]:
    """What a run was made with."""
    return {"hvp": version("hvp"), "torch": str(torch.__version__), "python": platform.python_version()}


# What may differ between a run and its continuation without changing what is computed.
FREE_TO_CHANGE = {
    *("data.workers", "data.timeout", "train.save_every", "train.keep_every", "train.log_every", "train.device"),
    "train.sharding",
}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str]) -> list[str]:
    old, new = flatten(before), flatten(now)
    if same_dataset(old.get("data.path"), new.get("data.path")):
        free = {*free, "data.path"}
    keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key) and key not in free]
    return [f"{key}: {old.get(key)} in the checkpoint, {new.get(key)} now" for key in keys]
