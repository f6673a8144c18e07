"""`hvp patch compare`: our trainer and the patched original, both run on the same numbers."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from rich.console import Console
from torch import nn

from hvp.common.config import resolve
from hvp.common.engine.checkpoint import load_checkpoint
from hvp.common.engine.run import seeded
from hvp.common.engine.training import build_loader, open_training_data
from hvp.common.errors import UserError
from hvp.common.originals.on_cpu import Given
from hvp.common.originals.original import COMPARED, Original
from hvp.common.originals.patching import Patch, apply_patch
from hvp.common.sections import RunConfig


class Trainer(Protocol):
    """Ours, as `hvp.methods` describes it."""

    @property
    def config(self) -> type[Any]: ...
    @property
    def train(self) -> Callable[..., Path]: ...
    @property
    def build_modules(self) -> Callable[[Any, torch.device], Sequence[nn.Module]]: ...


LOSS_TOLERANCE = 1e-5
LR_TOLERANCE = 1e-9
PARAMETER_TOLERANCE = 2e-2
"""Differences up to which rounding explains them, in the units of `Comparison`. Most tensors stay a hundred times below
the last. It is that of the attention keys' biases, which no loss depends on: their gradients are rounding alone, and
AdamW makes steps of full size of them."""


@dataclass(frozen=True)
class Comparison:
    """By how much a run of ours and one of the patched original differ."""

    steps: int
    loss: float
    """The largest difference of a step's loss, in units of the loss where that is above 1."""

    lr: float
    """The same of the learning rate, relative to the largest."""

    parameters: float
    """The largest difference of a final tensor, in units of the way that ours has gone from its start, of 1 % of its
    length, or of 1e-4 an entry, whichever is most: below that, rounding is all there is."""

    worst: str
    """The name of that tensor."""

    losses: list[tuple[float, float]]
    """Of both, ours first, step by step."""

    @property
    def agrees(self) -> bool:
        """Whether rounding explains the differences."""
        losses, lrs = self.loss <= LOSS_TOLERANCE, self.lr <= LR_TOLERANCE
        return losses and lrs and self.parameters <= PARAMETER_TOLERANCE


def compare(ours: Trainer, original: Original, patch: Patch, clone: Path) -> Comparison:
    """Trains the patched original and our trainer on the CPU, from the same weights, on the same batches, and with the
    same random combinations to choose from.

    Args:
        ours: our trainer.
        original: how it is told.
        patch: of the original.
        clone: the untouched original.

    Raises:
        UserError: the clone cannot be patched, or the original ended with an error.
    """
    config = resolve(ours.config, [("comparison", {**COMPARED, **original.compared})]).config
    device = torch.device("cpu")
    with seeded(config.train.seed, device):
        modules = ours.build_modules(config, device)
    start = {part: module.state_dict() for part, module in zip(original.parts, modules, strict=True)}
    first, *_ = start.values()
    weights = {original.named(key): tensor for key, tensor in first.items()}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        apply_patch(patch, clone, work / "patched")
        rows: list[Mapping[str, Any]] = []
        last = ours.train(config, work / "ours", console=Console(quiet=True), on_row=rows.append)
        given = Given(weights, _batches(original, config, device), dict(original.replaced), original.learner)
        taken = _run_original(original, patch, config, given, work)
        checkpoint = load_checkpoint(last)
    losses, lrs = ([float(row[key]) for row in rows] for key in ("loss", "lr"))
    if len(losses) != len(taken["losses"]):
        raise UserError(f"{patch.method}: {len(losses)} steps of ours, but {len(taken['losses'])} of the original")
    difference, worst = max(_differences(original, checkpoint, taken["checkpoint"], start))
    return Comparison(
        steps=len(losses),
        loss=max(abs(a - b) / max(abs(a), 1) for a, b in zip(losses, taken["losses"], strict=True)),
        lr=max(abs(a - b) for a, b in zip(lrs, taken["lrs"], strict=True)) / max(lrs),
        parameters=difference,
        worst=worst,
        losses=list(zip(losses, taken["losses"], strict=True)),
    )


def _batches(original: Original, config: RunConfig, device: torch.device) -> list[list[list[Any]]]:
    """What our trainer's loader gives, by epoch and step."""
    masks = original.masks and original.masks(config)
    loader = build_loader(config, open_training_data(config), device, masks=masks)
    try:
        return [[original.batch(part) for (part,) in loader.epoch(e)] for e in range(config.train.epochs)]
    finally:
        loader.close()


def _run_original(original: Original, patch: Patch, config: RunConfig, given: Given, work: Path) -> dict[str, Any]:
    data = work / "data" / "train" / "class"
    data.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(data / "0.png")  # the original wants a folder; its batches are given
    torch.save(asdict(given), work / "given.pt")
    files = {"HVP_GIVEN": str(work / "given.pt"), "HVP_TAKEN": str(work / "taken.pt")}
    patched = work / "patched"
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **files, **launched, "PYTHONPATH": str(patched)}
    flags = original.flags(config, str(work / "data"), 1)
    command = [sys.executable, "-m", "hvp.common.originals.on_cpu", patch.trainer, *flags]
    done = subprocess.run(command, cwd=patched, env=environment, capture_output=True, text=True)
    if done.returncode or not (work / "taken.pt").exists():
        raise UserError(f"the patched original ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    taken: dict[str, Any] = torch.load(work / "taken.pt")
    return taken


def _differences(
    original: Original, ours: Mapping[str, Any], theirs: Mapping[str, Any], start: Mapping[str, Any]
) -> Iterator[tuple[float, str]]:
    """How far every tensor of the original's ended from ours, and its name."""
    for part, name in original.parts.items():
        state = {key.removeprefix("module."): value for key, value in theirs[name].items()}
        if alone := state.keys() ^ {original.named(key) for key in ours[part]}:
            raise UserError(f"{part}: only one of both has {', '.join(sorted(alone))}")
        for key, value in ours[part].items():
            here, there, before = (tensor.double() for tensor in (value, state[original.named(key)], start[part][key]))
            floor = max(0.01 * here.norm(), 1e-4 * here.numel() ** 0.5)
            yield float((there - here).norm() / (here - before).norm().clamp(min=floor)), f"{part}.{key}"
