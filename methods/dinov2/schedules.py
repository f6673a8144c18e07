"""All schedules of a run as functions of the step.

Source: facebookresearch/dinov2 dinov2/train/train.py build_schedulers, dinov2/utils/utils.py CosineScheduler.
"""

from __future__ import annotations

from dataclasses import dataclass

from hvp.common.errors import UserError
from hvp.common.training.schedules import cosine, linear_then_constant, warmup_cosine
from hvp.methods.dinov2.config import DINOv2Config


@dataclass(frozen=True)
class Schedules:
    """Values that change from step to step; steps are counted from 0.

    Args:
        config: the configuration.
        total_steps: optimiser steps of the run.
        steps_per_epoch: steps of one pass over the images, the unit of warm-ups unless `optim.epoch_length` is set.

    Raises:
        UserError: the learning rate's warm-up is longer than the run.
    """

    config: DINOv2Config
    total_steps: int
    steps_per_epoch: int

    def __post_init__(self) -> None:
        warmup = self._steps(self.config.optim.warmup_epochs)
        if warmup > self.total_steps:
            raise UserError(
                f"optim.warmup_epochs = {self.config.optim.warmup_epochs} are {warmup} steps, but the run has "
                f"{self.total_steps}.\n    Lower it, or train longer (train.epochs)."
            )

    def _steps(self, epochs: int) -> int:
        return epochs * (self.config.optim.epoch_length or self.steps_per_epoch)

    def lr(self, step: int) -> float:
        """Learning rate of all parameters but the last layers, before the groups' multipliers."""
        return warmup_cosine(
            step,
            base=self.config.peak_lr,
            final=self.config.optim.min_lr,
            total_steps=self.total_steps,
            warmup_steps=self._steps(self.config.optim.warmup_epochs),
        )

    def last_layer_lr(self, step: int) -> float:
        """Learning rate of the last layers: 0 while they are frozen."""
        return 0.0 if step < self._steps(self.config.optim.freeze_last_layer) else self.lr(step)

    def weight_decay(self, step: int) -> float:
        """Weight decay, before the groups' multipliers."""
        optim = self.config.optim
        return cosine(step, base=optim.weight_decay, final=optim.weight_decay_end, total_steps=self.total_steps)

    def momentum(self, step: int) -> float:
        """EMA momentum of the teacher."""
        teacher = self.config.teacher
        return cosine(
            step,
            base=teacher.momentum_teacher,
            final=teacher.final_momentum_teacher,
            total_steps=self.total_steps,
        )

    def teacher_temp(self, step: int) -> float:
        """Temperature of the teacher."""
        teacher = self.config.teacher
        return linear_then_constant(
            step,
            teacher.warmup_teacher_temp,
            teacher.teacher_temp,
            self._steps(teacher.warmup_teacher_temp_epochs),
        )
