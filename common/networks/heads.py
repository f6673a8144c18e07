"""Projection heads with prototypes.

# B images, D embedding dim, K prototypes
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvp.common.networks.vision_transformer import init_linear


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows have direction `weight_v` and length `weight_g`.

    Args:
        in_dim, out_dim: D and K.
        train_gain: let `weight_g`, which starts at 1, be trained.
    """

    def __init__(self, in_dim: int, out_dim: int, *, train_gain: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=train_gain)
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # as nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., K]."""
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))

    def frozen(self) -> Callable[[Tensor], Tensor]:
        """The layer as it is now, for many small calls without gradient: the norms of the K rows are taken once.

        The gain multiplies the outputs and not the weights, so that no copy of the weights is made; results differ
        from `forward` by rounding only.
        """
        with torch.no_grad():
            gain = (self.weight_g / self.weight_v.norm(dim=1, keepdim=True)).squeeze(1)  # [K]

        def forward(x: Tensor) -> Tensor:
            logits = F.linear(x, self.weight_v)
            # In place where that rounds once; autocast's half-precision logits are promoted instead.
            return logits.mul_(gain) if logits.dtype == gain.dtype else logits * gain

        return forward


class DINOHead(nn.Module):
    """Projection head: a perceptron to a bottleneck on the unit sphere, then weight-normalised prototypes.

    Args:
        in_dim, out_dim: width of the backbone's feature, and the number of prototypes K.
        use_bn: batch norm after each hidden layer.
        norm_last_layer: keep the prototypes' lengths at 1.
        nlayers: linear layers of the perceptron; 1 leaves out the hidden ones.
        hidden_dim, bottleneck_dim: widths in between.

    Source: facebookresearch/dino vision_transformer.py DINOHead.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ) -> None:
        super().__init__()
        widths = [in_dim] + [hidden_dim] * (nlayers - 1)
        layers: list[nn.Module] = []
        for c_in, c_out in pairwise(widths):
            layers += [nn.Linear(c_in, c_out), *([nn.BatchNorm1d(c_out)] if use_bn else []), nn.GELU()]
        layers.append(nn.Linear(widths[-1], bottleneck_dim))
        # A single layer is named mlp.weight, not mlp.0.weight.
        self.mlp = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
        self.apply(init_linear)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, train_gain=not norm_last_layer)

    def embed(self, x: Tensor) -> Tensor:
        """Features [B, in_dim] to the bottleneck [B, bottleneck_dim], of length 1."""
        return F.normalize(self.mlp(x), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, in_dim] to logits [B, K]."""
        return self.last_layer(self.embed(x))
