"""InfoNCE, MoCo v3's objective.

# B images of this process, M images of all processes, D projection dim
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hvp.common.training.collectives import gathered
from hvp.common.training.distributed import World


def contrastive_loss(q: Tensor, k: Tensor, temperature: float, world: World = World()) -> Tensor:
    """Mean InfoNCE of one view's queries against the other view's keys of all processes.

    Args:
        q: queries of one view, [B, D], any float dtype; computed in float32.
        k: keys of the other view, [B, D]; they receive no gradient.
        temperature: greater than 0.
        world: the processes, all with the same number of images.

    Returns:
        Scalar float32, the mean of `info_nce()` over the images. The objective is the sum of both views' losses.

    Raises:
        ValueError: q and k differ in shape; the message shows both.

    Source: MoCo v3 (arXiv:2104.02057) Eq. 1; facebookresearch/moco-v3 moco/builder.py MoCo.contrastive_loss.
    """
    if q.shape != k.shape:
        raise ValueError(f"contrastive_loss: q is {list(q.shape)} but k is {list(k.shape)}")
    return info_nce(q, gathered(k.detach()), temperature, world).mean()


def info_nce(q: Tensor, k: Tensor, temperature: float, world: World = World()) -> Tensor:
    """InfoNCE of every image. With s = cos / temperature:

        2 * temperature * (logsumexp over all images j of s(q_i, k_j) - s(q_i, k_i)).

    The factor keeps the gradient's size when the temperature changes. The loss is 2 * temperature * ln(M) if all keys
    are equal.

    Args:
        q: queries of this process's images, [B, D], any float dtype; computed in float32.
        k: keys of all processes' images, [M, D], process after process.
        temperature, world: as for `contrastive_loss()`.

    Returns:
        [B] float32, 0 or more.
    """
    with torch.autocast(q.device.type, enabled=False):
        similarity = F.normalize(q.float(), dim=-1) @ F.normalize(k.float(), dim=-1).T / temperature  # [B, M]
        own = torch.arange(len(q), device=q.device) + world.rank * len(q)
        return F.cross_entropy(similarity, own, reduction="none") * (2 * temperature)
