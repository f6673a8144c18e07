"""Adapter from our configuration to bytedance/ibot with our patch."""

from typing import Any

from hvp.methods.ibot.config import IbotConfig
from hvp.patches.adapter import FIXED, FIXED_MULTI_CROP, MULTI_CROP_FLAGS, Adapter, Keys, Launch, multi_crop_flags

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
"""Flags of the original, by our key."""


def flags(config: IbotConfig, data: str, processes: int) -> list[str]:
    """Return the command line of main_ibot.py, which is started once per GPU."""
    words = multi_crop_flags(config, FLAGS, data, processes)
    words += ["--shared_head_teacher", str(config.model.shared_head).lower()]
    return words + (["--norm_in_head", config.model.norm_in_head] if config.model.norm_in_head else [])


def fixed(config: IbotConfig) -> dict[str, Any]:
    """Return the original's values where it has no flag."""
    precision = "fp16" if config.train.precision == "fp16" else "fp32"
    return {**FIXED, **FIXED_MULTI_CROP, "loss.center_momentum2": 0.9, "train.precision": precision}


ADAPTER = Adapter(
    flags,
    Keys(
        carried=(*FLAGS, "model.norm_in_head", "data.path", "data.workers", "train.batch_size"),
        fixed=fixed,
        only_ours={"model.arch": ("vit_micro",)},
    ),
    launch=Launch(
        starts_over="To resume, add --load_from CHECKPOINT, a file name there, to the command that --dry-run prints"
    ),
)
