"""The pair-loss matrix of SimCLR: what every pair of candidate views would cost, per image.

# B images of this process, M images of all processes, N candidate views, D embedding dim
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hvp.common.training.collectives import gathered
from hvp.common.training.distributed import World
from hvp.methods.simclr.model import SimCLR
from hvp.methods.simclr.nt_xent_loss import own_columns

# Similarities in float32 that exist at the same time, at least one row of them: 4 MB on a CPU, near its cache; a GPU
# wants more work for a launch. The passes over them need twice that again.
SIMILARITIES_AT_ONCE_CPU = 2**20
SIMILARITIES_AT_ONCE_CUDA = 2**24


def pair_losses(model: SimCLR, views: list[Tensor], temperature: float, world: World = World()) -> Tensor:
    """Forwards all candidates as one batch, as HVP's released code does. To be called without gradient.

    Args:
        model: in the mode that it is to score in.
        views: one tensor [N, B, 3, H, W], the candidates, normalised.
        temperature, world: as for `pair_nt_xent()`.

    Returns:
        [B, N, N], the result of `pair_nt_xent()`.
    """
    (candidates,) = views
    z = model(candidates.flatten(0, 1)).projection.unflatten(0, candidates.shape[:2])  # [N, B, D]
    return pair_nt_xent(z, temperature, world)


@torch.no_grad()
def pair_nt_xent(
    z: Tensor, temperature: float, world: World = World(), similarities_at_once: int | None = None
) -> Tensor:
    """NT-Xent of every candidate view against every other one of its image, the negatives being everybody's views of
    the same two numbers.

    The anchor (n, i), view n of image i, with partner (m, i) has the negatives (n, j) and (m, j) of all other images j.
    With s = cos / temperature and L(n, i, m) = logsumexp over images j of s((n, i), (m, j)), itself left out, its loss
    is

        logaddexp(L(n, i, n), L(n, i, m)) - s((n, i), (m, i)),

    so that one matrix of similarities, [N B, N M], serves all pairs. A slice of its rows exists at a time.

    Args:
        z: projections of the candidates, [N, B, D], any float dtype; computed in float32.
        temperature: greater than 0.
        world: the processes, each with as many images.
        similarities_at_once: bounds the slice; SIMILARITIES_AT_ONCE_* when left out.

    Returns:
        [B, N, N] float32 in nats, entry [b, t, v] of anchor v with partner t; higher is harder. The mean of both orders
        is what the image adds to `nt_xent_loss()` of a batch whose images all keep that pair. The diagonal, which is no
        pair, is 0. A view that is not finite is a negative of all images: it spoils the entries of its number, and no
        others.

    Raises:
        ValueError: z is no [N, B, D]; the message shows its shape.

    Source: SimCLR (arXiv:2002.05709) Eq. 1, before the mean; automl/hvp, branch simclr, losses/nt_xent_loss.py acs_fwd
        (which adds the two orders).
    """
    if z.dim() != 3:
        raise ValueError(f"pair_nt_xent: z is {list(z.shape)}, expected [N, B, D]")
    num_views, num_images, _ = z.shape
    device = z.device
    with torch.autocast(device.type, enabled=False):
        z = F.normalize(z.float(), dim=-1)
        everyone = gathered(z.transpose(0, 1)).transpose(0, 1)  # [N, M, D]
        columns = everyone.flatten(0, 1).T  # [D, N M]
        rows = z.flatten(0, 1) / temperature  # [N B, D]
        itself = own_columns(num_views, num_images, world, device)

        at_once = SIMILARITIES_AT_ONCE_CUDA if device.type == "cuda" else SIMILARITIES_AT_ONCE_CPU
        step = max((similarities_at_once or at_once) // columns.shape[1], 1)
        sums = torch.empty(len(rows), num_views, device=device)  # L: [N B, N]
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            similarity = rows[part] @ columns  # [n, N M]
            similarity.scatter_(1, itself[part, None], -torch.inf)
            sums[part] = similarity.unflatten(1, (num_views, -1)).logsumexp(dim=2)

        with_partner = sums.unflatten(0, (num_views, num_images)).transpose(0, 1)  # [B, N anchors, N partners]
        with_own = with_partner.diagonal(dim1=1, dim2=2)[:, :, None]  # [B, N anchors, 1]
        positive = rows.unflatten(0, (num_views, num_images)).transpose(0, 1) @ z.permute(1, 2, 0)  # [B, N, N]
        losses = torch.logaddexp(with_own, with_partner) - positive
        losses.diagonal(dim1=1, dim2=2).zero_()
        return losses.mT
