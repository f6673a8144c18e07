"""Encoders and heads that several methods train.

An *encoder*, here and in `hvp.common.evaluation`, is a module with

    embed_dim: int                                                           width of a feature
    num_blocks: int                                                          0 for networks without blocks
    forward(x [B, 3, H, W]) -> [B, embed_dim]
    probe_features(x, n_last_blocks, avgpool) -> [B, D]                      what a linear probe reads

Parameter names are those of the upstream trainers, so that their checkpoints load unchanged.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from hvp.common.networks.register_vision_transformer import register_vit_from_state
from hvp.common.networks.resnet import ConvNet, convnet_from_state
from hvp.common.networks.vision_transformer import VisionTransformer, vit_from_state

Encoder = VisionTransformer | ConvNet


class Features(NamedTuple):
    """What a network makes of n views on its way to the loss, in one forward pass."""

    backbone: Tensor
    """The encoder's output f(x), [n, embed_dim]."""

    projection: Tensor
    """The projection head's output z = g(f(x)), [n, D]. Of a head with prototypes: the bottleneck before them."""


def encoder_from_state(state: Mapping[str, Tensor]) -> Encoder | None:
    """The encoder that a backbone's state dict belongs to, by names and shapes, weights not loaded; None if there is
    none here."""
    vit = register_vit_from_state(state) or vit_from_state(state)
    return convnet_from_state(state) if vit is None else vit


def describe_encoder(encoder: nn.Module) -> str:
    """An encoder's kind and sizes in words."""
    millions = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    sizes = f"width {encoder.embed_dim}"
    if isinstance(encoder, VisionTransformer):
        sizes += f", {encoder.num_blocks} blocks, patches of {encoder.patch_size} pixels"
    return f"{type(encoder).__name__}, {sizes}, {millions:.1f} M parameters"


__all__ = ["Encoder", "Features", "describe_encoder", "encoder_from_state"]
