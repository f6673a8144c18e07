"""The moving average of parameters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hvp.common.training.ema import update_ema


@given(momentum=st.floats(0, 1), seed=st.integers(0, 2**16))
def test_equals_the_formula(momentum: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(), (3,), (2, 4), (0,)]
    teacher = [torch.randn(shape, generator=generator) for shape in shapes]
    student = [torch.randn(shape, generator=generator) for shape in shapes]
    expected = [momentum * t + (1 - momentum) * s for t, s in zip(teacher, student, strict=True)]
    kept = [s.clone() for s in student]
    update_ema(teacher, student, momentum)
    for ours, theirs in zip(teacher, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(student, kept, strict=True))


def test_momentum_of_zero_and_one_is_exact() -> None:
    teacher, student = [torch.randn(50)], [torch.randn(50)]
    before = teacher[0].clone()
    update_ema(teacher, student, 1.0)
    assert torch.equal(teacher[0], before)
    update_ema(teacher, student, 0.0)
    assert torch.equal(teacher[0], student[0])


def test_parameters_of_modules_move_and_buffers_stay() -> None:
    teacher, student = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    with torch.no_grad():
        student.weight.fill_(3.0)
        student.state_dict()["running_mean"].fill_(5.0)
    update_ema(teacher.parameters(), student.parameters(), 0.5)
    assert teacher.weight.tolist() == [2.0, 2.0, 2.0]
    assert teacher.state_dict()["running_mean"].tolist() == [0.0, 0.0, 0.0]
    assert teacher.weight.grad_fn is None


def test_tensors_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="the teacher's 1 tensors do not match the student's 2"):
        update_ema([torch.zeros(2)], [torch.zeros(2), torch.zeros(3)], 0.9)
    with pytest.raises(ValueError, match="do not match"):
        update_ema([torch.zeros(2)], [torch.zeros(3)], 0.9)
