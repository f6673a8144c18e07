"""Sums over similarities against their formula, whole and in slices."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvp.common.similarities import log_sums


@settings(max_examples=50)
@given(
    rows=st.integers(1, 6),
    views=st.integers(1, 3),
    images=st.integers(2, 4),
    at_once=st.one_of(st.none(), st.integers(1, 60)),
    leaves_out=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_sums_equal_the_formula(
    rows: int, views: int, images: int, at_once: int | None, leaves_out: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, columns = torch.randn(rows, 3, generator=generator), torch.randn(3, views * images, generator=generator)
    left_out = torch.randint(views * images, (rows,), generator=generator) if leaves_out else None
    sums = log_sums(x, columns, views, left_out=left_out, at_once=at_once)

    similarity = (x.double() @ columns.double()).exp()
    if left_out is not None:
        similarity[torch.arange(rows), left_out] = 0
    expected = torch.stack([view.sum(dim=1) for view in similarity.split(images, dim=1)], dim=1).log()
    torch.testing.assert_close(sums, expected.float(), rtol=1e-5, atol=1e-5)
