"""SimCLR's network: a backbone and a projector. State-dict keys are those of HVP's released code.

# B images, D embedding dim
"""

from itertools import pairwise

from torch import Tensor, nn

from hvp.common.networks import Features
from hvp.common.networks.resnet import ConvNet


class SimCLRProjectionHead(nn.Module):
    """MLP with batch norm after every layer, including the last.

    Args:
        in_dim, hidden_dim, output_dim: widths.
        num_layers: linear layers, at least 2. google-research/simclr: 2 in version 1, 3 in version 2.
        use_bn: use batch norm, and no bias in the linear layers.

    Source: google-research/simclr tf2/model.py ProjectionHead; automl/hvp, branch simclr, methods/simclr.py.
    """

    def __init__(self, in_dim: int, hidden_dim: int, output_dim: int, num_layers: int = 2, use_bn: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for c_in, c_out in pairwise([in_dim, *[hidden_dim] * (num_layers - 1), output_dim]):
            if layers:
                layers.append(nn.ReLU(inplace=True))
            layers.append(nn.Linear(c_in, c_out, bias=not use_bn))
            if use_bn:
                layers.append(nn.BatchNorm1d(c_out))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map features [B, in_dim] to projections [B, output_dim], which are not normalised."""
        projections: Tensor = self.layers(x)
        return projections


class SimCLR(nn.Module):
    """Backbone and projector."""

    def __init__(self, backbone: ConvNet, projector: SimCLRProjectionHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, x: Tensor) -> Features:
        """Map images [B, 3, H, W] to features and projections, [B, .]. Batch norm sees all views as one batch."""
        return self.encode(x)

    def encode(self, x: Tensor) -> Features:
        """rescue: the same, under the name that Rescue calls."""
        features: Tensor = self.backbone(x)
        return Features(features, self.projector(features))
