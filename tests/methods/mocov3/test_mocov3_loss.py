"""InfoNCE against its formula: the objective and its pair-loss matrix, in one and two processes."""

from __future__ import annotations

import math
from itertools import combinations, permutations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hvp.common.hardviews import Slots, combination_losses, select
from hvp.common.training.distributed import World, data_parallel
from hvp.methods.mocov3.contrastive_loss import contrastive_loss
from hvp.methods.mocov3.score import pair_info_nce
from tests.processes import Report, in_two_processes


def queries_and_keys(views: int = 4, images: int = 6, dim: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    q, k = torch.randn(2, views, images, dim, generator=torch.Generator().manual_seed(seed))
    return q, k


def slow(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    """Return [B, V, V] in float64: for query v and key t of image i, the cross-entropy over all images' keys t."""
    q, k = (nn.functional.normalize(x.double(), dim=-1) for x in (q, k))
    num_views, num_images, _ = q.shape
    losses = torch.zeros(num_images, num_views, num_views, dtype=torch.float64)
    for i, t, v in product(range(num_images), range(num_views), range(num_views)):
        terms = [math.exp(q[v, i].dot(k[t, j]).item() / temperature) for j in range(num_images)]
        losses[i, t, v] = 2 * temperature * (math.log(sum(terms)) - q[v, i].dot(k[t, i]).item() / temperature)
    return losses


BY_TRANSFORM, ANY = Slots.from_counts((2, 2), (1, 1)), Slots.from_counts((4,), (2,))
SHAPES = {
    "images": st.integers(1, 6),
    "dim": st.integers(1, 8),
    "temperature": st.floats(0.05, 2.0),
    "seed": st.integers(0, 2**16),
}


@settings(max_examples=50)
@given(**SHAPES)
@pytest.mark.parametrize("slots", [BY_TRANSFORM, ANY], ids=["by_transform", "any"])
def test_pair_losses_equal_the_formula(slots: Slots, images: int, dim: int, temperature: float, seed: int) -> None:
    q, k = queries_and_keys(4, images, dim, seed)
    losses = pair_info_nce(q, k, slots, temperature)
    assert losses.dtype == torch.float32
    expected, read = slow(q, k, temperature).float(), torch.zeros(4, 4, dtype=torch.bool)
    for a, b in slots.all_combinations().tolist():
        read[a, b] = read[b, a] = True
    assert read.sum() == (8 if slots == BY_TRANSFORM else 12)
    # logits reach 20, whose float32 are 2e-6 apart
    torch.testing.assert_close(losses[:, read], expected[:, read], rtol=1e-5, atol=2e-5)
    assert not losses[:, ~read].any()


@settings(max_examples=50)
@given(**SHAPES)
def test_the_mean_entry_of_a_pair_is_its_objective(images: int, dim: int, temperature: float, seed: int) -> None:
    q, k = queries_and_keys(4, images, dim, seed)
    means = pair_info_nce(q, k, ANY, temperature).mean(dim=0)
    for t, v in permutations(range(4), 2):
        torch.testing.assert_close(means[t, v], contrastive_loss(q[v], k[t], temperature), rtol=1e-6, atol=1e-7)


@settings(max_examples=30)
@given(**SHAPES)
@pytest.mark.parametrize("slots", [BY_TRANSFORM, ANY], ids=["by_transform", "any"])
def test_nothing_is_harder_than_what_is_kept(
    slots: Slots, images: int, dim: int, temperature: float, seed: int
) -> None:
    q, k = queries_and_keys(4, images, dim, seed)
    kept = select([], pair_info_nce(q, k, slots, temperature), slots)
    both = slow(q, k, temperature)
    both = (both + both.mT).float() / 2  # one order and the other
    first, second = kept.index.T
    torch.testing.assert_close(kept.loss, both[torch.arange(images), first, second], rtol=1e-5, atol=2e-5)
    pairs = product((0, 1), (2, 3)) if slots == BY_TRANSFORM else combinations(range(4), 2)
    hardest = torch.stack([both[:, a, b] for a, b in pairs]).amax(dim=0)
    assert (hardest <= kept.loss + 2e-5).all()
    if slots == BY_TRANSFORM:
        assert (first < 2).all()
        assert (second >= 2).all()


def test_the_loss_of_a_pair_is_half_its_objective() -> None:
    """A pair's loss is the mean of both orders; the objective is their sum."""
    q, k = queries_and_keys()
    pairs = BY_TRANSFORM.all_combinations()
    costs = combination_losses(pair_info_nce(q, k, BY_TRANSFORM, 0.2), pairs, BY_TRANSFORM).mean(dim=0)
    for cost, (a, b) in zip(costs, pairs.tolist(), strict=True):
        objective = contrastive_loss(q[a], k[b], 0.2) + contrastive_loss(q[b], k[a], 0.2)
        torch.testing.assert_close(2 * cost, objective, rtol=1e-5, atol=2e-5)


def test_keys_have_no_gradient_and_scoring_builds_no_graph() -> None:
    q, k = (x.requires_grad_() for x in queries_and_keys())
    assert not pair_info_nce(q, k, ANY, 0.2).requires_grad
    contrastive_loss(q[0], k[0], 0.2).backward()
    assert q.grad is not None
    assert q.grad.any()
    assert k.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    q, k = (x.to(dtype) for x in queries_and_keys(dim=40))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, loss = pair_info_nce(q, k, ANY, 0.2), contrastive_loss(q[0], k[1], 0.2)
    assert loss.dtype == losses.dtype == torch.float32
    assert torch.equal(losses, pair_info_nce(q.float(), k.float(), ANY, 0.2))
    assert torch.equal(loss, contrastive_loss(q[0].float(), k[1].float(), 0.2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_view_is_never_kept(value: float) -> None:
    q, k = queries_and_keys()
    expected = pair_info_nce(q, k, ANY, 0.2)
    q[2, 1, 0] = k[2, 1, 0] = value
    losses = pair_info_nce(q, k, ANY, 0.2)
    good = torch.ones(6, 4, 4, dtype=torch.bool)
    good[:, 2] = False  # as a key it spoils all images
    good[1, :, 2] = False  # as a query only its own
    bad = ~good & ~torch.eye(4, dtype=torch.bool)
    assert torch.equal(losses[good], expected[good])
    assert not losses[bad].isfinite().any()
    assert not (select([], losses, ANY).index == 2).any()


def test_equal_keys_give_the_loss_of_chance() -> None:
    q, k = torch.randn(8, 3), torch.ones(8, 3)
    assert contrastive_loss(q, k, 0.2).item() == pytest.approx(0.4 * math.log(8), rel=1e-6)


def test_inconsistent_shapes_are_refused() -> None:
    q, k = queries_and_keys()
    with pytest.raises(ValueError, match=r"q is \[6, 5\] but k is \[5, 5\]"):
        contrastive_loss(q[0], k[0, 1:], 0.2)
    with pytest.raises(ValueError, match=r"q is \[6, 5\] and k is \[6, 5\], expected both \[V, B, D\]"):
        pair_info_nce(q[0], k[0], ANY, 0.2)
    with pytest.raises(ValueError, match=r"q is \[4, 6, 5\] and k is \[3, 6, 5\]"):
        pair_info_nce(q, k[1:], ANY, 0.2)


BATCH = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))  # [V, images of both processes, features]


def _networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Linear(3, 5), nn.Linear(3, 5).requires_grad_(False)


def _share(world: World, report: Report) -> None:
    views = BATCH[:, world.rank * 3 : (world.rank + 1) * 3]
    base, momentum = _networks()
    with torch.no_grad():
        report(pair_info_nce(base(views), momentum(views), ANY, 0.2, world))
    ddp = data_parallel(base, world, torch.device("cpu"))
    loss = contrastive_loss(ddp(views[0]), momentum(views[1]), 0.2, world)
    loss.backward()
    report(world.mean([loss.item()]))
    report([p.grad for p in base.parameters()])


def test_two_processes_score_and_train_like_one_with_the_whole_batch(tmp_path) -> None:
    shares = in_two_processes(_share, tmp_path)
    base, momentum = _networks()
    expected = pair_info_nce(base(BATCH), momentum(BATCH), ANY, 0.2)
    loss = contrastive_loss(base(BATCH[0]), momentum(BATCH[1]), 0.2)
    loss.backward()
    torch.testing.assert_close(torch.cat([share[0] for share in shares]), expected, rtol=1e-6, atol=2e-6)
    for _, (mean,), gradients in shares:
        assert mean == pytest.approx(loss.item(), rel=1e-6)
        for gradient, parameter in zip(gradients, base.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-6)
