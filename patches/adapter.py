"""Adapters from our configuration to the command lines of the original trainers."""

import socket
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvp.common.config.sections import RunConfig
from hvp.common.errors import UserError
from hvp.common.training.rescuing import images_to_rescue


@dataclass(frozen=True)
class Keys:
    """Our configuration keys, as far as an original knows them."""

    carried: Collection[str]
    """Keys whose value the command line carries, whatever it is. `selection.hard_views` and `rescue.enabled` always
    belong to them."""

    fixed: Callable[[Any], Mapping[str, Any]]
    """fixed(config): the original's values, by our key, where it has no flag, or none for every value."""

    only_ours: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values of a key that the original does not have."""


@dataclass(frozen=True)
class Images:
    """Folders of images that an original can train on."""

    folders: Mapping[str, str] = field(default_factory=lambda: {"train": "train/CLASS/"})
    """Names of folders, one of which must be there, each with its description for messages."""

    check: Callable[[Path, Path], None] | None = None
    """check(data, clone): raises UserError if the original needs more than one of the folders."""


@dataclass(frozen=True)
class Launch:
    """Start of an original's processes, and its treatment of an earlier run in the same folder."""

    spawns: bool = False
    """The original is started once and starts its own processes; otherwise the elastic launcher starts them."""

    hidden: tuple[str, ...] = ()
    """Environment variables to remove, because they would mislead the original."""

    starts_over: str = ""
    """A sentence for the user on how to resume, for an original that by itself starts over. Empty: it resumes."""

    saves_objects: bool = False
    """The checkpoints hold Python objects, which PyTorch loads only where `job.TRUST` allows it."""


@dataclass(frozen=True)
class Adapter:
    """Everything that `hvp pretrain --engine upstream` needs to know about one original trainer."""

    flags: Callable[[Any, str, int], list[str]]
    """flags(config, data, processes): the original's command line. Raises UserError for what the original cannot do."""

    keys: Keys
    images: Images = Images()
    launch: Launch = Launch()

    differences: tuple[str, ...] = ()
    """Differences from our trainer that no configuration key describes; notes for the user."""


FIXED = {
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
"""Values of every patched original, by our key, unless a flag sets them. The start of each `Keys.fixed`."""

FIXED_MULTI_CROP = {
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
"""Further values of the originals with DINO's views and head."""

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
"""Flags of DINO's script, by our key, and of iBOT's, which began as a copy of it."""


def as_flags(config: Any, names: Mapping[str, str], *, switches: bool) -> list[str]:
    """Return values of a configuration as command line flags.

    Args:
        config: the configuration.
        names: flags, by dotted key.
        switches: give a flag that is true without a value, and leave out one that is false; otherwise write `true` or
            `false` after it.
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
    """Return the command line of DINO's or iBOT's script, which is started once per GPU.

    Args:
        config: the configuration.
        names: as for `as_flags()`.
        data: folder that holds `train`.
        processes: number of processes, one per GPU.
    """
    words = ["--data_path", str(Path(data) / "train"), *as_flags(config, names, switches=False)]
    words += ["--batch_size_per_gpu", str(config.train.batch_size // processes)]
    words += ["--use_fp16", str(config.train.precision == "fp16").lower()]
    words += [] if config.data.workers is None else ["--num_workers", str(config.data.workers)]
    return [*words, "--use_hvp", str(config.selection.hard_views == "hvp").lower()]


def spawning_flags(config: Any, processes: int) -> list[str]:
    """Return the flags that make SimSiam's and MoCo v3's scripts start one process per GPU of this machine.

    The port is free at the time of the call, so that two runs do not meet. Their `--workers` counts the loader workers
    of all processes together.
    """
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    words = ["--multiprocessing-distributed", "--world-size", "1", "--rank", "0"]
    words += ["--dist-url", f"tcp://localhost:{port}"]
    return words if config.data.workers is None else [*words, "--workers", str(config.data.workers * processes)]


def rescued_per_process(config: RunConfig, processes: int) -> int:
    """Return the number of images that each process of a patched original rescues: the easiest of its own.

    Raises:
        UserError: rescue.k does not divide.
    """
    rescued = images_to_rescue(config)
    if rescued % processes:
        raise UserError(
            f"rescue.k = {rescued} does not divide among {processes} processes; in the original each rescues as many "
            f"of its own images. Set a multiple of {processes}, for example {-(-rescued // processes) * processes}"
        )
    return rescued // processes


def value_of(config: Any, key: str) -> Any:
    """Return the value of a dotted key."""
    for name in key.split("."):
        config = getattr(config, name)
    return config
