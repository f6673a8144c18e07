"""DINOv2's targets and objective beyond the fixtures of tests/parity: written-out formulas, several processes, and
batches without a masked patch."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hvp.common.training.distributed import World
from hvp.methods.dinov2.losses import DINOv2Loss, TeacherCenter, koleo_loss, sinkhorn_center
from tests.processes import Report, in_two_processes
from tests.tensors import noise

K, K2, DIM, PATCHES = 11, 7, 5, 6


def sinkhorn_written_out(logits: Tensor, temp: float, iterations: int = 3) -> Tensor:
    """Return the result of the algorithm itself, on the matrix of assignments, in float64."""
    q = (logits.double() / temp).exp()
    for _ in range(iterations):
        q = q / q.sum(dim=0, keepdim=True)  # every prototype is used as often as the others
        q = q / q.sum(dim=1, keepdim=True)  # every row is a distribution
    return q.float()


@given(rows=st.integers(1, 20), seed=st.integers(0, 2**16), temp=st.sampled_from([0.04, 0.07, 1.0]))
def test_sinkhorn_knopp_equals_subtracting_a_centre(rows: int, seed: int, temp: float) -> None:
    logits = noise(rows, K, seed=seed).clamp(-1, 1)
    targets = ((logits - sinkhorn_center(logits, temp)) / temp).softmax(dim=-1)
    torch.testing.assert_close(targets, sinkhorn_written_out(logits, temp), rtol=1e-4, atol=1e-6)


def test_large_logits_do_not_overflow() -> None:
    logits = 100 * noise(8, K)
    assert sinkhorn_center(logits, 0.04).isfinite().all()


def test_sinkhorn_knopp_spreads_targets_over_the_prototypes() -> None:
    logits = noise(44, K)
    logits[:, 0] += 3  # all rows prefer the same prototype
    balanced = TeacherCenter(1, K, centering="sinkhorn_knopp", momentum=0.9)
    assert (balanced.targets(logits, 0.5).mean(dim=0) - 1 / K).abs().max() < 0.02
    assert logits.softmax(dim=-1).mean(dim=0)[0] > 0.5
    assert not balanced.center.any()


def _sinkhorn_of_a_share(world: World, report: Report) -> None:
    logits = noise(9, K)
    # unequal numbers of rows, and none in one process
    for share in ([slice(0, 6), slice(6, 9)], [slice(0, 9), slice(0, 0)]):
        report(sinkhorn_center(logits[share[world.rank]], 0.07))
    center = TeacherCenter(1, 1, K, centering="centering", momentum=0.5)
    center.step(logits[[slice(0, 6), slice(6, 9)][world.rank]])
    center.update()
    report(center.center)


def test_processes_balance_and_centre_together(tmp_path) -> None:
    expected = sinkhorn_center(noise(9, K), 0.07)
    for *balanced, centre in in_two_processes(_sinkhorn_of_a_share, tmp_path):
        assert len(balanced) == 2
        for found in balanced:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(centre, 0.5 * noise(9, K).mean(dim=0).reshape(1, 1, K))


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_a_batch_without_a_masked_patch(centering: Any) -> None:
    loss_fn = DINOv2Loss(K, K2, 3, centering=centering)
    masks = torch.zeros(8, PATCHES, dtype=torch.bool)
    patches = noise(0, K2).requires_grad_()
    losses = loss_fn(noise(12, K), patches, noise(8, DIM), noise(8, K), noise(0, K2), masks, 0.05)
    assert losses.ibot == 0
    assert losses.loss.isfinite()
    before = loss_fn.ibot_patch_loss.center.clone()
    loss_fn.center_step(noise(8, K), noise(0, K2))
    loss_fn.update_center()
    assert torch.equal(loss_fn.ibot_patch_loss.center, before)
    assert loss_fn.dino_loss.center.any() == (centering == "centering")


def test_weights_scale_their_terms() -> None:
    masks = torch.rand(8, PATCHES, generator=torch.Generator().manual_seed(0)) < 0.5
    rows = int(masks.sum())
    inputs = noise(16, K), noise(rows, K2), noise(8, DIM), noise(8, K, seed=1), noise(rows, K2, seed=1), masks, 0.05
    plain = DINOv2Loss(K, K2, 4, centering="centering", koleo_weight=1.0)(*inputs)
    weighted = DINOv2Loss(K, K2, 4, centering="centering", dino_weight=2, koleo_weight=3, ibot_weight=5)(*inputs)
    for term, weight in {"dino_global": 2, "dino_local": 2, "koleo": 3, "ibot": 5}.items():
        torch.testing.assert_close(getattr(weighted, term), weight * getattr(plain, term))
    torch.testing.assert_close(weighted.loss, sum(weighted[1:]))
    torch.testing.assert_close(plain.koleo, koleo_loss(inputs[2][:4]) + koleo_loss(inputs[2][4:]))


def test_koleo_pushes_nearest_neighbours_apart_and_needs_two_rows() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0]], requires_grad=True)
    koleo_loss(x).backward()
    assert x.grad is not None
    assert x.grad[0, 1] > 0 > x.grad[1, 1], "a step against the gradient moves them apart"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert koleo_loss(x.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="features"):
        koleo_loss(x[:1])


def test_inconsistent_shapes_are_refused() -> None:
    masks = torch.zeros(8, PATCHES, dtype=torch.bool)
    with pytest.raises(ValueError, match="DINOv2Loss"):
        DINOv2Loss(K, K2, 2, centering="centering")(
            noise(8, K), noise(3, K2), noise(8, DIM), noise(8, K), noise(2, K2), masks, 0.05
        )
