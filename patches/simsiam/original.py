"""SimSiam's original, facebookresearch/simsiam with our patch: its flags, and what it is compared on."""

from typing import Any

from hvp.methods.simsiam.config import SimSiamConfig
from hvp.patches.original import OF_EVERY_ORIGINAL, Original, as_flags, normalized_views, spawning_flags

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
"""Our keys that are flags there."""


def flags(config: SimSiamConfig, data: str, processes: int) -> list[str]:
    """The command line of main_simsiam.py, which starts a process for every GPU itself."""
    words = [data, *as_flags(config, FLAGS, switches=True)]
    words += spawning_flags(config, processes)
    return words + (["--use-hvp"] if config.selection.hard_views == "hvp" else [])


def fixed(_: SimSiamConfig) -> dict[str, Any]:
    """What the original does where it has no flag."""
    return {
        **OF_EVERY_ORIGINAL,
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


ORIGINAL = Original(
    flags,
    compared={
        "data.shapes.train": 320,
        "train.batch_size": 32,
        "model.arch": "convnet_micro",
        "model.dim": 64,
        "model.pred_dim": 16,
        "optim.fix_pred_lr": False,
        "views.crop_size": 32,
    },
    parts={"model": "state_dict"},
    batch=lambda batch: [normalized_views(batch), batch.index],
    replaced={"torchvision.models.convnet_micro": "hvp.patches.original.small_encoder"},
    notes=("the encoder is our convnet_micro; projector and predictor are its own",),
    carried=(*FLAGS, "data.path", "data.workers"),
    fixed=fixed,
    starts_over="To go on, add --resume CHECKPOINT to the command that --dry-run prints",
    only_ours={"model.arch": ("resnet18_cifar", "convnet_micro")},
    spawns=True,
)
