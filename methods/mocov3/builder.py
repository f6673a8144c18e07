"""MoCo v3's networks: a base encoder with projector, its moving average, and a predictor.

# B images of this process, D projection dim
"""

from __future__ import annotations

from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hvp.common.networks import Features
from hvp.common.networks.resnet import ConvNet
from hvp.common.training.ema import update_ema
from hvp.methods.mocov3.vits import VisionTransformerMoCo


class MoCoOutput(NamedTuple):
    """Outputs of a forward pass over two views of every image."""

    q1: Tensor
    """Queries, the predictor's output: [B, D]."""
    q2: Tensor
    k1: Tensor
    """Keys, the momentum encoder's projections: [B, D], detached."""
    k2: Tensor
    features: Features
    """rescue: the base encoder's features and projections of both views, [2 B, .], with gradient."""


class MoCo(nn.Module):
    """A base encoder that is trained, and a momentum encoder that follows it.

    Args:
        base_encoder: encoder with its projector in place.
        predictor: maps projections to queries.

    Source: facebookresearch/moco-v3 moco/builder.py.
    """

    projector = ""
    """Name of the encoder's layer that the projector replaces; subclasses define it."""

    def __init__(self, base_encoder: ConvNet | VisionTransformerMoCo, predictor: nn.Sequential) -> None:
        super().__init__()
        self.base_encoder = base_encoder
        self.momentum_encoder = deepcopy(base_encoder).requires_grad_(False)
        self.predictor = predictor

    @torch.no_grad()
    def update_momentum_encoder(self, m: float) -> None:
        """Move the momentum encoder's parameters towards the base encoder's; m = 1 leaves them unchanged.

        It keeps its own running statistics of batch norm.
        """
        update_ema(self.momentum_encoder.parameters(), self.base_encoder.parameters(), m)

    def encode(self, x: Tensor) -> Features:
        """Compute the base encoder's features and projections of views [n, 3, H, W], without the predictor."""
        features = self.base_encoder.pooled(x)
        return Features(features, getattr(self.base_encoder, self.projector)(features))

    def forward(self, x1: Tensor, x2: Tensor, m: float | None) -> MoCoOutput:
        """Forward both views of every image, one after the other, so batch norm sees one view at a time.

        Args:
            x1, x2: the views, [B, 3, H, W].
            m: momentum of the momentum encoder's update, which happens between the queries and the keys; None for no
                update, in all but the first part of an accumulated batch.
        """
        (h1, z1), (h2, z2) = self.encode(x1), self.encode(x2)
        q1, q2 = self.predictor(z1), self.predictor(z2)
        if m is not None:
            self.update_momentum_encoder(m)
        with torch.no_grad():
            k1, k2 = self.momentum_encoder(x1), self.momentum_encoder(x2)
        return MoCoOutput(q1, q2, k1, k2, Features(torch.cat((h1, h2)), torch.cat((z1, z2))))


class MoCo_ResNet(MoCo):
    """MoCo v3 with a convolutional encoder: a 2-layer projector, and a 2-layer predictor without batch norm at its end.

    Args:
        base_encoder: its `fc` is replaced by the projector.
        dim: D.
        mlp_dim: width of the hidden layers.
    """

    projector = "fc"

    def __init__(self, base_encoder: ConvNet, dim: int = 256, mlp_dim: int = 4096) -> None:
        base_encoder.fc = build_mlp(2, base_encoder.embed_dim, mlp_dim, dim)
        super().__init__(base_encoder, build_mlp(2, dim, mlp_dim, dim, last_bn=False))


class MoCo_ViT(MoCo):
    """MoCo v3 with a ViT: a 3-layer projector and a 2-layer predictor, both ending in batch norm.

    Args:
        base_encoder: its `head` is replaced by the projector.
        dim: D.
        mlp_dim: width of the hidden layers.
    """

    projector = "head"

    def __init__(self, base_encoder: VisionTransformerMoCo, dim: int = 256, mlp_dim: int = 4096) -> None:
        base_encoder.head = build_mlp(3, base_encoder.embed_dim, mlp_dim, dim)
        super().__init__(base_encoder, build_mlp(2, dim, mlp_dim, dim))


def build_mlp(num_layers: int, input_dim: int, mlp_dim: int, output_dim: int, last_bn: bool = True) -> nn.Sequential:
    """Build an MLP of linear layers without bias, with batch norm and ReLU between them.

    Args:
        num_layers: linear layers.
        input_dim, mlp_dim, output_dim: widths of the input, the hidden layers and the output.
        last_bn: end in batch norm without gain and bias.
    """
    layers: list[nn.Module] = []
    width = input_dim
    for _ in range(num_layers - 1):
        layers += [nn.Linear(width, mlp_dim, bias=False), nn.BatchNorm1d(mlp_dim), nn.ReLU(inplace=True)]
        width = mlp_dim
    layers.append(nn.Linear(width, output_dim, bias=False))
    if last_bn:
        layers.append(nn.BatchNorm1d(output_dim, affine=False))
    return nn.Sequential(*layers)
