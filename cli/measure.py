"""What a run will cost, from a few of its own steps: `hvp pretrain ... --dry-run --measure`."""

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

# What is changed for the steps that are measured: hard views off; on, in every step. The steps before `selection.start`
# and between those of `selection.every` load no more views, and take no longer, than without hard views.
VANILLA = {"selection.hard_views": "none"}
SELECTING = {"selection.hard_views": "hvp", "selection.start": 0.0, "selection.every": 1}


@dataclass(frozen=True)
class StepCost:
    """What one kind of step costs, on average."""

    seconds: float
    """Of a step, with what it waits for the loader."""

    images_per_s: float

    wait_share: float
    """Part of the time in which the step waits for the loader."""

    select_share: float
    """Part of the time that selection takes."""

    peak_memory: int
    """Bytes: of the GPU's memory, those that PyTorch allocated; on the CPU this process, without loader workers."""


@dataclass(frozen=True)
class Measurement:
    """What a configuration costs here, with and without hard views."""

    device: torch.device
    device_memory: int | None
    """Of the GPU, bytes; None on the CPU."""

    workers: int
    steps: int
    """Steps measured, of each kind."""

    warmup_steps: int
    """Steps before those."""

    steps_per_epoch: int
    epochs: int

    vanilla: StepCost
    """Steps without hard views."""

    hard: StepCost | None
    """Steps that select hard views; None where the configuration cannot be run with them, as `reason` says."""

    reason: str
    selecting_steps: int
    """Steps of the whole run that select when hard views are on."""

    hard_run_seconds: float | None
    """The whole run with hard views, which need not select in every step."""

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch


def measure(
    train: Callable[..., Path], config: Any, *, on_stage: Callable[[str], None] = lambda stage: None
) -> Measurement:
    """Trains a few steps with and without hard views, in a temporary folder that is gone afterwards.

    A loader with W workers delivers batches in bursts of W, the first of which are there before the first step. So the
    warm-up lasts at least one burst, and the steps measured are whole bursts.

    Args:
        train: the method's trainer, as in `hvp.methods.Method`.
        config: the run's configuration.
        on_stage: told what is measured next.

    Raises:
        UserError: whatever would end the run itself.
    """
    if config.data.path is None:
        raise UserError("nothing to measure without images: give --data DIR, or --data shapes")
    source = open_dataset(config.data.path, "train", shapes=config.data.shapes)
    per_epoch = steps_per_epoch(len(source), config.train.batch_size)
    device = pick_device(config.train.device)
    workers = available_workers(config.data.workers, device)
    warmup, steps = _how_many(per_epoch, math.ceil(workers / config.train.accumulate))
    total = config.train.epochs * per_epoch
    selecting = selecting_steps(config.selection, total)(0)

    def cost(changes: dict[str, Any], what: str) -> StepCost:
        on_stage(f"{warmup + steps} steps {what}")
        return _cost(train, _changed(config, changes), warmup, steps, device)

    # The kind of step that takes less memory comes first: what a process has freed it need not give back.
    vanilla, hard, run_seconds, reason = cost(VANILLA, "without hard views"), None, None, ""
    try:
        _changed(config, SELECTING)
    except UserError as error:
        reason = str(error)
    else:
        hard = cost(SELECTING, "with hard views")
        run_seconds = selecting * hard.seconds + (total - selecting) * vanilla.seconds
    return Measurement(
        device,
        torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        workers,
        steps,
        warmup,
        per_epoch,
        config.train.epochs,
        vanilla,
        hard,
        reason,
        selecting,
        run_seconds,
    )


class _Enough(Exception):
    """Ends a run whose steps have been measured."""


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
    """The configuration with some values changed and a row of the log for every step."""
    layers: list[tuple[str, Mapping[str, Any]]] = [
        ("configuration", config.model_dump(mode="json")),
        ("--measure", changes | {"train.log_every": 1, "train.save_every": 0}),
    ]
    return resolve(type(config), layers).config


def _how_many(available: int, burst: int) -> tuple[int, int]:
    """Steps of warm-up and steps to measure, at most one epoch together, at the end of which the run would save."""
    warmup = min(max(WARMUP_STEPS, burst), available // 2)
    wanted = STEPS if burst < 2 else math.ceil(STEPS / burst) * burst
    return warmup, max(1, min(wanted, available - warmup))
