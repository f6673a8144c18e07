"""DINO's original, facebookresearch/dino with our patch: its flags, and what it is compared on."""

from typing import Any

from hvp.methods.dino.config import DinoConfig
from hvp.patches.original import (
    MULTI_CROP_FLAGS,
    OF_EVERY_ORIGINAL,
    OF_MULTI_CROP,
    Original,
    multi_crop_flags,
    normalized_views,
)

FLAGS = {
    **MULTI_CROP_FLAGS,
    "model.drop_path_rate": "--drop_path_rate",
    "model.use_bn_in_head": "--use_bn_in_head",
}
"""Our keys that are flags there."""


def flags(config: DinoConfig, data: str, processes: int) -> list[str]:
    """The command line of main_dino.py, to be started once for every GPU."""
    return multi_crop_flags(config, FLAGS, data, processes)


def fixed(config: DinoConfig) -> dict[str, Any]:
    """What the original does where it has no flag."""
    precision = "fp16" if config.train.precision == "fp16" else "fp32"
    return {**OF_EVERY_ORIGINAL, **OF_MULTI_CROP, "optim.clip_by": "tensor", "train.precision": precision}


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
    replaced={"vision_transformer.vit_tiny": "hvp.patches.original.vit_of_32_pixels"},
    notes=("its ViT is made for images of 32 pixels",),
    carried=(*FLAGS, "data.path", "data.workers", "train.batch_size"),
    fixed=fixed,
    only_ours={"model.arch": ("vit_micro",)},
)
