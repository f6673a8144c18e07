"""InfoNCE, MoCo v3's objective.

# B images of this process, M images of all processes, D projection dim
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hvp.common.training.collectives import gathered
from hvp.common.training.distributed import World


def contrastive_loss(q: Tensor, k: Tensor, temperature: float, world: World = World()) -> Tensor:
    """How badly the queries of one view find their own images' keys of the other among those of all images.

    Args:
        q: queries of one view, [B, D], any float dtype; computed in float32.
        k: keys of the other view, [B, D]; no gradient flows to them.
        temperature: greater than 0.
        world: the processes, each with as many images.

    Returns:
        Scalar, the mean of `info_nce()` over the images. The objective is the sum of both views' losses.

    Raises:
        ValueError: q and k differ in shape; the message shows both.

    Source: MoCo v3 (arXiv:2104.02057) Eq. 1; facebookresearch/moco-v3 moco/builder.py MoCo.contrastive_loss.
    """
    if q.shape != k.shape:
        raise ValueError(f"contrastive_loss: q is {list(q.shape)} but k is {list(k.shape)}")
    return info_nce(q, gathered(k.detach()), temperature, world).mean()


def info_nce(q: Tensor, k: Tensor, temperature: float, world: World = World()) -> Tensor:
    """InfoNCE of every image: with s = cos / temperature,

        2 * temperature * (logsumexp over all images j of s(q_i, k_j) - s(q_i, k_i)).

    The factor keeps the gradient's size when the temperature changes. Keys that are all alike cost
    2 * temperature * ln(M).

    Args:
        q: queries of this process's images, [B, D], any float dtype; computed in float32.
        k: keys of everybody's, [M, D], process after process.
        temperature, world: as for `contrastive_loss()`.

    Returns:
        [B] float32, 0 or more.
    """
    with torch.autocast(q.device.type, enabled=False):
        similarity = F.normalize(q.float(), dim=-1) @ F.normalize(k.float(), dim=-1).T / temperature  # [B, M]
        own = torch.arange(len(q), device=q.device) + world.rank * len(q)
        return F.cross_entropy(similarity, own, reduction="none") * (2 * temperature)
