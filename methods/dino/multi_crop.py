"""The networks of DINO: its backbones, and the wrapper that runs many crops through one and a head.

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
    """An encoder with fresh weights.

    Args:
        arch: resnet50, or one of VITS.
        patch_size, img_size, drop_path_rate: as for `build_vit()`; a ResNet reads none of them.

    Raises:
        UserError: sizes that do not fit each other.
    """
    if arch == "resnet50":
        return CONVNETS["resnet50"]()
    return build_vit(arch, patch_size=patch_size, img_size=img_size, drop_path_rate=drop_path_rate)


class MultiCropWrapper(nn.Module):
    """Backbone and head over views of several resolutions: one forward of the backbone for each, one of the head.

    Source: facebookresearch/dino utils.py MultiCropWrapper.
    """

    def __init__(self, backbone: Encoder, head: DINOHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def features(self, views: Sequence[Tensor]) -> Tensor:
        """The backbone's features of `views`, in their order, [sum of B_i, embed_dim].

        Args:
            views: tensors [B_i, 3, H_i, W_i]; neighbours of equal size share a forward, so a view each, or all views of
                a resolution in one tensor, give the same.
        """
        groups = [list(group) for _, group in groupby(views, key=lambda view: view.shape[-2:])]
        outputs = [self.backbone(group[0] if len(group) == 1 else torch.cat(group)) for group in groups]
        return torch.cat(outputs)

    def embed(self, views: Sequence[Tensor]) -> Tensor:
        """The head's bottleneck of `views`, [sum of B_i, bottleneck_dim]; `head.last_layer` makes it logits."""
        return self.head.embed(self.features(views))

    def encode(self, x: Tensor) -> Features:
        """rescue: [CLS] (or pooled) features and the head's bottleneck of views [n, 3, H, W]."""
        features = self.backbone(x)
        return Features(features, self.head.embed(features))

    def forward(self, views: Sequence[Tensor]) -> tuple[Tensor, Features]:
        """The logits of `views`, [sum of B_i, K], view after view; and rescue: what `views[0]` was on its way there."""
        features = self.features(views)
        embedding = self.head.embed(features)
        first = len(views[0])
        return self.head.last_layer(embedding), Features(features[:first], embedding[:first])
