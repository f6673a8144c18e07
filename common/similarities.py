"""Similarities of everybody's views with each other, of which a slice exists at a time.

# n rows, V views, M images of all processes, D embedding dim
"""

import torch
from torch import Tensor

# Similarities in float32 that exist at the same time, at least one row of them: 4 MB on a CPU, near its cache; a GPU
# wants more work for a launch. The passes over them need twice that again.
SIMILARITIES_AT_ONCE_CPU = 2**20
SIMILARITIES_AT_ONCE_CUDA = 2**24


def log_sums(
    rows: Tensor, columns: Tensor, num_views: int, *, left_out: Tensor | None = None, at_once: int | None = None
) -> Tensor:
    """The logarithm of the sum of exp(row . column), for every row and over the columns of each view.

    Args:
        rows: [n, D] float32.
        columns: [D, V M] float32, view after view.
        num_views: V.
        left_out: [n] int64, a column that a row's sums leave out; None leaves out none.
        at_once: bounds the similarities that exist at the same time; SIMILARITIES_AT_ONCE_* when None.

    Returns:
        [n, V] float32.
    """
    if at_once is None:
        at_once = SIMILARITIES_AT_ONCE_CUDA if rows.device.type == "cuda" else SIMILARITIES_AT_ONCE_CPU
    step = max(at_once // columns.shape[1], 1)
    sums = torch.empty(len(rows), num_views, device=rows.device)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        similarity = rows[part] @ columns  # [at most `step`, V M]
        if left_out is not None:
            similarity.scatter_(1, left_out[part, None], -torch.inf)
        sums[part] = similarity.unflatten(1, (num_views, -1)).logsumexp(dim=2)
    return sums
