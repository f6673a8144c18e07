"""iBOT's objective and head, beyond the few small fixtures of tests/parity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvp.common.networks.vision_transformer import build_vit
from hvp.methods.ibot.head import MultiCropWrapper, iBOTHead
from hvp.methods.ibot.ibot_loss import iBOTLoss, patch_weights
from tests.tensors import noise


def loss_of(ncrops: int = 2, **options: Any) -> iBOTLoss:
    return iBOTLoss(11, 7, ncrops, 0.04, 0.07, 0.05, 0.09, 5, 12, **options)


@settings(max_examples=40)
@given(
    batch=st.integers(1, 3),
    ncrops=st.integers(2, 4),
    patches=st.integers(1, 6),
    epoch=st.integers(0, 11),
    seed=st.integers(0, 2**16),
)
def test_loss_equals_the_formula_view_by_view(batch: int, ncrops: int, patches: int, epoch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    loss_fn = loss_of(ncrops, lambda1=0.7, lambda2=0.3, pred_start_epoch=2)
    loss_fn.center.copy_(torch.randn(1, 11, generator=generator))
    loss_fn.center2.copy_(torch.randn(1, 1, 7, generator=generator))
    student, teacher = (torch.randn(n * batch, 11, generator=generator) for n in (ncrops, 2))
    student_all, teacher_all = torch.randn(2, 2 * batch, patches, 7, generator=generator)
    masks = torch.rand(2 * batch, patches, generator=generator) < 0.5
    losses = loss_fn(student, student_all[masks], teacher, teacher_all[masks], masks, epoch)

    p = ((teacher.double() - loss_fn.center) / loss_fn.teacher_temp(epoch)).softmax(dim=1).chunk(2)
    views = (student.double() / 0.1).log_softmax(dim=1).chunk(ncrops)
    terms = [-(p[t] * view).sum(dim=1).mean() for t in range(2) for v, view in enumerate(views) if t != v]
    p = ((teacher_all.double() - loss_fn.center2) / loss_fn.teacher_patch_temp(epoch)).softmax(dim=2)
    per_patch = -(p * (student_all.double() / 0.1).log_softmax(dim=2)).sum(dim=2)  # [2 B, N]
    per_view = [
        row[mask].mean() if mask.any() else row.new_zeros(()) for row, mask in zip(per_patch, masks, strict=True)
    ]
    expected = 0.7 * torch.stack(terms).mean(), 0.3 * torch.stack(per_view).mean()
    torch.testing.assert_close(losses.cls, expected[0].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.patch, expected[1].float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(losses.loss, losses.cls + losses.patch)


def test_temperature_of_patches_warms_up_once_masks_begin() -> None:
    later, at_once = loss_of(pred_start_epoch=3), loss_of()
    assert [later.teacher_patch_temp(epoch) for epoch in range(4)] == [0.05] * 4
    assert [later.teacher_patch_temp(3 + e) for e in range(9)] == [at_once.teacher_patch_temp(e) for e in range(9)]
    assert at_once.teacher_patch_temp(4) == at_once.teacher_patch_temp(11) == 0.09
    assert [later.teacher_temp(e) for e in range(12)] == [at_once.teacher_temp(e) for e in range(12)]


def test_without_masks_the_cls_loss_is_left_and_patches_have_zero_gradients() -> None:
    loss_fn = loss_of()
    patch = noise(4, 7).requires_grad_()
    masks = torch.zeros(4, 6, dtype=torch.bool)
    losses = loss_fn(noise(4, 11), patch[:0], noise(4, 11, seed=1), noise(0, 7), masks, 0)
    losses.loss.backward()
    assert losses.patch == 0
    assert losses.loss == losses.cls
    assert patch.grad is not None
    assert not patch.grad.any()


def test_every_image_has_the_same_weight_however_many_patches_are_masked() -> None:
    masks = torch.tensor([[True, False, False, False], [True, True, True, True], [False] * 4])
    torch.testing.assert_close(patch_weights(masks), torch.tensor([1.0, 0.25, 0.25, 0.25, 0.25]))


def test_loss_is_computed_in_float32() -> None:
    loss_fn = loss_of()
    masks = torch.ones(4, 5, dtype=torch.bool)
    inputs = [noise(*shape, seed=i).bfloat16() for i, shape in enumerate([(4, 11), (20, 7), (4, 11), (20, 7)])]
    expected = loss_fn(*(x.float() for x in inputs), masks, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = loss_fn(*inputs, masks, 0)
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(losses, expected, strict=True))


def test_centers_over_two_micro_batches_are_those_of_the_whole() -> None:
    whole, halves = loss_of(), loss_of()
    cls, patch = noise(6, 11), noise(6, 7, seed=1)
    whole.center_step(cls, patch)
    for part in (slice(0, 2), slice(2, 6)):
        halves.center_step(cls[part], patch[part])
    for loss_fn in (whole, halves):
        loss_fn.update_center()
    torch.testing.assert_close(halves.center, whole.center)
    torch.testing.assert_close(halves.center2, whole.center2)
    torch.testing.assert_close(whole.center2, 0.1 * patch.mean(dim=0)[None, None])
    with pytest.raises(ValueError, match="no rows were counted"):
        whole.update_center()


def test_the_state_holds_the_centres_alone() -> None:
    assert list(loss_of().state_dict()) == ["center", "center2"]


def test_inconsistent_shapes_and_epochs_are_refused() -> None:
    with pytest.raises(ValueError, match="ncrops is 1"):
        loss_of(1)
    with pytest.raises(ValueError, match="from epoch 8 on, but there are 12 epochs"):
        loss_of(pred_start_epoch=8)
    with pytest.raises(ValueError, match=r"patches \[3, 7\] of the student, \[2, 7\] of the teacher"):
        loss_of()(noise(4, 11), noise(3, 7), noise(4, 11), noise(2, 7), torch.ones(4, 1, dtype=torch.bool), 0)
    with pytest.raises(ValueError, match="a shared head has 4 prototypes, but patch_out_dim is 5"):
        iBOTHead(3, 4, patch_out_dim=5, shared_head=True)


def network_of(**options: Any) -> MultiCropWrapper:
    torch.manual_seed(0)
    backbone = build_vit("vit_micro", patch_size=8, img_size=32, mask_token=True)
    assert backbone.masked_embed is not None
    torch.nn.init.normal_(backbone.masked_embed)
    head = iBOTHead(96, 9, patch_out_dim=5, shared_head=False, hidden_dim=16, bottleneck_dim=6, **options)
    return MultiCropWrapper(backbone, head)


@pytest.fixture
def network() -> MultiCropWrapper:
    return network_of()


def some_masks() -> Tensor:
    masks = torch.zeros(3, 16, dtype=torch.bool)
    masks[0, :4], masks[2, 7] = True, True
    return masks


def test_shared_head_is_one_layer() -> None:
    head = iBOTHead(3, 4, patch_out_dim=4, shared_head=True)
    assert head.last_layer2 is head.last_layer
    assert sum("last_layer" in name for name, _ in head.named_parameters()) == 2
    assert sum("last_layer" in name for name in head.state_dict()) == 4  # as in upstream's checkpoints


def test_only_masked_patches_go_through_the_head(network: MultiCropWrapper) -> None:
    x, masks = noise(3, 3, 32, 32), some_masks()
    rows = []
    network.head.mlp.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    cls, patch, _ = network([x, noise(4, 3, 16, 16)], masks)
    assert rows == [3 + 5, 4]
    all_cls, all_patches = network.embed(x, masks)
    torch.testing.assert_close(cls[:3], network.head.last_layer(all_cls))
    torch.testing.assert_close(patch, network.head.last_layer2(all_patches[masks]))
    assert cls.shape == (7, 9)


def test_batch_norm_sees_all_patches_and_all_cls_tokens() -> None:
    network = network_of(use_bn=True)
    rows: list[int] = []
    network.head.mlp.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    cls, patch, _ = network([noise(3, 3, 32, 32), noise(4, 3, 16, 16)], some_masks())
    assert sorted(rows) == [3, 4, 3 * 16]
    assert (cls.shape, patch.shape) == ((7, 9), (5, 5))


def test_the_student_does_not_see_masked_patches(network: MultiCropWrapper) -> None:
    x, masks = noise(3, 3, 32, 32), some_masks()
    changed = x.clone()
    changed[0, :, :8] += noise(3, 8, 32, seed=1)  # the first row of patches, which is masked in the first image
    assert not torch.allclose(network.backbone.patch_embed(x)[0], network.backbone.patch_embed(changed)[0])
    network.backbone.patch_embed.stages = torch.nn.Identity()  # a stem that sees no neighbours of a patch
    network.backbone.patch_embed.proj = torch.nn.Conv2d(3, 96, 8, 8)
    a, b = (network.backbone.all_tokens(images, masks) for images in (x, changed))
    assert torch.equal(a, b)
    assert not torch.allclose(network.backbone.all_tokens(x), network.backbone.all_tokens(changed))


def test_without_masks_the_mask_token_is_not_used(network: MultiCropWrapper) -> None:
    x = noise(2, 3, 32, 32)
    masks = torch.zeros(2, 16, dtype=torch.bool)
    assert torch.equal(network.backbone.all_tokens(x, masks), network.backbone.all_tokens(x))
    torch.testing.assert_close(network.backbone.all_tokens(x)[:, 0], network.backbone(x))


def test_every_parameter_has_a_gradient_even_without_masked_patches(network: MultiCropWrapper) -> None:
    """Data-parallel training requires this."""
    cls, patch, _ = network([noise(2, 3, 32, 32)], torch.zeros(2, 16, dtype=torch.bool))
    (cls.sum() + patch.sum()).backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
