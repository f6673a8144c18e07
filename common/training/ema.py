"""Exponential moving average of parameters: the teacher of DINO, iBOT and DINOv2, the momentum encoder of MoCo v3."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


@torch.no_grad()
def update_ema(teacher: Iterable[Tensor], student: Iterable[Tensor], momentum: float) -> None:
    """Move `teacher` towards `student`, in place: t = momentum * t + (1 - momentum) * s.

    Buffers are not averaged: the teacher keeps its own batch-norm statistics, as in the upstream trainers.

    Args:
        teacher, student: parameters in the same order, such as `module.parameters()` of two equal modules.
        momentum: in [0, 1]; 1 leaves the teacher unchanged.

    Raises:
        ValueError: the two differ in number or shape.
    """
    targets, sources = list(teacher), list(student)
    if [t.shape for t in targets] != [s.shape for s in sources]:
        raise ValueError(
            f"update_ema: the teacher's {len(targets)} tensors do not match the student's {len(sources)} in number and "
            "shape"
        )
    if targets:
        get_ema_multi_avg_fn(momentum)(targets, sources, None)
