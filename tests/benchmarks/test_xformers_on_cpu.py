"""Stand-in for xFormers, against the formulas written out."""

import pytest
import torch
from torch import Tensor

from hvp.benchmarks.originals.xformers_on_cpu import (
    fmha,
    index_select_cat,
    memory_efficient_attention,
    scaled_index_add,
    unbind,
)

LENGTHS = [5, 5, 2, 2, 2, 7]


def random_tensor(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def dense_attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v, masked where not allowed, for [n, L, H, d]."""
    scores = torch.einsum("nqhd,nkhd->nhqk", query, key) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
    return torch.einsum("nhqk,nkhd->nqhd", weights, value)


def test_concatenated_sequences_attend_only_to_themselves():
    """The result and gradients equal one attention over the whole row under a dense mask."""
    row = random_tensor(1, sum(LENGTHS), 3, 2, 4).requires_grad_()
    blocks = torch.block_diag(*(torch.ones(length, length) for length in LENGTHS)).bool()
    query, key, value = unbind(row, 2)
    ours = memory_efficient_attention(query, key, value, attn_bias=fmha.BlockDiagonalMask.from_seqlens(LENGTHS))
    dense = dense_attention(query, key, value, blocks)
    torch.testing.assert_close(ours, dense)
    weights = random_tensor(*dense.shape)
    gradients = [torch.autograd.grad((output * weights).sum(), row)[0] for output in (ours, dense)]
    torch.testing.assert_close(*gradients)


def test_attention_without_a_mask():
    batch = random_tensor(3, 5, 3, 2, 4)
    query, key, value = unbind(batch, 2)
    ours = memory_efficient_attention(query, key, value)
    torch.testing.assert_close(ours, dense_attention(query, key, value, torch.ones(5, 5).bool()))


def test_batches_are_concatenated_and_split_again():
    batches = [random_tensor(2, 5, 3), random_tensor(3, 2, 3), random_tensor(1, 7, 3)]
    mask, row = fmha.BlockDiagonalMask.from_tensor_list(batches)
    assert row.shape == (1, 23, 3)
    assert torch.equal(row[0, 10:12], batches[1][0])
    assert all(map(torch.equal, mask.split(row), batches))


def test_a_row_is_split_by_batch_sizes_or_into_sequences():
    mask = fmha.BlockDiagonalMask.from_seqlens(LENGTHS)
    row = random_tensor(1, 23, 3)
    assert [part.shape[:2] for part in mask.split(row)] == [(1, length) for length in LENGTHS]
    mask._batch_sizes = [2, 3, 1]
    assert [part.shape[:2] for part in mask.split(row)] == [(2, 5), (3, 2), (1, 7)]


@pytest.mark.parametrize(("sizes", "tokens"), [([3, 3], 23), ([2, 3], 23), ([2, 3, 1], 22)])
def test_a_row_that_does_not_fit_is_refused(sizes, tokens):
    mask = fmha.BlockDiagonalMask.from_seqlens(LENGTHS)
    mask._batch_sizes = sizes
    with pytest.raises(ValueError, match=r"do not form batches of|not a row of 23 tokens"):
        mask.split(random_tensor(1, tokens, 3))


def test_chosen_rows_are_concatenated():
    sources = [random_tensor(4, 6), random_tensor(3, 2)]
    found = index_select_cat(sources, [torch.tensor([2, 0]), torch.tensor([1])])
    assert torch.equal(found, torch.cat([sources[0][2], sources[0][0], sources[1][1]]))


@pytest.mark.parametrize("scaled", [True, False])
def test_a_branch_is_added_to_its_rows(scaled):
    tokens, branch = random_tensor(4, 3, 2), random_tensor(2, 3, 2)
    scaling = torch.tensor([0.5, -2.0], dtype=torch.float64)
    found = scaled_index_add(tokens, torch.tensor([3, 1]), branch, scaling if scaled else None, alpha=2.0)
    expected = tokens.clone()
    for place, row in zip((3, 1), branch, strict=True):
        expected[place] += 2 * row * (scaling if scaled else 1)
    torch.testing.assert_close(found, expected)
