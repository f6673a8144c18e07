"""Train our trainer and a patched original on the same numbers, and compare their losses and final tensors."""

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

from hvp.benchmarks.originals.harness import Harness, comparison_config
from hvp.benchmarks.originals.on_cpu import Given
from hvp.benchmarks.timing import threads
from hvp.common.config.sections import RunConfig
from hvp.common.errors import UserError
from hvp.common.training.checkpoint import load_checkpoint
from hvp.common.training.loading import build_loader, open_training_data
from hvp.common.training.session import seeded
from hvp.patches.adapter import Adapter
from hvp.patches.patching import Patch, apply_patch, check_packages


class Trainer(Protocol):
    """A trainer of ours, as `hvp.methods` describes it."""

    @property
    def config(self) -> type[Any]: ...
    @property
    def train(self) -> Callable[..., Path]: ...
    @property
    def build_modules(self) -> Callable[[Any, torch.device], Sequence[nn.Module]]: ...


LOSS_TOLERANCE = 1e-5
LR_TOLERANCE = 1e-9
PARAMETER_TOLERANCE = 2e-2
"""Largest differences that rounding explains, in the units of `Comparison`. Most tensors stay a hundred times below the
last. Only the biases of attention keys come near it: no loss depends on them, so their gradients are rounding alone,
which AdamW turns into steps of full size."""


@dataclass(frozen=True)
class Comparison:
    """Differences between a run of our trainer and one of the patched original."""

    steps: int
    loss: float
    """Largest difference of a step's loss, relative to the loss where that is above 1."""

    lr: float
    """Largest difference of a step's learning rate, relative to the largest learning rate."""

    parameters: float
    """Largest difference of a final tensor, relative to the largest of: the distance of our tensor from its start, 1 %
    of its norm, and 1e-4 per entry. Smaller distances are rounding."""

    worst: str
    """Name of that tensor."""

    losses: list[tuple[float, float]]
    """Losses of both, ours first, by step."""

    untouched: bool
    """The patched original without our flags has the losses and final tensors of the untouched one, bit for bit, over
    the same number of steps."""

    @property
    def agrees(self) -> bool:
        """Rounding explains the differences, and without its flags the patch changes nothing."""
        losses, lrs = self.loss <= LOSS_TOLERANCE, self.lr <= LR_TOLERANCE
        return self.untouched and losses and lrs and self.parameters <= PARAMETER_TOLERANCE


def compare(ours: Trainer, adapter: Adapter, harness: Harness, patch: Patch, clone: Path) -> Comparison:
    """Compare a run of our trainer with one of the patched original, and the patched with the untouched original.

    Our trainer and the patched original train on the CPU, from the same weights, on the same batches, and with the same
    random combinations to choose from. The patched and the untouched original then train without hard views and Rescue.

    Args:
        ours: our trainer.
        adapter: adapter of the original.
        harness: settings of the comparison.
        patch: our patch of the original.
        clone: clone of the untouched original.

    Raises:
        UserError: the clone cannot be patched, a package is missing, or the original ended with an error.
    """
    check_packages(patch.repository, harness.needs)
    config = comparison_config(ours.config, harness.values)
    features_off = {"selection.hard_views": "none", "rescue.enabled": False}
    vanilla = comparison_config(ours.config, {**harness.values, **features_off})
    device = torch.device("cpu")
    with seeded(config.train.seed, device):
        modules = ours.build_modules(config, device)
    start = {part: module.state_dict() for part, module in zip(harness.checkpoints.parts, modules, strict=True)}
    with tempfile.TemporaryDirectory() as folder, threads(1):  # the same number for both: it decides how sums are split
        work = Path(folder)
        patched = work / "patched"
        apply_patch(patch, clone, patched)
        runs = _Runs(adapter, harness, patch, start, work)
        rows: list[Mapping[str, Any]] = []
        last = ours.train(config, work / "ours", console=Console(quiet=True), on_row=rows.append)
        taken = runs.run(patched, config)
        checkpoint = load_checkpoint(last)
        untouched = _equal(*(runs.run(tree, vanilla, our_flags=False) for tree in (patched, clone)))
    losses, lrs = ([float(row[key]) for row in rows] for key in ("loss", "lr"))
    if len(losses) != len(taken["losses"]):
        raise UserError(f"{patch.method}: {len(losses)} steps of ours, but {len(taken['losses'])} of the original")
    theirs = harness.checkpoints.read(taken["checkpoint"])
    difference, worst = max(_differences(harness, checkpoint, theirs, start))
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
    """Return a command line without some flags and their values; each flag has at most one value."""
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
    """Runs of an original, all from the same weights."""

    adapter: Adapter
    harness: Harness
    patch: Patch
    start: Mapping[str, Mapping[str, Tensor]]
    work: Path

    def run(self, tree: Path, config: RunConfig, *, our_flags: bool = True) -> dict[str, Any]:
        """Train a copy of the original on the batches of our loader.

        Args:
            tree: the copy.
            config: configuration, for its command line.
            our_flags: pass the flags of our patch, or leave them out.

        Returns:
            The fields of `Taken`.
        """
        work = self.work
        data = work / "data" / "train" / "class"
        data.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(data / "0.png")  # the original checks the folder, then trains on given batches
        first, *_ = self.start.values()
        weights = {self.harness.checkpoints.rename(key): tensor for key, tensor in first.items()}
        given = Given(weights, _batches(self.harness, config), self.harness.substitutes)
        torch.save(asdict(given), work / "given.pt")
        (work / "taken.pt").unlink(missing_ok=True)
        words = [self.harness.words.get(word, word) for word in self.adapter.flags(config, str(work / "data"), 1)]
        words = words if our_flags else without_flags(words, self.patch.flags)
        trainer = str(tree.resolve() / self.patch.trainer)
        with tempfile.TemporaryDirectory(dir=work) as folder:
            done = subprocess.run(
                [sys.executable, "-m", "hvp.benchmarks.originals.on_cpu", trainer, *words],
                cwd=folder,
                env=self._environment(tree),
                capture_output=True,
                text=True,
            )
        if done.returncode or not (work / "taken.pt").exists():
            which = "patched" if our_flags else "vanilla"
            raise UserError(f"the {which} original exited with code {done.returncode}:\n{done.stderr[-2000:]}")
        taken: dict[str, Any] = torch.load(work / "taken.pt")
        return taken

    def _environment(self, tree: Path) -> dict[str, str]:
        """Return the environment variables of a run."""
        kept = {name: value for name, value in os.environ.items() if name not in self.adapter.launch.hidden}
        return kept | {
            "HVP_GIVEN": str(self.work / "given.pt"),
            "HVP_TAKEN": str(self.work / "taken.pt"),
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_WORLD_SIZE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "0",  # not used: the process group meets in a file
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",  # the clone stays as it is
            "PYTHONPATH": os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }


def _batches(harness: Harness, config: RunConfig) -> list[list[Any]]:
    """Return the batches of our trainer's loader, converted for the original; by epoch and step."""
    convert, endless = harness.batches.convert, harness.batches.endless
    masks = harness.batches.masks and harness.batches.masks(config)
    loader = build_loader(config, open_training_data(config), torch.device("cpu"), masks=masks)
    try:
        batches = [[convert(part) for (part,) in loader.epoch(epoch)] for epoch in range(config.train.epochs)]
        return [list(chain.from_iterable(batches))] if endless else batches
    finally:
        loader.close()


def _equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two runs of an original are the same, bit for bit."""
    pairs = [(one["checkpoint"][part], other["checkpoint"][part]) for part in one["checkpoint"]]
    tensors = all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)
    return tensors and one["losses"] == other["losses"] and one["lrs"] == other["lrs"]


def _differences(
    harness: Harness, ours: Mapping[str, Any], theirs: Mapping[str, Any], start: Mapping[str, Any]
) -> Iterator[tuple[float, str]]:
    """Yield the difference of every final tensor of the original's from ours, and the tensor's name."""
    rename = harness.checkpoints.rename
    for part, name in harness.checkpoints.parts.items():
        state = {key.removeprefix("module."): value for key, value in theirs[name].items()}
        if unmatched := state.keys() ^ {rename(key) for key in ours[part]}:
            raise UserError(f"{part}: only one of the two has {', '.join(sorted(unmatched))}")
        for key, value in ours[part].items():
            here, there, before = (tensor.double() for tensor in (value, state[rename(key)], start[part][key]))
            floor = max(0.01 * here.norm(), 1e-4 * here.numel() ** 0.5)
            yield float((there - here).norm() / (here - before).norm().clamp(min=floor)), f"{part}.{key}"
