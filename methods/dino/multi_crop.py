"""DINO's networks: the backbones, and the wrapper that runs crops of several sizes through backbone and head.

# B images, V views, K prototypes
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from hvp.common.networks import Encoder, Features
from hvp.common.networks.heads import DINOHead
from hvp.common.networks.resnet import CONVNETS
from hvp.common.networks.vision_transformer import build_vit


def build_backbone(arch: str, *, patch_size: int = 16, img_size: int = 224, drop_path_rate: float = 0.0) -> Encoder:
    """Build an encoder with fresh weights.

    Args:
        arch: resnet50, or one of VITS.
        patch_size, img_size, drop_path_rate: as for `build_vit()`; unused by a ResNet.

    Raises:
        UserError: the sizes do not fit each other.
    """
    if arch == "resnet50":
        return CONVNETS["resnet50"]()
    return build_vit(arch, patch_size=patch_size, img_size=img_size, drop_path_rate=drop_path_rate)


class MultiCropWrapper(nn.Module):
    """Backbone and head for views of several resolutions: one backbone forward per resolution, one head forward.

    Source: facebookresearch/dino utils.py MultiCropWrapper.
    """

    def __init__(self, backbone: Encoder, head: DINOHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def features(self, views: Sequence[Tensor]) -> Tensor:
        """Compute the backbone's features of `views`, in order, [sum of B_i, embed_dim].

        Args:
            views: tensors [B_i, 3, H_i, W_i]. Neighbours of equal size share a forward pass, so one tensor per view and
                one tensor per resolution give the same result.
        """
        groups = [list(group) for _, group in groupby(views, key=lambda view: view.shape[-2:])]
        outputs = [self.backbone(group[0] if len(group) == 1 else torch.cat(group)) for group in groups]
        return torch.cat(outputs)

    def embed(self, views: Sequence[Tensor]) -> Tensor:
        """Compute the head's bottleneck embeddings, [sum of B_i, bottleneck_dim]; `head.last_layer` maps to logits."""
        return self.head.embed(self.features(views))

    def encode(self, x: Tensor) -> Features:
        """rescue: compute [CLS] (or pooled) features and bottleneck embeddings of views [n, 3, H, W]."""
        features = self.backbone(x)
        return Features(features, self.head.embed(features))

    def forward(self, views: Sequence[Tensor]) -> tuple[Tensor, Features]:
        """Compute the logits of `views`, [sum of B_i, K], view after view.

        Returns:
            The logits; and rescue: features and bottleneck embeddings of `views[0]`.
        """
        features = self.features(views)
        embedding = self.head.embed(features)
        first = len(views[0])
        return self.head.last_layer(embedding), Features(features[:first], embedding[:first])
