"""Pair-loss matrix of iBOT: DINO's cross-entropies off the diagonal, masked-patch losses on it.

# B images, G global views (targets), V online views, N patches of a global view, R masked patches in all of them
# b bottleneck dim, K and K2 prototypes ([CLS] and patches)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hvp.common.losses.cross_entropy import Layer, masked_patch_losses, pair_cross_entropies
from hvp.methods.ibot.head import MultiCropWrapper
from hvp.methods.ibot.ibot_loss import iBOTLoss


class Prototypes(NamedTuple):
    """Linear layers without bias that map bottleneck embeddings to logits; their results are overwritten."""

    student_cls: Layer
    student_patch: Layer
    teacher_patch: Layer


def pair_losses(
    student: MultiCropWrapper,
    teacher: MultiCropWrapper,
    crops: list[Tensor],
    masks: Tensor,
    ibot_loss: iBOTLoss,
    epoch: int,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Forward every candidate once, under its own mask, and score all pairs.

    Call it without gradient; it moves neither centre nor teacher.

    Args:
        student, teacher: in the mode to score in.
        crops: [G, B, 3, H, W] global and optionally [V - G, B, 3, h, w] local candidates, normalised.
        masks: [G, B, N] bool, for the global candidates.
        ibot_loss: provides centres, temperatures and weights.
        epoch: counted from 0; sets the teacher's temperatures.

    Returns:
        [B, G, V] float32, as `loss_matrix()`; and the teacher's bottleneck embeddings of the global crops, [CLS] tokens
        [G, B, b] and all patches [G, B, N, b], which take a thirtieth of the logits' memory.
    """
    num_global, batch = crops[0].shape[:2]
    views, rows = [crop.flatten(0, 1) for crop in crops], masks.flatten(0, 1)
    teacher_cls, teacher_patches = teacher.embed(views[0])
    features, patches = student.embed_masked(views[0], rows)
    cls = torch.cat((features.projection, *(student.encode(local).projection for local in views[1:])))
    losses = loss_matrix(
        teacher.head.last_layer(teacher_cls).unflatten(0, (num_global, batch)),
        teacher_patches[rows],
        cls.unflatten(0, (-1, batch)),
        patches,
        masks,
        ibot_loss,
        epoch,
        Prototypes(
            student.head.last_layer.frozen(), student.head.last_layer2.frozen(), teacher.head.last_layer2.frozen()
        ),
    )
    embedding = tuple(part.unflatten(0, (num_global, batch)) for part in (teacher_cls, teacher_patches))
    return losses, (embedding[0], embedding[1])


@torch.no_grad()
def loss_matrix(
    teacher_cls: Tensor,
    teacher_patch: Tensor,
    student_cls: Tensor,
    student_patch: Tensor,
    masks: Tensor,
    ibot_loss: iBOTLoss,
    epoch: int,
    prototypes: Prototypes | None = None,
) -> Tensor:
    """iBOT's loss of every online view against every target view, per image.

    With `Slots(..., diagonal=True)` a combination's loss is the objective itself: the mean of its entries off the
    diagonal, its [CLS] term, plus the mean of those on the diagonal, its patch term.

    Args:
        teacher_cls: logits of the global views, [G, B, K], any float dtype, like all; computed in float32.
        teacher_patch: bottleneck embeddings of the patches that `masks` marks, in its order, [R, b], or their logits
            [R, K2] when `prototypes` is left out.
        student_cls: bottleneck embeddings of the online views, [V, B, b], the global ones first, or logits [V, B, K].
        student_patch: as `teacher_patch`, from the student, which does not see these patches.
        masks: [G, B, N] bool.
        ibot_loss: provides centres, temperatures and weights; it is not changed.
        epoch: counted from 0; sets the teacher's temperatures.
        prototypes: layers from embeddings to logits. When left out, all inputs are logits.

    Returns:
        [B, G, V] float32 in nats, entry [b, t, v]: lambda1 times the [CLS] cross-entropy if t != v, lambda2 times the
        view's masked-patch loss if t == v.

    Source: iBOT (arXiv:2111.07832) Eqs. 2 and 3, before the means over views and images; automl/hvp, branch ibot,
        main_ibot.py iBOTLoss.hvs.
    """
    losses = ibot_loss.lambda1 * pair_cross_entropies(
        teacher_cls,
        student_cls,
        ibot_loss.center,
        ibot_loss.teacher_temp(epoch),
        ibot_loss.student_temp,
        prototypes=prototypes and prototypes.student_cls,
    )
    patch = masked_patch_losses(
        teacher_patch,
        student_patch,
        masks.flatten(0, 1),
        ibot_loss.center2,
        ibot_loss.teacher_patch_temp(epoch),
        ibot_loss.student_temp,
        prototypes and (prototypes.teacher_patch, prototypes.student_patch),
    )
    losses.diagonal(dim1=1, dim2=2).copy_(ibot_loss.lambda2 * patch.unflatten(0, masks.shape[:2]).T)  # [B, G]
    return losses
