"""Comparison of facebookresearch/dinov2, with our patch, with our trainer.

# B images, N patches of a global view, R masked patches in all of them
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, cat, nn, tensor

from hvp.benchmarks.originals.harness import (
    Batches,
    Checkpoints,
    Harness,
    OurImages,
    comparison_config,
    normalized_views,
)
from hvp.benchmarks.originals.on_cpu import Alone, Substitutes
from hvp.common.views import ViewBatch
from hvp.methods.dinov2.config import DINOv2Config
from hvp.methods.dinov2.main_dinov2 import build_masks


def batch_with_masks(batch: ViewBatch) -> dict[str, Any]:
    """Return a batch as the original's collate function does, with the images' indices added."""
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
        "upperbound": masks.numel() // 2,  # rows of a buffer; the first R are read
        "n_masked_patches": tensor([len(masked)]),
        "index": batch.index,
    }


def our_key(key: str) -> str:
    """Return our key of a parameter: the original's name without the number of its chunk of blocks."""
    return re.sub(r"^(backbone\.blocks)\.\d+\.", r"\1.", key)


def read_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Return the student, the teacher and the loss of an original's checkpoint, by our keys."""
    parts: dict[str, dict[str, Tensor]] = {"student": {}, "teacher": {}, "dinov2_loss": {}}
    for key, value in checkpoint["model"].items():
        part, _, name = key.partition(".")
        if part in parts:
            parts[part][our_key(name)] = value
        else:
            parts["dinov2_loss"][key] = value
    return parts


def with_our_weights(meta_arch: Callable[[Any], Any], cfg: Any) -> nn.Module:
    """Return the original's networks with our initial weights in the student, which it then copies to the teacher.

    The original updates its centres when it computes the next targets, our trainer at the end of a step. Here they are
    also updated before they are saved, so that both checkpoints hold the last update.
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
    """Return one index, in place of the original's dataset, which accepts only all of ImageNet-1k."""
    return range(1)


class ImagesOfSteps(OurImages):
    """Strong views by step, where our trainer makes them by epoch."""

    def __init__(self, *_: object, **__: object) -> None:
        config = comparison_config(DINOv2Config, HARNESS.values)
        super().__init__(config, config.data.shapes.train)
        self.steps_per_epoch = self.length // config.train.batch_size

    def strong_views(self, step: int, index: Tensor) -> Tensor:
        """Make strong views as `Rescuable.strong_views()` does."""
        return super().strong_views(step // self.steps_per_epoch, index)


HARNESS = Harness(
    values={
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
        "optim.base_lr": 0.0064,  # 4e-4 at 4 images: large enough to move in so few steps
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
    substitutes=Substitutes(
        {
            "dinov2.train.ssl_meta_arch.SSLMetaArch": "hvp.benchmarks.originals.dinov2.with_our_weights",
            "dinov2.data.make_dataset": "hvp.benchmarks.originals.dinov2.no_images",
            "hvp.patches.support.Rescuable": "hvp.benchmarks.originals.dinov2.ImagesOfSteps",
        },
        packages={"xformers.ops": "hvp.benchmarks.originals.xformers_on_cpu"},
    ),
    batches=Batches(batch_with_masks, masks=build_masks, endless=True),
    checkpoints=Checkpoints(
        {"student": "student", "teacher": "teacher", "dinov2_loss": "dinov2_loss"}, read=read_checkpoint
    ),
    needs=("omegaconf", "fvcore"),
    notes=(
        "PyTorch's attention, block by block, computes what the original calls of xFormers",
        "strong views are made from our trainer's images",
        "its centres take their last update before they are saved; by itself it leaves that to the next step",
    ),
)
