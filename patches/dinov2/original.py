"""DINOv2's original, facebookresearch/dinov2 with our patch: its flags, and what it is compared on."""

import json
import os
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, cat, nn, tensor

from hvp.benchmarks.originals.on_cpu import Alone
from hvp.common.config.resolving import resolve
from hvp.common.errors import UserError
from hvp.common.views import ViewBatch
from hvp.methods.dinov2.checkpoint_names import CHUNKS
from hvp.methods.dinov2.config import DINOv2Config
from hvp.methods.dinov2.main_dinov2 import build_masks
from hvp.methods.dinov2.schedules import Schedules
from hvp.patches.original import (
    COMPARED,
    OF_EVERY_ORIGINAL,
    OF_MULTI_CROP,
    Original,
    OurImages,
    normalized_views,
    rescued_by_each,
    value_of,
)

IMAGES = 1_281_167
"""Training images of ImageNet-1k. The original reads no other number (data/datasets/image_net.py)."""

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
"""Our keys, and what its configuration calls them."""


def flags(config: DINOv2Config, data: str, processes: int) -> list[str]:
    """The command line of train.py, to be started once for every GPU: our flags, then its options.

    Raises:
        UserError: the run is not a whole number of the original's epochs, or shorter than its warm-up.
    """
    length, epochs = official_epochs(config)
    rescued = rescued_by_each(config, processes)
    options: dict[str, Any] = {theirs: value_of(config, ours) for ours, theirs in OPTIONS.items()}
    options |= {
        "student.block_chunks": CHUNKS,  # what FSDP gathers at a time, as in its vitl16_short.yaml
        "optim.scaling_rule": "sqrt_wrt_1024",
        "optim.epochs": epochs,
        "train.OFFICIAL_EPOCH_LENGTH": length,
        "train.batch_size_per_gpu": config.train.batch_size // processes,
        "train.dataset_path": f"ImageNet:split=TRAIN:root={data}:extra={data}",
        **_precision(config),
    }
    if config.model.num_register_tokens:  # positions are then interpolated as ours are, and its released networks'
        options |= {"student.interpolate_antialias": True, "student.interpolate_offset": 0.0}
    if config.data.workers is not None:
        options["train.num_workers"] = config.data.workers
    # Options go over its defaults. It reads a file, too, which may be empty but has to be there.
    words = ["--config-file", os.devnull, "--output-dir", "."]
    words += ["--rescue-k", str(rescued), "--rescue-s", str(config.rescue.s)]
    return words + [f"{name}={_as_yaml(value)}" for name, value in options.items()]


def official_epochs(config: DINOv2Config) -> tuple[int, int]:
    """How long an epoch of the original's is, in steps, and how many of them the run has.

    Raises:
        UserError: not a whole number, or fewer than those of the warm-up.
    """
    images = config.data.shapes.train if config.data.path == "shapes" else IMAGES
    steps_per_pass = images // config.train.batch_size
    steps = config.train.epochs * steps_per_pass
    length = config.optim.epoch_length or steps_per_pass
    if not length or steps % length:
        raise UserError(
            f"train.epochs = {config.train.epochs} passes over {images} images are {steps} steps of train.batch_size = "
            f"{config.train.batch_size}, and no whole number of optim.epoch_length = {length}, which is what the "
            "original counts in. Leave out optim.epoch_length, or change one of the others"
        )
    Schedules(config, steps, steps_per_pass)  # which refuses a warm-up that is longer than the run
    return length, steps // length


def _precision(config: DINOv2Config) -> dict[str, Any]:
    """What FSDP shards, and in which precision; by default it does, and in fp16."""
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
    """Refuses a folder that the original cannot train on.

    Args:
        data: as `flags()` gets it.
        upstream: the clone, which can list the images.

    Raises:
        UserError: it cannot be told the path, or its list of ImageNet's images is not there, or not of all.
    """
    if re.search(r"[:=#$]", str(data)):
        raise UserError(f"{data}: the original cannot be told a path that has one of : = # $. Give a link to it")
    entries = data / "entries-TRAIN.npy"
    if not entries.is_file():
        folder = json.dumps(str(data))
        code = "from dinov2.data.datasets import ImageNet as I; "
        code += f"I(split=I.Split.TRAIN, root={folder}, extra={folder}).dump_extra()"
        command = shlex.join(["env", f"PYTHONPATH={upstream.absolute()}", "python", "-c", code])
        raise UserError(
            f"{data}: the original reads ImageNet-1k by a list of its own, {entries.name}, which is not there. It "
            f"makes it of train/ and labels.txt (lines of CLASS,NAME):\n    {command}"
        )
    found = len(np.load(entries, mmap_mode="r"))
    if found != IMAGES:
        raise UserError(f"{entries} lists {found} images, and the original trains on ImageNet-1k's {IMAGES} alone")


def fixed(config: DINOv2Config) -> dict[str, Any]:
    """What the original does where it has no option."""
    length, _ = official_epochs(config)
    return {
        **OF_EVERY_ORIGINAL,
        **OF_MULTI_CROP,
        "views.blur_global1": 0.0,  # it hands on the probability of the opposite; see README.md
        "views.blur_global2": 0.9,
        "teacher.student_temp": 0.1,
        "teacher.center_momentum": 0.9,
        "optim.optimizer": "adamw",
        "train.seed": 0,
        "train.save_every": 3 * length,
        "train.keep_every": 3,
    }


def batch_with_masks(batch: ViewBatch) -> dict[str, Any]:
    """A batch as the original's collate function makes it, and the images' numbers."""
    assert batch.masks is not None
    global1, global2, *local = normalized_views(batch)
    masks = batch.masks.flatten(2).flatten(0, 1)  # [2 B, N]
    masked = masks.flatten().nonzero().flatten()  # [R]
    weights = 1 / masks.sum(dim=1).clamp(min=1)  # [2 B]
    return {
        "collated_global_crops": cat((global1, global2)),
        "collated_local_crops": cat(local),
        "collated_masks": masks,
        "mask_indices_list": masked,
        "masks_weight": weights.repeat_interleave(masks.sum(dim=1)),
        "upperbound": masks.numel() // 2,  # rows of a buffer, of which the first R are read
        "n_masked_patches": tensor([len(masked)]),
        "index": batch.index,
    }


def our_key(key: str) -> str:
    """A parameter's name without the number of its chunk."""
    return re.sub(r"^(backbone\.blocks)\.\d+\.", r"\1.", key)


def saved(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Student, teacher and loss of an original's checkpoint, by our keys."""
    parts: dict[str, dict[str, Tensor]] = {"student": {}, "teacher": {}, "dinov2_loss": {}}
    for key, value in checkpoint["model"].items():
        part, _, name = key.partition(".")
        if part in parts:
            parts[part][our_key(name)] = value
        else:
            parts["dinov2_loss"][key] = value
    return parts


def with_our_weights(meta_arch: Callable[[Any], Any], cfg: Any) -> nn.Module:
    """The original's student and teacher, which is made equal to it afterwards, with our first weights.

    Its centres take an update when the next targets are made, ours at the end of a step; here they do so before they
    are saved, too, so that both checkpoints have the last.
    """
    model: Any = meta_arch(cfg)
    weights = Alone.weights
    assert weights is not None
    model.student.load_state_dict({key: weights[our_key(key)] for key in model.student.state_dict()})

    def take_updates(module: Any, *_: object) -> None:
        module.dino_loss.apply_center_update()
        module.ibot_patch_loss.apply_center_update()

    model.register_state_dict_pre_hook(take_updates)
    return model


def no_images(_: object, **__: object) -> range:
    """For the original's dataset, which takes nothing but all of ImageNet-1k."""
    return range(1)


class ImagesOfSteps(OurImages):
    """Strong views by step, which the original has where our trainer has the epoch."""

    def __init__(self, *_: object, **__: object) -> None:
        config = resolve(DINOv2Config, [("comparison", {**COMPARED, **ORIGINAL.compared})]).config
        super().__init__(config, config.data.shapes.train)
        self.steps_per_epoch = self.length // config.train.batch_size

    def strong_views(self, step: int, index: Tensor) -> Tensor:
        """As those of `Rescuable`."""
        return super().strong_views(step // self.steps_per_epoch, index)


ORIGINAL = Original(
    flags,
    compared={
        "data.shapes.train": 40,
        "train.batch_size": 4,
        "model.arch": "vit_small",
        "model.patch_size": 8,
        "model.drop_path_rate": 0.0,
        "model.layerscale": 0.1,
        "dino.head_n_prototypes": 96,
        "dino.head_hidden_dim": 256,
        "dino.head_bottleneck_dim": 64,
        "ibot.mask_ratio_min_max": [0.2, 0.5],
        "teacher.warmup_teacher_temp_epochs": 2,
        "optim.base_lr": 0.0064,  # 4e-4 of 4 images: enough to go somewhere in so few steps
        "optim.epoch_length": 5,
        "optim.warmup_epochs": 1,
        "views.global_crops_size": 32,
        "views.local_crops_size": 16,
        "views.local_crops_number": 2,
        "selection.hard_views": "none",
        "rescue.enabled": True,
        "rescue.k": 2,
        "rescue.s": 0.5,
    },
    parts={"student": "student", "teacher": "teacher", "dinov2_loss": "dinov2_loss"},
    batch=batch_with_masks,
    masks=build_masks,
    replaced={
        "dinov2.train.ssl_meta_arch.SSLMetaArch": "hvp.patches.dinov2.original.with_our_weights",
        "dinov2.data.make_dataset": "hvp.patches.dinov2.original.no_images",
        "hvp.patches.support.Rescuable": "hvp.patches.dinov2.original.ImagesOfSteps",
    },
    packages={"xformers.ops": "hvp.benchmarks.originals.xformers_on_cpu"},
    needs=("omegaconf", "fvcore"),
    endless=True,
    saved=saved,
    notes=(
        "what it calls of xFormers is computed by PyTorch's attention, block by block",
        "strong views are made of our trainer's images",
        "its centres take their last update before they are saved, where it leaves that to the next step",
    ),
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
    check_data=check_data,
    saves_objects=True,  # the shards of FSDP
    misleading=("SLURM_JOB_ID",),  # which it believes before what its launcher says
    only_ours={"model.arch": ("vit_micro",), "dino.loss_weight": (0.0,), "views.local_crops_number": (0,)},
)
