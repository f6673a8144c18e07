"""Vision Transformers. Blocks and patch embedding are timm's, parameter names DINO's.

# B images, N patches, D embedding dim
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from hvp.common.errors import UserError

# Attention heads by width. A state dict does not show its number of heads.
NUM_HEADS = {96: 3, 192: 3, 384: 6, 768: 12, 1024: 16, 1536: 24}
# A ViT-S with fixed positions has 12 heads; vit_from_state() recognises it by these positions.
NUM_HEADS_FIXED_POSITIONS = NUM_HEADS | {384: 12}

VITS = {"vit_micro": (96, 3), "vit_tiny": (192, 12), "vit_small": (384, 12), "vit_base": (768, 12)}
"""Width and depth; 0.4 M, 5.5 M, 22 M and 86 M parameters. `vit_micro` has a convolutional stem, for the demo."""


class VisionTransformer(nn.Module):
    """Vision Transformer whose feature is the [CLS] token after the final norm, for images of any size.

    Args:
        img_size: side in pixels for which `pos_embed` is stored; other sizes interpolate it.
        patch_size: side of a patch in pixels.
        embed_dim, depth, num_heads, mlp_ratio: the usual sizes.
        drop_path_rate: stochastic depth of the last block; rates grow linearly from 0 at the first block.
        drop_path_uniform: use that rate in every block.
        conv_stem: embed patches with a stack of small convolutions instead of a single large one.
        mask_token: add `masked_embed`, the embedding of a masked patch.
        block: block constructor, called with the arguments of timm's `Block`.

    Source: facebookresearch/dino vision_transformer.py VisionTransformer.
    """

    masked_embed: nn.Parameter | None

    def __init__(
        self,
        *,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        drop_path_uniform: bool = False,
        conv_stem: bool = False,
        mask_token: bool = False,
        block: Callable[..., nn.Module] = Block,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.num_blocks = depth
        self.patch_size = patch_size
        norm_layer: Any = partial(FloatLayerNorm, eps=1e-6)  # timm is annotated to take a class

        # img_size=None: accept any image size, dropping the pixels beyond the last whole patch.
        self.patch_embed = (
            ConvStem(patch_size, embed_dim)
            if conv_stem
            else PatchEmbed(img_size=None, patch_size=patch_size, embed_dim=embed_dim)
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        self.register_parameter("masked_embed", nn.Parameter(torch.zeros(1, embed_dim)) if mask_token else None)
        self.blocks = nn.ModuleList(
            block(
                embed_dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=True, drop_path=float(rate), norm_layer=norm_layer
            )
            for rate in torch.linspace(drop_path_rate if drop_path_uniform else 0, drop_path_rate, depth, device="cpu")
        )
        self.norm = norm_layer(embed_dim)

        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_linear)

    @property
    def image_size(self) -> int:
        """Image side that `pos_embed` is stored for, in pixels."""
        return math.isqrt(self.pos_embed.shape[1] - 1) * self.patch_size

    def interpolate_pos_encoding(self, height: int, width: int) -> Tensor:
        """Position embedding for an image of `height` x `width` pixels, [1, 1 + patches, D].

        Bicubic, without antialiasing. The scale factors assume 0.1 patches more than there are. That is upstream's
        guard against losing a patch to rounding; released weights were trained with it, so it is kept.
        """
        rows, columns = height // self.patch_size, width // self.patch_size
        num_patches = self.pos_embed.shape[1] - 1
        if rows * columns == num_patches and height == width:
            return self.pos_embed
        side = math.isqrt(num_patches)
        patches = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)  # [1, D, side, side]
        scale = ((rows + 0.1) / side, (columns + 0.1) / side)
        patches = F.interpolate(patches, scale_factor=scale, mode="bicubic")  # [1, D, rows, columns]
        return torch.cat((self.pos_embed[:, :1], patches.flatten(2).mT), dim=1)

    def prepare_tokens(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W] to the tokens of the first block, [B, 1 + N, D].

        Args:
            x: the images.
            masks: [B, N] bool, patches to replace by the mask token.

        Raises:
            ValueError: there are masks, but the network has no mask token.
        """
        height, width = x.shape[-2:]
        patches = self.patch_embed(x)
        if masks is not None:
            if self.masked_embed is None:
                raise ValueError("VisionTransformer: got masks, but the network has no mask token")
            patches = torch.where(masks[..., None], self.masked_embed.to(patches.dtype), patches)
        tokens = torch.cat((self.cls_token.expand(len(x), -1, -1), patches), dim=1)
        return tokens + self.interpolate_pos_encoding(height, width)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to features [B, D]."""
        x = self.prepare_tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])

    def all_tokens(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W] to normalised [CLS] and patch tokens, [B, 1 + N, D]; masks as in `prepare_tokens()`."""
        x = self.prepare_tokens(x, masks)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """Normalised tokens [B, 1 + N, D] after each of the last `n` blocks."""
        x = self.prepare_tokens(x)
        layers = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= self.num_blocks - n:
                layers.append(self.norm(x))
        return layers

    def probe_features(self, x: Tensor, n_last_blocks: int, avgpool: bool) -> Tensor:
        """Features for a linear probe: the [CLS] tokens of the last blocks, or the last [CLS] and the mean patch token.

        Args:
            x: images [B, 3, H, W].
            n_last_blocks: number of blocks whose [CLS] token is used.
            avgpool: add the mean patch token; only with `n_last_blocks` = 1.

        Returns:
            [B, n_last_blocks * D], or [B, 2 * D] with `avgpool`, the two interleaved as in the upstream.

        Raises:
            UserError: the network has fewer blocks, or `avgpool` is combined with several blocks.

        Source: facebookresearch/dino eval_linear.py.
        """
        if not 1 <= n_last_blocks <= self.num_blocks:
            raise UserError(
                f"n_last_blocks = {n_last_blocks}, but this network has {self.num_blocks} blocks.\n"
                f"    Set a number from 1 to {self.num_blocks}."
            )
        if avgpool and n_last_blocks != 1:
            raise UserError(
                f"avgpool adds the mean patch to the [CLS] of one block, but n_last_blocks = {n_last_blocks}.\n"
                "    Set n_last_blocks to 1 (DINO's ViT-B setting), or avgpool to false (its ViT-S setting)."
            )
        layers = self.get_intermediate_layers(x, n_last_blocks)
        if avgpool:
            return torch.stack((layers[0][:, 0], layers[0][:, 1:].mean(dim=1)), dim=-1).flatten(1)
        return torch.cat([tokens[:, 0] for tokens in layers], dim=-1)


class FloatLayerNorm(nn.LayerNorm):
    """Layer norm in float32, whatever the dtype of its parameters. Autocast ensures that on a GPU, but not on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to float32 of the same shape."""
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class ConvStem(nn.Module):
    """Patch embedding by 3 x 3 convolutions of stride 2, each doubling the width, then a 1 x 1 projection.

    Small networks learn much faster with it than with a single large convolution. The norm is GroupNorm, which keeps
    no batch statistics: an image's feature does not depend on the rest of its batch, so a teacher's outputs may be
    computed in any batch and reused.
    """

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        num_stages = patch_size.bit_length() - 1
        widths = [3, *(embed_dim >> i for i in reversed(range(num_stages)))]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(c_in, c_out, kernel_size=3, stride=2, padding=1, bias=False),
                    nn.GroupNorm(math.gcd(c_out, 8), c_out),
                    nn.GELU(),
                )
                for c_in, c_out in pairwise(widths)
            )
        )
        self.proj = nn.Conv2d(embed_dim, embed_dim, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to patches [B, N, D]."""
        return self.proj(self.stages(x)).flatten(2).mT


def build_vit(
    arch: str, *, patch_size: int, img_size: int, drop_path_rate: float = 0.0, mask_token: bool = False
) -> VisionTransformer:
    """Build a ViT with fresh weights.

    Args:
        arch: one of VITS.
        patch_size: side of a patch in pixels.
        img_size: side of the global crops in pixels; the position embedding is stored for it.
        drop_path_rate: stochastic depth of the last block, in [0, 1); for students only.
        mask_token: add the embedding of a masked patch; for students only.

    Raises:
        UserError: the patch size does not divide the image size, or the stem cannot produce it.
    """
    if not 1 <= patch_size <= img_size or img_size % patch_size:
        raise UserError(
            f"patch_size = {patch_size} does not divide the image size {img_size} of arch = {arch}.\n"
            "    Set a patch size that does, for example 8 or 16 at 224 pixels."
        )
    if arch == "vit_micro" and patch_size not in (2, 4, 8, 16, 32):
        raise UserError(
            f"patch_size = {patch_size}, but the stem of vit_micro halves the image at each stage.\n"
            "    Set 2, 4, 8, 16 or 32."
        )
    embed_dim, depth = VITS[arch]
    return VisionTransformer(
        img_size=img_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=NUM_HEADS[embed_dim],
        drop_path_rate=drop_path_rate,
        conv_stem=arch == "vit_micro",
        mask_token=mask_token,
    )


def vit_from_state(state: Mapping[str, Tensor]) -> VisionTransformer | None:
    """Like `encoder_from_state()`, for VisionTransformer."""
    sizes = vit_sizes(state)
    return None if sizes is None else VisionTransformer(**sizes)


def vit_sizes(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Infer a ViT's constructor arguments from a backbone's state dict; None if it is not a ViT."""
    pos_embed, proj = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    if pos_embed is None or proj is None or pos_embed.ndim != 3 or proj.ndim != 4:
        return None
    num_patches, embed_dim = pos_embed.shape[1] - 1, pos_embed.shape[2]
    side = math.isqrt(max(num_patches, 0))
    if side < 1 or side**2 != num_patches or embed_dim not in NUM_HEADS:
        return None
    num_stages = sum(key.startswith("patch_embed.stages.") and key.endswith(".0.weight") for key in state)
    patch_size = 2**num_stages if num_stages else proj.shape[-1]
    return {
        "img_size": side * patch_size,
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": sum(key.startswith("blocks.") and key.endswith(".norm1.weight") for key in state),
        "num_heads": (NUM_HEADS_FIXED_POSITIONS if _positions_are_fixed(pos_embed) else NUM_HEADS)[embed_dim],
        "conv_stem": num_stages > 0,
    }


def sincos_positions(side: int, embed_dim: int) -> Tensor:
    """Fixed position embedding: sines and cosines of a patch's row, then of its column.

    With w_d = 10000 ** (-d / (D / 4)), patch (i, j) has the four quarters sin(i w), cos(i w), sin(j w), cos(j w). The
    [CLS] token has zeros.

    Args:
        side: number of rows and of columns of patches.
        embed_dim: D, a multiple of 4.

    Returns:
        [1, 1 + side ** 2, D] float32.

    Raises:
        ValueError: D is not a multiple of 4.

    Source: facebookresearch/moco-v3 vits.py build_2d_sincos_position_embedding, which also encodes the row first.
    """
    if embed_dim % 4:
        raise ValueError(f"sincos_positions: embed_dim is {embed_dim}, but it must be a multiple of 4")
    frequency = 10000.0 ** -(torch.arange(embed_dim // 4) / (embed_dim // 4))
    angle = torch.arange(side)[:, None] * frequency  # [side, D / 4]
    axis = torch.cat((angle.sin(), angle.cos()), dim=1)  # [side, D / 2]
    patches = torch.cat((axis.repeat_interleave(side, dim=0), axis.repeat(side, 1)), dim=1)  # [side ** 2, D]
    return F.pad(patches, (0, 0, 1, 0))[None]


def _positions_are_fixed(pos_embed: Tensor) -> bool:
    """Whether a position embedding equals `sincos_positions()` up to half-precision rounding."""
    if pos_embed.is_meta or pos_embed.shape[2] % 4:
        return False
    fixed = sincos_positions(math.isqrt(pos_embed.shape[1] - 1), pos_embed.shape[2])
    return torch.allclose(pos_embed.detach().float().cpu(), fixed, rtol=0.0, atol=5e-3)


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer: weights from a truncated normal with standard deviation 0.02, bias 0."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
