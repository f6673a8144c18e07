"""Adapter from our configuration to facebookresearch/dino with our patch."""

from typing import Any

from hvp.methods.dino.config import DinoConfig
from hvp.patches.adapter import FIXED, FIXED_MULTI_CROP, MULTI_CROP_FLAGS, Adapter, Keys, multi_crop_flags

FLAGS = {
    **MULTI_CROP_FLAGS,
    "model.drop_path_rate": "--drop_path_rate",
    "model.use_bn_in_head": "--use_bn_in_head",
}
"""Flags of the original, by our key."""


def flags(config: DinoConfig, data: str, processes: int) -> list[str]:
    """Return the command line of main_dino.py, which is started once per GPU."""
    return multi_crop_flags(config, FLAGS, data, processes)


def fixed(config: DinoConfig) -> dict[str, Any]:
    """Return the original's values where it has no flag."""
    precision = "fp16" if config.train.precision == "fp16" else "fp32"
    return {**FIXED, **FIXED_MULTI_CROP, "optim.clip_by": "tensor", "train.precision": precision}


ADAPTER = Adapter(
    flags,
    Keys(
        carried=(*FLAGS, "data.path", "data.workers", "train.batch_size"),
        fixed=fixed,
        only_ours={"model.arch": ("vit_micro",)},
    ),
)
