"""The pair-loss matrix of MoCo v3: what finding every candidate view from every other one would cost, per image.

# B images of this process, M images of all processes, V candidate views, D projection dim
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hvp.common.engine.collectives import gathered
from hvp.common.engine.distributed import World
from hvp.common.similarities import log_sums
from hvp.methods.mocov3.builder import MoCo


def pair_losses(model: MoCo, views: list[Tensor], temperature: float, world: World = World()) -> Tensor:
    """Forwards all candidates through both encoders. To be called without gradient; moves no weights.

    One view at a time, as the training step does, so that batch norm sees the same kind of batch.

    Args:
        model: in the mode that it is to score in.
        views: one tensor [V, B, 3, H, W], the candidates, normalised.
        temperature, world: as for `pair_info_nce()`.

    Returns:
        [B, V, V], the result of `pair_info_nce()`.
    """
    (candidates,) = views
    q = torch.stack([model.predictor(model.base_encoder(view)) for view in candidates])  # [V, B, D]
    k = torch.stack([model.momentum_encoder(view) for view in candidates])
    return pair_info_nce(q, k, temperature, world)


@torch.no_grad()
def pair_info_nce(
    q: Tensor, k: Tensor, temperature: float, world: World = World(), similarities_at_once: int | None = None
) -> Tensor:
    """InfoNCE of every candidate view's query against every candidate view's key, kept per image.

    With s = cos / temperature, the entry of query (v, i) and key (t, i) is

        2 * temperature * (logsumexp over images j of s(q(v, i), k(t, j)) - s(q(v, i), k(t, i))),

    so the negatives are the keys of candidate t of all other images. One matrix of similarities, [V B, V M], serves all
    pairs. A slice of its rows exists at a time.

    Args:
        q: queries (online views), [V, B, D], any float dtype; computed in float32.
        k: keys (target views), [V, B, D].
        temperature: greater than 0.
        world: the processes, each with as many images.
        similarities_at_once: bounds the slice, as for `log_sums()`.

    Returns:
        [B, V, V] float32, 0 or more; entry [b, t, v] is target t against online v; higher is harder. The mean over the
        images is `contrastive_loss()` of a batch whose images all keep that pair. A key that is not finite is a
        negative of all images: it spoils the entries of its number as target.

    Raises:
        ValueError: q is no [V, B, D], or q and k differ in shape; the message shows both.

    Source: MoCo v3 (arXiv:2104.02057) Eq. 1, before the mean. There is no released code of HVP for MoCo v3.
    """
    if q.dim() != 3 or q.shape != k.shape:
        raise ValueError(f"pair_info_nce: q is {list(q.shape)} and k is {list(k.shape)}, expected both [V, B, D]")
    num_views, num_images, _ = q.shape
    with torch.autocast(q.device.type, enabled=False):
        q, k = F.normalize(q.float(), dim=-1) / temperature, F.normalize(k.float(), dim=-1)
        everyone = gathered(k.transpose(0, 1)).transpose(0, 1)  # [V, M, D]
        sums = log_sums(q.flatten(0, 1), everyone.flatten(0, 1).T, num_views, at_once=similarities_at_once)
        sums = sums.unflatten(0, (num_views, num_images)).permute(1, 2, 0)  # [B, V targets, V online]
        positive = k.transpose(0, 1) @ q.permute(1, 2, 0)  # [B, V targets, V online]
        return (sums - positive) * (2 * temperature)
