"""A run: its folder, its clock, its checkpoints. The trainer's own loop calls it; it calls nothing back."""

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from rich.console import Console

from hvp.common.config import flatten, to_yaml
from hvp.common.engine.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from hvp.common.engine.log import RunLog
from hvp.common.engine.timing import Stopwatch
from hvp.common.errors import UserError
from hvp.common.sections import RunConfig
from hvp.common.views import MultiViewLoader, ViewBatch


class Stateful(Protocol):
    """A module, optimiser or scaler."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds PyTorch's generators, and gives the caller's back their state afterwards."""
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def available_workers(asked: int | None, device: torch.device) -> int:
    """Loader processes: as asked, or the cores at hand, at most 16; a quarter of them where the CPU trains, too."""
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // 4) if device.type == "cpu" else min(16, cores)


def claim_folder(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Makes the run's folder, and sees to it that nothing of an earlier run is lost unasked.

    Raises:
        UserError: the folder holds something and neither `resume` nor `overwrite` is given; overwriting a folder that
            is no run's; or it cannot be written.
    """
    try:
        occupied = out.exists() and any(out.iterdir())
        if occupied and overwrite:
            if not (out / "config.yaml").is_file():
                raise UserError(f"{out}: holds files but no run (no config.yaml), so --overwrite leaves it alone")
            shutil.rmtree(out)
        elif occupied and not resume:
            raise UserError(
                f"{out}: is not empty. Go on with --resume, start over with --overwrite, or give another --out"
            )
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{out}: cannot be used as output folder: {error.strerror}") from error


class Run:
    """One training run; a context manager around the trainer's loop.

    Args:
        method: name of the method, for the checkpoint.
        config: the resolved configuration; written to `config.yaml`.
        out: the run's folder, claimed by `claim_folder()`.
        loader: gives the steps of an epoch.
        parts: what a checkpoint holds, by name: networks, losses with buffers, optimiser, scaler.
        device: where the networks are.
        console: where progress goes.
        resume: go on from `last.pt`, if there is one.
        on_row: told every row of the log once it is written; what it raises ends the run.

    Raises:
        UserError: `last.pt` cannot be read, or does not fit the configuration.
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
        *,
        resume: bool = False,
        on_row: Callable[[Mapping[str, Any]], None] | None = None,
    ):
        self.out = out
        self.step = 0
        """Optimiser steps done."""
        self.steps_per_epoch = loader.steps_per_epoch
        self.total_steps = config.train.epochs * loader.steps_per_epoch
        self.waiting = Stopwatch(torch.device("cpu"))
        self.selecting = Stopwatch(device)
        self.skipped: list[str] = []
        """Images that did not decode and were replaced, in the order in which they were met."""
        self._method = method
        self._config = config
        self._loader = loader
        self._parts = dict(parts)
        self._device = device
        self._on_row = on_row
        self._loss_sum, self._loss_count = 0.0, 0
        self._clock = time.perf_counter()
        if resume:
            self._restore(console)
        write_atomically(out / "config.yaml", lambda file: file.write(to_yaml(config).encode()))
        self.log = RunLog(out, console, total_steps=self.total_steps, first_step=self.step)

    def __enter__(self) -> "Run":
        self.log.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.log.__exit__(kind, error, trace)
        if kind is None and self.skipped:
            listed = "\n".join(f"  {name}" for name in sorted(set(self.skipped)))
            self.log.note(f"{len(set(self.skipped))} images could not be read and were replaced:\n{listed}")

    @property
    def last_checkpoint(self) -> Path:
        return self.out / "last.pt"

    @property
    def epochs(self) -> range:
        """The epochs that are not finished yet."""
        return range(self.step // self.steps_per_epoch, self._config.train.epochs)

    def steps(self, epoch: int) -> Iterator[tuple[int, list[ViewBatch]]]:
        """The steps of an epoch that are not done yet, each with its parts (`train.accumulate` of them).

        When the loop asks for the next step, the last one counts as done, and a checkpoint is written if one is due.
        """
        batches = self._loader.epoch(epoch, start_step=self.step - epoch * self.steps_per_epoch)
        while True:
            with self.waiting.running():
                parts = next(batches, None)
            if parts is None:
                return
            self.skipped += [name for part in parts for name in part.skipped]
            yield self.step, parts
            self.step += 1
            self.log.advance(self.step, epoch)
            self._save_if_due()

    def record(self, loss: float, **values: float | list[float]) -> None:
        """Takes a step's loss, and every `train.log_every` steps writes a row of the log.

        The row's loss is the mean since the last row; `values` are those of its step.

        Raises:
            UserError: the loss is not finite.
        """
        done = self.step + 1
        if loss != loss or abs(loss) == float("inf"):
            last = (
                f"The last good checkpoint is {self.last_checkpoint}"
                if self.last_checkpoint.exists()
                else "No checkpoint"
            )
            raise UserError(f"step {done}: the loss is {loss}. {last}. Lower the learning rate or raise the precision")
        self._loss_sum += loss
        self._loss_count += 1
        if done % self._config.train.log_every and done != self.total_steps:
            return
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        steps = self._loss_count
        row: dict[str, Any] = {
            "step": done,
            "epoch": (done - 1) // self.steps_per_epoch,
            "loss": self._loss_sum / steps,
            **values,
            "images_per_s": steps * self._config.train.batch_size / seconds,
            "wait_share": self.waiting.take() / seconds,
            "select_share": self.selecting.take() / seconds,
        }
        self.log.write(row)
        self._loss_sum, self._loss_count = 0.0, 0
        if self._on_row is not None:
            self._on_row(row)

    def save(self, path: Path | None = None) -> None:
        """Writes a checkpoint, `last.pt` unless told otherwise, that a resume continues from exactly."""
        save_checkpoint(
            path or self.last_checkpoint,
            {
                "method": self._method,
                "config": self._config.model_dump(mode="json"),
                "step": self.step,
                "epoch": self.step // self.steps_per_epoch,
                "steps_per_epoch": self.steps_per_epoch,
                "log": {"loss_sum": self._loss_sum, "loss_count": self._loss_count, "skipped": self.skipped},
                "random": {
                    "torch": torch.get_rng_state(),
                    "cuda": torch.cuda.get_rng_state() if self._device.type == "cuda" else None,
                },
                "versions": {
                    "hvp": version("hvp"),
                    "torch": str(torch.__version__),
                    "python": platform.python_version(),
                },
                **{name: part.state_dict() for name, part in self._parts.items()},
            },
        )

    def _save_if_due(self) -> None:
        train = self._config.train
        epochs, inside = divmod(self.step, self.steps_per_epoch)
        if inside == 0 or (train.save_every and self.step % train.save_every == 0):
            self.save()
        if inside == 0 and train.keep_every and epochs % train.keep_every == 0:
            self.save(self.out / f"epoch{epochs:04d}.pt")

    def _restore(self, console: Console) -> None:
        if not self.last_checkpoint.exists():
            console.print(
                f"{self.out}: no checkpoint was written yet, so the run starts from the beginning", markup=False
            )
            return
        content = load_checkpoint(self.last_checkpoint)
        differences = _differences(content["config"], self._config.model_dump(mode="json"))
        if content["method"] != self._method:
            differences = [f"method: {content['method']} in the checkpoint, {self._method} now"]
        if content["steps_per_epoch"] != self.steps_per_epoch:
            differences.append(
                f"steps per epoch: {content['steps_per_epoch']} in the checkpoint, {self.steps_per_epoch} now"
            )
        if differences:
            listed = "\n".join(f"  {line}" for line in differences)
            raise UserError(
                f"{self.last_checkpoint}: belongs to another configuration:\n{listed}\n"
                "Resume with the same values, or start a new run with another --out"
            )
        for name, part in self._parts.items():
            part.load_state_dict(content[name])
        torch.set_rng_state(content["random"]["torch"])
        if self._device.type == "cuda" and content["random"]["cuda"] is not None:
            torch.cuda.set_rng_state(content["random"]["cuda"])
        self.step = content["step"]
        log = content["log"]
        self._loss_sum, self._loss_count, self.skipped = log["loss_sum"], log["loss_count"], log["skipped"]
        console.print(f"{self.last_checkpoint}: going on after step {self.step} of {self.total_steps}", markup=False)


# What may differ between a run and its continuation without changing what is computed.
FREE_TO_CHANGE = {"data.workers", "train.save_every", "train.keep_every", "train.log_every", "train.device"}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    old, new = flatten(before), flatten(now)
    keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key) and key not in FREE_TO_CHANGE]
    return [f"{key}: {old.get(key)} in the checkpoint, {new.get(key)} now" for key in keys]
