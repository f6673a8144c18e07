"""SimSiam's network: encoder with projector, and predictor.

# B images per process, D projection dim
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from hvp.common.networks import Features
from hvp.common.networks.resnet import ConvNet


class SimSiam(nn.Module):
    """An encoder whose `fc` is the projector, and a predictor from one view's projection to the other's.

    Args:
        encoder: its `fc` is replaced by the projector, whose hidden layers are as wide as the encoder's features.
        dim: D, width of the projection.
        pred_dim: width of the predictor's hidden layer.
        projector_layers: 3 for ImageNet, 2 for CIFAR's ResNet-18.
        projector_bias: give the projector's last linear layer a bias. It is never trained, because the batch norm after
            it cancels it. Upstream has it, HVP's released code does not.

    Source: facebookresearch/simsiam simsiam/builder.py; automl/hvp builder.py.
    """

    def __init__(
        self,
        encoder: ConvNet,
        dim: int = 2048,
        pred_dim: int = 512,
        *,
        projector_layers: Literal[2, 3] = 3,
        projector_bias: bool = True,
    ) -> None:
        super().__init__()
        width = encoder.embed_dim
        layers: list[nn.Module] = []
        for _ in range(projector_layers - 1):
            layers += [nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        last = nn.Linear(width, dim, bias=projector_bias)
        if projector_bias:
            last.bias.requires_grad_(False)
        self.encoder = encoder
        self.encoder.fc = nn.Sequential(*layers, last, nn.BatchNorm1d(dim, affine=False))
        self.predictor = nn.Sequential(
            nn.Linear(dim, pred_dim, bias=False),
            nn.BatchNorm1d(pred_dim),
            nn.ReLU(inplace=True),
            nn.Linear(pred_dim, dim),
        )

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Features]:
        """Forward both views of every image, one after the other, so batch norm sees one view at a time.

        Args:
            x1, x2: the views, [B, 3, H, W].

        Returns:
            p1, p2: predictions, [B, D].
            z1, z2: projections, [B, D], detached.
            features: rescue: features and projections of both views, [2 B, .], with gradient.
        """
        (h1, z1), (h2, z2) = self.encode(x1), self.encode(x2)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        return p1, p2, z1.detach(), z2.detach(), Features(torch.cat((h1, h2)), torch.cat((z1, z2)))

    def encode(self, x: Tensor) -> Features:
        """Compute features and projections of views [n, 3, H, W]."""
        features = self.encoder.pooled(x)
        return Features(features, self.encoder.fc(features))

    def single_forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """hvp: forward views [N, 3, H, W] as one batch, over which batch norm takes its statistics.

        Returns:
            p, z: predictions and projections, [N, D].
        """
        z: Tensor = self.encoder(x)
        return self.predictor(z), z
