"""MoCo v3's original, facebookresearch/moco-v3 with our patch: its flags, and what it is compared on."""

from typing import Any

from hvp.common.config.resolving import resolve
from hvp.methods.mocov3.config import MoCoConfig
from hvp.patches.original import (
    COMPARED,
    OF_EVERY_ORIGINAL,
    Original,
    OurImages,
    as_flags,
    normalized_views,
    rescued_by_each,
    spawning_flags,
)

FLAGS = {
    "model.arch": "--arch",
    "model.stop_grad_conv1": "--stop-grad-conv1",
    "model.dim": "--moco-dim",
    "model.mlp_dim": "--moco-mlp-dim",
    "model.momentum": "--moco-m",
    "model.momentum_cosine": "--moco-m-cos",
    "loss.temperature": "--moco-t",
    "optim.optimizer": "--optimizer",
    "optim.base_lr": "--lr",
    "optim.warmup_epochs": "--warmup-epochs",
    "optim.weight_decay": "--wd",
    "rescue.s": "--rescue-s",
    "train.batch_size": "--batch-size",
    "train.epochs": "--epochs",
    "train.seed": "--seed",
    "train.log_every": "--print-freq",
}
"""Our keys that are flags there."""


def flags(config: MoCoConfig, data: str, processes: int) -> list[str]:
    """The command line of main_moco.py, which starts a process for every GPU itself."""
    words = [data, *as_flags(config, FLAGS, switches=True), "--crop-min", str(config.views.crop_scale[0])]
    words += spawning_flags(config, processes)
    rescued = rescued_by_each(config, processes) * processes
    return [*words, "--rescue-k", str(rescued)]


def fixed(config: MoCoConfig) -> dict[str, Any]:
    """What the original does where it has no flag."""
    return {
        **OF_EVERY_ORIGINAL,
        "views.crop_size": 224,
        "views.crop_scale": (config.views.crop_scale[0], 1.0),
        "views.jitter": 0.8,
        "views.brightness": 0.4,
        "views.contrast": 0.4,
        "views.saturation": 0.2,
        "views.hue": 0.1,
        "views.grayscale": 0.2,
        "views.blur_view1": 1.0,
        "views.blur_view2": 0.1,
        "views.solarize": 0.2,
        "train.keep_every": 1,
        "train.precision": "fp16",
    }


def our_images(_: type, dataset: Any, *__: object, **___: object) -> OurImages:
    """For the `Rescuable`."""
    return OurImages(resolve(MoCoConfig, [("comparison", {**COMPARED, **ORIGINAL.compared})]).config, len(dataset))


def is_available(_: object) -> bool:
    """For CUDA, without which the original leaves its network as it is and then fails."""
    return True


ORIGINAL = Original(
    flags,
    compared={
        "data.shapes.train": 320,
        "train.batch_size": 32,
        "model.arch": "convnet_micro",
        "model.dim": 64,
        "model.mlp_dim": 128,
        "loss.temperature": 0.2,
        "optim.base_lr": 0.2,
        "optim.warmup_epochs": 1,
        "views.crop_size": 32,
        "selection.hard_views": "none",
        "rescue.enabled": True,
        "rescue.k": 8,
        "rescue.s": 0.5,
    },
    parts={"model": "state_dict"},
    batch=lambda batch: [normalized_views(batch), batch.index],
    replaced={
        "torchvision.models.convnet_micro": "hvp.patches.original.small_encoder",
        "hvp.patches.support.Rescuable": "hvp.patches.mocov3.original.our_images",
        "torch.cuda.is_available": "hvp.patches.mocov3.original.is_available",
    },
    notes=(
        "the encoder is our convnet_micro; projector and predictor are its own",
        "strong views are made of our trainer's images",
    ),
    carried=(*FLAGS, "data.path", "data.workers", "rescue.k"),
    fixed=fixed,
    starts_over="To go on, add --resume CHECKPOINT to the command that --dry-run prints",
    only_ours={"model.arch": ("vit_micro", "convnet_micro")},
    spawns=True,
)
