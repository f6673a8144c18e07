"""Schedules as pure functions of the step, so a resumed run has the same values without saving any state."""

from __future__ import annotations

import math
from collections.abc import Callable

from hvp.common.config.sections import TeacherOptimConfig


def cosine(step: int, *, base: float, final: float, total_steps: int) -> float:
    """Half a cosine from `base` at step 0 to `final` at `total_steps` and after.

    Raises:
        ValueError: the step or length is negative.
    """
    if step < 0 or total_steps < 0:
        raise ValueError(f"cosine: step {step} of {total_steps}")
    if step >= total_steps:
        return final
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * step / total_steps))


def warmup_cosine(
    step: int, *, base: float, final: float, total_steps: int, warmup_steps: int = 0, start: float = 0.0
) -> float:
    """Linear warm-up from `start` to `base`, then half a cosine to `final`.

    The warm-up reaches both ends, so the first step has `start` and the cosine begins by repeating `base`. The last
    step falls one short of `final`, the value from `total_steps` on.

    Args:
        step: counted from 0.
        base, final: values after the warm-up and at the end.
        total_steps, warmup_steps: lengths in steps; the first includes the second.
        start: value at step 0 if there is a warm-up.

    Raises:
        ValueError: the step is negative, or the warm-up is longer than the whole schedule.

    Source: facebookresearch/dino utils.py cosine_scheduler.
    """
    if step < 0 or not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_cosine: step {step}, warm-up of {warmup_steps} in {total_steps} steps")
    if step < warmup_steps:
        return _linear(step, start, base, warmup_steps)
    return cosine(step - warmup_steps, base=base, final=final, total_steps=total_steps - warmup_steps)


def student_with_teacher(
    optim: TeacherOptimConfig, peak_lr: float, momentum: float, total_steps: int, steps_per_epoch: int
) -> Callable[[int], tuple[float, float, float]]:
    """Return the schedules of learning rate, weight decay and teacher momentum as one function of the step.

    Args:
        optim: ends and warm-up of the schedules.
        peak_lr: learning rate after the warm-up, scaled by the batch size.
        momentum: teacher momentum at the start; 1 at the end.
        total_steps, steps_per_epoch: lengths in steps.

    Source: facebookresearch/dino main_dino.py train_dino.
    """

    def at(step: int) -> tuple[float, float, float]:
        warmup = optim.warmup_epochs * steps_per_epoch
        return (
            warmup_cosine(step, base=peak_lr, final=optim.min_lr, total_steps=total_steps, warmup_steps=warmup),
            warmup_cosine(step, base=optim.weight_decay, final=optim.weight_decay_end, total_steps=total_steps),
            warmup_cosine(step, base=momentum, final=1.0, total_steps=total_steps),
        )

    return at


def linear_then_constant(step: int, start: float, end: float, warmup_steps: int) -> float:
    """Linear ramp from `start` to `end` over `warmup_steps` steps, reaching both, then constant `end`.

    Args:
        step: counted from 0; an epoch, for DINO's teacher temperature.
        start, end: first and last value of the ramp.
        warmup_steps: length of the ramp; with 0 the value is always `end`, with 1 the first value is `start`.

    Raises:
        ValueError: the step or length is negative.

    Source: facebookresearch/dino main_dino.py DINOLoss.teacher_temp_schedule.
    """
    if step < 0 or warmup_steps < 0:
        raise ValueError(f"linear_then_constant: step {step}, warm-up of {warmup_steps} steps")
    return _linear(step, start, end, warmup_steps) if step < warmup_steps else end


def _linear(step: int, first: float, last: float, num_steps: int) -> float:
    """Value `step` of `num_steps` equally spaced values from `first` to `last`; a single value is `first`."""
    return first + (last - first) * step / max(num_steps - 1, 1)
