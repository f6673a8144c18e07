"""Stand-in for `xformers.ops` without a GPU: the functions that DINOv2's networks call, computed block by block.

Sequences of several lengths are concatenated into one, with no attention between them. `BlockDiagonalMask` holds their
boundaries.

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
    """Mask under which each of several concatenated sequences attends only to itself.

    Args:
        lengths: lengths of the sequences, in tokens.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self._batch_sizes: Sequence[int] | None = None  # set by the original: sequences per split

    @classmethod
    def from_seqlens(cls, lengths: Sequence[int]) -> BlockDiagonalMask:
        """Return the mask for sequences of these lengths."""
        return cls(lengths)

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[BlockDiagonalMask, Tensor]:
        """Return the mask for all sequences of several batches [n, L, ...], and their concatenation [1, T, ...]."""
        mask = cls([batch.shape[1] for batch in tensors for _ in range(len(batch))])
        mask._batch_sizes = [len(batch) for batch in tensors]
        return mask, torch.cat([batch.flatten(0, 1) for batch in tensors])[None]

    def split(self, row: Tensor) -> list[Tensor]:
        """Split a row [1, T, ...] into its batches, [n, L, ...] each; into sequences where no batch sizes are known.

        Raises:
            ValueError: the row has another number of tokens, or the sequences of a batch differ in length.
        """
        sizes = self._batch_sizes or [1] * len(self.lengths)
        ends = list(accumulate(sizes))
        groups = [self.lengths[end - size : end] for size, end in zip(sizes, ends, strict=True)]
        if ends[-1:] != [len(self.lengths)] or any(len(set(group)) != 1 for group in groups):
            raise ValueError(f"sequences of {self.lengths} tokens do not form batches of {list(sizes)}")
        if row.shape[:2] != (1, sum(self.lengths)):
            raise ValueError(f"{list(row.shape)} is not a row of {sum(self.lengths)} tokens")
        parts = row[0].split([sum(group) for group in groups])
        return [part.unflatten(0, (len(group), -1)) for part, group in zip(parts, groups, strict=True)]


fmha = SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask)


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: BlockDiagonalMask | None = None
) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v for tensors [n, L, H, d], or [1, T, H, d] under a mask."""
    if attn_bias is None:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [n, H, L, d]
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    blocks = zip(*(attn_bias.split(x) for x in (query, key, value)), strict=True)
    return torch.cat([memory_efficient_attention(*block).flatten(0, 1) for block in blocks])[None]


def unbind(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Return the slices along a dimension."""
    return torch.unbind(x, dim)


def index_select_cat(sources: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """Concatenate chosen rows of several tensors [n, D], flattened."""
    return torch.cat([source[index].flatten() for source, index in zip(sources, indices, strict=True)])


def scaled_index_add(
    input: Tensor, index: Tensor, source: Tensor, scaling: Tensor | None = None, alpha: float = 1.0
) -> Tensor:
    """Add alpha * scaling [D] * source [m, L, D] to the rows of `input` [n, L, D] that `index` [m] names."""
    return input.index_add(0, index, source if scaling is None else source * scaling, alpha=alpha)
