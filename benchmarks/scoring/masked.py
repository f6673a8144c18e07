"""Scoring with masked patches: the parts that the benchmarks of iBOT and DINOv2 share.

# B images, G = 4 global and V candidate crops, N = 196 patches of a global crop
# C combinations, S crops of one, b = 256 bottleneck dim, K = 8192 prototypes of both kinds
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hvp.benchmarks.scoring.rows import plain_selection
from hvp.common.hardviews import Slots

NUM_GLOBAL, PATCHES, PROTOTYPES, BOTTLENECK = 4, 196, 8192, 256


def random_embeddings(slots: Slots, batch: int) -> tuple[Tensor, Tensor]:
    """Draw embeddings of the student and of the teacher: [CLS] tokens [2, V, B, b], and patches [2, G, B, N, b]."""
    cls = torch.randn(2, slots.num_views, batch, BOTTLENECK)
    patches = torch.randn(2, NUM_GLOBAL, batch, PATCHES, BOTTLENECK)
    return F.normalize(cls, dim=-1), F.normalize(patches, dim=-1)


@dataclass(frozen=True)
class Logits:
    """Logits of all [CLS] tokens or patches, with the constants of their cross-entropy."""

    student: Tensor
    """[V, B, K] or [G, B, N, K]."""
    teacher: Tensor
    """[G, B, K] or [G, B, N, K]."""
    center: Tensor
    """Any shape that broadcasts against [B, K] or [B, N, K]."""
    teacher_temp: float
    student_temp: float

    def cross_entropy(self, target: Tensor, view: Tensor) -> Tensor:
        """Cross-entropy of one view against one target, [B] or [B, N]."""
        p = F.softmax((self.teacher[target] - self.center) / self.teacher_temp, dim=-1)
        return -(p * F.log_softmax(self.student[view] / self.student_temp, dim=-1)).sum(dim=-1)


def plain_masked_selection(cls: Logits, patches: Logits, masks: Tensor, combinations: Tensor) -> Tensor:
    """Select as the papers describe it: for every combination the objective of its crops, the maximum kept.

    The logits of all patches exist; their loss is masked afterwards.

    Args:
        cls, patches: logits of [CLS] tokens and of patches.
        masks: [G, B, N] bool.
        combinations: [C, S] crop numbers.

    Returns:
        [B, S], the hardest combination of each image.
    """

    def loss_of(combination: Tensor) -> Tensor:
        cls_terms, patch_terms = [], []
        for i, t in enumerate(combination[:2]):
            cls_terms += [cls.cross_entropy(t, v) for j, v in enumerate(combination) if i != j]
            per_patch = patches.cross_entropy(t, t)  # [B, N]
            patch_terms.append((per_patch * masks[t]).sum(dim=-1) / masks[t].sum(dim=-1).clamp(min=1))
        return torch.stack(cls_terms).mean(dim=0) + torch.stack(patch_terms).mean(dim=0)

    return plain_selection(combinations, masks.shape[1], loss_of)
