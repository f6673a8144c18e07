"""Exchanges between processes that gradients flow through.

Every process r has a loss L_r, and the run's is their mean, L = (1/W) sum_r L_r. A tensor x_s of process s that is
exchanged enters the losses of all, so that

    dL/dx_s = (1/W) sum_r dL_r/dx_s

Backward, the functions here give process s the sum. The 1/W is that of DistributedDataParallel, which averages the
gradients of the parameters over the processes:

    dL/dw = (1/W) sum_s (sum_r dL_r/dx_s) dx_s/dw

Collective: all processes call them, forward and backward, in the same order. Alone, they are the identity.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def gathered(x: Tensor) -> Tensor:
    """The rows of all processes.

    Args:
        x: [B, ...] floats, the same shape in every process.

    Returns:
        [W * B, ...] in the order of ranks; for W = 1, x itself.
    """
    if _processes() == 1:
        return x
    rows: Tensor = _Gathered.apply(x)
    return rows


def summed(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes.

    Args:
        x: floats of any shape, the same in every process.

    Returns:
        Like x; for W = 1, x itself.
    """
    if _processes() == 1:
        return x
    total: Tensor = _Summed.apply(x)
    return total


def _processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _all_reduced(x: Tensor) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        parts = list(rows.chunk(dist.get_world_size()))
        dist.all_gather(parts, x.contiguous())
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _all_reduced(gradient).chunk(dist.get_world_size())[dist.get_rank()]


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _all_reduced(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _all_reduced(gradient)
