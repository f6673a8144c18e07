"""NT-Xent against its formula: the objective and its pair-loss matrix, in one and two processes."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hvp.common.hardviews import Slots, combination_losses, select
from hvp.common.training.distributed import World, data_parallel
from hvp.methods.simclr.nt_xent_loss import nt_xent_loss
from hvp.methods.simclr.score import pair_nt_xent
from tests.processes import Report, in_two_processes
from tests.tensors import LargestTensor, noise


def projections(views: int = 4, images: int = 6, dim: int = 5, seed: int = 0) -> Tensor:
    return noise(views, images, dim, seed=seed)


def slow(z: Tensor, temperature: float) -> Tensor:
    """Return [B, N, N] in float64: for anchor (v, i) and partner (t, i), the cross-entropy over all views t and v."""
    z = torch.nn.functional.normalize(z.double(), dim=-1)
    num_views, num_images, _ = z.shape
    losses = torch.zeros(num_images, num_views, num_views, dtype=torch.float64)
    for i in range(num_images):
        for t, v in permutations(range(num_views), 2):
            others = [(view, j) for view in (t, v) for j in range(num_images) if (view, j) != (v, i)]
            terms = [math.exp(z[v, i].dot(z[view, j]).item() / temperature) for view, j in others]
            losses[i, t, v] = math.log(sum(terms)) - z[v, i].dot(z[t, i]).item() / temperature
    return losses


SHAPES = {
    "views": st.integers(2, 5),
    "images": st.integers(1, 6),
    "dim": st.integers(1, 8),
    "temperature": st.floats(0.05, 2.0),
    "seed": st.integers(0, 2**16),
}


@settings(max_examples=50)
@given(**SHAPES, at_once=st.one_of(st.none(), st.integers(1, 200)))
def test_pair_losses_equal_the_formula(
    views: int, images: int, dim: int, temperature: float, seed: int, at_once: int | None
) -> None:
    z = projections(views, images, dim, seed)
    losses = pair_nt_xent(z, temperature, similarities_at_once=at_once)
    assert losses.dtype == torch.float32
    # logits reach 20, whose float32 are 2e-6 apart
    torch.testing.assert_close(losses, slow(z, temperature).float(), rtol=1e-5, atol=2e-5)


@settings(max_examples=50)
@given(**SHAPES)
def test_the_mean_loss_of_a_pair_is_its_objective(
    views: int, images: int, dim: int, temperature: float, seed: int
) -> None:
    z = projections(views, images, dim, seed)
    slots = Slots.from_counts((views,), (2,))
    pairs = slots.all_combinations()
    costs = combination_losses(pair_nt_xent(z, temperature), pairs, slots).mean(dim=0)
    for cost, pair in zip(costs, pairs, strict=True):
        torch.testing.assert_close(cost, nt_xent_loss(z[pair], temperature), rtol=1e-5, atol=2e-5)


@settings(max_examples=30)
@given(**SHAPES)
def test_nothing_is_harder_than_what_is_kept(views: int, images: int, dim: int, temperature: float, seed: int) -> None:
    z = projections(views, images, dim, seed)
    kept = select([], pair_nt_xent(z, temperature), Slots.from_counts((views,), (2,)))
    both = slow(z, temperature)
    both = (both + both.mT) / 2
    first, second = kept.index.T
    images_ = torch.arange(images)
    torch.testing.assert_close(kept.loss, both[images_, first, second].float(), rtol=1e-5, atol=2e-5)
    assert (both.amax(dim=(1, 2)) <= kept.loss + 2e-5).all()


def test_computing_in_slices_changes_only_rounding() -> None:
    z = projections(views=4, images=50, dim=16)
    whole = pair_nt_xent(z, 0.1, similarities_at_once=200 * 200)
    for at_once in (1, 200, 7 * 200, 199 * 200):
        torch.testing.assert_close(pair_nt_xent(z, 0.1, similarities_at_once=at_once), whole, rtol=1e-6, atol=2e-6)


def test_only_a_slice_of_the_similarities_exists_at_once() -> None:
    z = projections(views=4, images=64, dim=8)
    with LargestTensor() as largest:
        pair_nt_xent(z, 0.1, similarities_at_once=16 * 256)
    assert largest.numel == 16 * 256


def test_no_graph_is_built_and_the_projections_stay() -> None:
    z = projections().requires_grad_()
    before = z.detach().clone()
    assert not pair_nt_xent(z, 0.1).requires_grad
    assert torch.equal(z, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    z = projections(views=2, dim=40).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, loss = pair_nt_xent(z, 0.1), nt_xent_loss(z, 0.1)
    assert loss.dtype == losses.dtype == torch.float32
    assert torch.equal(losses, pair_nt_xent(z.float(), 0.1))
    assert torch.equal(loss, nt_xent_loss(z.float(), 0.1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_view_spoils_only_the_pairs_with_its_number(value: float) -> None:
    z = projections()
    expected = pair_nt_xent(z, 0.1)
    z[2, 1, 0] = value
    losses = pair_nt_xent(z, 0.1)
    others = torch.ones(4, 4, dtype=torch.bool)
    others[2, :] = others[:, 2] = False
    others[2, 2] = True  # no pair
    assert torch.equal(losses[:, others], expected[:, others])
    assert not losses[:, ~others].isfinite().any()
    assert not (select([], losses, Slots.from_counts((4,), (2,))).index == 2).any()


def test_an_image_alone_costs_nothing() -> None:
    z = projections(images=1)
    torch.testing.assert_close(pair_nt_xent(z, 0.1), torch.zeros(1, 4, 4), rtol=0.0, atol=2e-6)
    assert nt_xent_loss(z[:2], 0.1).item() == pytest.approx(0.0, abs=2e-6)


def test_equal_projections_give_the_loss_of_chance() -> None:
    z = torch.ones(2, 8, 3)
    assert nt_xent_loss(z, 0.1).item() == pytest.approx(math.log(15), rel=1e-6)


def test_inconsistent_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"z is \[3, 6, 5\], expected \[2, B, D\]"):
        nt_xent_loss(projections(views=3), 0.1)
    with pytest.raises(ValueError, match=r"z is \[6, 5\], expected \[N, B, D\]"):
        pair_nt_xent(projections()[0], 0.1)


BATCH = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))  # [N, images of both processes, features]


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 5)


def _share(world: World, report: Report) -> None:
    views = BATCH[:, world.rank * 3 : (world.rank + 1) * 3]
    network = _network()
    with torch.no_grad():
        report(pair_nt_xent(network(views), 0.1, world))
    ddp = data_parallel(network, world, torch.device("cpu"))
    loss = nt_xent_loss(ddp(views[:2]), 0.1, world)
    loss.backward()
    report(world.mean([loss.item()]))
    report([p.grad for p in network.parameters()])


def test_two_processes_score_and_train_like_one_with_the_whole_batch(tmp_path) -> None:
    shares = in_two_processes(_share, tmp_path)
    network = _network()
    expected = pair_nt_xent(network(BATCH), 0.1)
    loss = nt_xent_loss(network(BATCH[:2]), 0.1)
    loss.backward()
    torch.testing.assert_close(torch.cat([share[0] for share in shares]), expected, rtol=1e-6, atol=2e-6)
    for _, (mean,), gradients in shares:
        assert mean == pytest.approx(loss.item(), rel=1e-6)
        for gradient, parameter in zip(gradients, network.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-6)
