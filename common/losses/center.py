"""The means that centres of teacher outputs follow."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class GlobalMean:
    """The mean of rows that are counted batch by batch, over all processes.

    It is empty between two optimiser steps, so it is no part of a checkpoint.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Count rows [n, D] in, any float dtype; they are summed in float32."""
        total = rows.sum(dim=0, keepdim=True, dtype=torch.float32)
        self._sum = total if self._sum is None else self._sum + total
        self._count += len(rows)

    @torch.no_grad()
    def take(self) -> Tensor:
        """The mean of all rows counted since the last call, [1, D] float32.

        Raises:
            ValueError: none were counted.
        """
        if self._sum is None:
            raise ValueError("GlobalMean: no rows were counted")
        # Sum and count travel together: processes may hold different numbers of rows.
        total = torch.cat((self._sum, self._sum.new_full((1, 1), self._count)), dim=1)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        self._sum, self._count = None, 0
        return total[:, :-1] / total[:, -1:]
