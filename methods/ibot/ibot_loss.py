"""iBOT's objective: [CLS] cross-entropy over pairs of different views, masked-patch cross-entropy of each global view
against itself, and their two centres.

# B images per process, R masked patches in both global views together, K and K2 prototypes ([CLS] and patches)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hvp.common.losses.center import GlobalMean
from hvp.common.losses.cross_entropy import patch_weights, view_cross_entropy
from hvp.common.training.schedules import linear_then_constant

NUM_GLOBAL_VIEWS = 2


class Losses(NamedTuple):
    """Scalar losses, float32, in nats."""

    loss: Tensor
    """Sum of both terms."""
    cls: Tensor
    """lambda1 * [CLS] term."""
    patch: Tensor
    """lambda2 * patch term."""


class iBOTLoss(nn.Module):
    """Cross-entropies of [CLS] tokens and of masked patches, with the EMA centres `center` and `center2`.

    Call `center_step` after each micro-batch's loss and `update_center` once per optimiser step. Neither the loss nor a
    selection moves a centre.

    Args:
        out_dim, patch_out_dim: numbers of prototypes, K and K2.
        ncrops: number of student views, including the two global ones, which come first.
        warmup_teacher_temp, teacher_temp: the teacher's [CLS] temperature at the start and after its warm-up.
        warmup_teacher_patch_temp, teacher_patch_temp: the same for patches, whose warm-up begins with masking.
        warmup_teacher_temp_epochs: length of both warm-ups.
        nepochs: epochs of the training.
        student_temp: the student's temperature, for both terms.
        center_momentum, center_momentum2: EMA momenta of the centres.
        lambda1, lambda2: weights of the [CLS] and the patch term.
        pred_start_epoch: first epoch with masks.

    Raises:
        ValueError: there are fewer than two views, or a warm-up is longer than the training.

    Source: iBOT (arXiv:2111.07832) Eqs. 2 and 3; bytedance/ibot main_ibot.py iBOTLoss.
    """

    center: Tensor
    center2: Tensor

    def __init__(
        self,
        out_dim: int,
        patch_out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_patch_temp: float,
        teacher_patch_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        *,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_momentum2: float = 0.9,
        lambda1: float = 1.0,
        lambda2: float = 1.0,
        pred_start_epoch: int = 0,
    ) -> None:
        super().__init__()
        if ncrops < NUM_GLOBAL_VIEWS:
            raise ValueError(f"iBOTLoss: ncrops is {ncrops}, but it includes the two global views")
        if warmup_teacher_temp_epochs + pred_start_epoch > nepochs:
            raise ValueError(
                f"iBOTLoss: the teacher temperatures warm up over {warmup_teacher_temp_epochs} epochs, for patches "
                f"from epoch {pred_start_epoch} on, but there are {nepochs} epochs"
            )
        self.ncrops = ncrops
        self.cls_temps = warmup_teacher_temp, teacher_temp
        self.patch_temps = warmup_teacher_patch_temp, teacher_patch_temp
        self.warmup_teacher_temp_epochs = warmup_teacher_temp_epochs
        self.pred_start_epoch = pred_start_epoch
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.center_momentum2 = center_momentum2
        self.lambda1 = lambda1
        self.lambda2 = lambda2
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.register_buffer("center2", torch.zeros(1, 1, patch_out_dim))
        self._means = GlobalMean(), GlobalMean()

    def teacher_temp(self, epoch: int) -> float:
        """Return the teacher's temperature for [CLS] tokens in an epoch, counted from 0."""
        return linear_then_constant(epoch, *self.cls_temps, self.warmup_teacher_temp_epochs)

    def teacher_patch_temp(self, epoch: int) -> float:
        """Return the teacher's temperature for patches in an epoch, counted from 0."""
        if epoch < self.pred_start_epoch:
            return self.patch_temps[0]
        return linear_then_constant(epoch - self.pred_start_epoch, *self.patch_temps, self.warmup_teacher_temp_epochs)

    def forward(
        self,
        student_cls: Tensor,
        student_patch: Tensor,
        teacher_cls: Tensor,
        teacher_patch: Tensor,
        masks: Tensor,
        epoch: int,
    ) -> Losses:
        """Compute both terms and their sum.

        The [CLS] term is the mean over the pairs of different views. The patch term is the mean over an image's masked
        patches (0 for an image without any), then over the images, then over the two global views.

        Args:
            student_cls: logits [ncrops * B, K], view after view; any float dtype, like all; computed in float32.
            student_patch: logits [R, K2] of the patches that `masks` marks, in its order.
            teacher_cls: logits [2 * B, K] of the two global views.
            teacher_patch: logits [R, K2] of the same patches, which the teacher sees unmasked.
            masks: [2 * B, N] bool, True for a masked patch.
            epoch: counted from 0; sets the teacher's temperatures.

        Raises:
            ValueError: shapes do not match; the message shows them.
        """
        if student_patch.shape != teacher_patch.shape or len(masks) != len(teacher_cls):
            raise ValueError(
                f"iBOTLoss: patches {list(student_patch.shape)} of the student, {list(teacher_patch.shape)} of the "
                f"teacher, masks {list(masks.shape)}, teacher's [CLS] {list(teacher_cls.shape)}"
            )
        targets = ((teacher_cls.detach().float() - self.center) / self.teacher_temp(epoch)).softmax(dim=-1)
        views = (student_cls.float() / self.student_temp).chunk(self.ncrops)
        cls = self.lambda1 * view_cross_entropy(targets.chunk(NUM_GLOBAL_VIEWS), views)

        target = ((teacher_patch.detach().float() - self.center2[0]) / self.teacher_patch_temp(epoch)).softmax(dim=-1)
        online = student_patch.float() / self.student_temp
        # Product and sum rather than a matrix product, which autocast would compute in half precision.
        per_patch = online.logsumexp(dim=-1) - (target * online).sum(dim=-1)  # [R]
        patch = self.lambda2 * (per_patch * patch_weights(masks)).sum() / len(masks)
        return Losses(cls + patch, cls, patch)

    @torch.no_grad()
    def center_step(self, teacher_cls: Tensor, teacher_patch_mean: Tensor) -> None:
        """Add a micro-batch's teacher outputs to the next update of the centres.

        Args:
            teacher_cls: logits [n, K].
            teacher_patch_mean: logits [n, K2], each the mean over all patches of a view, masked or not.
        """
        for mean, rows in zip(self._means, (teacher_cls, teacher_patch_mean), strict=True):
            mean.add(rows)

    @torch.no_grad()
    def update_center(self) -> None:
        """Move the centres towards the means of all outputs added since the last update, over all processes.

        Raises:
            ValueError: none were added.
        """
        cls, patch = self._means
        self.center.lerp_(cls.take(), 1 - self.center_momentum)
        self.center2.lerp_(patch.take()[None], 1 - self.center_momentum2)
