"""iBOT's pair-loss matrix against the objective itself, without unmasked patches and without all logits at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvp.common.hardviews import Slots, combination_losses
from hvp.common.losses.cross_entropy import masked_patch_losses
from hvp.common.networks.heads import WeightNormLinear
from hvp.methods.ibot.ibot_loss import iBOTLoss
from hvp.methods.ibot.score import Prototypes, loss_matrix
from tests.tensors import LargestTensor, noise

K, K2, DIM = 11, 7, 4


def loss_of(ncrops: int = 2) -> iBOTLoss:
    loss_fn = iBOTLoss(K, K2, ncrops, 0.04, 0.07, 0.05, 0.09, 5, 12, lambda1=0.7, lambda2=0.3)
    loss_fn.center.copy_(noise(1, K, seed=100))
    loss_fn.center2.copy_(noise(1, 1, K2, seed=101))
    return loss_fn


def some_masks(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4


@settings(max_examples=30)
@given(
    batch=st.integers(1, 3),
    num_local=st.integers(0, 3),
    any_pair=st.booleans(),
    epoch=st.integers(0, 11),
    seed=st.integers(0, 2**16),
)
def test_a_combination_costs_the_objective_of_its_views(
    batch: int, num_local: int, any_pair: bool, epoch: int, seed: int
) -> None:
    """For every combination and image, the cost is the loss of a batch of one with those views and their masks."""
    kept_local = (num_local + 1) // 2
    loss_fn, patches = loss_of(2 + kept_local), 5
    teacher_cls, student_cls = noise(4, batch, K, seed=seed), noise(4 + num_local, batch, K, seed=seed + 1)
    teacher_patch, student_patch = noise(2, 4, batch, patches, K2, seed=seed + 2)
    masks = some_masks(4, batch, patches, seed=seed)
    losses = loss_matrix(teacher_cls, teacher_patch[masks], student_cls, student_patch[masks], masks, loss_fn, epoch)
    globals_ = ((4,), (2,)) if any_pair else ((2, 2), (1, 1))
    local = ((num_local,), (kept_local,)) if num_local else ((), ())
    slots = Slots.from_counts(*(a + b for a, b in zip(globals_, local, strict=True)), diagonal=True)
    combinations = slots.all_combinations()
    ours = combination_losses(losses, combinations, slots)  # [B, C]
    for number, combination in enumerate(combinations.tolist()):
        first_two = combination[:2]
        for b in range(batch):
            mask = masks[first_two, b]
            expected = loss_fn(
                student_cls[combination, b],
                student_patch[first_two, b][mask],
                teacher_cls[first_two, b],
                teacher_patch[first_two, b][mask],
                mask,
                epoch,
            ).loss
            torch.testing.assert_close(ours[b, number], expected, rtol=1e-5, atol=1e-5)


def test_unmasked_views_have_no_patch_loss_and_unmasked_patches_no_influence() -> None:
    loss_fn, masks = loss_of(), some_masks(4, 3, 5)
    masks[1, 2] = False
    cls, teacher_patch, student_patch = noise(4, 3, K), noise(4, 3, 5, K2, seed=1), noise(4, 3, 5, K2, seed=2)
    losses = loss_matrix(cls, teacher_patch[masks], cls, student_patch[masks], masks, loss_fn, 0)
    assert losses[2, 1, 1] == 0
    masked = masks.any(dim=2).T
    assert (losses.diagonal(dim1=1, dim2=2)[masked] > 0).all()
    for patches in (teacher_patch, student_patch):
        patches[~masks] += 100 * noise(int((~masks).sum()), K2, seed=3)
    assert torch.equal(losses, loss_matrix(cls, teacher_patch[masks], cls, student_patch[masks], masks, loss_fn, 0))
    student_patch[0, 0, masks[0, 0].nonzero()[0]] += 1
    changed = losses != loss_matrix(cls, teacher_patch[masks], cls, student_patch[masks], masks, loss_fn, 0)
    assert changed.nonzero().tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("patches_at_once", [None, 1, 3])
def test_prototypes_are_applied_to_embeddings(patches_at_once: int | None) -> None:
    masks = some_masks(4, 6)
    layers = [WeightNormLinear(DIM, K2, train_gain=True) for _ in range(2)]
    teacher, student = noise(2, int(masks.sum()), DIM)
    with torch.no_grad():
        for layer in layers:
            layer.weight_g.uniform_(0.5, 2.0)
        logits = layers[0](teacher), layers[1](student)
    center2 = noise(1, 1, K2)
    expected = masked_patch_losses(*logits, masks, center2, 0.07, 0.1)
    losses = masked_patch_losses(
        teacher, student, masks, center2, 0.07, 0.1, (layers[0].frozen(), layers[1].frozen()), patches_at_once
    )
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


def test_matrix_from_embeddings_and_prototypes() -> None:
    loss_fn, masks = loss_of(), some_masks(4, 3, 5)
    layers = Prototypes(*(WeightNormLinear(DIM, out, train_gain=False) for out in (K, K2, K2)))
    teacher_cls, student_cls = noise(4, 3, K), noise(6, 3, DIM, seed=1)
    teacher_patch, student_patch = noise(2, int(masks.sum()), DIM, seed=2)
    losses = loss_matrix(teacher_cls, teacher_patch, student_cls, student_patch, masks, loss_fn, 3, layers)
    logits = layers.teacher_patch(teacher_patch), layers.student_cls(student_cls), layers.student_patch(student_patch)
    expected = loss_matrix(teacher_cls, logits[0], logits[1], logits[2], masks, loss_fn, 3)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


def test_inputs_stay_as_they_are_and_no_graph_is_built() -> None:
    masks = some_masks(4, 6)
    teacher, student = noise(2, int(masks.sum()), K2)
    student.requires_grad_()
    before = teacher.clone(), student.detach().clone()
    # A temperature of 1 must not make the computation work in place on the caller's logits.
    assert not masked_patch_losses(teacher, student, masks, torch.zeros(K2), 1.0, 1.0).requires_grad
    assert torch.equal(teacher, before[0])
    assert torch.equal(student, before[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    masks = some_masks(4, 6)
    teacher, student = (9000 * noise(2, int(masks.sum()), K2)).to(dtype)
    expected = masked_patch_losses(teacher.float(), student.float(), masks, torch.zeros(K2), 0.04, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = masked_patch_losses(teacher, student, masks, torch.zeros(K2), 0.04, 0.1)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, expected)
    assert losses.isfinite().all()


def test_a_bad_patch_spoils_its_own_image_alone() -> None:
    masks = torch.ones(3, 2, dtype=torch.bool)
    teacher, student = noise(2, 6, K2)
    expected = masked_patch_losses(teacher, student, masks, torch.zeros(K2), 0.5, 0.5)
    for patches in (teacher, student):
        bad = patches.clone()
        bad[3, 1] = float("nan")  # the second image's second patch
        pair = (bad, student) if patches is teacher else (teacher, bad)
        losses = masked_patch_losses(*pair, masks, torch.zeros(K2), 0.5, 0.5)
        assert losses.isnan().tolist() == [False, True, False]
        assert torch.equal(losses[[0, 2]], expected[[0, 2]])


def test_only_the_logits_of_a_few_patches_exist_at_once() -> None:
    masks, prototypes = torch.ones(8, 9, dtype=torch.bool), 64
    teacher, student = noise(2, 72, 3)
    layers = tuple(WeightNormLinear(3, prototypes, train_gain=False).frozen() for _ in range(2))
    with LargestTensor() as largest:
        masked_patch_losses(teacher, student, masks, torch.zeros(prototypes), 0.04, 0.1, (layers[0], layers[1]), 6)
    assert largest.numel == 6 * prototypes


def test_inconsistent_shapes_are_refused() -> None:
    masks = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"teacher \[6, 7\], student \[5, 7\], but 6 patches are masked"):
        masked_patch_losses(noise(6, K2), noise(5, K2), masks, torch.zeros(K2), 0.04, 0.1)
