"""DINO's objective: cross-entropy between teacher and student over pairs of different views, and the centre.

# B images per process, K prototypes
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hvp.common.losses.center import GlobalMean
from hvp.common.losses.cross_entropy import view_cross_entropy
from hvp.common.training.schedules import linear_then_constant

NUM_TEACHER_VIEWS = 2


class DINOLoss(nn.Module):
    """Cross-entropy of every student view against both teacher views except its own, with an EMA centre.

    Call `center_step` after each micro-batch's loss and `update_center` once per optimiser step. Neither the loss nor a
    selection moves the centre.

    Args:
        out_dim: number of prototypes, K.
        ncrops: number of student views, including the two global ones, which come first.
        warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs: the teacher's temperature goes linearly from the
            first to the second over this many epochs, then stays constant.
        nepochs: epochs of the training.
        student_temp: the student's temperature.
        center_momentum: EMA momentum of the centre.

    Raises:
        ValueError: there are fewer than two views, or the warm-up is longer than the training.

    Source: DINO (arXiv:2104.14294) Eqs. 3 and 4; facebookresearch/dino main_dino.py DINOLoss.
    """

    center: Tensor

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
            raise ValueError(f"DINOLoss: ncrops is {ncrops}, but it includes the two global views")
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
        self._teacher_mean = GlobalMean()

    def teacher_temp(self, epoch: int) -> float:
        """Return the teacher's temperature in an epoch, counted from 0."""
        return linear_then_constant(
            epoch, self.warmup_teacher_temp, self.final_teacher_temp, self.warmup_teacher_temp_epochs
        )

    def forward(self, student_output: Tensor, teacher_output: Tensor, epoch: int) -> Tensor:
        """Compute the mean cross-entropy over the batch and over all pairs of different views.

        Args:
            student_output: logits [ncrops * B, K], view after view; any float dtype, computed in float32.
            teacher_output: logits [2 * B, K] of the two global views.
            epoch: counted from 0; sets the teacher's temperature.

        Returns:
            Scalar float32, in nats.

        Raises:
            ValueError: the outputs do not have the right numbers of views; the message shows both shapes.
        """
        if len(student_output) * NUM_TEACHER_VIEWS != len(teacher_output) * self.ncrops:
            raise ValueError(
                f"DINOLoss: student {list(student_output.shape)} and teacher {list(teacher_output.shape)}"
                f" are not {self.ncrops} and {NUM_TEACHER_VIEWS} views of the same images"
            )
        logits = (teacher_output.detach().float() - self.center) / self.teacher_temp(epoch)
        views = (student_output.float() / self.student_temp).chunk(self.ncrops)
        return view_cross_entropy(logits.softmax(dim=-1).chunk(NUM_TEACHER_VIEWS), views)

    @torch.no_grad()
    def center_step(self, teacher_output: Tensor) -> None:
        """Add a micro-batch's teacher logits [n, K] to the next update of the centre."""
        self._teacher_mean.add(teacher_output)

    @torch.no_grad()
    def update_center(self) -> None:
        """Move the centre towards the mean of all teacher logits added since the last update, over all processes.

        Raises:
            ValueError: none were added.
        """
        self.center.lerp_(self._teacher_mean.take(), 1 - self.center_momentum)
