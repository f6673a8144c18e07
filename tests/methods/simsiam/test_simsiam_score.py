"""SimSiam's pair-loss matrix against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvp.common.hardviews import Slots, select
from hvp.methods.simsiam.main_simsiam import symmetric_loss
from hvp.methods.simsiam.score import negative_cosines


def outputs(views: int = 4, images: int = 3, dim: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p, z = (torch.randn(views, images, dim, generator=generator) for _ in range(2))
    return p, z


@settings(max_examples=40)
@given(
    views=st.integers(1, 5),
    images=st.integers(1, 4),
    dim=st.integers(1, 9),
    zeros=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_the_formula(views: int, images: int, dim: int, zeros: bool, seed: int) -> None:
    p, z = outputs(views, images, dim, seed)
    if zeros:  # an output without a direction has cosine 0 with everything
        p[0, 0] = 0
        z[-1, -1] = 0
    losses = negative_cosines(p, z)
    assert losses.shape == (images, views, views)
    for b in range(images):
        for t in range(views):
            for v in range(views):
                online, target = p[v, b].tolist(), z[t, b].tolist()
                lengths = math.hypot(*online) * math.hypot(*target)
                cosine = sum(x * y for x, y in zip(online, target, strict=True)) / lengths if lengths else 0.0
                assert losses[b, t, v].item() == pytest.approx(-cosine, abs=1e-5)


@settings(max_examples=30)
@given(views=st.integers(2, 6), seed=st.integers(0, 2**16))
def test_nothing_is_harder_than_the_kept_pair(views: int, seed: int) -> None:
    """Compared with the objective itself, pair by pair and image by image."""
    p, z = outputs(views, seed=seed)
    kept = select([], negative_cosines(p, z), Slots.from_counts((views,), (2,)))
    for b in range(p.shape[1]):
        of_pair = {
            (i, j): symmetric_loss(p[i, b : b + 1], p[j, b : b + 1], z[i, b : b + 1], z[j, b : b + 1]).item()
            for j in range(views)
            for i in range(j)
        }
        i, j = kept.index[b].tolist()
        assert kept.loss[b].item() == pytest.approx(of_pair[i, j], abs=1e-5)
        assert max(of_pair.values()) == pytest.approx(of_pair[i, j], abs=1e-5)


def test_inputs_stay_as_they_are_and_no_graph_is_built() -> None:
    p, z = (x.requires_grad_() for x in outputs())
    before = [x.detach().clone() for x in (p, z)]
    assert not negative_cosines(p, z).requires_grad
    assert all(torch.equal(a.detach(), b) for a, b in zip((p, z), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    p, z = (30000 * x.clamp(-1, 1) for x in outputs(dim=50))  # the norm is too large for float16
    p, z = p.to(dtype), z.to(dtype)
    losses = negative_cosines(p, z)
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()
    assert torch.equal(losses, negative_cosines(p.float(), z.float()))
    loss = symmetric_loss(p[0], p[1], z[0], z[1])
    assert loss.dtype == torch.float32
    assert torch.equal(loss, symmetric_loss(p[0].float(), p[1].float(), z[0].float(), z[1].float()))


def test_autocast_does_not_coarsen_the_losses() -> None:
    p, z = outputs(dim=50)
    expected, loss = negative_cosines(p, z), symmetric_loss(p[0], p[1], z[0], z[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(negative_cosines(p, z), expected)
        assert torch.equal(symmetric_loss(p[0], p[1], z[0], z[1]), loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_output_spoils_its_own_entries_alone(value: float) -> None:
    p, z = outputs()
    expected = negative_cosines(p, z)
    bad = p.clone()
    bad[3, 1, 2] = value
    losses = negative_cosines(bad, z)
    others = torch.ones_like(losses, dtype=torch.bool)
    others[1, :, 3] = False
    assert not losses[~others].isfinite().any()
    assert torch.equal(losses[others], expected[others])


def test_inconsistent_shapes_are_refused() -> None:
    p, z = outputs()
    with pytest.raises(ValueError, match=r"p is \[4, 3, 5\] but z is \[4, 2, 5\]"):
        negative_cosines(p, z[:, :2])
