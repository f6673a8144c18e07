"""Adapter from our configuration to facebookresearch/dinov2 with our patch."""

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from hvp.common.errors import UserError
from hvp.methods.dinov2.checkpoint_names import CHUNKS
from hvp.methods.dinov2.config import DINOv2Config
from hvp.methods.dinov2.schedules import Schedules
from hvp.patches.adapter import FIXED, FIXED_MULTI_CROP, Adapter, Images, Keys, Launch, rescued_per_process, value_of

IMAGES = 1_281_167
"""Training images of ImageNet-1k; the original accepts no other number (data/datasets/image_net.py)."""

_HEAD = ("head_n_prototypes", "head_bottleneck_dim", "head_nlayers", "head_hidden_dim")

OPTIONS = {
    "model.arch": "student.arch",
    "model.patch_size": "student.patch_size",
    "model.drop_path_rate": "student.drop_path_rate",
    "model.drop_path_uniform": "student.drop_path_uniform",
    "model.layerscale": "student.layerscale",
    "model.ffn_layer": "student.ffn_layer",
    "model.num_register_tokens": "student.num_register_tokens",
    "dino.loss_weight": "dino.loss_weight",
    "dino.koleo_loss_weight": "dino.koleo_loss_weight",
    **{f"dino.{name}": f"dino.{name}" for name in _HEAD},
    "ibot.loss_weight": "ibot.loss_weight",
    "ibot.mask_sample_probability": "ibot.mask_sample_probability",
    "ibot.mask_ratio_min_max": "ibot.mask_ratio_min_max",
    "ibot.separate_head": "ibot.separate_head",
    **{f"ibot.{name}": f"ibot.{name}" for name in _HEAD},
    "teacher.momentum_teacher": "teacher.momentum_teacher",
    "teacher.final_momentum_teacher": "teacher.final_momentum_teacher",
    "teacher.warmup_teacher_temp": "teacher.warmup_teacher_temp",
    "teacher.teacher_temp": "teacher.teacher_temp",
    "teacher.warmup_teacher_temp_epochs": "teacher.warmup_teacher_temp_epochs",
    "teacher.centering": "train.centering",
    "optim.base_lr": "optim.base_lr",
    "optim.min_lr": "optim.min_lr",
    "optim.warmup_epochs": "optim.warmup_epochs",
    "optim.weight_decay": "optim.weight_decay",
    "optim.weight_decay_end": "optim.weight_decay_end",
    "optim.clip_grad": "optim.clip_grad",
    "optim.freeze_last_layer": "optim.freeze_last_layer_epochs",
    "optim.layerwise_decay": "optim.layerwise_decay",
    "optim.patch_embed_lr_mult": "optim.patch_embed_lr_mult",
    "views.global_crops_size": "crops.global_crops_size",
    "views.global_crops_scale": "crops.global_crops_scale",
    "views.local_crops_size": "crops.local_crops_size",
    "views.local_crops_number": "crops.local_crops_number",
    "views.local_crops_scale": "crops.local_crops_scale",
}
"""Keys of the original's configuration, by our key."""


def flags(config: DINOv2Config, data: str, processes: int) -> list[str]:
    """Return the command line of train.py, which is started once per GPU: the flags of our patch, then its options.

    Raises:
        UserError: the run is not a whole number of the original's epochs, or shorter than its warm-up.
    """
    length, epochs = official_epochs(config)
    rescued = rescued_per_process(config, processes)
    options: dict[str, Any] = {theirs: value_of(config, ours) for ours, theirs in OPTIONS.items()}
    options |= {
        "student.block_chunks": CHUNKS,  # blocks that FSDP gathers at a time, as in its vitl16_short.yaml
        "optim.scaling_rule": "sqrt_wrt_1024",
        "optim.epochs": epochs,
        "train.OFFICIAL_EPOCH_LENGTH": length,
        "train.batch_size_per_gpu": config.train.batch_size // processes,
        "train.dataset_path": f"ImageNet:split=TRAIN:root={data}:extra={data}",
        **_precision(config),
    }
    if config.model.num_register_tokens:  # then positions are interpolated as in our networks and in those it released
        options |= {"student.interpolate_antialias": True, "student.interpolate_offset": 0.0}
    if config.data.workers is not None:
        options["train.num_workers"] = config.data.workers
    # The options override its defaults. The file that it also reads has to exist, but may be empty.
    words = ["--config-file", os.devnull, "--output-dir", "."]
    words += ["--rescue-k", str(rescued), "--rescue-s", str(config.rescue.s)]
    return words + [f"{name}={_as_yaml(value)}" for name, value in options.items()]


def official_epochs(config: DINOv2Config) -> tuple[int, int]:
    """Return the length of the original's epoch, in steps, and the number of such epochs in the run.

    Raises:
        UserError: the run is no whole number of them, or shorter than the warm-up.
    """
    images = config.data.shapes.train if config.data.path == "shapes" else IMAGES
    steps_per_pass = images // config.train.batch_size
    steps = config.train.epochs * steps_per_pass
    length = config.optim.epoch_length or steps_per_pass
    if not length or steps % length:
        raise UserError(
            f"train.epochs = {config.train.epochs} passes over {images} images are {steps} steps of train.batch_size = "
            f"{config.train.batch_size}, which is no whole number of optim.epoch_length = {length}, the original's "
            "epochs. Leave out optim.epoch_length, or change one of the others"
        )
    Schedules(config, steps, steps_per_pass)  # refuses a warm-up longer than the run
    return length, steps // length


def _precision(config: DINOv2Config) -> dict[str, Any]:
    """Return FSDP's options for sharding and precision, where they are not the defaults: sharded, in fp16."""
    options: dict[str, Any] = {"compute_precision.grad_scaler": config.train.precision == "fp16"}
    for network in ("student", "teacher"):
        for part in ("backbone", "dino_head", "ibot_head"):
            where = f"compute_precision.{network}.{part}"
            if config.train.sharding == "ddp":
                options[f"{where}.sharding_strategy"] = "NO_SHARD"
            if config.train.precision != "fp16":
                options[f"{where}.mixed_precision.param_dtype"] = config.train.precision
                options[f"{where}.mixed_precision.reduce_dtype"] = "fp32"
    return options


def _as_yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def check_data(data: Path, upstream: Path) -> None:
    """Check that the original can train on a folder.

    Args:
        data: the folder, as `flags()` receives it.
        upstream: the clone, which can list the images.

    Raises:
        UserError: the original cannot read such a path, or its list of ImageNet's images is missing or incomplete.
    """
    if re.search(r"[:=#$]", str(data)):
        raise UserError(f"{data}: the original cannot read a path that contains : = # or $. Give a link to it")
    entries = data / "entries-TRAIN.npy"
    if not entries.is_file():
        folder = json.dumps(str(data))
        code = "from dinov2.data.datasets import ImageNet as I; "
        code += f"I(split=I.Split.TRAIN, root={folder}, extra={folder}).dump_extra()"
        command = shlex.join(["env", f"PYTHONPATH={upstream.absolute()}", "python", "-c", code])
        raise UserError(
            f"{data}: the original reads ImageNet-1k from a list of its own, {entries.name}, which is missing. It "
            f"makes the list from train/ and labels.txt (lines of CLASS,NAME):\n    {command}"
        )
    found = len(np.load(entries, mmap_mode="r"))
    if found != IMAGES:
        raise UserError(f"{entries} lists {found} images, but the original trains only on all {IMAGES} of ImageNet-1k")


def fixed(config: DINOv2Config) -> dict[str, Any]:
    """Return the original's values where it has no option."""
    length, _ = official_epochs(config)
    return {
        **FIXED,
        **FIXED_MULTI_CROP,
        "views.blur_global1": 0.0,  # it passes on the probability of the opposite; see README.md
        "views.blur_global2": 0.9,
        "teacher.student_temp": 0.1,
        "teacher.center_momentum": 0.9,
        "optim.optimizer": "adamw",
        "train.seed": 0,
        "train.save_every": 3 * length,
        "train.keep_every": 3,
    }


ADAPTER = Adapter(
    flags,
    Keys(
        carried=(
            *OPTIONS,
            "optim.epoch_length",
            "data.path",
            "data.workers",
            "train.batch_size",
            "train.epochs",
            "train.precision",
            "train.sharding",
            "rescue.k",
            "rescue.s",
        ),
        fixed=fixed,
        only_ours={"model.arch": ("vit_micro",), "dino.loss_weight": (0.0,), "views.local_crops_number": (0,)},
    ),
    Images(check=check_data),
    Launch(
        hidden=("SLURM_JOB_ID",),  # the original believes it before its launcher
        saves_objects=True,  # the shards of FSDP
    ),
)
