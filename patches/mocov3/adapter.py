"""Adapter from our configuration to facebookresearch/moco-v3 with our patch."""

from typing import Any

from hvp.methods.mocov3.config import MoCoConfig
from hvp.patches.adapter import FIXED, Adapter, Keys, Launch, as_flags, rescued_per_process, spawning_flags

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
"""Flags of the original, by our key."""


def flags(config: MoCoConfig, data: str, processes: int) -> list[str]:
    """Return the command line of main_moco.py, which starts one process per GPU itself."""
    words = [data, *as_flags(config, FLAGS, switches=True), "--crop-min", str(config.views.crop_scale[0])]
    words += spawning_flags(config, processes)
    return [*words, "--rescue-k", str(rescued_per_process(config, processes) * processes)]


def fixed(config: MoCoConfig) -> dict[str, Any]:
    """Return the original's values where it has no flag."""
    return {
        **FIXED,
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


ADAPTER = Adapter(
    flags,
    Keys(
        carried=(*FLAGS, "data.path", "data.workers", "rescue.k"),
        fixed=fixed,
        only_ours={"model.arch": ("vit_micro", "convnet_micro")},
    ),
    launch=Launch(spawns=True, starts_over="To resume, add --resume CHECKPOINT to the command that --dry-run prints"),
)
