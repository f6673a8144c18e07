"""Batch means for the moving centres of teacher outputs."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class GlobalMean:
    """Mean over all processes of rows added batch by batch.

    It is empty between two optimiser steps, so a checkpoint does not contain it.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Add rows [n, D] of any float dtype; they are summed in float32."""
        total = rows.sum(dim=0, keepdim=True, dtype=torch.float32)
        self._sum = total if self._sum is None else self._sum + total
        self._count += len(rows)

    @torch.no_grad()
    def take(self) -> Tensor:
        """Return the mean of all rows added since the last call, [1, D] float32.

        Raises:
            ValueError: no rows were added.
        """
        if self._sum is None:
            raise ValueError("GlobalMean: no rows were counted")
        # Reduce the count with the sum: processes may hold different numbers of rows.
        total = torch.cat((self._sum, self._sum.new_full((1, 1), self._count)), dim=1)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        self._sum, self._count = None, 0
        return total[:, :-1] / total[:, -1:]
