"""iBOT's networks around the backbone: the head with prototypes for [CLS] tokens and patches, and the wrapper of both.

# n views, N patches of each, R of them masked, D embedding dim, b bottleneck dim, K and K2 prototypes ([CLS], patches)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hvp.common.networks import Features
from hvp.common.networks.heads import DINOHead, WeightNormLinear
from hvp.common.networks.vision_transformer import VisionTransformer
from hvp.common.training.batch_norm import has_batch_norm


class iBOTHead(DINOHead):
    """DINO's head with a second layer of prototypes, `last_layer2`, for patches.

    Args:
        in_dim, out_dim: width of a token, and number of [CLS] prototypes, K.
        patch_out_dim: number of patch prototypes, K2.
        shared_head: make `last_layer2` the same module as `last_layer`, so K2 is K. As upstream, the state dict then
            contains it twice.
        use_bn, norm_last_layer, nlayers, hidden_dim, bottleneck_dim: as in DINOHead, for both layers.

    Raises:
        ValueError: the head is shared, but K2 differs from K.

    Source: bytedance/ibot models/head.py iBOTHead.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        patch_out_dim: int,
        shared_head: bool,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ) -> None:
        super().__init__(in_dim, out_dim, use_bn, norm_last_layer, nlayers, hidden_dim, bottleneck_dim)
        if shared_head and patch_out_dim != out_dim:
            raise ValueError(f"iBOTHead: a shared head has {out_dim} prototypes, but patch_out_dim is {patch_out_dim}")
        self.last_layer2 = (
            self.last_layer
            if shared_head
            else WeightNormLinear(bottleneck_dim, patch_out_dim, train_gain=not norm_last_layer)
        )


class MultiCropWrapper(nn.Module):
    """Backbone and head: [CLS] tokens and patches of global views, masked or not, and [CLS] tokens of local views.

    Source: bytedance/ibot utils.py MultiCropWrapper.
    """

    def __init__(self, backbone: VisionTransformer, head: iBOTHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        # Batch norm's statistics are over all patches of a batch, or over all [CLS] tokens. Without batch norm, patches
        # that the loss does not use can skip the head.
        self.has_batch_norm = has_batch_norm(self)

    def embed(self, views: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute the bottleneck embeddings of the [CLS] tokens, [n, b], and of all patches, [n, N, b].

        Args:
            views: images [n, 3, H, W].
            masks: [n, N] bool; the backbone sees the mask token in place of these patches.
        """
        tokens = self.backbone.all_tokens(views, masks)
        patches = self.head.embed(tokens[:, 1:].flatten(0, 1)).unflatten(0, (len(views), -1))
        return self.head.embed(tokens[:, 0]), patches

    def embed_masked(self, views: Tensor, masks: Tensor) -> tuple[Features, Tensor]:
        """Compute the [CLS] tokens and their bottleneck embeddings, [n, .], and those of the masked patches, [R, b]."""
        tokens = self.backbone.all_tokens(views, masks)
        cls, patches = tokens[:, 0], tokens[:, 1:]
        if self.has_batch_norm:
            patches = self.head.embed(patches.flatten(0, 1)).unflatten(0, masks.shape)[masks]
            return Features(cls, self.head.embed(cls)), patches
        embedding, patches = self.head.embed(torch.cat((cls, patches[masks]))).tensor_split((len(views),))
        return Features(cls, embedding), patches

    def encode(self, x: Tensor) -> Features:
        """Compute the [CLS] tokens of unmasked views [n, 3, H, W] and their bottleneck embeddings."""
        cls = self.backbone(x)
        return Features(cls, self.head.embed(cls))

    def forward(self, views: Sequence[Tensor], masks: Tensor) -> tuple[Tensor, Tensor, Features]:
        """Compute the student's outputs.

        Args:
            views: global views [n, 3, H, W] and optionally local ones [m, 3, h, w], which stay unmasked.
            masks: [n, N] bool, the patches to mask in the global views.

        Returns:
            Logits of all [CLS] tokens, [n + m, K], and of the masked patches in the order of `masks`, [R, K2]; rescue:
            the global views' [CLS] tokens and bottleneck embeddings.
        """
        features, patches = self.embed_masked(views[0], masks)
        cls = torch.cat((features.projection, *(self.encode(local).projection for local in views[1:])))
        return self.head.last_layer(cls), self.head.last_layer2(patches), features
