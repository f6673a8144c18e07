"""Adapter from our configuration to sthalles/SimCLR with our patch.

The original's recipe is not ours: Adam, a schedule of its own, no batch norm in the projector, no normalised images.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

from hvp.common.errors import UserError
from hvp.methods.simclr.config import SimclrConfig
from hvp.patches.adapter import FIXED, Adapter, Images, Keys, Launch, as_flags, rescued_per_process

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
"""Flags of the original, by our key."""

CONSTANT_EPOCHS = 11
"""Epochs before the learning rate first changes."""


class Dataset(NamedTuple):
    """A dataset that the original trains on."""

    name: str
    """The value of its flag."""

    size: int
    """Height and width of a view, pixels."""

    total: int
    """Number of images."""


DATASETS = {
    "stl10_binary": Dataset("stl10", size=96, total=100_000),  # the unlabelled images
    "cifar-10-batches-py": Dataset("cifar10", size=32, total=50_000),
}
"""Datasets by the folder from which torchvision reads them."""


def dataset_in(data: str | None) -> Dataset:
    """Return the dataset that the original finds in a folder; STL-10, its default, where there is none.

    Raises:
        UserError: both datasets are there.
    """
    found = [dataset for folder, dataset in DATASETS.items() if data is not None and (Path(data) / folder).is_dir()]
    if len(found) > 1:
        raise UserError(f"{data}: {' and '.join(DATASETS)} are both there. Give a folder that holds one of them")
    return found[0] if found else DATASETS["stl10_binary"]


def flags(config: SimclrConfig, data: str, processes: int) -> list[str]:
    """Return the command line of run.py, which trains in one process."""
    if processes > 1:
        raise UserError(f"--devices {processes}: sthalles/SimCLR trains on one GPU. Leave it out")
    words = ["-data", data, "-dataset-name", dataset_in(data).name, "--arch", config.model.arch]
    words += [*as_flags(config, FLAGS, switches=True), "--lr", str(config.peak_lr), "--seed", str(config.train.seed)]
    words += ["--fp16-precision"] if config.train.precision == "fp16" else []
    words += [] if config.data.workers is None else ["--workers", str(config.data.workers)]
    words += ["--use-hvp"] if config.selection.hard_views == "hvp" else []
    return [*words, "--rescue-k", str(rescued_per_process(config, 1))]


def fixed(config: SimclrConfig) -> dict[str, Any]:
    """Return the original's values where it has no flag, or none for every value."""
    dataset, train = dataset_in(config.data.path), config.train
    steps = dataset.total // train.batch_size
    if not steps:
        raise UserError(f"train.batch_size = {train.batch_size}, but {dataset.name} has {dataset.total} images")
    last = lr_of_epoch(train.epochs - 1, config.peak_lr, steps)
    schedule = f"{config.peak_lr:g} for {CONSTANT_EPOCHS} epochs, then a cosine that changes once an epoch, "
    schedule += f"to 0 in {steps} epochs and back; {last:g} in the last"
    return {
        **FIXED,
        "model.zero_init_residual": False,
        "model.proj_hidden_dim": 2048,  # the encoder's width
        "model.num_proj_layers": 2,
        "model.use_bn_in_head": False,
        "optim.optimizer": "adam",
        "optim.warmup_epochs": 0,
        "optim.min_lr": schedule,
        "views.crop_size": dataset.size,
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
        "train.seed": 0 if train.seed == 0 else "0, except for strong views",
        "train.precision": "fp16" if train.precision == "fp16" else "fp32",
    }


def lr_of_epoch(epoch: int, peak: float, steps: int) -> float:
    """Return the original's learning rate in an epoch.

    Args:
        epoch: the epoch, counted from 0.
        peak: learning rate at the start.
        steps: steps per epoch. The cosine turns after as many *epochs*.
    """
    moved = max(0, epoch + 1 - CONSTANT_EPOCHS)
    return peak * (1 + math.cos(math.pi * moved / steps)) / 2


ADAPTER = Adapter(
    flags,
    Keys(
        carried=(*FLAGS, "model.arch", "optim.base_lr", "optim.lr_scaling", "data.path", "data.workers", "rescue.k"),
        fixed=fixed,
        only_ours={"model.arch": ("resnet18_cifar", "convnet_micro")},
    ),
    Images({"stl10_binary": "STL-10 (stl10_binary/)", "cifar-10-batches-py": "CIFAR-10 (cifar-10-batches-py/)"}),
    Launch(spawns=True, starts_over="It cannot resume one"),
    differences=(
        "the original does not normalise images",
        "the original's Adam adds weight decay to the gradient, for biases and norms too",
    ),
)
