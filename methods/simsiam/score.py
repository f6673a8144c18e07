"""The pair-loss matrix of SimSiam: what predicting every candidate view from every other would cost, per image.

# B images, N candidate views, D projection dim
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hvp.methods.simsiam.builder import SimSiam

EPS = 1e-8
"""Vectors shorter than this are divided by it instead of their length, as `torch.nn.CosineSimilarity` does."""


def pair_losses(model: SimSiam, views: list[Tensor]) -> Tensor:
    """Forwards all candidates in one batch. To be called without gradient.

    So batch norm sees all views of a batch together, as in HVP's released code, where a training step shows it the two
    kept views one after the other.

    Args:
        model: in the mode it is to score in; in training mode its running statistics move.
        views: one tensor [N, B, 3, H, W] of candidates, normalised.

    Returns:
        [B, N, N] as `negative_cosines()`.

    Source: HVP (arXiv:2310.03940) Eq. 2; automl/hvp select_crops.py.
    """
    (candidates,) = views
    p, z = model.single_forward(candidates.flatten(0, 1))  # each [N B, D]
    return negative_cosines(*(x.unflatten(0, candidates.shape[:2]) for x in (p, z)))


@torch.no_grad()
def negative_cosines(p: Tensor, z: Tensor) -> Tensor:
    """Negative cosine of every view's prediction to every view's projection, kept per image.

    A pair's loss is the mean of its two entries. The diagonal, a view against itself, is no term of the objective.

    Args:
        p: predictions (online views), [N, B, D], any float dtype; computed in float32.
        z: projections (target views), [N, B, D].

    Returns:
        [B, N, N] float32, unitless, in [-1, 1]; entry [b, t, v] is target t against online v; higher is harder.

    Raises:
        ValueError: p and z differ in shape; the message shows both.

    Source: SimSiam (arXiv:2011.10566) Eq. 1, before the mean over the batch.
    """
    if p.shape != z.shape:
        raise ValueError(f"negative_cosines: p is {list(p.shape)} but z is {list(z.shape)}")
    p, z = (normalize(x.float(), dim=-1, eps=EPS).transpose(0, 1) for x in (p, z))  # [B, N, D]
    with torch.autocast(p.device.type, enabled=False):
        return -(z @ p.mT)
