"""Vision Transformers of MoCo v3, with fixed position embeddings and their own initialisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from timm.layers import PatchEmbed
from torch import Tensor, nn

from hvp.common.networks.vision_transformer import (
    NUM_HEADS_FIXED_POSITIONS,
    VisionTransformer,
    sincos_positions,
)

PATCH_SIZE = {"vit_small": 16, "vit_base": 16, "vit_micro": 8}
"""Height and width of each network's patches, pixels."""


class VisionTransformerMoCo(VisionTransformer):
    """A ViT with fixed sine-cosine position embeddings and Xavier-uniform initialisation of all linear layers.

    `head` is the identity; `MoCo_ViT` replaces it by the projector.

    Args:
        stop_grad_conv1: freeze the patch projection; a convolutional stem is always trained.
        sizes: as for `VisionTransformer`.

    Source: facebookresearch/moco-v3 vits.py VisionTransformerMoCo.
    """

    def __init__(self, *, stop_grad_conv1: bool = False, **sizes: Any) -> None:
        super().__init__(**sizes)
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        self.pos_embed = nn.Parameter(sincos_positions(side, self.embed_dim), requires_grad=False)
        self.head: nn.Module = nn.Identity()
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                rows, columns = module.weight.shape
                # Queries, keys and values are three matrices stored in one.
                _xavier_uniform(module, columns + (rows // 3 if name.endswith("qkv") else rows))
        nn.init.normal_(self.cls_token, std=1e-6)
        if isinstance(self.patch_embed, PatchEmbed):
            _xavier_uniform(self.patch_embed.proj, 3 * self.patch_size**2 + self.embed_dim)
            self.patch_embed.proj.requires_grad_(not stop_grad_conv1)

    def pooled(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to the features before `head`, the normalised [CLS] tokens, [B, D]."""
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to the output of `head`: the features, [B, D], or projections."""
        y: Tensor = self.head(self.pooled(x))
        return y


def _xavier_uniform(layer: nn.Linear | nn.Conv2d, fans: int) -> None:
    """Initialise weights uniformly within +- sqrt(6 / (fan in + fan out)), and biases to 0."""
    bound = math.sqrt(6 / fans)
    nn.init.uniform_(layer.weight, -bound, bound)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def vit_small(*, img_size: int = 224, stop_grad_conv1: bool = False) -> VisionTransformerMoCo:
    """Build a ViT-S/16 with 12 heads, twice as many as DINO's; 22 M parameters."""
    return _vit("vit_small", 384, 12, img_size, stop_grad_conv1=stop_grad_conv1)


def vit_base(*, img_size: int = 224, stop_grad_conv1: bool = False) -> VisionTransformerMoCo:
    """Build a ViT-B/16; 86 M parameters."""
    return _vit("vit_base", 768, 12, img_size, stop_grad_conv1=stop_grad_conv1)


def vit_micro(*, img_size: int = 32, stop_grad_conv1: bool = False) -> VisionTransformerMoCo:
    """Build our tiny ViT for 32 x 32 images, with a convolutional stem; 0.4 M parameters."""
    return _vit("vit_micro", 96, 3, img_size, stop_grad_conv1=stop_grad_conv1, conv_stem=True)


def _vit(arch: str, embed_dim: int, depth: int, img_size: int, **other: Any) -> VisionTransformerMoCo:
    return VisionTransformerMoCo(
        img_size=img_size,
        patch_size=PATCH_SIZE[arch],
        embed_dim=embed_dim,
        depth=depth,
        num_heads=NUM_HEADS_FIXED_POSITIONS[embed_dim],
        **other,
    )


VITS: dict[str, Callable[..., VisionTransformerMoCo]] = {
    "vit_small": vit_small,
    "vit_base": vit_base,
    "vit_micro": vit_micro,
}
