"""Compare our selection with that of automl/hvp, the code that HVP's authors released, on the same network outputs.

`python -m hvp.benchmarks.originals METHOD --hvp-code DIR` prints the comparison. The released code runs in a process of
its own, because its modules have names such as `data`, `models` and `utils`:

    python -m hvp.benchmarks.released.selection FOLDER FUNCTION GIVEN TAKEN

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
from hvp.benchmarks.originals.harness import comparison_config
from hvp.benchmarks.originals.on_cpu import substitute
from hvp.common.errors import UserError
from hvp.common.hardviews import Slots, combination_losses, select
from hvp.common.training.loading import Masks, build_loader, open_training_data
from hvp.common.training.session import seeded

REPOSITORY = "automl/hvp"
URL = f"https://github.com/{REPOSITORY}"

TOLERANCE = 5e-6
"""Largest difference of an image's loss that rounding explains, relative to the loss where that is above 1."""

NOTES = (
    "the networks are stand-ins that return these outputs, in float32 and on the CPU",
    "the views that it selects are recognised in the images that it returns",
)
"""Caveats of every comparison."""

NUM_BATCHES = 8
"""Number of batches of random outputs."""

BATCH_SIZE = 32

Outputs = Mapping[str, Tensor]
"""Outputs of networks for a batch of candidates, by name."""


class Choices(NamedTuple):
    """Views that the released code selected."""

    views: Tensor
    """Index of the view in each slot of each image, [B, S] int64; -1 where the results contradict each other."""

    score: Tensor
    """Score of the selected combination, [B] float32."""

    combinations: Tensor | None = None
    """Combinations that it drew and compared, [C, S] int64; None: all."""


@dataclass(frozen=True)
class Released:
    """Settings of a comparison with a method's selection in the released code."""

    branch: str
    commit: str
    function: str
    """Name of the function that selects, for the reader."""

    slots: Slots
    """Slots to fill, for its number and order of views."""

    random: Callable[[torch.Generator], Outputs]
    """random(generator): random outputs for BATCH_SIZE images."""

    network: Callable[..., Outputs]
    """network(*modules, batch): outputs of our trainer's modules for a batch."""

    values: Mapping[str, Any]
    """Configuration values of those modules and batches, besides SHARED_VALUES; by dotted key."""

    theirs: Callable[[Outputs], Choices]
    """theirs(outputs): choices of the released code. Runs where its modules can be imported."""

    pair_losses: Callable[[Outputs], Tensor]
    """pair_losses(outputs): our pair-loss matrix, [B, T, V]."""

    unit: float
    """Factor from its score to our loss."""

    notes: tuple[str, ...]
    """Differences from our selection, and limits of the comparison."""

    masks: Callable[[Any], Masks] | None = None
    """masks(config): the masks that our loader draws besides views."""


@dataclass(frozen=True)
class Agreement:
    """Agreement of the two selections on several batches."""

    images: int
    equal: int
    """Number of images for which both chose the same views."""

    ties: int
    """Number of images for which the two chose different views, with the same loss up to rounding."""

    close: int
    """Number of images whose two best combinations have the same loss up to rounding, whichever was chosen."""

    loss: float
    """Largest difference of the chosen combination's loss, relative to the loss where that is above 1."""

    @property
    def agrees(self) -> bool:
        """Rounding explains the differences."""
        return self.equal + self.ties == self.images and self.loss <= TOLERANCE


def compare_selection(released: Released, ours: Trainer, clone: Path) -> dict[str, Agreement]:
    """Compare the views that the released code and ours select from the same outputs, in float32 on the CPU.

    Args:
        released: settings of the comparison.
        ours: our trainer, whose networks make some of the outputs.
        clone: clone of automl/hvp, at any commit; it stays as it is.

    Returns:
        The agreement on random outputs and on a network's outputs, by a name for the reader.

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
    """Write the files of the pinned commit to a new folder, from the clone's objects.

    Raises:
        UserError: the clone does not have the commit.
    """
    get = f"git clone {URL} DIR && git -C DIR fetch origin {released.branch}"
    if not clone.is_dir():
        raise UserError(f"{clone} is not a folder. Get a clone: {get}")
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
        raise UserError(f"cannot start git to read {clone}: {error.strerror}") from error
    if archive.returncode:
        raise UserError(f"cannot read {clone}: {archive.stderr.decode(errors='replace').strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(out, filter="data")


def _network_outputs(released: Released, ours: Trainer) -> list[Outputs]:
    """Return outputs of a network with its initial weights, on generated images."""
    sizes = {"train.batch_size": BATCH_SIZE, "data.shapes.train": 2 * BATCH_SIZE}
    config = comparison_config(ours.config, {**sizes, **released.values})
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
    """Return the choices of the released code, which runs in a process of its own."""
    torch.save([dict(batch) for batch in batches], work / "given.pt")
    function = f"{released.theirs.__module__}:{released.theirs.__name__}"
    files = [str(work / name) for name in ("given.pt", "taken.pt")]
    command = [sys.executable, "-m", "hvp.benchmarks.released.selection", str(work / "released"), function, *files]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the released code exited with code {done.returncode}:\n{done.stderr[-2000:]}")
    return [Choices(*chosen) for chosen in torch.load(work / "taken.pt")]


def _agreement(released: Released, batches: Sequence[Outputs], chosen: Sequence[Choices]) -> Agreement:
    """Compare our choices with those of the released code."""
    slots, counts, differences = released.slots, torch.zeros(4, dtype=torch.int64), []
    for outputs, theirs in zip(batches, chosen, strict=True):
        pair_loss = released.pair_losses(outputs)
        compared = slots.all_combinations() if theirs.combinations is None else theirs.combinations
        ours = select([], pair_loss, slots, combinations=compared)
        size = ours.loss.abs().clamp(min=1)
        rounding = TOLERANCE * size
        differences.append((theirs.score * released.unit - ours.loss).abs() / size)

        equal = (_sorted_in_groups(ours.index, slots) == _sorted_in_groups(theirs.views, slots)).all(dim=1)
        known = (theirs.views >= 0).all(dim=1)
        loss = combination_losses(pair_loss, theirs.views.clamp(min=0)[:, None], slots)[:, 0]
        ties = ~equal & known & (loss >= ours.loss - rounding)
        different = _sorted_in_groups(compared, slots).unique(dim=0)
        best, second = combination_losses(pair_loss, different, slots).topk(2).values.unbind(1)
        close = best - second <= rounding
        counts += torch.tensor([len(equal), equal.sum(), ties.sum(), close.sum()])
    images, num_equal, num_ties, num_close = counts.tolist()
    return Agreement(images, num_equal, num_ties, num_close, loss=float(torch.cat(differences).max()))


def _sorted_in_groups(index: Tensor, slots: Slots) -> Tensor:
    """Sort combinations [n, S] inside each group, whose slots are interchangeable."""
    parts = index.split([group.kept for group in slots.groups], dim=1)
    return torch.cat([part.sort(dim=1).values for part in parts], dim=1)


def marked_images(num_views: int, batch: int, size: int, first: int = 0) -> list[Tensor]:
    """Make images [B, 1, size, size], one tensor per view, whose pixels all hold the number view * B + image.

    Args:
        num_views: number of views.
        batch: B.
        size: height and width, pixels.
        first: number of the first view.
    """
    marks = (first * batch + torch.arange(num_views * batch)).float().unflatten(0, (num_views, batch))
    return list(marks[:, :, None, None, None].expand(-1, -1, 1, size, size))


def views_in(images: Sequence[Tensor]) -> Tensor:
    """Return the views that marked images are, [B, S] int64; -1 for a view of another image, or a mix of several."""
    marks = torch.stack(list(marks_of(images)), dim=1)  # [B, S]
    batch = len(marks)
    own = (marks % batch == torch.arange(batch)[:, None]) & (marks >= 0)
    return torch.where(own, marks // batch, -1)


def marks_of(images: Sequence[Tensor]) -> list[Tensor]:
    """Return the numbers in marked images, [B] int64 per tensor; -1 for an image whose pixels differ."""
    flat = [view.flatten(1) for view in images]
    return [torch.where((view == view[:, :1]).all(dim=1), view[:, 0], -1).long() for view in flat]


class Network:
    """Stand-in for a network: returns the rows of tables that belong to the marked images it receives.

    Args:
        tables: outputs [n, B, ...], one table or several, for n views each. A table is left out of the result where an
            image is beyond its views.
    """

    device = torch.device("cpu")

    def __init__(self, *tables: Tensor) -> None:
        self.tables = [table.flatten(0, 1) for table in tables]

    def __call__(self, images: Tensor | Sequence[Tensor], mask: object = None) -> Any:
        """Return a tensor for one table, a tuple for several."""
        rows = torch.cat(marks_of([images] if isinstance(images, Tensor) else images))
        if len(self.tables) == 1:
            return self.tables[0][rows]
        return tuple(table[rows] for table in self.tables if rows.max() < len(table))


def agreed(index: Tensor, *others: Tensor) -> Tensor:
    """Return `index` where all others are equal to it, and -1 elsewhere."""
    for other in others:
        index = torch.where(index == other.long(), index, -1)
    return index


def random_outputs(num_views: int, generator: torch.Generator, *shape: int) -> Tensor:
    """Draw normal outputs [num_views, BATCH_SIZE, *shape]; the views of an image resemble each other."""
    image = torch.randn(BATCH_SIZE, *shape, generator=generator)
    return (image + torch.randn(num_views, BATCH_SIZE, *shape, generator=generator)) / 2**0.5


def main() -> None:
    folder, function, given, taken = sys.argv[1:]
    owner, name = function.split(":")
    theirs = getattr(importlib.import_module(owner), name)
    substitute()
    random.seed(0)  # for the numbers that the released code draws
    sys.path.insert(0, folder)
    torch.save([tuple(theirs(outputs)) for outputs in torch.load(given)], taken)


if __name__ == "__main__":
    main()
