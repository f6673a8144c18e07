"""How one original is told what our configuration says, and what both are compared on: `methods/*/original.py`.

# V candidate views
"""

import socket
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hvp.common.config.sections import RunConfig
from hvp.common.errors import UserError
from hvp.common.networks.resnet import CONVNETS
from hvp.common.training.loading import Masks, build_strong_views, open_training_data
from hvp.common.training.rescuing import images_to_rescue
from hvp.common.views import ViewBatch, normalize


@dataclass(frozen=True)
class Original:
    """How one original is told what our configuration says, and compared with our trainer."""

    flags: Callable[[Any, str, int], list[str]]
    """flags(config, data, processes): the original's command line for it. UserError: it cannot do that."""

    compared: Mapping[str, Any]
    """The configuration that both are compared on, as far as it differs from COMPARED; by dotted key."""

    parts: Mapping[str, str]
    """What a checkpoint of ours holds, and the name of it in the original's."""

    batch: Callable[[ViewBatch], Any]
    """A batch of ours as the original's loader gives it."""

    named: Callable[[str], str] = lambda key: key
    """The original's name of a tensor, by its key in a state dict of ours."""

    learner: str | None = None
    """As in `Given`."""

    masks: Callable[[Any], Masks] | None = None
    """masks(config): what the loader draws besides views."""

    replaced: Mapping[str, str] = field(default_factory=dict)
    """As in `Given`."""

    packages: Mapping[str, str] = field(default_factory=dict)
    """As in `Given`."""

    needs: tuple[str, ...] = ()
    """Packages of `Patch.needs` that a comparison needs, too; something stands in for the others."""

    endless: bool = False
    """Its loader does not end with an epoch."""

    saved: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    """saved(checkpoint): the original's checkpoint as `parts` calls it, with our keys in each part."""

    notes: tuple[str, ...] = ()
    """What that means, in words."""

    carried: Collection[str] = ()
    """Our keys that `flags` says, whatever their value; besides `selection.hard_views` and `rescue.enabled`."""

    fixed: Callable[[Any], Mapping[str, Any]] = lambda _: {}
    """fixed(config): what the original does, by our key, where it has no flag or none for every value."""

    otherwise: tuple[str, ...] = ()
    """What else it does in another way than our trainer, where we have no key for it; in words."""

    folders: Mapping[str, str] = field(default_factory=lambda: {"train": "train/CLASS/"})
    """Folders that hold its images, one of them, and how they are called in a message."""

    only_ours: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values of a key that the original does not know."""

    check_data: Callable[[Path, Path], None] | None = None
    """check_data(data, clone): raises UserError if the original needs more of a folder than train/CLASS/."""

    misleading: tuple[str, ...] = ()
    """Environment variables that it must not see."""

    starts_over: str = ""
    """How to go on with an earlier run in its folder, as it starts over by itself; a sentence for the user. Empty: it
    goes on."""

    saves_objects: bool = False
    """Its checkpoints hold Python objects, which PyTorch loads only where `job.TRUST` says so."""

    spawns: bool = False
    """It is started once and starts what processes it needs itself; otherwise the elastic launcher does."""


OF_EVERY_ORIGINAL = {
    "data.loader": "pil",
    "data.on_bad_image": "error",
    "data.timeout": 0,
    "train.accumulate": 1,
    "train.device": "cuda",
    "train.save_every": 0,
    "selection.policy": "hardest",
    "selection.search": "sampled",
    "selection.comparisons": 128,
    "selection.per_image": False,
    "selection.mode": "train",
    "selection.every": 1,
    "selection.start": 0.0,
    "rescue.feature": "projection",
    "rescue.stop_gradient": False,
    "rescue.direction": "pull",
    "rescue.num_ops": 2,
    "rescue.cutout": 0.5,
}
"""What the patched originals do, by our key, unless a flag says otherwise. Beginning of `Original.fixed`."""

OF_MULTI_CROP = {
    "views.jitter": 0.8,
    "views.brightness": 0.4,
    "views.contrast": 0.4,
    "views.saturation": 0.2,
    "views.hue": 0.1,
    "views.grayscale": 0.2,
    "views.global_crops_size": 224,
    "views.local_crops_size": 96,
    "views.blur_global1": 1.0,
    "views.blur_global2": 0.1,
    "views.blur_local": 0.5,
    "views.solarize": 0.2,
    "selection.global_pairs": "by_transform",
    "model.head_hidden_dim": 2048,
    "model.head_bottleneck_dim": 256,
    "loss.student_temp": 0.1,
    "loss.center_momentum": 0.9,
    "train.log_every": 10,
}
"""The same of those with DINO's views and head."""


MULTI_CROP_FLAGS = {
    "model.arch": "--arch",
    "model.patch_size": "--patch_size",
    "model.out_dim": "--out_dim",
    "model.norm_last_layer": "--norm_last_layer",
    "model.momentum_teacher": "--momentum_teacher",
    "loss.warmup_teacher_temp": "--warmup_teacher_temp",
    "loss.teacher_temp": "--teacher_temp",
    "loss.warmup_teacher_temp_epochs": "--warmup_teacher_temp_epochs",
    "optim.optimizer": "--optimizer",
    "optim.base_lr": "--lr",
    "optim.min_lr": "--min_lr",
    "optim.warmup_epochs": "--warmup_epochs",
    "optim.weight_decay": "--weight_decay",
    "optim.weight_decay_end": "--weight_decay_end",
    "optim.clip_grad": "--clip_grad",
    "optim.freeze_last_layer": "--freeze_last_layer",
    "views.global_crops_scale": "--global_crops_scale",
    "views.local_crops_number": "--local_crops_number",
    "views.local_crops_scale": "--local_crops_scale",
    "selection.global_candidates": "--global_candidates",
    "selection.local_candidates": "--local_candidates",
    "selection.comparisons": "--comparisons",
    "train.epochs": "--epochs",
    "train.seed": "--seed",
    "train.keep_every": "--saveckp_freq",
}
"""Our keys that are flags of DINO's script, and of iBOT's, which began as a copy of it."""

COMPARED = {
    "data.path": "shapes",
    "data.workers": 0,
    "data.shapes.size": 40,
    "train.epochs": 2,
    "train.precision": "fp32",
    "train.device": "cpu",
    "train.seed": 3,
    "train.log_every": 1,
}
"""The configuration of every comparison."""


def as_flags(config: Any, names: Mapping[str, str], *, switches: bool) -> list[str]:
    """Values of a configuration as command line flags.

    Args:
        config: whose values.
        names: dotted key to flag.
        switches: what is true is said by the flag alone, and what is false by its absence; otherwise by a word.
    """
    words: list[str] = []
    for key, flag in names.items():
        value = value_of(config, key)
        if isinstance(value, bool):
            words += ([flag] if value else []) if switches else [flag, str(value).lower()]
        elif isinstance(value, tuple):
            words += [flag, *map(str, value)]
        else:
            words += [flag, str(value)]
    return words


def multi_crop_flags(config: Any, names: Mapping[str, str], data: str, processes: int) -> list[str]:
    """The command line of DINO's and iBOT's scripts, to be started once for every GPU.

    Args:
        config: what it says.
        names: as for `as_flags()`.
        data: folder of `train`.
        processes: one a GPU.
    """
    words = ["--data_path", str(Path(data) / "train"), *as_flags(config, names, switches=False)]
    words += ["--batch_size_per_gpu", str(config.train.batch_size // processes)]
    words += ["--use_fp16", str(config.train.precision == "fp16").lower()]
    words += [] if config.data.workers is None else ["--num_workers", str(config.data.workers)]
    return [*words, "--use_hvp", str(config.selection.hard_views == "hvp").lower()]


def spawning_flags(config: Any, processes: int) -> list[str]:
    """By which SimSiam's and MoCo v3's scripts start a process for every GPU of this machine themselves. The port is
    one that is free now, so that two runs do not meet; loader workers are given for all processes together."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    words = ["--multiprocessing-distributed", "--world-size", "1", "--rank", "0"]
    words += ["--dist-url", f"tcp://localhost:{port}"]
    return words if config.data.workers is None else [*words, "--workers", str(config.data.workers * processes)]


def rescued_by_each(config: RunConfig, processes: int) -> int:
    """Images that each of a patched original's processes rescues; it takes the easiest of its own.

    Raises:
        UserError: rescue.k does not divide.
    """
    rescued = images_to_rescue(config)
    if rescued % processes:
        raise UserError(
            f"rescue.k = {rescued}, but each of {processes} processes of the original rescues as many of its own "
            f"images. Set a multiple of {processes}, for example {-(-rescued // processes) * processes}"
        )
    return rescued // processes


def value_of(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def small_encoder(
    _: object, *, num_classes: int, zero_init_residual: bool = False, pretrained: bool = False
) -> nn.Module:
    """Our `convnet_micro` with a last layer, for originals that take torchvision's encoders by name.

    Args:
        num_classes: width of the last layer.
        zero_init_residual, pretrained: as torchvision's; there is nothing that they change.
    """
    encoder = CONVNETS["convnet_micro"]()
    encoder.fc = nn.Linear(encoder.embed_dim, num_classes)
    return encoder


def vit_of_32_pixels(vit: Callable[..., nn.Module], **named: Any) -> nn.Module:
    """DINO's and iBOT's network, whose size of images has no flag."""
    return vit(img_size=[32], **named)


class OurImages:
    """A `Rescuable` over the images of our trainer, as the original's own are not read in a comparison.

    Args:
        config: of our trainer.
        length: of the original's dataset.
    """

    def __init__(self, config: RunConfig, length: int) -> None:
        self.length = length
        self.strong = build_strong_views(config, open_training_data(config), 1)

    def __len__(self) -> int:
        return self.length

    def strong_views(self, epoch: int, index: Tensor) -> Tensor:
        """As those of `Rescuable`."""
        return normalize(self.strong([(epoch, number) for number in index.tolist()]))


def normalized_views(batch: ViewBatch) -> list[Tensor]:
    """Every candidate of a batch on its own, V tensors [B, 3, H, W], in memory as our trainers have them."""
    return [view for pixels in batch.pixels for view in normalize(pixels)]
