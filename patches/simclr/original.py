"""SimCLR's original, sthalles/SimCLR with our patch: its flags, and what it is compared on.

Its recipe is another than ours: Adam, a schedule of its own, no batch norm in the projector, no normalised images.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

from torchvision.datasets import FakeData

from hvp.common.config.resolving import resolve
from hvp.common.errors import UserError
from hvp.methods.simclr.config import SimclrConfig
from hvp.patches.original import (
    COMPARED,
    OF_EVERY_ORIGINAL,
    Original,
    OurImages,
    as_flags,
    normalized_views,
    rescued_by_each,
)

FLAGS = {
    "model.out_dim": "--out_dim",
    "loss.temperature": "--temperature",
    "optim.weight_decay": "--wd",
    "selection.candidates": "--candidates",
    "rescue.s": "--rescue-s",
    "train.batch_size": "--batch-size",
    "train.epochs": "--epochs",
    "train.log_every": "--log-every-n-steps",
}
"""Our keys that are flags there."""

CONSTANT_EPOCHS = 11
"""Before the learning rate moves for the first time."""


class Images(NamedTuple):
    """What the original trains on."""

    name: str
    """As a flag."""

    size: int
    """Height and width of a view, pixels."""

    total: int


FOLDERS = {
    "stl10_binary": Images("stl10", size=96, total=100_000),  # the unlabelled ones
    "cifar-10-batches-py": Images("cifar10", size=32, total=50_000),
}
"""By the folder that torchvision reads them from."""


def images_in(data: str | None) -> Images:
    """What the original finds in a data folder; STL-10, its default, where neither is there.

    Raises:
        UserError: both are there.
    """
    found = [images for folder, images in FOLDERS.items() if data is not None and (Path(data) / folder).is_dir()]
    if len(found) > 1:
        raise UserError(f"{data}: {' and '.join(FOLDERS)} are both there. Give a folder that holds one of them")
    return found[0] if found else FOLDERS["stl10_binary"]


def flags(config: SimclrConfig, data: str, processes: int) -> list[str]:
    """The command line of run.py, which trains in one process."""
    if processes > 1:
        raise UserError(f"--devices {processes}: sthalles/SimCLR trains on one GPU. Leave it out")
    arch = config.model.arch.replace("convnet_micro", "resnet18")  # in a comparison, where it goes by that name
    words = ["-data", data, "-dataset-name", images_in(data).name, "--arch", arch]
    words += [*as_flags(config, FLAGS, switches=True), "--lr", str(config.peak_lr), "--seed", str(config.train.seed)]
    words += ["--fp16-precision"] if config.train.precision == "fp16" else []
    words += [] if config.data.workers is None else ["--workers", str(config.data.workers)]
    words += ["--use-hvp"] if config.selection.hard_views == "hvp" else []
    return [*words, "--rescue-k", str(rescued_by_each(config, 1))]


def fixed(config: SimclrConfig) -> dict[str, Any]:
    """What the original does where it has no flag, or none for every value."""
    images, train = images_in(config.data.path), config.train
    steps = images.total // train.batch_size
    if not steps:
        raise UserError(f"train.batch_size = {train.batch_size}, but {images.name} has {images.total} images")
    last = lr_of_epoch(train.epochs - 1, config.peak_lr, steps)
    schedule = f"{config.peak_lr:g} for {CONSTANT_EPOCHS} epochs, then a cosine that moves once an epoch, "
    schedule += f"to 0 in {steps} epochs and back; {last:g} in the last"
    return {
        **OF_EVERY_ORIGINAL,
        "model.zero_init_residual": False,
        "model.proj_hidden_dim": 2048,  # the encoder's width
        "model.num_proj_layers": 2,
        "model.use_bn_in_head": False,
        "optim.optimizer": "adam",
        "optim.warmup_epochs": 0,
        "optim.min_lr": schedule,
        "views.crop_size": images.size,
        "views.crop_scale": (0.08, 1.0),
        "views.jitter": 0.8,
        "views.brightness": 0.8,
        "views.contrast": 0.8,
        "views.saturation": 0.8,
        "views.hue": 0.2,
        "views.grayscale": 0.2,
        "views.blur": 1.0,
        "train.keep_every": 0,
        "train.save_every": "once, at the end",
        "train.seed": 0 if train.seed == 0 else "0, but for strong views",
        "train.precision": "fp16" if train.precision == "fp16" else "fp32",
    }


def lr_of_epoch(epoch: int, peak: float, steps: int) -> float:
    """The original's learning rate.

    Args:
        epoch: counted from 0.
        peak: what it starts with.
        steps: of an epoch, after as many epochs of which the cosine turns.
    """
    moved = max(0, epoch + 1 - CONSTANT_EPOCHS)
    return peak * (1 + math.cos(math.pi * moved / steps)) / 2


def no_images(_: type, root: str, *, transform: Any, **__: object) -> FakeData:
    """For STL-10, of which a comparison reads nothing."""
    return FakeData(size=1, transform=transform)


def our_images(_: type, dataset: Any, *__: object, **___: object) -> OurImages:
    """For the `Rescuable`."""
    return OurImages(resolve(SimclrConfig, [("comparison", {**COMPARED, **ORIGINAL.compared})]).config, len(dataset))


ORIGINAL = Original(
    flags,
    compared={
        "data.shapes.train": 320,
        "train.batch_size": 32,
        "model.arch": "convnet_micro",
        "model.proj_hidden_dim": 96,  # the encoder's width
        "model.out_dim": 64,
        "model.use_bn_in_head": False,
        "loss.temperature": 0.2,
        "optim.optimizer": "adamw",  # without weight decay it is Adam
        "optim.weight_decay": 0.0,
        "optim.base_lr": 0.008,  # 0.001 at this batch, constant as in the original's first epochs
        "optim.min_lr": 0.001,
        "optim.warmup_epochs": 0,
        "views.crop_size": 32,
        "rescue.enabled": True,
        "rescue.k": 8,
        "rescue.s": 0.5,
    },
    parts={"model": "state_dict"},
    batch=lambda batch: [normalized_views(batch), batch.index],
    named=lambda key: key.replace("projector.layers.", "backbone.fc."),
    learner="simclr.SimCLR",
    replaced={
        "torchvision.models.resnet18": "hvp.patches.original.small_encoder",
        "torchvision.datasets.STL10": "hvp.patches.simclr.original.no_images",
        "hvp.patches.support.Rescuable": "hvp.patches.simclr.original.our_images",
    },
    notes=(
        "the encoder is our convnet_micro, by the name of resnet18; the projector is its own",
        "strong views are made of our trainer's images; STL-10 is not read",
    ),
    carried=(*FLAGS, "model.arch", "optim.base_lr", "optim.lr_scaling", "data.path", "data.workers", "rescue.k"),
    fixed=fixed,
    starts_over="It cannot go on with one",
    otherwise=(
        "the original does not normalise images",
        "the original's Adam has weight decay in its gradient, that of biases and norms included",
    ),
    folders={"stl10_binary": "STL-10 (stl10_binary/)", "cifar-10-batches-py": "CIFAR-10 (cifar-10-batches-py/)"},
    only_ours={"model.arch": ("resnet18_cifar", "convnet_micro")},
    spawns=True,
)
