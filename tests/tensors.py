"""Random tensors, and the size of the tensors that a computation makes."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Return normally distributed numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class LargestTensor(TorchDispatchMode):
    """The largest number of elements of any tensor that an operation returned while this was active."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        created = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x._base is None]
        self.numel = max([self.numel, *(x.numel() for x in created)])
        return out
