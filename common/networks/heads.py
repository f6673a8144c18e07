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
    """Linear layer without bias; each row has direction `weight_v` and length `weight_g`.

    Args:
        in_dim, out_dim: D and K.
        train_gain: whether `weight_g`, which starts at 1, is trained.
    """

    def __init__(self, in_dim: int, out_dim: int, *, train_gain: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=train_gain)
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # like nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., K]."""
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))

    def frozen(self) -> Callable[[Tensor], Tensor]:
        """Return the current layer as a function for many small calls without gradient: row norms are computed once.

        The gain multiplies the outputs rather than the weights, which avoids a copy of the weights. Results differ
        from `forward` only by rounding.
        """
        with torch.no_grad():
            gain = (self.weight_g / self.weight_v.norm(dim=1, keepdim=True)).squeeze(1)  # [K]

        def forward(x: Tensor) -> Tensor:
            logits = F.linear(x, self.weight_v)
            # In place if that rounds only once; half-precision logits from autocast are promoted instead.
            return logits.mul_(gain) if logits.dtype == gain.dtype else logits * gain

        return forward


class DINOHead(nn.Module):
    """Projection head: a perceptron to a bottleneck on the unit sphere, then weight-normalised prototypes.

    Args:
        in_dim, out_dim: width of the backbone's feature, and number of prototypes K.
        use_bn: add batch norm after each hidden layer.
        norm_last_layer: keep the length of each prototype at 1.
        nlayers: linear layers of the perceptron; with 1 there are no hidden layers.
        hidden_dim, bottleneck_dim: widths of the hidden layers and of the bottleneck.

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
        """Features [B, in_dim] to unit-length bottleneck embeddings [B, bottleneck_dim]."""
        return F.normalize(self.mlp(x), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, in_dim] to logits [B, K]."""
        return self.last_layer(self.embed(x))
