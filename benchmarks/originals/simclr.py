"""Comparison of sthalles/SimCLR, with our patch, with our trainer."""

from typing import Any

from torchvision.datasets import FakeData

from hvp.benchmarks.originals.harness import Checkpoints, Harness, OurImages, comparison_config
from hvp.benchmarks.originals.on_cpu import Substitutes
from hvp.methods.simclr.config import SimclrConfig


def no_images(_: type, root: str, *, transform: Any, **__: object) -> FakeData:
    """Return a dataset of one generated image, in place of STL-10, from which a comparison reads nothing."""
    return FakeData(size=1, transform=transform)


def our_images(_: type, dataset: Any, *__: object, **___: object) -> OurImages:
    """Return our trainer's images, in place of a `Rescuable`."""
    return OurImages(comparison_config(SimclrConfig, HARNESS.values), len(dataset))


HARNESS = Harness(
    values={
        "data.shapes.train": 320,
        "train.batch_size": 32,
        "model.arch": "convnet_micro",
        "model.proj_hidden_dim": 96,  # the encoder's width
        "model.out_dim": 64,
        "model.use_bn_in_head": False,
        "loss.temperature": 0.2,
        "optim.optimizer": "adamw",  # without weight decay it is Adam
        "optim.weight_decay": 0.0,
        "optim.base_lr": 0.008,  # 0.001 at this batch, constant as in the original's first epochs
        "optim.min_lr": 0.001,
        "optim.warmup_epochs": 0,
        "views.crop_size": 32,
        "rescue.enabled": True,
        "rescue.k": 8,
        "rescue.s": 0.5,
    },
    substitutes=Substitutes(
        {
            "torchvision.models.resnet18": "hvp.benchmarks.originals.harness.small_encoder",
            "torchvision.datasets.STL10": "hvp.benchmarks.originals.simclr.no_images",
            "hvp.patches.support.Rescuable": "hvp.benchmarks.originals.simclr.our_images",
        },
        learner="simclr.SimCLR",
    ),
    checkpoints=Checkpoints(rename=lambda key: key.replace("projector.layers.", "backbone.fc.")),
    words={"convnet_micro": "resnet18"},
    notes=(
        "the encoder is our convnet_micro, under the name resnet18; the projector is the original's",
        "strong views are made from our trainer's images; STL-10 is not read",
    ),
)
