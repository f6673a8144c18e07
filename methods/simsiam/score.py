"""The pair-loss matrix of SimSiam: what predicting every candidate view from every other would cost, per image.

# B images, N candidate views, D projection dim
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

EPS = 1e-8
"""Shorter vectors are divided by this instead of their length, as `torch.nn.CosineSimilarity` does."""


@torch.no_grad()
def pair_losses(p: Tensor, z: Tensor) -> Tensor:
    """Negative cosine of every view's prediction to every view's projection, kept per image.

    A pair's loss is the mean of its two entries. The diagonal, a view against itself, is no term of the objective.

    Args:
        p: predictions (online views), [N, B, D], any float dtype; computed in float32.
        z: projections (target views), [N, B, D].

    Returns:
        [B, N, N] float32, unitless, in [-1, 1]; entry [b, t, v] is target t against online v; higher is harder.

    Raises:
        ValueError: p and z differ in shape; the message shows both.

    Source: HVP (arXiv:2310.03940) Eq. 2; SimSiam (arXiv:2011.10566) Eq. 2, before the mean over the batch.
    """
    if p.shape != z.shape:
        raise ValueError(f"pair_losses: p is {list(p.shape)} but z is {list(z.shape)}")
    p, z = (normalize(x.float(), dim=-1, eps=EPS).transpose(0, 1) for x in (p, z))  # [B, N, D]
    with torch.autocast(p.device.type, enabled=False):
        return -(z @ p.mT)
