"""Pair-loss matrix of MoCo v3: the InfoNCE loss of every pair of candidate views, per image.

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
    """Forward all candidates through both encoders and score their pairs. Call it without gradient.

    Views are forwarded one at a time, as in the training step, so batch norm sees the same kind of batch.

    Args:
        model: in the mode to score in.
        views: one tensor [V, B, 3, H, W] of normalised candidates.
        slots, temperature, world: as for `pair_info_nce()`.

    Returns:
        [B, V, V] float32, as `pair_info_nce()`.
    """
    (candidates,) = views
    q = torch.stack([model.predictor(model.base_encoder(view)) for view in candidates])  # [V, B, D]
    k = torch.stack([model.momentum_encoder(view) for view in candidates])
    return pair_info_nce(q, k, slots, temperature, world)


@torch.no_grad()
def pair_info_nce(q: Tensor, k: Tensor, slots: Slots, temperature: float, world: World = World()) -> Tensor:
    """InfoNCE of candidate views' queries against candidate views' keys, per image.

    The negatives of query (v, i) against key (t, i) are the keys of candidate t of all other images. Only one pair's
    similarities, [B, M], exist at a time, and only pairs that a combination uses are computed: half of them, with one
    view of each transform.

    Args:
        q: queries (online views), [V, B, D], any float dtype; computed in float32.
        k: keys (target views), [V, B, D].
        slots: pairs of views that are combinations.
        temperature: greater than 0.
        world: the processes, all with the same number of images.

    Returns:
        [B, V, V] float32, 0 or more; entry [b, t, v] for target t and online view v; higher is harder. The mean over
        the images is `contrastive_loss()` of a batch whose images all keep that pair. Entries that no combination uses
        are 0. A key that is not finite is a negative of all images: it spoils the entries with its view as target.

    Raises:
        ValueError: q is not [V, B, D], or q and k differ in shape; the message shows both.

    Source: MoCo v3 (arXiv:2104.02057) Eq. 1, before the mean. HVP released no code for MoCo v3.
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
