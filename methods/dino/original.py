"""DINO's original, facebookresearch/dino with our patch: its flags, and what it is compared on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from hvp.common.originals.original import OF_EVERY_ORIGINAL, OF_MULTI_CROP, Original, as_flags, normalized_views
from hvp.methods.dino.config import DinoConfig

FLAGS = {
    "model.arch": "--arch",
    "model.patch_size": "--patch_size",
    "model.drop_path_rate": "--drop_path_rate",
    "model.out_dim": "--out_dim",
    "model.norm_last_layer": "--norm_last_layer",
    "model.use_bn_in_head": "--use_bn_in_head",
    "model.momentum_teacher": "--momentum_teacher",
    "loss.warmup_teacher_temp": "--warmup_teacher_temp",
    "loss.teacher_temp": "--teacher_temp",
    "loss.warmup_teacher_temp_epochs": "--warmup_teacher_temp_epochs",
    "optim.optimizer": "--optimizer",
    "optim.base_lr": "--lr",
    "optim.min_lr": "--min_lr",
    "optim.warmup_epochs": "--warmup_epochs",
    "optim.weight_decay": "--weight_decay",
    "optim.weight_decay_end": "--weight_decay_end",
    "optim.clip_grad": "--clip_grad",
    "optim.freeze_last_layer": "--freeze_last_layer",
    "views.global_crops_scale": "--global_crops_scale",
    "views.local_crops_number": "--local_crops_number",
    "views.local_crops_scale": "--local_crops_scale",
    "selection.global_candidates": "--global_candidates",
    "selection.local_candidates": "--local_candidates",
    "selection.comparisons": "--comparisons",
    "train.epochs": "--epochs",
    "train.seed": "--seed",
    "train.keep_every": "--saveckp_freq",
}
"""Our keys that are flags there."""


def flags(config: DinoConfig, data: str, processes: int) -> list[str]:
    """The command line of main_dino.py, to be started once for every GPU."""
    words = ["--data_path", str(Path(data) / "train"), *as_flags(config, FLAGS, switches=False)]
    words += ["--batch_size_per_gpu", str(config.train.batch_size // processes)]
    words += ["--use_fp16", str(config.train.precision == "fp16").lower()]
    words += [] if config.data.workers is None else ["--num_workers", str(config.data.workers)]
    return [*words, "--use_hvp", str(config.selection.hard_views == "hvp").lower()]


def fixed(config: DinoConfig) -> dict[str, Any]:
    """What the original does where it has no flag."""
    precision = "fp16" if config.train.precision == "fp16" else "fp32"
    return {**OF_EVERY_ORIGINAL, **OF_MULTI_CROP, "optim.clip_by": "tensor", "train.precision": precision}


def vit_of_32_pixels(vit: Callable[..., nn.Module], **named: Any) -> nn.Module:
    """The original's network, whose size of images has no flag."""
    return vit(img_size=[32], **named)


ORIGINAL = Original(
    flags,
    compared={
        "data.shapes.train": 40,
        "train.batch_size": 4,
        "model.arch": "vit_tiny",
        "model.patch_size": 8,
        "model.drop_path_rate": 0.0,
        "model.out_dim": 96,
        "model.norm_last_layer": False,
        "loss.warmup_teacher_temp_epochs": 1,
        "loss.teacher_temp": 0.07,
        "optim.base_lr": 0.0064,  # 1e-4 of 4 images: enough to go somewhere in so few steps
        "optim.warmup_epochs": 1,
        "views.global_crops_size": 32,
        "views.local_crops_size": 16,
        "views.local_crops_number": 2,
        "selection.local_candidates": 4,
        "selection.comparisons": 5,
    },
    parts={"student": "student", "teacher": "teacher", "dino_loss": "dino_loss"},
    batch=lambda batch: [normalized_views(batch), batch.index],
    replaced={"vision_transformer.vit_tiny": "hvp.methods.dino.original.vit_of_32_pixels"},
    notes=("its ViT is made for images of 32 pixels",),
    carried=(*FLAGS, "data.path", "data.workers", "train.batch_size"),
    fixed=fixed,
    only_ours={"model.arch": ("vit_micro",)},
)
