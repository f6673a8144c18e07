"""Our trainers beside the originals: a configuration as an original's flags, and both run on the same numbers.

# V candidate views
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from hvp.common.config import resolve
from hvp.common.engine.checkpoint import load_checkpoint
from hvp.common.engine.run import seeded
from hvp.common.engine.training import Masks, build_loader, open_training_data
from hvp.common.errors import UserError
from hvp.common.networks.resnet import CONVNETS
from hvp.common.original_on_cpu import Given
from hvp.common.patching import Patch, apply_patch
from hvp.common.sections import RunConfig
from hvp.common.views import ViewBatch, normalize


class Trainer(Protocol):
    """Ours, as `hvp.methods` describes it."""

    @property
    def config(self) -> type[Any]: ...
    @property
    def train(self) -> Callable[..., Path]: ...
    @property
    def build_modules(self) -> Callable[[Any, torch.device], Sequence[nn.Module]]: ...


@dataclass(frozen=True)
class Original:
    """How one original is told what our configuration says, and compared with our trainer."""

    flags: Callable[[Any, str, int], list[str]]
    """flags(config, data, processes): the original's command line for it."""

    compared: Mapping[str, Any]
    """The configuration that both are compared on, as far as it differs from COMPARED; by dotted key."""

    parts: Mapping[str, str]
    """What a checkpoint of ours holds, and the name of it in the original's."""

    batch: Callable[[ViewBatch], list[Any]]
    """A batch of ours as the original's loader gives it."""

    masks: Callable[[Any], Masks] | None = None
    """masks(config): what the loader draws besides views."""

    replaced: Mapping[str, str] = field(default_factory=dict)
    """As in `Given`."""

    notes: tuple[str, ...] = ()
    """What that means, in words."""

    carried: Collection[str] = ()
    """Our keys that `flags` says, whatever their value; besides `selection.hard_views` and `rescue.enabled`."""

    fixed: Callable[[Any], Mapping[str, Any]] = lambda _: {}
    """fixed(config): what the original does, by our key, where it has no flag or none for every value."""

    only_ours: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Values of a key that the original does not know."""

    spawns: bool = False
    """It is started once and starts a process for every GPU itself; otherwise the elastic launcher does."""


OF_EVERY_ORIGINAL = {
    "data.loader": "pil",
    "data.on_bad_image": "error",
    "train.accumulate": 1,
    "train.device": "cuda",
    "train.save_every": 0,
    "selection.policy": "hardest",
    "selection.search": "sampled",
    "selection.comparisons": 128,
    "selection.per_image": False,
    "selection.mode": "train",
    "selection.every": 1,
    "selection.start": 0.0,
}
"""What the patched originals do, by our key, unless a flag says otherwise. Beginning of `Original.fixed`."""

OF_MULTI_CROP = {
    "views.jitter": 0.8,
    "views.brightness": 0.4,
    "views.contrast": 0.4,
    "views.saturation": 0.2,
    "views.hue": 0.1,
    "views.grayscale": 0.2,
    "views.global_crops_size": 224,
    "views.local_crops_size": 96,
    "views.blur_global1": 1.0,
    "views.blur_global2": 0.1,
    "views.blur_local": 0.5,
    "views.solarize": 0.2,
    "selection.global_pairs": "by_transform",
    "model.head_hidden_dim": 2048,
    "model.head_bottleneck_dim": 256,
    "loss.student_temp": 0.1,
    "loss.center_momentum": 0.9,
    "train.log_every": 10,
}
"""The same of those with DINO's views and head."""


COMPARED = {
    "data.path": "shapes",
    "data.workers": 0,
    "data.shapes.size": 40,
    "train.epochs": 2,
    "train.precision": "fp32",
    "train.device": "cpu",
    "train.seed": 3,
    "train.log_every": 1,
}
"""The configuration of every comparison."""

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


def as_flags(config: Any, names: Mapping[str, str], *, switches: bool) -> list[str]:
    """Values of a configuration as command line flags.

    Args:
        config: whose values.
        names: dotted key to flag.
        switches: what is true is said by the flag alone, and what is false by its absence; otherwise by a word.
    """
    words: list[str] = []
    for key, flag in names.items():
        value = value_of(config, key)
        if isinstance(value, bool):
            words += ([flag] if value else []) if switches else [flag, str(value).lower()]
        elif isinstance(value, tuple):
            words += [flag, *map(str, value)]
        else:
            words += [flag, str(value)]
    return words


def value_of(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def small_encoder(_: None, num_classes: int, zero_init_residual: bool) -> nn.Module:
    """Our `convnet_micro` with a last layer, for originals that take torchvision's encoders by name."""
    encoder = CONVNETS["convnet_micro"](zero_init_residual=zero_init_residual)
    encoder.fc = nn.Linear(encoder.embed_dim, num_classes)
    return encoder


def normalized_views(batch: ViewBatch) -> list[Tensor]:
    """Every candidate of a batch on its own, V tensors [B, 3, H, W], in memory as our trainers have them."""
    return [view for pixels in batch.pixels for view in normalize(pixels)]


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
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        apply_patch(patch, clone, work / "patched")
        rows: list[Mapping[str, Any]] = []
        last = ours.train(config, work / "ours", console=Console(quiet=True), on_row=rows.append)
        given = Given(first, _batches(original, config, device), dict(original.replaced))
        taken = _run_original(original, patch, config, given, work)
        checkpoint = load_checkpoint(last)
    losses, lrs = ([float(row[key]) for row in rows] for key in ("loss", "lr"))
    if len(losses) != len(taken["losses"]):
        raise UserError(f"{patch.method}: {len(losses)} steps of ours, but {len(taken['losses'])} of the original")
    difference, worst = max(_differences(checkpoint, taken["checkpoint"], start, original.parts))
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
    command = [sys.executable, "-m", "hvp.common.original_on_cpu", patch.trainer, *flags]
    done = subprocess.run(command, cwd=patched, env=environment, capture_output=True, text=True)
    if done.returncode or not (work / "taken.pt").exists():
        raise UserError(f"the patched original ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    taken: dict[str, Any] = torch.load(work / "taken.pt")
    return taken


def _differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], start: Mapping[str, Any], parts: Mapping[str, str]
) -> Iterator[tuple[float, str]]:
    """How far every tensor of the original's ended from ours, and its name."""
    for part, name in parts.items():
        state = {key.removeprefix("module."): value for key, value in theirs[name].items()}
        if state.keys() != ours[part].keys():
            raise UserError(f"{part}: only one of both has {', '.join(sorted(state.keys() ^ ours[part].keys()))}")
        for key, value in ours[part].items():
            here, there, before = (tensor.double() for tensor in (value, state[key], start[part][key]))
            floor = max(0.01 * here.norm(), 1e-4 * here.numel() ** 0.5)
            yield float((there - here).norm() / (here - before).norm().clamp(min=floor)), f"{part}.{key}"
