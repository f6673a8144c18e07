"""DINOv2's student and teacher: a backbone, a head for [CLS] tokens and, optionally, a separate head for patches.

# n global and m local views, N patches of a global view, R of them masked, D embedding dim, b bottleneck dim
# K and K2 prototypes ([CLS] and patches)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hvp.common.networks import Features
from hvp.common.networks.heads import DINOHead
from hvp.common.networks.register_vision_transformer import RegisterVisionTransformer
from hvp.common.training.sharding import Unit


class StudentOutputs(NamedTuple):
    """Outputs of the student for the objective."""

    cls: Tensor
    """Logits of all [CLS] tokens, [n + m, K]."""
    patch: Tensor
    """Logits of the masked patches, in the order of the masks, [R, K2]."""
    features: Features
    """[CLS] tokens and bottleneck embeddings of the global views, [n, .]; KoLeo spreads the [CLS] tokens."""


class Network(nn.Module):
    """Student or teacher. Without a separate head for patches, `ibot_head` is None and `dino_head` serves both.

    Source: facebookresearch/dinov2 dinov2/train/ssl_meta_arch.py SSLMetaArch, with the same three modules in `student`
        and `teacher`.
    """

    ibot_head: DINOHead | None

    def __init__(self, backbone: RegisterVisionTransformer, dino_head: DINOHead, ibot_head: DINOHead | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.dino_head = dino_head
        self.ibot_head = ibot_head

    def shards(self) -> Iterator[Unit]:
        """Yield the units of sharding, inner ones first, as `shard()` takes them."""
        for block in self.backbone.blocks:
            yield block, ()
        yield self.backbone, ("all_tokens",)
        for head in (self.dino_head, self.ibot_head):
            if head is not None:
                yield head.mlp, ()
                yield head.last_layer, ("frozen",)

    @property
    def patch_head(self) -> DINOHead:
        """The head that patches go through."""
        return self.dino_head if self.ibot_head is None else self.ibot_head

    def embed_teacher(self, views: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Compute bottleneck embeddings of unmasked views: [CLS] tokens, [n, b], and patches marked by `masks`, [R, b].

        Args:
            views: global views [n, 3, H, W].
            masks: [n, N] bool, the patches that are masked for the student.
        """
        return self._embed(self.backbone.all_tokens(views), masks)

    def embed_masked(self, views: Tensor, masks: Tensor) -> tuple[Features, Tensor]:
        """Compute [CLS] tokens and their bottleneck embeddings, [n, .], and those of the masked patches, [R, b]."""
        tokens = self.backbone.all_tokens(views, masks)
        cls, patches = self._embed(tokens, masks)
        return Features(tokens[:, 0], cls), patches

    def encode(self, x: Tensor) -> Features:
        """Compute the [CLS] tokens of unmasked views [n, 3, H, W] and their bottleneck embeddings."""
        cls = self.backbone(x)
        return Features(cls, self.dino_head.embed(cls))

    def _embed(self, tokens: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        cls, patches = tokens[:, 0], tokens[:, 1:][masks]
        return self.dino_head.embed(cls), self.patch_head.embed(patches)

    def forward(self, views: Sequence[Tensor], masks: Tensor) -> StudentOutputs:
        """Compute the student's outputs.

        Args:
            views: global views [n, 3, H, W] and optionally local ones [m, 3, h, w], which stay unmasked.
            masks: [n, N] bool, the patches to mask in the global views.
        """
        features, patches = self.embed_masked(views[0], masks)
        cls = torch.cat((features.projection, *(self.encode(local).projection for local in views[1:])))
        return StudentOutputs(self.dino_head.last_layer(cls), self.patch_head.last_layer(patches), features)
