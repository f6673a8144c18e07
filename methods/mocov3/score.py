"""The pair-loss matrix of MoCo v3: what finding candidate views from one another would cost, per image.

# B images of this process, M images of all processes, V candidate views, D projection dim
"""

import torch
from torch import Tensor

from hvp.common.hardviews import Slots
from hvp.common.training.collectives import gathered
from hvp.common.training.distributed import World
from hvp.methods.mocov3.builder import MoCo
from hvp.methods.mocov3.contrastive_loss import info_nce


def pair_losses(model: MoCo, views: list[Tensor], slots: Slots, temperature: float, world: World = World()) -> Tensor:
    """Forwards all candidates through both encoders. To be called without gradient; moves no weights.

    One view at a time, as the training step does, so that batch norm sees the same kind of batch.

    Args:
        model: in the mode that it is to score in.
        views: one tensor [V, B, 3, H, W], the candidates, normalised.
        slots, temperature, world: as for `pair_info_nce()`.

    Returns:
        [B, V, V], the result of `pair_info_nce()`.
    """
    (candidates,) = views
    q = torch.stack([model.predictor(model.base_encoder(view)) for view in candidates])  # [V, B, D]
    k = torch.stack([model.momentum_encoder(view) for view in candidates])
    return pair_info_nce(q, k, slots, temperature, world)


@torch.no_grad()
def pair_info_nce(q: Tensor, k: Tensor, slots: Slots, temperature: float, world: World = World()) -> Tensor:
    """InfoNCE of candidate views' queries against candidate views' keys, kept per image.

    The negatives of query (v, i) against key (t, i) are the keys of candidate t of all other images. The similarities
    of one pair, [B, M], exist at a time, and only those that a combination reads are made: with a view of each
    transform, half of all.

    Args:
        q: queries (online views), [V, B, D], any float dtype; computed in float32.
        k: keys (target views), [V, B, D].
        slots: which pairs of views are combinations.
        temperature: greater than 0.
        world: the processes, each with as many images.

    Returns:
        [B, V, V] float32, 0 or more; entry [b, t, v] is target t against online v; higher is harder. The mean over the
        images is `contrastive_loss()` of a batch whose images all keep that pair. Entries of no combination are 0. A
        key that is not finite is a negative of all images: it spoils the entries of its number as target.

    Raises:
        ValueError: q is no [V, B, D], or q and k differ in shape; the message shows both.

    Source: MoCo v3 (arXiv:2104.02057) Eq. 1, before the mean. There is no released code of HVP for MoCo v3.
    """
    if q.dim() != 3 or q.shape != k.shape:
        raise ValueError(f"pair_info_nce: q is {list(q.shape)} and k is {list(k.shape)}, expected both [V, B, D]")
    num_views, num_images, _ = q.shape
    everyone = gathered(k.transpose(0, 1)).transpose(0, 1)  # [V, M, D]
    losses = torch.zeros(num_images, num_views, num_views, device=q.device)
    for a, b in slots.all_combinations().tolist():
        for target, online in ((a, b), (b, a)):
            losses[:, target, online] = info_nce(q[online], everyone[target], temperature, world)
    return losses
