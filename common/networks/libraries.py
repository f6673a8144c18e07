"""Backbones under the names of timm and torchvision, where these differ from the names here.

# N patches, D embedding dim
"""

from collections.abc import Mapping

import torch
from torch import Tensor

TORCHVISION_NAMES = {
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj.": "conv_proj.",
    "norm.": "encoder.ln.",
    "blocks.": "encoder.layers.encoder_layer_",
    ".norm1.": ".ln_1.",
    ".norm2.": ".ln_2.",
    ".attn.qkv.": ".self_attention.in_proj_",
    ".attn.proj.": ".self_attention.out_proj.",
    ".mlp.fc1.": ".mlp.0.",
    ".mlp.fc2.": ".mlp.3.",
}
"""Names that differ in torchvision's ViTs: prefixes, then parts inside a name."""


def to_torchvision(key: str) -> str:
    """Our name of a ViT's tensor as torchvision's."""
    return _renamed(key, TORCHVISION_NAMES)


def from_libraries(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of timm's or torchvision's under the names here; any other as it is.

    torchvision's ViTs have names of their own. timm's networks with LayerScale or registers lack the mask token, which
    no feature depends on; those with registers have no position for [CLS], which is part of `cls_token` there.
    """
    if "conv_proj.weight" in state:
        names = {theirs: ours for ours, theirs in TORCHVISION_NAMES.items()}
        return {_renamed(key, names): value for key, value in state.items()}
    ours = {("register_tokens" if key == "reg_token" else key): value for key, value in state.items()}
    if ("blocks.0.ls1.gamma" in ours or "reg_token" in state) and "mask_token" not in ours and "cls_token" in ours:
        ours["mask_token"] = torch.zeros_like(ours["cls_token"][0])  # [1, D]
    if "reg_token" in state and "pos_embed" in ours:
        positions = ours["pos_embed"]  # [1, N, D]
        ours["pos_embed"] = torch.cat((torch.zeros_like(positions[:, :1]), positions), dim=1)
    return ours


def _renamed(key: str, names: Mapping[str, str]) -> str:
    for before, after in names.items():
        if key.startswith(before) or (before.startswith(".") and before in key):
            key = key.replace(before, after, 1)
    return key
