"""Parameter groups with layer-wise learning rates: lower for early layers, lowest for the patch embedding.

Source: facebookresearch/dinov2 dinov2/utils/param_groups.py.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from hvp.methods.dinov2.networks import Network

TOKENS = ("cls_token", "pos_embed", "mask_token", "register_tokens", "patch_embed.")
"""Names of parameters before the first block."""


def layer_decay(name: str, num_blocks: int, decay: float) -> float:
    """Return a parameter's learning-rate multiplier, `decay` to the power of the number of layers above it.

    Args:
        name: the parameter's name in the network. Heads and the final norm have multiplier 1.
        num_blocks: number of the backbone's blocks.
        decay: multiplier for one layer.
    """
    name, in_backbone = name.removeprefix("backbone."), name.startswith("backbone.")
    layer = num_blocks + 1
    if in_backbone and name.startswith(TOKENS):
        layer = 0
    elif in_backbone and name.startswith("blocks."):
        layer = int(name.split(".")[1]) + 1
    return decay ** (num_blocks + 1 - layer)


def parameter_groups(network: Network, *, layerwise_decay: float, patch_embed_lr_mult: float) -> list[dict[str, Any]]:
    """Group the network's parameters by the values that the schedules use.

    Args:
        network: the student.
        layerwise_decay: learning-rate multiplier per layer.
        patch_embed_lr_mult: additional learning-rate multiplier for the patch embedding.

    Returns:
        Groups with `params`, `lr_multiplier`, `wd_multiplier` (0 for 1-D tensors: biases, norms and LayerScale's
        gains) and `last_layer` (whether these are prototypes, which start frozen).
    """
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        multiplier = layer_decay(name, network.backbone.num_blocks, layerwise_decay)
        if "patch_embed" in name:
            multiplier *= patch_embed_lr_mult
        key = multiplier, 0.0 if parameter.ndim == 1 else 1.0, "last_layer" in name
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr_multiplier": lr, "wd_multiplier": wd, "last_layer": last}
        for (lr, wd, last), parameters in groups.items()
    ]
