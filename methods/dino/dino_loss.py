"""DINO's objective: cross-entropy between teacher and student over pairs of different views, and its centre.

# B images per process, K prototypes
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hvp.common.engine.schedules import linear_then_constant

NUM_TEACHER_VIEWS = 2


class DINOLoss(nn.Module):
    """Cross-entropy of every student view against both teacher views, its own excepted; keeps the centre.

    With gradient accumulation call `center_step` after each micro-batch's loss, and `update_center` once per optimiser
    step. Neither the loss nor a selection moves the centre.

    Args:
        out_dim: prototypes K.
        ncrops: student views, the two global ones first.
        warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs: the teacher's temperature grows linearly from the
            first to the second over so many epochs, then stays.
        nepochs: epochs of the training.
        student_temp: the student's temperature.
        center_momentum: EMA momentum of the centre.

    Raises:
        ValueError: fewer than two views, or a warm-up longer than the training.

    Source: DINO (arXiv:2104.14294) Eqs. 3 and 4; facebookresearch/dino main_dino.py DINOLoss.
    """

    center: Tensor
    _center_sum: Tensor

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if ncrops < NUM_TEACHER_VIEWS:
            raise ValueError(f"DINOLoss: ncrops is {ncrops}, but the two global views are part of it")
        if warmup_teacher_temp_epochs > nepochs:
            raise ValueError(
                f"DINOLoss: the teacher temperature warms up over {warmup_teacher_temp_epochs} of {nepochs} epochs"
            )
        self.ncrops = ncrops
        self.warmup_teacher_temp = warmup_teacher_temp
        self.final_teacher_temp = teacher_temp
        self.warmup_teacher_temp_epochs = warmup_teacher_temp_epochs
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))
        # Between two optimiser steps only, so no part of a checkpoint.
        self.register_buffer("_center_sum", torch.zeros(1, out_dim), persistent=False)
        self._center_count = 0

    def teacher_temp(self, epoch: int) -> float:
        """The teacher's temperature in an epoch, counted from 0."""
        return linear_then_constant(
            epoch, self.warmup_teacher_temp, self.final_teacher_temp, self.warmup_teacher_temp_epochs
        )

    def forward(self, student_output: Tensor, teacher_output: Tensor, epoch: int) -> Tensor:
        """The mean over the pairs of different views of the batch's mean cross-entropy.

        The targets of a student view are summed first, so it costs one product, not one a pair: with n targets P_v,
        sum_t H(p_t, v) = n logsumexp(v) - <P_v, v>.

        Args:
            student_output: logits [ncrops * B, K], view after view; any float dtype, computed in float32.
            teacher_output: logits [2 * B, K] of the two global views.
            epoch: counted from 0; sets the teacher's temperature.

        Returns:
            Scalar float32, in nats.
        """
        if len(student_output) * NUM_TEACHER_VIEWS != len(teacher_output) * self.ncrops:
            raise ValueError(
                f"DINOLoss: student {list(student_output.shape)} and teacher {list(teacher_output.shape)}"
                f" are not {self.ncrops} and {NUM_TEACHER_VIEWS} views of the same images"
            )
        targets = self._targets(teacher_output.detach(), epoch)
        views = (student_output.float() / self.student_temp).chunk(self.ncrops)
        total = views[0].new_zeros(())
        for v, view in enumerate(views):
            if v < NUM_TEACHER_VIEWS:
                num_targets, target = 1, targets[1 - v]
            else:
                num_targets, target = 2, targets[2]
            # Product and sum rather than a matrix product, which autocast would compute in half precision.
            total = total + (num_targets * view.logsumexp(dim=-1) - (target * view).sum(dim=-1)).mean()
        return total / (NUM_TEACHER_VIEWS * (self.ncrops - 1))

    def _targets(self, teacher_output: Tensor, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's probabilities of either view, and their sum; each [B, K]."""
        logits = (teacher_output.float() - self.center) / self.teacher_temp(epoch)
        first, second = logits.softmax(dim=-1).chunk(NUM_TEACHER_VIEWS)
        return first, second, first + second

    @torch.no_grad()
    def center_step(self, teacher_output: Tensor) -> None:
        """Count a micro-batch's teacher logits [n, K] into the next update of the centre."""
        self._center_sum += teacher_output.sum(dim=0, keepdim=True, dtype=torch.float32)
        self._center_count += len(teacher_output)

    @torch.no_grad()
    def update_center(self) -> None:
        """Move the centre towards the mean of all teacher logits counted since the last update, over all processes.

        Raises:
            ValueError: none were counted.
        """
        if self._center_count == 0:
            raise ValueError("DINOLoss: update_center before any center_step")
        # Sum and count travel together: processes may hold different numbers of rows.
        total = torch.cat((self._center_sum, self._center_sum.new_full((1, 1), self._center_count)), dim=1)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        self.center.lerp_(total[:, :-1] / total[:, -1:], 1 - self.center_momentum)
        self._center_sum.zero_()
        self._center_count = 0
