"""Vision Transformers with LayerScale, and optionally registers and gated feed-forward layers; names are DINOv2's.

# B images, N patches, R registers, D embedding dim
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from hvp.common.errors import UserError
from hvp.common.networks.vision_transformer import NUM_HEADS, VisionTransformer, vit_sizes

SIZES = {
    "vit_micro": (96, 3),
    "vit_small": (384, 12),
    "vit_base": (768, 12),
    "vit_large": (1024, 24),
    "vit_giant2": (1536, 40),
}
"""Width and depth by name. `vit_micro` has a convolutional stem."""


class RegisterVisionTransformer(VisionTransformer):
    """ViT with LayerScale, a mask token, and registers: extra tokens that hold no patch and are not part of any output.

    Registers stand between [CLS] and the patches inside the blocks; no method returns them. Like the
    released networks, it interpolates positions as DINO does without registers, and to the target size with
    antialiasing when it has registers.

    Args:
        init_values: initial gains of LayerScale; 0 for no LayerScale.
        swiglu: use gated feed-forward layers, two thirds as wide, instead of perceptrons.
        num_registers: number of registers, R.
        sizes: as for VisionTransformer.

    Source: facebookresearch/dinov2 dinov2/models/vision_transformer.py DinoVisionTransformer.
    """

    register_tokens: nn.Parameter | None

    def __init__(
        self,
        *,
        init_values: float = 1e-5,
        swiglu: bool = False,
        num_registers: int = 0,
        **sizes: Any,
    ) -> None:
        options: dict[str, Any] = {"mlp_layer": SwiGLU} if swiglu else {}
        super().__init__(**sizes, block=partial(SubsetBlock, init_values=init_values, **options))
        registers = nn.Parameter(torch.empty(1, num_registers, self.embed_dim)) if num_registers else None
        self.register_parameter("register_tokens", registers)
        self.mask_token = nn.Parameter(torch.zeros(1, self.embed_dim))
        nn.init.normal_(self.cls_token, std=1e-6)
        if registers is not None:
            nn.init.normal_(registers, std=1e-6)

    @property
    def num_registers(self) -> int:
        return 0 if self.register_tokens is None else self.register_tokens.shape[1]

    def interpolate_pos_encoding(self, height: int, width: int) -> Tensor:
        """Position embedding for an image of `height` x `width` pixels, [1, 1 + patches, D]."""
        if self.register_tokens is None:
            return super().interpolate_pos_encoding(height, width)
        rows, columns = height // self.patch_size, width // self.patch_size
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if rows == columns == side:
            return self.pos_embed
        patches = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [1, D, side, side]
        patches = F.interpolate(patches, size=(rows, columns), mode="bicubic", antialias=True)
        return torch.cat((self.pos_embed[:, :1], patches.flatten(2).mT), dim=1)

    def prepare_tokens(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W] to the tokens of the first block, [B, 1 + R + N, D].

        Args:
            x: the images.
            masks: [B, N] bool, patches to replace by the mask token.
        """
        height, width = x.shape[-2:]
        patches = self.patch_embed(x)
        if masks is not None:
            patches = torch.where(masks[..., None], self.mask_token.to(patches.dtype), patches)
        tokens = torch.cat((self.cls_token.expand(len(x), -1, -1), patches), dim=1)
        # Sharding gathers positions in half precision, which would turn the residual stream of every block to half.
        tokens = tokens.float() + self.interpolate_pos_encoding(height, width)
        if self.register_tokens is None:
            return tokens
        return torch.cat((tokens[:, :1], self.register_tokens.expand(len(x), -1, -1), tokens[:, 1:]), dim=1)

    def all_tokens(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W] to normalised [CLS] and patch tokens, [B, 1 + N, D]; masks as in `prepare_tokens()`."""
        return self._without_registers(super().all_tokens(x, masks))

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """Normalised tokens [B, 1 + N, D] after each of the last `n` blocks."""
        return [self._without_registers(tokens) for tokens in super().get_intermediate_layers(x, n)]

    def _without_registers(self, tokens: Tensor) -> Tensor:
        if self.register_tokens is None:
            return tokens
        return torch.cat((tokens[:, :1], tokens[:, 1 + self.num_registers :]), dim=1)


class SubsetBlock(Block):
    """timm's block, with stochastic depth that computes each branch for a random subset of the batch only.

    Of n rows, int(n * (1 - rate)), but at least one, get the branch, scaled by n over that number. A rate of 0.3 saves
    three tenths of the work.

    Source: facebookresearch/dinov2 dinov2/layers/block.py NestedTensorBlock, drop_add_residual_stochastic_depth_list.
    """

    def __init__(self, dim: int, num_heads: int, *, drop_path: float = 0.0, **others: Any) -> None:
        super().__init__(dim, num_heads, **others)
        self.drop_rate = drop_path

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens [n, T, D] to tokens."""
        if not self.training or self.drop_rate == 0:
            return super().forward(x, attn_mask, is_causal)
        x = self._add_to_subset(x, lambda rows: self.ls1(self.attn(self.norm1(rows))))
        return self._add_to_subset(x, lambda rows: self.ls2(self.mlp(self.norm2(rows))))

    def _add_to_subset(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        num_kept = max(int(len(x) * (1 - self.drop_rate)), 1)
        kept = torch.randperm(len(x), device=x.device)[:num_kept]
        return torch.index_add(x, 0, kept, branch(x[kept]).to(x.dtype), alpha=len(x) / num_kept)


class SwiGLU(nn.Module):
    """Gated feed-forward layer: silu(a) * b, with (a, b) = `w12`(x), then `w3`.

    Args:
        in_features: D.
        hidden_features: width of the perceptron it replaces; its own is two thirds, rounded up to a multiple of 8.
        bias: whether both layers have a bias.
        others: further arguments that timm's blocks pass to a feed-forward layer (dropout, norm); ignored.

    Source: facebookresearch/dinov2 dinov2/layers/swiglu_ffn.py SwiGLUFFNFused.
    """

    def __init__(self, in_features: int, hidden_features: int, bias: bool = True, **others: Any) -> None:
        super().__init__()
        width = math.ceil(int(hidden_features * 2 / 3) / 8) * 8
        self.w12 = nn.Linear(in_features, 2 * width, bias=bias)
        self.w3 = nn.Linear(width, in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def build_register_vit(
    arch: str,
    *,
    patch_size: int,
    img_size: int,
    drop_path_rate: float = 0.0,
    drop_path_uniform: bool = True,
    init_values: float = 1e-5,
    swiglu: bool = False,
    num_registers: int = 0,
) -> RegisterVisionTransformer:
    """Build a ViT with LayerScale and fresh weights.

    Args:
        arch: one of SIZES.
        patch_size: side of a patch in pixels.
        img_size: side of the images in pixels; the position embedding is stored for it.
        drop_path_rate, drop_path_uniform, init_values, swiglu, num_registers: as for RegisterVisionTransformer.

    Raises:
        UserError: the patch size does not divide the image size, or the stem cannot produce it.
    """
    if img_size % patch_size or (arch == "vit_micro" and patch_size not in (2, 4, 8, 16, 32)):
        raise UserError(
            f"patch_size = {patch_size} does not suit arch = {arch} at {img_size} pixels.\n"
            "    Set one that divides the image, for example 14 or 16 at 224 pixels; a power of 2 for vit_micro."
        )
    embed_dim, depth = SIZES[arch]
    return RegisterVisionTransformer(
        img_size=img_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=NUM_HEADS[embed_dim],
        drop_path_rate=drop_path_rate,
        drop_path_uniform=drop_path_uniform,
        conv_stem=arch == "vit_micro",
        init_values=init_values,
        swiglu=swiglu,
        num_registers=num_registers,
    )


def register_vit_from_state(state: Mapping[str, Tensor]) -> RegisterVisionTransformer | None:
    """Like `encoder_from_state()`, for RegisterVisionTransformer, which is recognised by its `mask_token`."""
    sizes = vit_sizes(state)
    if sizes is None or "mask_token" not in state:
        return None
    registers = state.get("register_tokens")
    return RegisterVisionTransformer(
        **sizes,
        init_values=1e-5 if "blocks.0.ls1.gamma" in state else 0.0,
        swiglu="blocks.0.mlp.w12.weight" in state,
        num_registers=0 if registers is None else registers.shape[1],
    )
