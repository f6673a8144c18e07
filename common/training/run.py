"""A run: the trainer's steps with a clock, checkpoints, a log, and signals that stop it.

The trainer's own loop calls it; it calls nothing back.
"""

import math
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer

from hvp.common.config.resolving import to_yaml
from hvp.common.config.sections import RunConfig
from hvp.common.data.workers import Hanging, NoBatch, WaitInterrupted
from hvp.common.errors import Stopped, UserError
from hvp.common.training.checkpoint import save_checkpoint
from hvp.common.training.distributed import World
from hvp.common.training.folder import LAST, PREVIOUS, Claim, describe_run, versions
from hvp.common.training.log import NoLog, RunLog
from hvp.common.training.nonfinite import stop_nonfinite
from hvp.common.training.optimizers import squared_gradient_norm
from hvp.common.training.peak_memory import peak_memory
from hvp.common.training.precision import Precision
from hvp.common.training.progress import Progress, images_per_second
from hvp.common.training.rescuing import Rescuer
from hvp.common.training.resume import Start, Stateful, describe_images, restore
from hvp.common.training.selecting import selecting_steps
from hvp.common.training.signals import EXIT_CODES, StopSignals
from hvp.common.training.step import Step, Value
from hvp.common.training.timing import Stopwatch, duration
from hvp.common.views import MultiViewLoader, ViewBatch
from hvp.common.views.randomness import mix


class Run(Step):
    """One training run; a context manager around the trainer's loop.

        for epoch in run.epochs:
            for step, batch in run.steps(epoch):            # fetches; counts the last step as done; saves; stops
                ...                                         # forward and backward passes: see `Step`
                run.optimize(optimizer)                     # raises before a bad loss or gradient reaches the weights
                run.record(lr=lr)

    To be resumed exactly, everything that changes during training is in `parts`, and random numbers come from PyTorch's
    generators or from (seed, step) alone. With several processes, all make these calls; the leader owns the folder.

    Args:
        method: name of the method, for the checkpoint.
        config: the resolved configuration; written to `config.yaml`.
        out: the run's folder, within `claimed()`.
        claim: the claim on it.
        loader: batches of an epoch.
        parts: contents of a checkpoint, by name: networks, losses with buffers, optimiser.
        trained: the network that learns.
        precision: device and number format.
        rescuer: the Rescue loss of that network.
        console: destination of progress messages.
        world: the processes of the run.
        resume: continue from the last checkpoint, if there is one.
        force: resume although the configuration differs.
        data_moved: resume with the same images in another place.
        on_row: called with every row of the log once it is written; an exception from it stops the run.
        temporary: the folder will be deleted, so a signal stops the run without a checkpoint.

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
        trained: nn.Module,
        precision: Precision,
        rescuer: Rescuer,
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
        self.waiting = Stopwatch(torch.device("cpu"))
        self.grad_norm: float | None = None
        """L2 norm of the step's gradients before clipping, over all parameters; None if it is not finite."""
        self._method = method
        self._config = config
        self._claim = claim
        self._loader = loader
        self._parts = {**parts, "precision": precision}
        self._on_row = on_row
        self._temporary = temporary
        self._signals = StopSignals(leader=world.leader, saves=not temporary)
        self._stop: signal.Signals | None = None
        self._batch: list[ViewBatch] = []
        self._started = self._clock = time.perf_counter()
        self.log: RunLog = NoLog()
        if world.rank > 0:
            # So far all processes drew the same numbers, for equal weights. From here on each has its own stream.
            torch.manual_seed(mix(config.train.seed, world.rank))
        start = Start()
        if resume:
            source, steps = loader.source, loader.steps_per_epoch
            start = restore(
                *(out, method, config, source, self._parts, steps, world, precision.device, console),
                force=force,
                data_moved=data_moved,
            )
        super().__init__(
            config, trained, precision, world, rescuer, steps_per_epoch=loader.steps_per_epoch, step=start.step
        )
        self.skipped = start.skipped
        """Images that this process could not decode and replaced, in order."""
        self._saved, self._last_is_whole = start.saved, start.last_is_whole
        self._loss_sum, self._loss_count = start.loss
        self._epoch_loss_sum, self._epoch_loss_count = start.epoch_loss
        self._clock_step = self.step
        """Steps done when the clock was read for the last row."""
        with world.agreeing():
            if world.leader:
                describe_run(out, method, config)
                self.log = self._open_log(console)

    def _open_log(self, console: Console) -> RunLog:
        config = self._config
        selects = config.combination_slots().num_combinations > 1
        progress = Progress(
            console,
            total_steps=self.total_steps,
            epochs=config.train.epochs,
            first_step=self.step,
            selecting_steps=selecting_steps(config.selection, self.total_steps) if selects else lambda step: 0,
        )
        return RunLog(
            self.out, progress, config=to_yaml(config), steps_per_epoch=self.steps_per_epoch, first_step=self.step
        )

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
                self.note(f"{len(skipped)} images could not be read and were replaced:\n{listed}")

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self.log.note(text)

    @property
    def row_due(self) -> bool:
        """Whether `record()` writes a row of the log for this step."""
        done = self.step + 1
        return done % self._config.train.log_every == 0 or done == self.total_steps

    @property
    def last_checkpoint(self) -> Path:
        return self.out / LAST

    @property
    def epochs(self) -> range:
        """Epochs that are not finished yet."""
        return range(self.step // self.steps_per_epoch, self._config.train.epochs)

    def steps(self, epoch: int) -> Iterator[tuple[int, list[ViewBatch]]]:
        """Yield the steps of an epoch that are not done yet, each with the `train.accumulate` parts of its batch.

        When the loop asks for the next step, the last one counts as done; a checkpoint is written if one is due or a
        signal asked to stop. A signal also ends a wait for the loader, and so does a loader that hangs for
        `data.timeout` seconds or has died; the steps done so far are saved.

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
            batch, stop = self._fetch(batches)
            if stop is None:
                if batch is None:
                    return
                self.skipped += [name for part in batch for name in part.skipped]
                self._batch = batch
                self._begin_step()
                yield self.step, batch
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
                advice = "" if self._temporary else f" Continue with: hvp resume {shlex.quote(str(self.out))}"
                raise Stopped(
                    f"{stop.name}: stopped after step {self.step} of {self.total_steps}.{advice}",
                    EXIT_CODES[stop],
                    self.world.leader,
                )

    def _fetch(self, batches: Iterator[list[ViewBatch]]) -> tuple[list[ViewBatch] | None, signal.Signals | None]:
        """Return the next batch, None at the end of the epoch; or the signal that ended a process's wait for it."""
        batch: list[ViewBatch] | None = None
        failure: UserError | None = None
        stop: signal.Signals | None = None
        with self.waiting.running():
            try:
                batch = next(batches, None)
            except WaitInterrupted:
                stop = self._signals.received
            except UserError as error:
                if self.world.size == 1 and not isinstance(error, NoBatch):
                    raise
                failure = error
            # one exchange for the errors, which `World.agreeing()` would exchange, and for the signal
            failed, lost, *stops = self.world.sum(
                [failure is not None, isinstance(failure, NoBatch), *(stop is number for number in EXIT_CODES)]
            )
        if lost:
            with suppress(UserError):  # it would hide the cause
                if not self._nothing_to_save:
                    self.save()
            if isinstance(failure, NoBatch):
                failure = self._with_advice(failure)
        if failed:
            with self.world.agreeing():
                if failure is not None:
                    raise failure
        return batch, _first_signal(stops)

    @property
    def _nothing_to_save(self) -> bool:
        return self.step in (0, self._saved)

    def _with_advice(self, error: NoBatch) -> NoBatch:
        lines = [str(error)]
        if isinstance(error, Hanging):
            lines.append("If storage is just slow, allow it more time: --set data.timeout=SECONDS, or 0 for no limit.")
        if self._saved is not None:
            lines.append(f"Step {self._saved} is saved. Continue with: hvp resume {self.out}")
        return type(error)("\n    ".join(lines))

    def _check(self, loss: Tensor, optimizer: Optimizer) -> float:
        """Return the step's loss, mean over the processes, and set `grad_norm`; processes agree on a signal here.

        Raises:
            UserError: the loss of a process or the norm of the gradients is not finite. An infinite norm is allowed
                under fp16: the gradient scaler skips that step. Weights and checkpoints are those of the step before,
                and the images are listed in `nonfinite.json`.
        """
        square = squared_gradient_norm(optimizer, self.world.size)
        own_loss, square_part = torch.stack((loss.detach().double(), square.to(loss.device))).tolist()
        received = [float(self._signals.received is number) for number in EXIT_CODES]
        total, squared_norm, *stops = self.world.sum([own_loss, square_part, *received])
        self._stop = _first_signal(stops)
        finite = math.isfinite(squared_norm)
        self.grad_norm = math.sqrt(squared_norm) if finite else None
        if not math.isfinite(total) or (not finite and self._config.train.precision != "fp16"):
            values = {"lr": max(group["lr"] for group in optimizer.param_groups), **self.precision.statistics()}
            stop_nonfinite(
                *(self.out, self._claim, self.world, self._loader.source, self._batch),
                step=self.step + 1,
                loss=own_loss,
                squared_norm=squared_norm,
                values=values,
                saved=self._saved,
            )
        return total / self.world.size

    def _record(self, loss: float, values: Mapping[str, Value]) -> None:
        self._loss_sum += loss
        self._loss_count += 1
        self._epoch_loss_sum += loss
        self._epoch_loss_count += 1
        if not self.row_due:
            return
        done, now = self.step + 1, time.perf_counter()
        seconds, self._clock = now - self._clock, now
        steps, self._clock_step = done - self._clock_step, done
        own: dict[str, Value] = {
            "loss": self._loss_sum / self._loss_count,
            **values,
            "images_per_s": steps * self._config.train.batch_size / seconds,
            "wait_share": self.waiting.take() / seconds,
            "select_share": self.selecting.take() / seconds,
        }
        if self.grad_norm is not None:
            own["grad_norm"] = self.grad_norm
        row: dict[str, Any] = {
            "step": done,
            "epoch": (done - 1) // self.steps_per_epoch + 1,
            "seconds": self.log.seconds + now - self._started,
            **self._mean(own),
            "peak_memory": max(self.world.gather(peak_memory(self.device))),
        }
        with self.world.agreeing():
            self._claim.check()
            self.log.write(row)
        self._loss_sum, self._loss_count = 0.0, 0
        if self._on_row is not None:
            self._on_row(row)

    def _mean(self, row: Mapping[str, Value]) -> dict[str, Value]:
        """Return a row's numbers, mean over the processes."""
        if self.world.size == 1:
            return dict(row)
        flat = [number for value in row.values() for number in (value if isinstance(value, list) else [value])]
        means = iter(self.world.mean(flat))
        return {
            name: [next(means) for _ in value] if isinstance(value, list) else next(means)
            for name, value in row.items()
        }

    def save(self, path: Path | None = None) -> None:
        """Write a checkpoint from which a run can be resumed exactly.

        Args:
            path: the file; `last.pt` if left out, whose predecessor is kept as `previous.pt`.

        Raises:
            UserError: it cannot be written; earlier checkpoints are still there.
        """
        streams = self.world.gather(
            {
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
                "skipped": self.skipped,
            }
        )
        content = {
            "method": self._method,
            "config": self._config.model_dump(mode="json"),
            "step": self.step,
            "epoch": self.step // self.steps_per_epoch,  # finished ones
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
                # a damaged last.pt must not replace the previous.pt from which the run was resumed
                previous = self.out / PREVIOUS if self._last_is_whole else None
                save_checkpoint(self.last_checkpoint, content, previous)
                self._last_is_whole = True
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

    def _note_epoch(self, epoch: int, steps: int, seconds: float) -> None:
        """Print an epoch's mean loss, and the time of its steps since the run was last started."""
        loss = self._epoch_loss_sum / max(1, self._epoch_loss_count)
        self._epoch_loss_sum, self._epoch_loss_count = 0.0, 0
        rate = images_per_second(steps * self._config.train.batch_size / seconds)
        self.note(
            f"epoch {epoch + 1}/{self._config.train.epochs}: loss {loss:.4f}, {steps} "
            f"step{'' if steps == 1 else 's'} in {duration(seconds)}, {rate}"
        )


def _first_signal(counts: list[float]) -> signal.Signals | None:
    """Return the first of the stop signals that some process received."""
    return next((number for number, count in zip(EXIT_CODES, counts, strict=True) if count), None)
