"""Encoders and heads shared by several methods.

An *encoder* is a module with

    embed_dim: int                                           width of a feature
    num_blocks: int                                          0 for networks without blocks
    forward(x [B, 3, H, W]) -> [B, embed_dim]
    probe_features(x, n_last_blocks, avgpool) -> [B, D]      features for a linear probe

Parameter names are those of the upstream trainers, so their checkpoints load unchanged.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from hvp.common.networks.register_vision_transformer import register_vit_from_state
from hvp.common.networks.resnet import ConvNet, convnet_from_state
from hvp.common.networks.vision_transformer import VisionTransformer, vit_from_state

Encoder = VisionTransformer | ConvNet


class Features(NamedTuple):
    """Backbone and projection features of n views, from one forward pass."""

    backbone: Tensor
    """The encoder's output f(x), [n, embed_dim]."""

    projection: Tensor
    """The projection head's output z = g(f(x)), [n, D]; for a head with prototypes, the bottleneck before them."""


def encoder_from_state(state: Mapping[str, Tensor]) -> Encoder | None:
    """Build the encoder that a backbone's state dict belongs to, from names and shapes; its weights are not loaded.

    Args:
        state: state dict of a backbone alone, without prefixes such as `module.`, `backbone.` or `encoder.`.

    Returns:
        An encoder of the right shape, or None if the weights fit none of ours. Extra entries are ignored here; strict
        loading finds them.
    """
    vit = register_vit_from_state(state) or vit_from_state(state)
    return convnet_from_state(state) if vit is None else vit


def describe_encoder(encoder: nn.Module) -> str:
    """Describe an encoder's class and sizes in one line, for the user."""
    millions = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    sizes = f"width {encoder.embed_dim}"
    if isinstance(encoder, VisionTransformer):
        sizes += f", {encoder.num_blocks} blocks, patches of {encoder.patch_size} pixels"
    return f"{type(encoder).__name__}, {sizes}, {millions:.1f} M parameters"


__all__ = ["Encoder", "Features", "describe_encoder", "encoder_from_state"]
