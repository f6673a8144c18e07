"""Pair-loss matrix of DINOv2: [CLS] cross-entropies off the diagonal, masked-patch losses on it. It leaves out KoLeo,
which compares images, not views.

# B images, G global views (targets), V online views, N patches of a global view, R masked patches in all of them
# b bottleneck dim, K and K2 prototypes ([CLS] and patches)
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvp.common.losses.cross_entropy import masked_patch_losses, pair_cross_entropies
from hvp.common.networks.heads import WeightNormLinear
from hvp.methods.dinov2.losses import DINOv2Loss
from hvp.methods.dinov2.networks import Network


def pair_losses(
    student: Network,
    teacher: Network,
    crops: list[Tensor],
    masks: Tensor,
    dinov2_loss: DINOv2Loss,
    teacher_temp: float,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Forward every candidate once, under its own mask, and score all pairs.

    Call it without gradient; it moves neither centre nor teacher. With Sinkhorn-Knopp the targets are balanced over all
    candidates.

    Args:
        student, teacher: in the mode to score in.
        crops: [G, B, 3, H, W] global and optionally [V - G, B, 3, h, w] local candidates, normalised.
        masks: [G, B, N] bool, for the global candidates.
        dinov2_loss: provides centres and weights.
        teacher_temp: the teacher's temperature.

    Returns:
        [B, G, V] float32 in nats, entry [b, t, v]: the weighted [CLS] cross-entropy if t != v, the view's weighted
        masked-patch loss if t == v. With `Slots(..., diagonal=True)` a combination's loss is the objective itself
        without KoLeo. And the teacher's bottleneck embeddings of the global crops, [CLS] tokens [G, B, b] and patches
        [G, B, N, b], zero where not masked.

    Source: DINOv2 (arXiv:2304.07193) section 4, before the means over views and images; HVP Algorithm 1.
    """
    num_global, batch = crops[0].shape[:2]
    views, rows = [crop.flatten(0, 1) for crop in crops], masks.flatten(0, 1)
    teacher_cls, teacher_patch = teacher.embed_teacher(views[0], rows)
    features, student_patch = student.embed_masked(views[0], rows)
    student_cls = torch.cat((features.projection, *(student.encode(local).projection for local in views[1:])))

    losses = loss_matrix(
        teacher_cls.unflatten(0, (num_global, batch)),
        teacher_patch,
        student_cls.unflatten(0, (-1, batch)),
        student_patch,
        masks,
        dinov2_loss,
        teacher_temp,
        (teacher.dino_head.last_layer, teacher.patch_head.last_layer),
        (student.dino_head.last_layer, student.patch_head.last_layer),
    )
    patches = teacher_patch.new_zeros(*masks.shape, teacher_patch.shape[1])  # [G, B, N, b]
    patches[masks] = teacher_patch
    return losses, (teacher_cls.unflatten(0, (num_global, batch)), patches)


@torch.no_grad()
def loss_matrix(
    teacher_cls: Tensor,
    teacher_patch: Tensor,
    student_cls: Tensor,
    student_patch: Tensor,
    masks: Tensor,
    dinov2_loss: DINOv2Loss,
    teacher_temp: float,
    teacher_layers: tuple[WeightNormLinear, WeightNormLinear],
    student_layers: tuple[WeightNormLinear, WeightNormLinear],
) -> Tensor:
    """DINOv2's loss, without KoLeo, of every online view against every target view, per image.

    Args:
        teacher_cls: bottleneck embeddings of the global views, [G, B, b].
        teacher_patch: bottleneck embeddings of the patches that `masks` marks, in its order, [R, b].
        student_cls: bottleneck embeddings of the online views, [V, B, b], the global ones first.
        student_patch: as `teacher_patch`, from the student, which does not see these patches.
        masks: [G, B, N] bool.
        dinov2_loss: provides centres and weights; it is not changed.
        teacher_temp: the teacher's temperature.
        teacher_layers, student_layers: prototypes of [CLS] tokens and of patches.

    Returns:
        [B, G, V] float32, the matrix of `pair_losses()`.
    """
    temps = teacher_temp, dinov2_loss.student_temp
    logits = teacher_layers[0](teacher_cls)  # [G, B, K]
    losses = dinov2_loss.dino_weight * pair_cross_entropies(
        logits,
        student_cls,
        dinov2_loss.dino_loss.center_for(logits.flatten(0, 1), teacher_temp),
        *temps,
        prototypes=student_layers[0].frozen(),
    )
    teacher_prototypes, student_prototypes = teacher_layers[1].frozen(), student_layers[1].frozen()
    patch_loss = dinov2_loss.ibot_patch_loss
    patch_center = patch_loss.center
    if patch_loss.centering == "sinkhorn_knopp":  # this centre needs all logits at once
        patch_center = patch_loss.center_for(teacher_prototypes(teacher_patch), teacher_temp)
    patch = masked_patch_losses(
        teacher_patch,
        student_patch,
        masks.flatten(0, 1),
        patch_center,
        *temps,
        prototypes=(teacher_prototypes, student_prototypes),
    )
    losses.diagonal(dim1=1, dim2=2).copy_(dinov2_loss.ibot_weight * patch.unflatten(0, masks.shape[:2]).T)  # [B, G]
    return losses
