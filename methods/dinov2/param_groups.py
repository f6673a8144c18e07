"""Parameter groups with rates of their own: lower for early layers, lowest for the patch embedding.

Source: facebookresearch/dinov2 dinov2/utils/param_groups.py.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from hvp.methods.dinov2.networks import Network

TOKENS = ("cls_token", "pos_embed", "mask_token", "register_tokens", "patch_embed.")
"""What comes before the first block."""


def layer_decay(name: str, num_blocks: int, decay: float) -> float:
    """By what a parameter's learning rate is multiplied: `decay` to the power of the layers above it.

    Args:
        name: within the network; heads and the final norm have 1.
        num_blocks: of the backbone.
        decay: one layer's.
    """
    name, in_backbone = name.removeprefix("backbone."), name.startswith("backbone.")
    layer = num_blocks + 1
    if in_backbone and name.startswith(TOKENS):
        layer = 0
    elif in_backbone and name.startswith("blocks."):
        layer = int(name.split(".")[1]) + 1
    return decay ** (num_blocks + 1 - layer)


def parameter_groups(network: Network, *, layerwise_decay: float, patch_embed_lr_mult: float) -> list[dict[str, Any]]:
    """The network's parameters, grouped by what the schedules multiply: `lr_multiplier`, `wd_multiplier` (0 for biases,
    norms and LayerScale's gains, which are the vectors), and whether they are a `last_layer`."""
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
