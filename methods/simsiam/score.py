"""Pair-loss matrix of SimSiam: the loss of predicting every candidate view from every other, per image.

# B images, N candidate views, D projection dim
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hvp.methods.simsiam.builder import SimSiam

EPS = 1e-8
"""Lower bound of the norm that a vector is divided by, as in `torch.nn.CosineSimilarity`."""


def pair_losses(model: SimSiam, views: list[Tensor]) -> Tensor:
    """Forward all candidates as one batch and score all pairs. Call it without gradient.

    Batch norm therefore sees all candidates together, as in HVP's released code, whereas a training step forwards the
    two kept views one after the other.

    Args:
        model: in the mode to score in; in training mode its running statistics move.
        views: one tensor [N, B, 3, H, W] of normalised candidates.

    Returns:
        [B, N, N] float32, as `negative_cosines()`.

    Source: HVP (arXiv:2310.03940) Eq. 2; automl/hvp select_crops.py.
    """
    (candidates,) = views
    p, z = model.single_forward(candidates.flatten(0, 1))  # each [N B, D]
    return negative_cosines(*(x.unflatten(0, candidates.shape[:2]) for x in (p, z)))


@torch.no_grad()
def negative_cosines(p: Tensor, z: Tensor) -> Tensor:
    """Negative cosine between every view's prediction and every view's projection, per image.

    A pair's loss is the mean of its two entries. The diagonal, a view against itself, is not part of the objective.

    Args:
        p: predictions (online views), [N, B, D], any float dtype; computed in float32.
        z: projections (target views), [N, B, D].

    Returns:
        [B, N, N] float32, unitless, in [-1, 1]; entry [b, t, v] for target t and online view v; higher is harder.

    Raises:
        ValueError: p and z differ in shape; the message shows both.

    Source: SimSiam (arXiv:2011.10566) Eq. 1, before the mean over the batch.
    """
    if p.shape != z.shape:
        raise ValueError(f"negative_cosines: p is {list(p.shape)} but z is {list(z.shape)}")
    p, z = (normalize(x.float(), dim=-1, eps=EPS).transpose(0, 1) for x in (p, z))  # [B, N, D]
    with torch.autocast(p.device.type, enabled=False):
        return -(z @ p.mT)
