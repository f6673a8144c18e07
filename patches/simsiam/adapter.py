"""Adapter from our configuration to facebookresearch/simsiam with our patch."""

from typing import Any

from hvp.methods.simsiam.config import SimSiamConfig
from hvp.patches.adapter import FIXED, Adapter, Keys, Launch, as_flags, spawning_flags

FLAGS = {
    "model.arch": "--arch",
    "model.dim": "--dim",
    "model.pred_dim": "--pred-dim",
    "optim.base_lr": "--lr",
    "optim.weight_decay": "--wd",
    "optim.fix_pred_lr": "--fix-pred-lr",
    "selection.candidates": "--candidates",
    "train.batch_size": "--batch-size",
    "train.epochs": "--epochs",
    "train.seed": "--seed",
    "train.log_every": "--print-freq",
}
"""Flags of the original, by our key."""


def flags(config: SimSiamConfig, data: str, processes: int) -> list[str]:
    """Return the command line of main_simsiam.py, which starts one process per GPU itself."""
    words = [data, *as_flags(config, FLAGS, switches=True)]
    words += spawning_flags(config, processes)
    return words + (["--use-hvp"] if config.selection.hard_views == "hvp" else [])


def fixed(_: SimSiamConfig) -> dict[str, Any]:
    """Return the original's values where it has no flag."""
    return {
        **FIXED,
        "model.zero_init_residual": True,
        "model.projector_layers": 3,
        "model.projector_bias": True,
        "optim.optimizer": "sgd",
        "views.crop_size": 224,
        "views.crop_scale": (0.2, 1.0),
        "views.jitter": 0.8,
        "views.brightness": 0.4,
        "views.contrast": 0.4,
        "views.saturation": 0.4,
        "views.hue": 0.1,
        "views.grayscale": 0.2,
        "views.blur": 0.5,
        "train.keep_every": 1,
        "train.precision": "fp32",
    }


ADAPTER = Adapter(
    flags,
    Keys(
        carried=(*FLAGS, "data.path", "data.workers"),
        fixed=fixed,
        only_ours={"model.arch": ("resnet18_cifar", "convnet_micro")},
    ),
    launch=Launch(spawns=True, starts_over="To resume, add --resume CHECKPOINT to the command that --dry-run prints"),
)
