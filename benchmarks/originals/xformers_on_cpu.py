"""Stands in for `xformers.ops` where there is no GPU: what DINOv2's networks call of it, computed block by block.

Sequences of several lengths run as one, with no attention between them: `BlockDiagonalMask` says where each begins.

# T tokens of all sequences together, n sequences of L tokens each, H heads, d width of a head, D width

Source: the documentation of xFormers (facebookresearch.github.io/xformers), xformers.ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor


class BlockDiagonalMask:
    """Each of the sequences that stand in one row attends to itself alone.

    Args:
        lengths: of the sequences, in tokens.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self._batch_sizes: Sequence[int] | None = None  # the original sets it: sequences to split off at a time

    @classmethod
    def from_seqlens(cls, lengths: Sequence[int]) -> BlockDiagonalMask:
        """The mask of sequences of these lengths."""
        return cls(lengths)

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[BlockDiagonalMask, Tensor]:
        """The mask of all sequences of some batches [n, L, ...], and these in one row, [1, T, ...]."""
        mask = cls([batch.shape[1] for batch in tensors for _ in range(len(batch))])
        mask._batch_sizes = [len(batch) for batch in tensors]
        return mask, torch.cat([batch.flatten(0, 1) for batch in tensors])[None]

    def split(self, row: Tensor) -> list[Tensor]:
        """A row [1, T, ...] as batches again, each [n, L, ...]; or each sequence alone where no batch sizes are known.

        Raises:
            ValueError: the row has another number of tokens, or a batch's sequences are not equally long.
        """
        sizes = self._batch_sizes or [1] * len(self.lengths)
        ends = list(accumulate(sizes))
        groups = [self.lengths[end - size : end] for size, end in zip(sizes, ends, strict=True)]
        if ends[-1:] != [len(self.lengths)] or any(len(set(group)) != 1 for group in groups):
            raise ValueError(f"sequences of {self.lengths} tokens are no batches of {list(sizes)}")
        if row.shape[:2] != (1, sum(self.lengths)):
            raise ValueError(f"{list(row.shape)} is no row of {sum(self.lengths)} tokens")
        parts = row[0].split([sum(group) for group in groups])
        return [part.unflatten(0, (len(group), -1)) for part, group in zip(parts, groups, strict=True)]


fmha = SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask)


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: BlockDiagonalMask | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, of tensors [n, L, H, d]; under a mask of a row [1, T, H, d]."""
    if attn_bias is None:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [n, H, L, d]
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    blocks = zip(*(attn_bias.split(x) for x in (query, key, value)), strict=True)
    return torch.cat([memory_efficient_attention(*block).flatten(0, 1) for block in blocks])[None]


def unbind(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """The slices along a dimension."""
    return torch.unbind(x, dim)


def index_select_cat(sources: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """The chosen rows of some tensors [n, D], one after the other, flat."""
    return torch.cat([source[index].flatten() for source, index in zip(sources, indices, strict=True)])


def scaled_index_add(
    input: Tensor, index: Tensor, source: Tensor, scaling: Tensor | None = None, alpha: float = 1.0
) -> Tensor:
    """`input` [n, L, D] with alpha * scaling [D] * source [m, L, D] added to the rows that `index` [m] names."""
    return input.index_add(0, index, source if scaling is None else source * scaling, alpha=alpha)
