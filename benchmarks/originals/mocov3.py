"""Comparison of facebookresearch/moco-v3, with our patch, with our trainer."""

from typing import Any

from hvp.benchmarks.originals.harness import Harness, OurImages, comparison_config
from hvp.benchmarks.originals.on_cpu import Substitutes
from hvp.methods.mocov3.config import MoCoConfig


def our_images(_: type, dataset: Any, *__: object, **___: object) -> OurImages:
    """Return our trainer's images, in place of a `Rescuable`."""
    return OurImages(comparison_config(MoCoConfig, HARNESS.values), len(dataset))


def is_available(_: object) -> bool:
    """Report that CUDA is available; without it the original does not prepare its network, and then fails."""
    return True


HARNESS = Harness(
    values={
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
    substitutes=Substitutes(
        {
            "torchvision.models.convnet_micro": "hvp.benchmarks.originals.harness.small_encoder",
            "hvp.patches.support.Rescuable": "hvp.benchmarks.originals.mocov3.our_images",
            "torch.cuda.is_available": "hvp.benchmarks.originals.mocov3.is_available",
        }
    ),
    notes=(
        "the encoder is our convnet_micro; the projector and the predictor are the original's",
        "strong views are made from our trainer's images",
    ),
)
