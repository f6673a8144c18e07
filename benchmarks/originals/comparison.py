"""`hvp patch compare`: our trainer and the patched original, both run on the same numbers."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from hvp.benchmarks.originals.on_cpu import Given
from hvp.benchmarks.timing import threads
from hvp.common.config.resolving import resolve
from hvp.common.config.sections import RunConfig
from hvp.common.errors import UserError
from hvp.common.training.checkpoint import load_checkpoint
from hvp.common.training.loading import build_loader, open_training_data
from hvp.common.training.session import seeded
from hvp.patches.original import COMPARED, Original
from hvp.patches.patching import Patch, apply_patch, check_packages


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

    untouched: bool
    """Whether the patched original, with our flags left out, has the losses and final tensors of the untouched one, bit
    for bit, over as many steps."""

    @property
    def agrees(self) -> bool:
        """Whether rounding explains the differences, and the patch changes nothing unasked."""
        losses, lrs = self.loss <= LOSS_TOLERANCE, self.lr <= LR_TOLERANCE
        return self.untouched and losses and lrs and self.parameters <= PARAMETER_TOLERANCE


def compare(ours: Trainer, original: Original, patch: Patch, clone: Path) -> Comparison:
    """Trains the patched original and our trainer on the CPU, from the same weights, on the same batches, and with the
    same random combinations to choose from; then, with what the patch brings left out, the patched original and the
    untouched one.

    Args:
        ours: our trainer.
        original: how it is told.
        patch: of the original.
        clone: the untouched original.

    Raises:
        UserError: the clone cannot be patched, a package is missing, or the original ended with an error.
    """
    check_packages(patch.repository, original.needs)
    configured = {**COMPARED, **original.compared}
    config = resolve(ours.config, [("comparison", configured)]).config
    vanilla = {**configured, "selection.hard_views": "none", "rescue.enabled": False}
    device = torch.device("cpu")
    with seeded(config.train.seed, device):
        modules = ours.build_modules(config, device)
    start = {part: module.state_dict() for part, module in zip(original.parts, modules, strict=True)}
    with tempfile.TemporaryDirectory() as folder, threads(1):  # as many for both: sums are split between them
        work = Path(folder)
        patched = work / "patched"
        apply_patch(patch, clone, patched)
        runs = _Runs(original, patch, start, work)
        rows: list[Mapping[str, Any]] = []
        last = ours.train(config, work / "ours", console=Console(quiet=True), on_row=rows.append)
        taken = runs.run(patched, config)
        checkpoint = load_checkpoint(last)
        without = resolve(ours.config, [("comparison", vanilla)]).config
        untouched = _equal(*(runs.run(tree, without, ours=False) for tree in (patched, clone)))
    losses, lrs = ([float(row[key]) for row in rows] for key in ("loss", "lr"))
    if len(losses) != len(taken["losses"]):
        raise UserError(f"{patch.method}: {len(losses)} steps of ours, but {len(taken['losses'])} of the original")
    difference, worst = max(_differences(original, checkpoint, original.saved(taken["checkpoint"]), start))
    return Comparison(
        steps=len(losses),
        loss=max(abs(a - b) / max(abs(a), 1) for a, b in zip(losses, taken["losses"], strict=True)),
        lr=max(abs(a - b) for a, b in zip(lrs, taken["lrs"], strict=True)) / max(lrs),
        parameters=difference,
        worst=worst,
        losses=list(zip(losses, taken["losses"], strict=True)),
        untouched=untouched,
    )


def without_flags(words: Sequence[str], flags: Collection[str]) -> list[str]:
    """A command line without some flags and their values, of which each has one at most."""
    kept: list[str] = []
    value_may_follow = False
    for word in words:
        if word in flags:
            value_may_follow = True
        elif not value_may_follow or word.startswith("--"):
            kept.append(word)
            value_may_follow = False
        else:
            value_may_follow = False
    return kept


@dataclass(frozen=True)
class _Runs:
    """Runs of an original from the same weights."""

    original: Original
    patch: Patch
    start: Mapping[str, Mapping[str, Tensor]]
    work: Path

    def run(self, tree: Path, config: RunConfig, *, ours: bool = True) -> dict[str, Any]:
        """What a copy of the original does on the batches of our loader.

        Args:
            tree: the copy.
            config: what it is told.
            ours: with the flags of our patch; otherwise they are left out.

        Returns:
            As `Taken` has it.
        """
        original, work = self.original, self.work
        data = work / "data" / "train" / "class"
        data.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(data / "0.png")  # the original wants a folder; its batches are given
        first, *_ = self.start.values()
        weights = {original.named(key): tensor for key, tensor in first.items()}
        given = Given(
            weights, _batches(original, config), dict(original.replaced), original.learner, dict(original.packages)
        )
        torch.save(asdict(given), work / "given.pt")
        files = {"HVP_GIVEN": str(work / "given.pt"), "HVP_TAKEN": str(work / "taken.pt")}
        (work / "taken.pt").unlink(missing_ok=True)
        launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        launched |= {"CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # it meets in a file
        launched |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        found = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
        written = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": found}  # the clone stays as it is
        flags = original.flags(config, str(work / "data"), 1)
        environment = {name: value for name, value in os.environ.items() if name not in original.misleading}
        words = flags if ours else without_flags(flags, self.patch.flags)
        with tempfile.TemporaryDirectory(dir=work) as folder:
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "hvp.benchmarks.originals.on_cpu",
                    str(tree.resolve() / self.patch.trainer),
                    *words,
                ],
                cwd=folder,
                env={**environment, **files, **launched, **written},
                capture_output=True,
                text=True,
            )
        if done.returncode or not (work / "taken.pt").exists():
            which = "patched" if ours else "vanilla"
            raise UserError(f"the {which} original ended with code {done.returncode}:\n{done.stderr[-2000:]}")
        taken: dict[str, Any] = torch.load(work / "taken.pt")
        return taken


def _batches(original: Original, config: RunConfig) -> list[list[Any]]:
    """What our trainer's loader gives, by epoch and step."""
    masks = original.masks and original.masks(config)
    loader = build_loader(config, open_training_data(config), torch.device("cpu"), masks=masks)
    try:
        batches = [[original.batch(part) for (part,) in loader.epoch(e)] for e in range(config.train.epochs)]
        return [list(chain.from_iterable(batches))] if original.endless else batches
    finally:
        loader.close()


def _equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs of an original are the same, bit for bit."""
    pairs = [(one["checkpoint"][part], other["checkpoint"][part]) for part in one["checkpoint"]]
    tensors = all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)
    return tensors and one["losses"] == other["losses"] and one["lrs"] == other["lrs"]


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
