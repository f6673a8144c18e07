"""The code that HVP's authors released, automl/hvp, beside ours: which views both select from the same network outputs.

    python -m hvp.benchmarks.released.selection FOLDER FUNCTION GIVEN TAKEN

runs the released code alone, in a process of its own, as its modules are called `data`, `models`, `utils`.
`hvp patch compare --hvp-code` does this.

# B images, V candidate views, T of them targets, S slots of a combination, C combinations
"""

import importlib
import io
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvp.benchmarks.originals.comparison import Trainer
from hvp.benchmarks.originals.on_cpu import substitute
from hvp.common.config.resolving import resolve
from hvp.common.errors import UserError
from hvp.common.hardviews import Slots, combination_losses, select
from hvp.common.training.loading import Masks, build_loader, open_training_data
from hvp.common.training.session import seeded
from hvp.patches.original import COMPARED

REPOSITORY = "automl/hvp"
URL = f"https://github.com/{REPOSITORY}"

TOLERANCE = 5e-6
"""Difference of an image's loss up to which rounding explains it, in units of the loss where that is above 1."""

NOTES = (
    "the networks are stand-ins that give these outputs, in float32 and on the CPU",
    "which views it selects is read off the images that it returns",
)
"""What holds of every comparison."""

NUM_BATCHES = 8
"""Of random outputs."""

BATCH_SIZE = 32

Outputs = Mapping[str, Tensor]
"""What networks made of a batch of candidates, by name."""


class Choices(NamedTuple):
    """What the released code selects."""

    views: Tensor
    """[B, S] int64: which view fills each slot of each image; -1 where its results contradict each other."""

    score: Tensor
    """[B] float32: its score of them."""

    combinations: Tensor | None = None
    """[C, S] int64, if it drew those that it compares."""


@dataclass(frozen=True)
class Released:
    """A method's selection in the released code, and how both are given the same outputs."""

    branch: str
    commit: str
    function: str
    """What selects there, for the reader."""

    slots: Slots
    """What it selects from: its number and order of views."""

    random: Callable[[torch.Generator], Outputs]
    """random(generator): outputs for BATCH_SIZE images that no network made."""

    network: Callable[..., Outputs]
    """network(*modules, batch): what the modules of our trainer make of a batch."""

    compared: Mapping[str, Any]
    """The configuration of those, as far as it differs from COMPARED; by dotted key."""

    theirs: Callable[[Outputs], Choices]
    """What the released code selects. Runs where its modules can be imported."""

    pair_losses: Callable[[Outputs], Tensor]
    """Ours: [B, T, V]."""

    unit: float
    """A loss of ours in units of its score."""

    notes: tuple[str, ...]
    """What it does otherwise, and what is not compared."""

    masks: Callable[[Any], Masks] | None = None
    """masks(config): what our loader draws besides views."""


@dataclass(frozen=True)
class Agreement:
    """How far both selections agree on some batches."""

    images: int
    equal: int
    """Images for which both chose the same views."""

    ties: int
    """Images for which the released code chose others, whose loss is the same up to rounding."""

    close: int
    """Images whose two best combinations have the same loss up to rounding, whatever was chosen."""

    loss: float
    """The largest difference of the chosen combination's loss, in units of the loss where that is above 1."""

    @property
    def agrees(self) -> bool:
        """Whether rounding explains the differences."""
        return self.equal + self.ties == self.images and self.loss <= TOLERANCE


def compare_selection(released: Released, ours: Trainer, clone: Path) -> dict[str, Agreement]:
    """Lets the released code and ours select views, from outputs in float32 on the CPU.

    Args:
        released: how it is run.
        ours: our trainer, whose networks make some of the outputs.
        clone: of automl/hvp, at any commit; nothing in it changes.

    Returns:
        An agreement for random outputs, and one for those of a network; by a name for the reader.

    Raises:
        UserError: the clone lacks the commit, or the released code ended with an error.
    """
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        check_out(released, clone, work / "released")
        batches = {
            "random outputs": [released.random(generator) for _ in range(NUM_BATCHES)],
            "network outputs": _network_outputs(released, ours),
        }
        chosen = _run_released(released, [batch for part in batches.values() for batch in part], work)
    rest = iter(chosen)
    return {name: _agreement(released, part, [next(rest) for _ in part]) for name, part in batches.items()}


def check_out(released: Released, clone: Path, out: Path) -> None:
    """Writes the files of the pinned commit to a new folder, from the clone's objects.

    Raises:
        UserError: the clone does not have it.
    """
    get = f"git clone {URL} DIR && git -C DIR fetch origin {released.branch}"
    if not clone.is_dir():
        raise UserError(f"{clone} is no folder. Get a clone: {get}")
    try:
        found = subprocess.run(["git", "-C", clone, "rev-parse", "--absolute-git-dir"], capture_output=True, text=True)
        if found.returncode:
            why = " ".join(found.stderr.split())
            raise UserError(f"{clone} cannot be read as a git repository ({why}). Get a clone: {get}")
        git = ["git", f"--git-dir={found.stdout.strip()}"]
        known = subprocess.run([*git, "cat-file", "-e", f"{released.commit}^{{commit}}"], capture_output=True)
        if known.returncode:
            raise UserError(
                f"{clone} does not have commit {released.commit[:12]} of {REPOSITORY}, branch {released.branch}. Get "
                f"it: git -C {clone} fetch {URL} {released.branch}"
            )
        archive = subprocess.run([*git, "archive", "--format=tar", released.commit], capture_output=True)
    except OSError as error:
        raise UserError(f"cannot start git, which reads {clone}: {error.strerror}") from error
    if archive.returncode:
        raise UserError(f"cannot read {clone}: {archive.stderr.decode(errors='replace').strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(out, filter="data")


def _network_outputs(released: Released, ours: Trainer) -> list[Outputs]:
    """Of a network with its first weights, on generated images."""
    values = {"train.batch_size": BATCH_SIZE, "data.shapes.train": 2 * BATCH_SIZE, **released.compared}
    config = resolve(ours.config, [("comparison", {**COMPARED, **values})]).config
    device = torch.device("cpu")
    with seeded(config.train.seed, device):
        modules = ours.build_modules(config, device)
    masks = released.masks and released.masks(config)
    loader = build_loader(config, open_training_data(config), device, masks=masks)
    try:
        with torch.no_grad():
            return [released.network(*modules, part) for (part,) in loader.epoch(0)]
    finally:
        loader.close()


def _run_released(released: Released, batches: Sequence[Outputs], work: Path) -> list[Choices]:
    torch.save([dict(batch) for batch in batches], work / "given.pt")
    function = f"{released.theirs.__module__}:{released.theirs.__name__}"
    files = [str(work / name) for name in ("given.pt", "taken.pt")]
    command = [sys.executable, "-m", "hvp.benchmarks.released.selection", str(work / "released"), function, *files]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the released code ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    return [Choices(*chosen) for chosen in torch.load(work / "taken.pt")]


def _agreement(released: Released, batches: Sequence[Outputs], chosen: Sequence[Choices]) -> Agreement:
    slots, counts, differences = released.slots, torch.zeros(4, dtype=torch.int64), []
    for outputs, theirs in zip(batches, chosen, strict=True):
        pair_loss = released.pair_losses(outputs)
        compared = slots.all_combinations() if theirs.combinations is None else theirs.combinations
        ours = select([], pair_loss, slots, combinations=compared)
        size = ours.loss.abs().clamp(min=1)
        rounding = TOLERANCE * size
        differences.append((theirs.score * released.unit - ours.loss).abs() / size)

        equal = (_in_order(ours.index, slots) == _in_order(theirs.views, slots)).all(dim=1)
        known = (theirs.views >= 0).all(dim=1)
        loss = combination_losses(pair_loss, theirs.views.clamp(min=0)[:, None], slots)[:, 0]
        ties = ~equal & known & (loss >= ours.loss - rounding)
        different = _in_order(compared, slots).unique(dim=0)
        best, second = combination_losses(pair_loss, different, slots).topk(2).values.unbind(1)
        close = best - second <= rounding
        counts += torch.tensor([len(equal), equal.sum(), ties.sum(), close.sum()])
    images, num_equal, num_ties, num_close = counts.tolist()
    return Agreement(images, num_equal, num_ties, num_close, loss=float(torch.cat(differences).max()))


def _in_order(index: Tensor, slots: Slots) -> Tensor:
    """Combinations [n, S] with the views of a group in order: which of its slots they fill is no matter."""
    parts = index.split([group.kept for group in slots.groups], dim=1)
    return torch.cat([part.sort(dim=1).values for part in parts], dim=1)


def marked_images(num_views: int, batch: int, size: int, first: int = 0) -> list[Tensor]:
    """Images [B, 1, size, size], one tensor a view, whose every pixel says which they are: view * B + image.

    Args:
        num_views: how many views.
        batch: B.
        size: height and width, pixels.
        first: the number of the first view.
    """
    marks = (first * batch + torch.arange(num_views * batch)).float().unflatten(0, (num_views, batch))
    return list(marks[:, :, None, None, None].expand(-1, -1, 1, size, size))


def views_in(images: Sequence[Tensor]) -> Tensor:
    """Which views marked images are: [B, S] int64, -1 where one is another image's, or mixed from several."""
    marks = torch.stack(list(marks_of(images)), dim=1)  # [B, S]
    batch = len(marks)
    own = (marks % batch == torch.arange(batch)[:, None]) & (marks >= 0)
    return torch.where(own, marks // batch, -1)


def marks_of(images: Sequence[Tensor]) -> list[Tensor]:
    """The marks of images, [B] int64 each; -1 of one whose pixels differ."""
    flat = [view.flatten(1) for view in images]
    return [torch.where((view == view[:, :1]).all(dim=1), view[:, 0], -1).long() for view in flat]


class Network:
    """Stands in for a network: gives the rows of tables that belong to the marked images it is called with.

    Args:
        tables: [n, B, ...] each, n views. Of images beyond a table's it gives nothing.
    """

    device = torch.device("cpu")

    def __init__(self, *tables: Tensor) -> None:
        self.tables = [table.flatten(0, 1) for table in tables]

    def __call__(self, images: Tensor | Sequence[Tensor], mask: object = None) -> Any:
        """A tensor of one table; a tuple of several."""
        rows = torch.cat(marks_of([images] if isinstance(images, Tensor) else images))
        if len(self.tables) == 1:
            return self.tables[0][rows]
        return tuple(table[rows] for table in self.tables if rows.max() < len(table))


def agreed(index: Tensor, *others: Tensor) -> Tensor:
    """`index` where all others are the same, and -1 elsewhere."""
    for other in others:
        index = torch.where(index == other.long(), index, -1)
    return index


def random_outputs(num_views: int, generator: torch.Generator, *shape: int) -> Tensor:
    """Normally distributed outputs [num_views, BATCH_SIZE, *shape]; those of an image resemble each other."""
    image = torch.randn(BATCH_SIZE, *shape, generator=generator)
    return (image + torch.randn(num_views, BATCH_SIZE, *shape, generator=generator)) / 2**0.5


def main() -> None:
    folder, function, given, taken = sys.argv[1:]
    owner, name = function.split(":")
    theirs = getattr(importlib.import_module(owner), name)
    substitute()
    random.seed(0)  # of what it draws itself
    sys.path.insert(0, folder)
    torch.save([tuple(theirs(outputs)) for outputs in torch.load(given)], taken)


if __name__ == "__main__":
    main()
