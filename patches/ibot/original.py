"""iBOT's original, bytedance/ibot with our patch: its flags, and what it is compared on."""

from typing import Any

from hvp.common.views import ViewBatch
from hvp.methods.ibot.config import IbotConfig
from hvp.methods.ibot.main_ibot import build_masks
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
    "model.drop_path_rate": "--drop_path",
    "model.patch_out_dim": "--patch_out_dim",
    "model.shared_head": "--shared_head",
    "masks.pred_ratio": "--pred_ratio",
    "masks.pred_ratio_var": "--pred_ratio_var",
    "masks.pred_shape": "--pred_shape",
    "masks.pred_start_epoch": "--pred_start_epoch",
    "loss.lambda1": "--lambda1",
    "loss.lambda2": "--lambda2",
    "loss.warmup_teacher_patch_temp": "--warmup_teacher_patch_temp",
    "loss.teacher_patch_temp": "--teacher_patch_temp",
}
"""Our keys that are flags there."""


def flags(config: IbotConfig, data: str, processes: int) -> list[str]:
    """The command line of main_ibot.py, to be started once for every GPU."""
    words = multi_crop_flags(config, FLAGS, data, processes)
    words += ["--shared_head_teacher", str(config.model.shared_head).lower()]
    return words + (["--norm_in_head", config.model.norm_in_head] if config.model.norm_in_head else [])


def fixed(config: IbotConfig) -> dict[str, Any]:
    """What the original does where it has no flag."""
    precision = "fp16" if config.train.precision == "fp16" else "fp32"
    return {**OF_EVERY_ORIGINAL, **OF_MULTI_CROP, "loss.center_momentum2": 0.9, "train.precision": precision}


def no_clusters(_: object, *__: object, **___: object) -> tuple[float, float, float, float]:
    """For how well the prototypes match the labels, which the original logs and does not train on."""
    return 0.0, 0.0, 0.0, 0.0


def batch_with_masks(batch: ViewBatch) -> list[Any]:
    """Views, labels and the global candidates' masks, which are those of the local ones in no loss."""
    assert batch.masks is not None
    return [normalized_views(batch), batch.index, list(batch.masks)]


ORIGINAL = Original(
    flags,
    compared={
        "data.shapes.train": 40,
        "train.batch_size": 4,
        "model.arch": "vit_tiny",
        "model.patch_size": 4,
        "model.drop_path_rate": 0.0,
        "model.out_dim": 96,
        "model.patch_out_dim": 96,
        "model.norm_last_layer": False,
        "masks.pred_ratio": [0.0, 0.4],
        "masks.pred_ratio_var": [0.0, 0.1],
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
    parts={"student": "student", "teacher": "teacher", "ibot_loss": "ibot_loss"},
    batch=batch_with_masks,
    masks=build_masks,
    replaced={
        "models.vit_tiny": "hvp.patches.original.vit_of_32_pixels",
        "evaluation.unsupervised.unsup_cls.eval_pred": "hvp.patches.ibot.original.no_clusters",
    },
    notes=("its ViT is made for images of 32 pixels", "prototypes are not compared with labels for the log"),
    carried=(*FLAGS, "model.norm_in_head", "data.path", "data.workers", "train.batch_size"),
    fixed=fixed,
    starts_over="To go on, add --load_from CHECKPOINT, a file's name there, to the command that --dry-run prints",
    only_ours={"model.arch": ("vit_micro",)},
)
