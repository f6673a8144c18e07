"""Parameter names of timm and torchvision, where they differ from ours.

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
"""Our names and torchvision's for a ViT: prefixes first, then parts within a name."""


def to_torchvision(key: str) -> str:
    """Translate our name of a ViT's tensor to torchvision's."""
    return _renamed(key, TORCHVISION_NAMES)


def from_libraries(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a timm or torchvision state dict to our names; return any other state dict unchanged.

    timm's ViTs with LayerScale or registers lack a mask token; it is added as zeros, since no feature depends on it.
    timm's ViTs with registers add the position of [CLS] to `cls_token`; a zero position is added for it.
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
