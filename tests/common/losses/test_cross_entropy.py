"""The pair-loss matrix equals its formula, keeps views apart, and never holds all logits at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hvp.common.losses.cross_entropy import pair_cross_entropies
from hvp.common.networks.heads import WeightNormLinear


def slow(teacher: Tensor, student: Tensor, center: Tensor, teacher_temp: float, student_temp: float) -> Tensor:
    """- <softmax((t - center) / teacher_temp), log_softmax(s / student_temp)>, pair by pair in float64."""
    teacher, student, center = teacher.double(), student.double(), center.double().reshape(-1)
    losses = torch.empty(teacher.shape[1], len(teacher), len(student), dtype=torch.float64)
    for t, target in enumerate(teacher):
        for v, view in enumerate(student):
            p = ((target - center) / teacher_temp).softmax(dim=-1)
            losses[:, t, v] = -(p * (view / student_temp).log_softmax(dim=-1)).sum(dim=-1)
    return losses


def inputs(images: int = 3, targets: int = 2, views: int = 5, prototypes: int = 7, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(targets, images, prototypes), (views, images, prototypes), (1, prototypes)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@settings(max_examples=60)
@given(
    images=st.integers(1, 5),
    targets=st.integers(1, 4),
    views=st.integers(1, 6),
    prototypes=st.integers(1, 40),
    teacher_temp=st.floats(0.02, 2.0),
    student_temp=st.floats(0.05, 2.0),
    images_at_once=st.one_of(st.none(), st.integers(1, 6)),
    seed=st.integers(0, 2**16),
)
def test_equals_the_formula(
    images: int,
    targets: int,
    views: int,
    prototypes: int,
    teacher_temp: float,
    student_temp: float,
    images_at_once: int | None,
    seed: int,
) -> None:
    teacher, student, center = inputs(images, targets, views, prototypes, seed)
    losses = pair_cross_entropies(teacher, student, center, teacher_temp, student_temp, images_at_once=images_at_once)
    assert losses.dtype == torch.float32
    expected = slow(teacher, student, center, teacher_temp, student_temp).float()
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


def test_inputs_stay_unchanged_and_no_graph_is_built() -> None:
    teacher, student, center = inputs()
    student.requires_grad_()
    before = [teacher.clone(), student.detach().clone(), center.clone()]
    # A student temperature of 1 must not turn the caller's logits into the working buffer.
    assert not pair_cross_entropies(teacher, student, center, 0.04, 1.0).requires_grad
    assert all(torch.equal(a, b) for a, b in zip([teacher, student, center], before, strict=True))


@pytest.mark.parametrize("images_at_once", [None, 1, 2])
def test_prototypes_are_applied_to_embeddings(images_at_once: int | None) -> None:
    teacher, _, center = inputs(images=5, prototypes=11)
    layer = WeightNormLinear(4, 11, train_gain=True)
    with torch.no_grad():
        layer.weight_g.uniform_(0.5, 2.0)
    embeddings = torch.nn.functional.normalize(torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(1)), dim=-1)
    losses = pair_cross_entropies(teacher, embeddings, center, 0.07, 0.1, layer.frozen(), images_at_once)
    with torch.no_grad():
        expected = slow(teacher, layer(embeddings), center, 0.07, 0.1).float()
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    teacher, student, center = inputs(prototypes=50)
    student = student * 9000  # overflows float16 when divided by the temperature
    teacher, student = teacher.to(dtype), student.to(dtype)
    losses = pair_cross_entropies(teacher, student, center, 0.04, 0.1)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, pair_cross_entropies(teacher.float(), student.float(), center, 0.04, 0.1))
    assert losses.isfinite().all()


def test_autocast_does_not_change_the_losses() -> None:
    teacher, student, center = inputs(prototypes=50)
    expected = pair_cross_entropies(teacher, student, center, 0.04, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pair_cross_entropies(teacher, student, center, 0.04, 0.1), expected)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_logits(scale: float) -> None:
    teacher, student, center = inputs(prototypes=30)
    teacher, student = teacher * scale, student * scale
    losses = pair_cross_entropies(teacher, student, center, 0.04, 0.1)
    torch.testing.assert_close(losses, slow(teacher, student, center, 0.04, 0.1).float(), rtol=1e-5, atol=scale * 1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_only_entries_of_a_bad_view_are_not_finite(value: float) -> None:
    teacher, student, center = inputs()
    expected = pair_cross_entropies(teacher, student, center, 0.5, 0.5)

    bad = student.clone()
    bad[3, 1, 2] = value
    losses = pair_cross_entropies(teacher, bad, center, 0.5, 0.5)
    others = torch.ones_like(losses, dtype=torch.bool)
    others[1, :, 3] = False
    assert not losses[~others].isfinite().any()
    assert torch.equal(losses[others], expected[others])

    bad = teacher.clone()
    bad[1, 2, 4] = value
    losses = pair_cross_entropies(bad, student, center, 0.5, 0.5)
    others = torch.ones_like(losses, dtype=torch.bool)
    others[2, 1, :] = False
    assert bool(losses[~others].isfinite().all()) == (value == float("-inf"))  # -inf rules out a prototype
    assert torch.equal(losses[others], expected[others])


class LargestTensor(TorchDispatchMode):
    """Track the largest number of elements of any tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        created = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x._base is None]
        self.numel = max([self.numel, *(x.numel() for x in created)])
        return out


@pytest.mark.parametrize("from_embeddings", [False, True])
def test_logits_of_only_a_few_images_exist_at_once(from_embeddings: bool) -> None:
    views, prototypes = 5, 64
    teacher, student, center = inputs(images=8, views=views, prototypes=prototypes)
    layer = WeightNormLinear(3, prototypes, train_gain=False)
    embeddings = torch.randn(views, 8, 3)
    with LargestTensor() as largest:
        if from_embeddings:
            pair_cross_entropies(teacher, embeddings, center, 0.04, 0.1, layer.frozen(), images_at_once=2)
        else:
            pair_cross_entropies(teacher, student, center, 0.04, 0.1, images_at_once=2)
    assert largest.numel == 2 * views * prototypes


def test_shapes_that_do_not_fit() -> None:
    teacher, student, center = inputs()
    with pytest.raises(ValueError, match=r"\[2, 3, 7\], student \[5, 2, 7\]"):
        pair_cross_entropies(teacher, student[:, :2], center, 0.04, 0.1)
    with pytest.raises(ValueError, match=r"center \[1, 6\]"):
        pair_cross_entropies(teacher, student, center[:, :6], 0.04, 0.1)
    with pytest.raises(ValueError, match="7 prototypes"):
        pair_cross_entropies(teacher, student[..., :6], center, 0.04, 0.1)
