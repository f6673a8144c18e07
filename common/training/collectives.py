"""Differentiable collectives between processes. In a single process both return their input.

# W processes
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gathered(x: Tensor) -> Tensor:
    """Concatenate the rows of all processes, in order of rank.

    Every process uses these rows, so their gradient is the sum over all processes' losses. If each loss is the mean
    over the process's own rows, then averaging the parameters' gradients over the processes, as `data_parallel()` does,
    gives the gradient of the mean over all rows.

    Args:
        x: [B, ...], any dtype, B the same in all processes.

    Returns:
        [W B, ...].
    """
    return x if _alone() else _Gather.apply(x)


def summed(x: Tensor) -> Tensor:
    """Sum a tensor over the processes; each process receives the sum.

    Every process's sum depends on this process's `x`, so its gradient is the sum of all processes' gradients.

    Args:
        x: any shape, the same in all processes.
    """
    return x if _alone() else _Sum.apply(x)


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient
