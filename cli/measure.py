"""Cost of a run, measured on a few of its own steps, for `hvp pretrain ... --dry-run --measure`."""

import math
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hvp.common.config.resolving import resolve
from hvp.common.data import open_dataset
from hvp.common.errors import UserError
from hvp.common.training.distributed import available_workers
from hvp.common.training.peak_memory import peak_memory, reset_peak_memory
from hvp.common.training.precision import pick_device
from hvp.common.training.selecting import selecting_steps
from hvp.common.views import steps_per_epoch

STEPS, WARMUP_STEPS = 10, 2

# Changes to the configuration for each kind of measured step: hard views off, or on in every step. Steps of the run
# before `selection.start`, and those that `selection.every` skips, load no extra views and cost the same as vanilla.
VANILLA = {"selection.hard_views": "none"}
SELECTING = {"selection.hard_views": "hvp", "selection.start": 0.0, "selection.every": 1}


@dataclass(frozen=True)
class StepCost:
    """Average cost of one kind of step."""

    seconds: float
    """Duration of a step, including the wait for the loader."""

    images_per_s: float

    wait_share: float
    """Share of the time spent waiting for the loader."""

    select_share: float
    """Share of the time spent selecting."""

    peak_memory: int
    """Bytes that PyTorch allocated on the GPU; on the CPU those of this process, without loader workers."""


@dataclass(frozen=True)
class Measurement:
    """Cost of a configuration on this machine, with and without hard views."""

    device: torch.device
    workers: int
    steps: int
    """Steps measured of each kind."""

    warmup_steps: int
    """Steps run before the measured ones."""

    steps_per_epoch: int
    epochs: int

    vanilla: StepCost
    """Steps without hard views."""

    hard: StepCost | None
    """Steps that select hard views; None if the configuration cannot run with them, for the reason in `reason`."""

    reason: str
    selecting_steps: int
    """Steps of the whole run that select, with hard views on."""

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def hard_run_seconds(self) -> float | None:
        """Duration of the whole run with hard views, which may select in only some of its steps."""
        if self.hard is None:
            return None
        others = self.total_steps - self.selecting_steps
        return self.selecting_steps * self.hard.seconds + others * self.vanilla.seconds


def measure(
    train: Callable[..., Path], config: Any, *, on_stage: Callable[[str], None] = lambda stage: None
) -> Measurement:
    """Train a few steps with and without hard views, in a temporary folder that is deleted afterwards.

    A loader with W workers delivers batches in bursts of W, and the first burst is ready before the first step. So the
    warm-up lasts at least one burst, and the measured steps are whole bursts.

    Args:
        train: the method's trainer, as in `hvp.methods.Method`.
        config: the run's configuration.
        on_stage: called with a description of each measurement before it starts.

    Raises:
        UserError: anything that would stop the run itself.
    """
    if config.data.path is None:
        raise UserError("nothing to measure without images. Give --data DIR, or --data shapes")
    source = open_dataset(config.data.path, "train", shapes=config.data.shapes)
    per_epoch = steps_per_epoch(len(source), config.train.batch_size)
    device = pick_device(config.train.device)
    workers = available_workers(config.data.workers, device)
    warmup, steps = _how_many(per_epoch, math.ceil(workers / config.train.accumulate))

    def cost(changes: dict[str, Any], what: str) -> StepCost:
        on_stage(f"{warmup + steps} steps {what}")
        return _cost(train, _changed(config, changes), warmup, steps, device)

    # The step that takes less memory comes first, because a process may keep the memory that it freed.
    vanilla, hard, reason = cost(VANILLA, "without hard views"), None, ""
    try:
        _changed(config, SELECTING)
    except UserError as error:
        reason = str(error)
    else:
        hard = cost(SELECTING, "with hard views")
    epochs = config.train.epochs
    selecting = selecting_steps(config.selection, epochs * per_epoch)(0)
    return Measurement(device, workers, steps, warmup, per_epoch, epochs, vanilla, hard, reason, selecting)


class _Enough(Exception):
    """Stop a run whose steps have been measured."""


def _cost(train: Callable[..., Path], config: Any, warmup: int, steps: int, device: torch.device) -> StepCost:
    rows: list[Mapping[str, Any]] = []

    def watch(row: Mapping[str, Any]) -> None:
        rows.append(row)
        if len(rows) == warmup + steps:
            raise _Enough

    reset_peak_memory(device)
    with tempfile.TemporaryDirectory(prefix="hvp-measure-") as folder, suppress(_Enough):
        train(config, Path(folder) / "run", console=Console(quiet=True), on_row=watch, temporary=True)
    seconds = [config.train.batch_size / row["images_per_s"] for row in rows[warmup:]]
    total = sum(seconds)

    def share(name: str) -> float:
        return sum(part * row[name] for part, row in zip(seconds, rows[warmup:], strict=True)) / total

    return StepCost(
        seconds=total / steps,
        images_per_s=steps * config.train.batch_size / total,
        wait_share=share("wait_share"),
        select_share=share("select_share"),
        peak_memory=peak_memory(device),
    )


def _changed(config: Any, changes: dict[str, Any]) -> Any:
    """Return the configuration with `changes`, a log row for every step and no checkpoint within an epoch."""
    layers: list[tuple[str, Mapping[str, Any]]] = [
        ("configuration", config.model_dump(mode="json")),
        ("--measure", changes | {"train.log_every": 1, "train.save_every": 0}),
    ]
    return resolve(type(config), layers).config


def _how_many(available: int, burst: int) -> tuple[int, int]:
    """Return the numbers of warm-up and measured steps, within one epoch: the run would save at its end."""
    warmup = min(max(WARMUP_STEPS, burst), available // 2)
    wanted = STEPS if burst < 2 else math.ceil(STEPS / burst) * burst
    return warmup, max(1, min(wanted, available - warmup))
